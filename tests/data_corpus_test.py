"""Tokens of a split in one array, in memory or in a cache that notices damage."""

import json
import os
import stat

import numpy as np
import pytest

from experiments.data import DataConfig, fingerprint, load_corpus
from experiments.errors import DataError

SYNTHETIC = DataConfig(source='synthetic', synthetic_bytes=1 << 15, seq_len=32)


@pytest.fixture
def files(tmp_path):
  for name, text in (('train', 'one two'), ('valid', 'three')):
    (tmp_path / f'{name}.txt').write_text(text)
  return DataConfig(
    source='files',
    paths=(str(tmp_path / 'train.txt'),),
    valid_paths=(str(tmp_path / 'valid.txt'),),
    seq_len=4,
  )


def assert_same(one, other):
  assert one.stats == other.stats and one.provenance() == other.provenance()
  for split in ('train', 'valid'):
    assert one.tokens[split].dtype == other.tokens[split].dtype
    np.testing.assert_array_equal(one.tokens[split], other.tokens[split])


def test_documents_end_with_the_end_token(files):
  corpus = load_corpus(files)
  assert bytes(corpus.tokens['train'].tolist()) == b'one two\0'
  assert bytes(corpus.tokens['valid'].tolist()) == b'three\0'
  assert corpus.tokens['train'].dtype == np.uint16
  with pytest.raises(ValueError, match='read-only'):
    corpus.tokens['train'][0] = 1


def test_provenance_counts_and_digests():
  corpus = load_corpus(SYNTHETIC)
  found = json.loads(json.dumps(corpus.provenance()))
  train, valid = found['train'], found['valid']
  assert train['bytes'] + valid['bytes'] == 1 << 15
  assert train['tokens'] == train['bytes'] + train['documents']
  assert train['text_sha256'] != valid['text_sha256']
  assert found['python'].startswith('CPython')


def test_provenance_does_not_depend_on_where_files_lie(tmp_path):
  stats = []
  for name in ('here', 'there'):
    (tmp_path / name).mkdir()
    for i in range(30):
      (tmp_path / name / f'{i}.txt').write_text(f'text {i}')
    paths = (str(tmp_path / name),)
    config = DataConfig(source='files', paths=paths, seq_len=4, valid_fraction=0.4)
    stats.append(load_corpus(config).stats)
  assert stats[0] == stats[1]


def test_cache_equals_memory_and_is_read_again(tmp_path, monkeypatch):
  cache = tmp_path / 'cache'
  built = load_corpus(SYNTHETIC, str(cache))
  assert_same(built, load_corpus(SYNTHETIC))
  assert isinstance(built.tokens['train'], np.memmap)
  assert stat.S_IMODE(cache.stat().st_mode) == 0o700
  (directory,) = cache.iterdir()
  assert sorted(p.name for p in directory.iterdir()) == [
    'stats.json', 'train.npy', 'valid.npy'
  ]  # fmt: skip
  monkeypatch.setattr('experiments.data.sources.documents', None)
  assert_same(built, load_corpus(SYNTHETIC, str(cache)))


def test_cache_knows_changed_files(files, tmp_path):
  cache = str(tmp_path / 'cache')
  old = load_corpus(files, cache)
  with open(files.paths[0], 'a', encoding='utf-8') as file:
    file.write('!')
  new = load_corpus(files, cache)
  assert len(new.tokens['train']) == len(old.tokens['train']) + 1
  assert len(os.listdir(cache)) == 2


def test_failed_build_leaves_nothing(tmp_path, monkeypatch):
  def broken(config):
    raise DataError('broken')
    yield

  monkeypatch.setattr('experiments.data.sources.documents', broken)
  with pytest.raises(DataError, match='broken'):
    load_corpus(SYNTHETIC, str(tmp_path / 'cache'))
  assert os.listdir(tmp_path / 'cache') == []


def test_second_builder_takes_the_first_ones_files(tmp_path, monkeypatch):
  cache = str(tmp_path / 'cache')
  first = load_corpus(SYNTHETIC, cache)
  # As if the directory had appeared after the second one looked.
  monkeypatch.setattr('os.path.isdir', lambda path, real=os.path.isdir: (
    monkeypatch.setattr('os.path.isdir', real) or False
  ))  # fmt: skip
  assert_same(first, load_corpus(SYNTHETIC, cache))
  assert len(os.listdir(cache)) == 1


@pytest.mark.parametrize('name', ['train.npy', 'valid.npy', 'stats.json'])
@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'delete'])
def test_damaged_cache_is_noticed(name, damage, tmp_path):
  load_corpus(SYNTHETIC, str(tmp_path))
  (path,) = tmp_path.glob(f'*/{name}')
  data = bytearray(path.read_bytes())
  place = data.index(b'sha256": "') + 12 if name == 'stats.json' else len(data) // 2
  data[place] ^= 1
  cut = {'flip': data, 'cut': data[: len(data) // 2], 'empty': b''}
  path.unlink() if damage == 'delete' else path.write_bytes(cut[damage])
  with pytest.raises(DataError, match='damaged: delete that directory'):
    load_corpus(SYNTHETIC, str(tmp_path))


def test_cache_never_unpickles(tmp_path):
  marker = tmp_path / 'marker'

  class Evil:
    def __reduce__(self):
      return open, (str(marker), 'w')

  load_corpus(SYNTHETIC, str(tmp_path / 'cache'))
  (path,) = (tmp_path / 'cache').glob('*/train.npy')
  np.save(path, np.array([Evil()], object), allow_pickle=True)
  with pytest.raises(DataError):
    load_corpus(SYNTHETIC, str(tmp_path / 'cache'))
  assert not marker.exists()


def test_splits_that_are_too_short(files):
  long = DataConfig(**{**vars(files), 'seq_len': 8})
  with pytest.raises(ValueError, match=r'8 training tokens in 1 documents .* = 9'):
    load_corpus(long)
  one_document = DataConfig(source='synthetic', synthetic_bytes=500)
  with pytest.raises(ValueError, match='validation split is empty'):
    load_corpus(one_document)


def test_short_split_is_noticed_in_a_cache_too(files, tmp_path):
  cache = str(tmp_path / 'cache')
  load_corpus(files, cache)
  with pytest.raises(ValueError, match='less than one window'):
    load_corpus(DataConfig(**{**vars(files), 'seq_len': 8}), cache)


@pytest.mark.parametrize(
  'change',
  [{'seq_len': 33}, {'batch_size': 8}, {'synthetic_seed': 1}, {'valid_fraction': 0.2}],
)
def test_fingerprint_tells_streams_apart(change):
  print_of = lambda config, seed=0: fingerprint(load_corpus(config), seed)
  base = print_of(SYNTHETIC)
  assert json.loads(json.dumps(base)) == base == print_of(SYNTHETIC)
  assert base != print_of(SYNTHETIC, 1)
  assert base != print_of(DataConfig(**{**vars(SYNTHETIC), **change}))
