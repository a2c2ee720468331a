"""Documents from every source, and what happens to bad files."""

import collections
import hashlib
import json
import random
import sys

import pytest

from experiments.data import DataConfig
from experiments.data.files import find_files
from experiments.data.formats import read
from experiments.data.sources import documents, split_of
from experiments.data.synthetic import texts
from experiments.errors import DataError

TEXTS = [f'text {i}: naïve 日本' for i in range(40)]


def write(path, texts):
  """The texts as a file of the format that the path's ending names."""
  if path.suffix == '.jsonl':
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  elif path.suffix == '.parquet':
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({'n': range(len(texts)), 'text': texts})
    pq.write_table(table, path, row_group_size=7)
  else:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:4')
    for text in texts:
      writer.write(json.dumps({'text': text}).encode())
    writer.close()
  return path


def decoded(config, split=None):
  return [d.text.decode() for d in documents(config) if split in (None, d.split)]


@pytest.mark.parametrize('ending', ['jsonl', 'parquet', 'arrayrecord'])
def test_records_of_every_format(ending, tmp_path):
  path = write(tmp_path / f'data.{ending}', TEXTS)
  config = DataConfig(source='files', paths=(str(path),), valid_fraction=0.3)
  assert decoded(config) == TEXTS
  found = collections.Counter(d.split for d in documents(config))
  assert found['valid'] == sum(
    split_of(f'data.{ending}#{i}', 0.3) == 'valid' for i in range(40)
  )
  assert 0 < found['valid'] < 40


def test_more_records_than_are_read_at_once(tmp_path):
  many = [str(i) for i in range(700)]
  for ending in ('parquet', 'arrayrecord'):
    path = write(tmp_path / f'data.{ending}', many)
    assert [t.decode() for t in read(str(path), ending, 'text')] == many


def test_array_records_that_are_texts(tmp_path):
  path = write(tmp_path / 'data.arrayrecord', ['x'])
  assert list(read(str(path), 'arrayrecord', '')) == [b'{"text": "x"}']


def test_one_text_is_cut_and_several_are_split_by_file(tmp_path):
  (tmp_path / 'a.txt').write_text('é' * 1000)
  one = DataConfig(source='files', paths=(str(tmp_path),), valid_fraction=0.1001)
  train, valid = documents(one)
  assert (train.split, valid.split) == ('train', 'valid')
  assert (len(train.text), len(valid.text)) == (1798, 202)  # on a character
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'b.txt').write_text('b')
  assert [d.name for d in documents(one)] == ['a.txt', 'sub/b.txt']


def test_validation_by_path(tmp_path):
  for name in ('train', 'valid'):
    write(tmp_path / f'{name}.jsonl', [name, name])
  paths = tuple(str(tmp_path / f'{n}.jsonl') for n in ('train', 'valid'))
  config = DataConfig(source='files', paths=paths[:1], valid_paths=paths[1:])
  assert decoded(config, 'train') == ['train'] * 2
  assert decoded(config, 'valid') == ['valid'] * 2
  with pytest.raises(ValueError, match=r'in paths and in valid_paths: .*valid\.jsonl'):
    list(documents(DataConfig(source='files', paths=paths, valid_paths=paths[1:])))


def test_find_files(tmp_path):
  for name in ('b.txt', 'a.jsonl', '.hidden', 'sub/c.txt', '.git/d.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('x')
  (tmp_path / 'empty.txt').touch()
  names = lambda path, format='auto': [n for n, _ in find_files((path,), format)]
  assert names(str(tmp_path)) == ['a.jsonl', 'b.txt', 'sub/c.txt']
  assert names(str(tmp_path), 'jsonl') == ['a.jsonl']
  assert names(str(tmp_path / '**' / '*.txt')) == ['b.txt', 'c.txt']
  twice = (str(tmp_path / 'b.txt'), str(tmp_path))
  assert len(find_files(twice, 'auto')) == 3


def test_paths_that_hold_nothing(tmp_path):
  for path, format in (('x.txt', 'auto'), ('*.txt', 'auto'), ('', 'parquet')):
    with pytest.raises(FileNotFoundError, match='holds no'):
      find_files((str(tmp_path / path),), format)
  (tmp_path / 'empty.txt').touch()
  with pytest.raises(ValueError, match=r'empty\.txt is empty'):
    find_files((str(tmp_path / 'empty.txt'),), 'auto')


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.txt', b'abc\xff', r'a\.txt is not UTF-8 at byte 3'),
    ('a.jsonl', b'{"text": "x"}\n{"text": "\xff"}', r'not UTF-8 at byte 24'),
    ('a.jsonl', b'{"text": "x"}\n\nnope\n', r'a\.jsonl, line 3 is not JSON'),
    ('a.jsonl', b'{"text": "x"', r'line 1 is not JSON'),
    ('a.jsonl', b'[' * 100_000, r'line 1 is not JSON'),
    (
      'a.jsonl',
      b'{"body": "x", "id": 1}',
      r"line 1: no key 'text'; .*\['body', 'id'\]",
    ),
    ('a.jsonl', b'["x"]', r"line 1: expected an object with the key 'text', got list"),
    ('a.jsonl', b'{"text": null}', r"line 1: 'text' is NoneType, not str"),
    ('a.jsonl', rb'{"text": "\ud800"}', r"line 1: 'text' is not valid Unicode"),
    ('a.parquet', b'PAR1', r'a\.parquet is not a whole Parquet file'),
    ('a.arrayrecord', b'x' * 100, r'a\.arrayrecord is not a whole ArrayRecord file'),
  ],
)
def test_bad_files(name, content, message, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(documents(DataConfig(source='files', paths=(str(tmp_path / name),))))


def test_parquet_columns(tmp_path):
  path = str(write(tmp_path / 'a.parquet', ['x', None]))
  with pytest.raises(ValueError, match=r"no column 'body'; there are \['n', 'text'\]"):
    list(read(path, 'parquet', 'body'))
  with pytest.raises(ValueError, match=r"column 'n' is int64, not string"):
    list(read(path, 'parquet', 'n'))
  with pytest.raises(ValueError, match=r"a\.parquet, row 1: 'text' is NoneType"):
    list(read(path, 'parquet', 'text'))


@pytest.mark.parametrize('ending', ['jsonl', 'parquet', 'arrayrecord'])
def test_damaged_files_are_read_or_refused(ending, tmp_path):
  path = write(tmp_path / f'data.{ending}', TEXTS)
  whole, draw = path.read_bytes(), random.Random(0)
  for trial in range(60):
    data = bytearray(whole)
    if trial % 2:
      data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
      del data[draw.randrange(len(data)) :]
    path.write_bytes(data)
    try:
      for text in read(str(path), ending, 'text'):
        text.decode('utf-8')
    except ValueError as error:
      assert str(path) in str(error)


def test_standard_library():
  config = DataConfig()
  found = list(documents(config))
  names = [d.name for d in found]
  assert names == [d.name for d in documents(config)]
  assert 'argparse.py' in names and 'json/decoder.py' in names
  assert not [n for n in names if 'site-packages' in n or '/test' in n]
  valid = sum(d.split == 'valid' for d in found)
  # A hash of each name: 5 % of the files, four standard deviations to each side.
  deviation = (len(found) * 0.05 * 0.95) ** 0.5
  assert abs(valid - 0.05 * len(found)) < 4 * deviation


def test_standard_library_without_sources(tmp_path, monkeypatch):
  for path in (tmp_path, tmp_path / 'python311.zip'):
    monkeypatch.setattr('sysconfig.get_paths', lambda path=path: {'stdlib': str(path)})
    with pytest.raises(FileNotFoundError, match="Pass source='files'"):
      list(documents(DataConfig()))


def test_synthetic_text_is_the_same_everywhere():
  text = b''.join(texts(1 << 16, seed=0))
  assert len(text) == 1 << 16
  # Recorded: another digest means that results no longer compare between machines.
  assert hashlib.sha256(text).hexdigest()[:16] == 'cafdf4d692085983'
  assert text != b''.join(texts(1 << 16, seed=1))


@pytest.fixture
def offline(monkeypatch):
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)


@pytest.mark.parametrize('builder', ['json', 'parquet'])
def test_hub_streams_through_datasets(builder, tmp_path, offline):
  ending = 'jsonl' if builder == 'json' else builder
  train = str(write(tmp_path / f'train.{ending}', TEXTS))
  valid = str(write(tmp_path / f'valid.{ending}', ['v'] * 9))
  config = DataConfig(
    source='hub',
    hub_name=builder,
    paths=(train,),
    valid_paths=(valid,),
    hub_valid_split='validation',
    hub_documents=25,
    hub_valid_documents=5,
  )
  assert decoded(config, 'train') == TEXTS[:25]
  assert decoded(config, 'valid') == ['v'] * 5


def test_hub_split_by_hash_and_errors(tmp_path, offline):
  path = write(tmp_path / 'train.jsonl', TEXTS)
  fields = {'source': 'hub', 'hub_name': 'json', 'paths': (str(path),)}
  found = list(documents(DataConfig(**fields, valid_fraction=0.3)))
  assert [d.text.decode() for d in found] == TEXTS
  assert {d.split for d in found} == {'train', 'valid'}
  with pytest.raises(ValueError, match=r"json, train#0: no key 'body'.*\['text'\]"):
    list(documents(DataConfig(**fields, text_key='body')))
  path.write_text('{"text": "x"}\n{"text": nope}\n')
  with pytest.raises(DataError, match='json: record 0 cannot be read') as caught:
    list(documents(DataConfig(**fields)))
  assert caught.value.__cause__ is not None


def test_hub_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ImportError, match="source='hub' needs the package `datasets`"):
    list(documents(DataConfig(source='hub', hub_name='allenai/c4')))
