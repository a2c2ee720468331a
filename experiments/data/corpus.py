"""A source tokenized once, into one flat array of tokens for each split.

Training and validation windows are slices of these arrays, so every source has random
access, and the cost of resuming does not depend on the step. What it costs instead is
one pass over the source before the first step, by every process for itself; with a
`cache_dir` it is one pass for each machine, its result is a memory-mapped file, and
later starts only read it through to check its digest. A pass that is interrupted
starts again at the first document.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
from typing import BinaryIO, NamedTuple

import numpy as np

from experiments.data import sources
from experiments.data.config import DataConfig
from experiments.data.tokenizers import Tokenizer, load_tokenizer
from experiments.errors import DataError

_SPLITS = ('train', 'valid')
_LAYOUT = 1  # of the cache; another number never reads this one's files
_FLUSH = 1 << 20  # bytes of text tokenized in one call


class SplitStats(NamedTuple):
  """What one split was made of."""

  documents: int  # for the standard library these are its files
  bytes: int  # of UTF-8
  tokens: int  # with one end token for each document
  text_sha256: str  # over names and texts
  tokens_sha256: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The tokens of a config, and where they come from.

  Attributes:
    config: of the data.
    tokenizer: that made the tokens.
    tokens: 'train' and 'valid', each (n,) uint16 or uint32, read-only.
    stats: 'train' and 'valid'.
  """

  config: DataConfig
  tokenizer: Tokenizer
  tokens: dict[str, np.ndarray]
  stats: dict[str, SplitStats]

  def provenance(self) -> dict:
    """What to store with every result: sizes and digests of the text, JSON-able.

    The default corpus is the running Python's own, so its version belongs to it.
    """
    return dict(
      source=self.config.source,
      python=f'{platform.python_implementation()} {platform.python_version()}',
      tokenizer=self.tokenizer.fingerprint,
      vocab_size=self.tokenizer.vocab_size,
      **{split: self.stats[split]._asdict() for split in _SPLITS},
    )


def load_corpus(config: DataConfig, cache_dir: str | None = None) -> Corpus:
  """Reads and tokenizes the source of a config, or opens what was tokenized before.

  Args:
    config: of the data.
    cache_dir: directory for token files, which is made for the user alone; None: the
      tokens are held in memory. Local files are known again by paths, sizes and
      times, a hub data set by name and revision only.

  Returns:
    The corpus.

  Raises:
    FileNotFoundError: if nothing is at a path.
    ValueError: if a file is not of its format, or a split is too short.
    DataError: if a stream breaks off, or a token file was damaged.
  """
  tokenizer = load_tokenizer(config.tokenizer, config.end_token)
  if cache_dir is None:
    files = {split: io.BytesIO() for split in _SPLITS}
    stats = _tokenize(config, tokenizer, files)
    tokens = {s: np.load(_rewound(f), allow_pickle=False) for s, f in files.items()}
  else:
    directory = os.path.join(cache_dir, _key(config, tokenizer))
    if not os.path.isdir(directory):
      _build(config, tokenizer, directory)
    tokens, stats = _open(directory)
    _check_lengths(config, stats)
  for array in tokens.values():
    array.flags.writeable = False
  return Corpus(config, tokenizer, tokens, stats)


def _rewound(file):
  file.seek(0)
  return file


class _TokenFile:
  """Writes the documents of one split as a .npy file of one axis."""

  def __init__(self, file: BinaryIO, tokenizer: Tokenizer):
    self._file, self._tokenizer = file, tokenizer
    self._dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
    self._pending, self._pending_bytes = [], 0
    self._text, self._tokens = hashlib.sha256(), hashlib.sha256()
    self._documents = self._bytes = self._count = 0
    self._header()

  def _header(self):
    # Numpy pads the header so that the first axis can grow in place.
    np.lib.format.write_array_header_1_0(
      self._file,
      {'descr': self._dtype.str, 'fortran_order': False, 'shape': (self._count,)},
    )

  def add(self, document):
    self._documents += 1
    self._bytes += len(document.text)
    header = f'{document.name}\0{len(document.text)}\0'
    self._text.update(header.encode('utf-8', 'surrogateescape'))
    self._text.update(document.text)
    self._pending.append(document.text)
    self._pending_bytes += len(document.text)
    if self._pending_bytes >= _FLUSH:
      self._flush()

  def _flush(self):
    for ids in self._tokenizer.encode_batch(self._pending):
      data = np.append(ids, self._tokenizer.end).astype(self._dtype).tobytes()
      self._file.write(data)
      self._tokens.update(data)
      self._count += len(ids) + 1
    self._pending, self._pending_bytes = [], 0

  def finish(self) -> SplitStats:
    self._flush()
    self._file.seek(0)
    self._header()
    return SplitStats(
      self._documents,
      self._bytes,
      self._count,
      self._text.hexdigest(),
      self._tokens.hexdigest(),
    )


def _tokenize(config, tokenizer, files):
  writers = {split: _TokenFile(file, tokenizer) for split, file in files.items()}
  for document in sources.documents(config):
    writers[document.split].add(document)
  stats = {split: writer.finish() for split, writer in writers.items()}
  _check_lengths(config, stats)
  return stats


def _check_lengths(config, stats):
  train, valid = stats['train'], stats['valid']
  where = f'source={config.source!r}' + (
    f', paths={config.paths}' if config.paths else ''
  )
  if train.tokens < config.seq_len + 1:
    raise ValueError(
      f'{where}: {train.tokens} training tokens in {train.documents} documents are '
      f'less than one window of seq_len + 1 = {config.seq_len + 1}'
    )
  if valid.tokens < 2:
    raise ValueError(
      f'{where}: the validation split is empty beside {train.documents} training '
      f'documents: raise valid_fraction={config.valid_fraction}, or name valid_paths '
      '(files) or hub_valid_split (hub)'
    )


def _key(config, tokenizer):
  return _digest([_LAYOUT, sources.identity(config), tokenizer.fingerprint])[:32]


def _digest(value):
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _build(config, tokenizer, directory):
  """Writes beside `directory` and renames, so that it is there whole or not at all."""
  parent = os.path.dirname(directory)
  os.makedirs(parent, mode=0o700, exist_ok=True)
  building = tempfile.mkdtemp(prefix=os.path.basename(directory) + '.', dir=parent)
  try:
    with contextlib.ExitStack() as stack:
      files = {
        split: stack.enter_context(open(os.path.join(building, f'{split}.npy'), 'wb'))
        for split in _SPLITS
      }
      stats = _tokenize(config, tokenizer, files)
    plain = {split: s._asdict() for split, s in stats.items()}
    with open(os.path.join(building, 'stats.json'), 'w', encoding='utf-8') as file:
      json.dump({'stats': plain, 'sha256': _digest(plain)}, file, indent=2)
    os.rename(building, directory)
  except OSError:
    # Another process of the same run may have been first; its files are as good.
    if not os.path.isdir(directory):
      raise
  finally:
    shutil.rmtree(building, ignore_errors=True)


def _open(directory):
  try:
    with open(os.path.join(directory, 'stats.json'), encoding='utf-8') as file:
      content = json.load(file)
    stats = {split: SplitStats(**s) for split, s in content['stats'].items()}
    tokens = {
      split: np.load(
        os.path.join(directory, f'{split}.npy'), mmap_mode='r', allow_pickle=False
      )
      for split in _SPLITS
    }
    sound = content['sha256'] == _digest(content['stats']) and all(
      hashlib.sha256(tokens[split]).hexdigest() == stats[split].tokens_sha256
      for split in _SPLITS
    )
  except Exception as error:  # a damaged file can fail in any way
    raise DataError(_damaged(directory)) from error
  if not sound:
    raise DataError(_damaged(directory))
  return tokens, stats


def _damaged(directory):
  return (
    f'the token files in {directory} are damaged: delete that directory, and they are '
    'made anew'
  )
