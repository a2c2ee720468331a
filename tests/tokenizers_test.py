"""Tokens of text and back; broken and foreign tokenizer files."""

import json
import random

import numpy as np
import pytest

from experiments.data import (
  DataConfig,
  check_vocab_size,
  load_corpus,
  load_tokenizer,
)

TEXT = 'def naïve(x):\n  return "日本 🎉" * x\n'


@pytest.fixture(scope='module')
def tokenizer_json(tmp_path_factory):
  """A small byte-level BPE with truncation, padding and special tokens switched on."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers

  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  inner.train_from_iterator(
    ['def f(x): return x + 1'] * 20,
    trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<pad>', '</s>'],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  inner.post_processor = processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  inner.enable_truncation(4)
  inner.enable_padding(length=8)
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  inner.save(str(path))
  return str(path)


@pytest.fixture(params=['bytes', 'json'])
def tokenizer(request, tokenizer_json):
  return load_tokenizer('bytes' if request.param == 'bytes' else tokenizer_json)


def test_round_trip(tokenizer):
  tokens = tokenizer.encode(TEXT)
  assert tokens.dtype == np.uint32 and tokens.max() < tokenizer.vocab_size
  assert tokenizer.decode(tokens) == TEXT


def test_str_bytes_and_batches_agree(tokenizer):
  data = TEXT.encode()
  (first, second) = tokenizer.encode_batch([data, b'x'])
  np.testing.assert_array_equal(tokenizer.encode(data), tokenizer.encode(TEXT))
  np.testing.assert_array_equal(first, tokenizer.encode(TEXT))
  np.testing.assert_array_equal(second, tokenizer.encode('x'))


def test_bytes_are_the_tokens():
  tokenizer = load_tokenizer('bytes')
  assert (tokenizer.vocab_size, tokenizer.end) == (256, 0)
  assert tokenizer.encode(TEXT).tolist() == list(TEXT.encode())
  assert tokenizer.decode([0xC3]) == '\ufffd'


def test_json_encodes_documents_whole_and_adds_nothing(tokenizer_json):
  tokenizer = load_tokenizer(tokenizer_json)
  assert tokenizer.end == 1
  assert len(tokenizer.encode('def ' * 50)) > 8  # neither truncated nor padded
  # A text that spells the end token does not end the document.
  assert 1 not in tokenizer.encode('a</s>b')
  assert tokenizer.decode(tokenizer.encode('a</s>b')) == 'a</s>b'


def test_fingerprint_tells_files_and_end_tokens_apart(tokenizer_json, tmp_path):
  named = load_tokenizer(tokenizer_json, '<pad>')
  other = tmp_path / 'tokenizer.json'
  with open(tokenizer_json, encoding='utf-8') as file:
    other.write_text(file.read() + ' ', encoding='utf-8')
  assert named.end == 0
  prints = {
    load_tokenizer('bytes').fingerprint,
    load_tokenizer(tokenizer_json).fingerprint,
    load_tokenizer(str(other)).fingerprint,
    named.fingerprint,
  }
  assert len(prints) == 4


def with_token(path, number, tmp_path):
  """The tokenizer with one more token of the given number."""
  with open(path, encoding='utf-8') as file:
    content = json.load(file)
  added = {**content['added_tokens'][0], 'id': number, 'content': '<far>'}
  content['added_tokens'].append(added)
  content['model']['vocab']['<far>'] = number
  (tmp_path / 'far.json').write_text(json.dumps(content))
  return str(tmp_path / 'far.json')


def test_vocab_size_is_one_more_than_the_largest_token(tokenizer_json, tmp_path):
  path = with_token(tokenizer_json, 500, tmp_path)
  assert load_tokenizer(path).vocab_size == 501


def test_corpus_of_json_tokens(tokenizer_json, tmp_path):
  (tmp_path / 'text').mkdir()
  for i in range(8):
    (tmp_path / 'text' / f'{i}.txt').write_text(f'{i} ' + TEXT)
  config = DataConfig(
    source='files',
    paths=(str(tmp_path / 'text'),),
    tokenizer=tokenizer_json,
    valid_fraction=0.5,
  )
  corpus = load_corpus(config)
  for split in ('train', 'valid'):
    tokens = corpus.tokens[split]
    assert tokens.dtype == np.uint16
    texts = corpus.tokenizer.decode(tokens).split('</s>')
    assert len(texts) == corpus.stats[split].documents + 1 and texts[-1] == ''
    assert all(text.endswith(TEXT) for text in texts[:-1])
  far = with_token(tokenizer_json, 1 << 17, tmp_path)
  wide = load_corpus(DataConfig(**{**vars(config), 'tokenizer': far}))
  assert wide.tokens['train'].dtype == np.uint32
  np.testing.assert_array_equal(wide.tokens['train'], corpus.tokens['train'])


def test_vocabulary_mismatch():
  tokenizer = load_tokenizer('bytes')
  check_vocab_size(tokenizer, 256)
  check_vocab_size(tokenizer, 320)  # padded embeddings are common
  with pytest.raises(ValueError, match=r'vocab_size=256.*vocab_size=255'):
    check_vocab_size(tokenizer, 255)


@pytest.mark.parametrize('content', ['', '{', '[]', '{"model": 1}', '{"version": "9"}'])
def test_broken_json(content, tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text(content)
  with pytest.raises(ValueError, match=r'tokenizer\.json is not a readable'):
    load_tokenizer(str(path))


def test_damaged_json_is_read_or_refused(tokenizer_json, tmp_path):
  draw = random.Random(0)
  with open(tokenizer_json, 'rb') as file:
    whole = file.read()
  path = tmp_path / 'tokenizer.json'
  for trial in range(60):
    data = bytearray(whole)
    if trial % 2:
      data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
      del data[draw.randrange(len(data)) :]
    path.write_bytes(data)
    try:
      load_tokenizer(str(path)).encode(TEXT)
    except ValueError as error:
      assert str(path) in str(error)


def test_missing_file_and_missing_end_token(tokenizer_json):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    load_tokenizer('nowhere/tokenizer.json')
  with pytest.raises(ValueError, match=r'no token <eot> to end a document.*end_token'):
    load_tokenizer(tokenizer_json, '<eot>')
  with pytest.raises(ValueError, match="end_token='</s>'"):
    load_tokenizer('bytes', '</s>')
