"""Text to integers: bytes, or any tokenizer.json."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

# Tried in this order in a tokenizer.json when no end token is named.
END_TOKENS = ('</s>', '<|endoftext|>', '<|end_of_text|>', '<eos>', '[SEP]')


class Tokenizer(Protocol):
  """What the corpus needs of a tokenizer.

  Attributes:
    vocab_size: one more than the largest token.
    end: token that is put after every document.
    fingerprint: digest of all that determines the tokens of a text.
  """

  vocab_size: int
  end: int
  fingerprint: str

  def encode(self, text: str | bytes) -> np.ndarray:
    """Tokens of a text, (n,) uint32, without the end token."""
    ...

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of each text."""
    ...

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of tokens."""
    ...


class ByteTokenizer:
  """Each UTF-8 byte is a token; byte 0, which text hardly has, ends a document.

  >>> ByteTokenizer().encode('héllo').tolist()
  [104, 195, 169, 108, 108, 111]
  """

  vocab_size = 256
  end = 0
  fingerprint = 'bytes'

  def encode(self, text: str | bytes) -> np.ndarray:
    data = text.encode('utf-8') if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.uint32)

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    # A window may cut a character in two.
    return bytes(int(t) for t in tokens).decode('utf-8', errors='replace')


class JsonTokenizer:
  """A tokenizer.json, read by the package `tokenizers`.

  Its own truncation, padding and special tokens are switched off: documents are
  encoded whole, and the corpus puts `end` after each. The name of a special token
  within a document is ordinary text.

  Args:
    path: of the tokenizer.json.
    end_token: name of the token that ends a document; None: the first of
      `END_TOKENS` that the vocabulary has.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no tokenizer.json or does not have the end token.
  """

  def __init__(self, path: str, end_token: str | None = None):
    import tokenizers

    with open(path, 'rb') as file:
      data = file.read()
    try:
      inner = tokenizers.Tokenizer.from_str(data.decode('utf-8'))
      vocabulary = inner.get_vocab(with_added_tokens=True)
    except Exception as error:  # the package raises bare Exception
      raise ValueError(f'{path} is not a readable tokenizer.json: {error}') from error
    if not vocabulary:
      raise ValueError(f'{path} has an empty vocabulary')
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    self._inner = inner
    self.vocab_size = max(vocabulary.values()) + 1
    self.end = _end_token(vocabulary, end_token, path)
    self.fingerprint = hashlib.sha256(data + b'\0%d' % self.end).hexdigest()

  def encode(self, text: str | bytes) -> np.ndarray:
    text = text if isinstance(text, str) else text.decode('utf-8')
    return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.uint32)

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    # One call for many texts uses all cores.
    encodings = self._inner.encode_batch_fast(
      [text.decode('utf-8') for text in texts], add_special_tokens=False
    )
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    return self._inner.decode([int(t) for t in tokens], skip_special_tokens=False)


def _end_token(vocabulary, name, path):
  names = END_TOKENS if name is None else (name,)
  for candidate in names:
    if candidate in vocabulary:
      return vocabulary[candidate]
  raise ValueError(
    f'{path} has no token {" or ".join(names)} to end a document with; '
    'set end_token to one of its tokens'
  )


def load_tokenizer(name: str, end_token: str | None = None) -> Tokenizer:
  """The tokenizer of a config: 'bytes', or the path of a tokenizer.json."""
  if name != 'bytes':
    return JsonTokenizer(name, end_token)
  if end_token is not None:
    raise ValueError(f"end_token={end_token!r}: tokenizer='bytes' always ends with 0")
  return ByteTokenizer()


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Refuses a tokenizer that a model's embedding cannot hold.

  A model with more entries than the tokenizer is fine: embeddings are often padded.

  Args:
    tokenizer: of the corpus.
    vocab_size: of the model.

  Raises:
    ValueError: if the tokenizer has tokens that the model lacks.

  >>> check_vocab_size(ByteTokenizer(), 256)
  >>> check_vocab_size(ByteTokenizer(), 128)
  Traceback (most recent call last):
  ValueError: the tokenizer has vocab_size=256, the model only vocab_size=128: ...
  """
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f'the tokenizer has vocab_size={tokenizer.vocab_size}, the model only '
      f'vocab_size={vocab_size}: give the model at least as many'
    )
