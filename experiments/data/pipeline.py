"""Tokens to batches, by grain: the order depends on seed and step alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from experiments.data.corpus import Corpus
from experiments.errors import DataError

if TYPE_CHECKING:
  import grain  # imports jax and array_record: left to the functions that need it


# Windows of a training stream. Not sys.maxsize, as without a number of epochs: grain
# computes the length of a batched stream in floating point, exact up to here.
_ENDLESS = 2**52


def train_batches(
  corpus: Corpus, seed: int, *, host: int = 0, hosts: int = 1
) -> grain.IterDataset:
  """Endless training batches, every epoch in another order.

  The windows are shuffled globally, then dealt out to the hosts, so that the windows
  of global batch t are the same for every number of hosts (host h has those at places
  h, h + hosts, ...), and the position of an iterator is the step.

  Args:
    corpus: to cut windows of seq_len + 1 tokens from, each starting at the last token
      of the one before; a shorter rest is left out.
    seed: at least 0.
    host: this process.
    hosts: number of processes.

  Returns:
    A dataset of dict(tokens), int32 (batch_size / hosts, seq_len + 1). Inputs are
    `tokens[:, :-1]`, targets `tokens[:, 1:]`.

  Raises:
    TypeError, ValueError: if the seed is no int or below 0, or the hosts do not divide
      the batch size.
  """
  if isinstance(seed, bool) or not isinstance(seed, int):
    raise TypeError(f'seed={seed!r} must be int, got {type(seed).__name__}')
  if seed < 0:
    raise ValueError(f'seed={seed} must be at least 0')
  import grain

  rows = _rows(corpus.config.batch_size, host, hosts)
  windows = grain.MapDataset.source(_TrainWindows(corpus))
  shuffled = windows.seed(seed).shuffle().repeat(_ENDLESS // len(windows))
  return shuffled[host::hosts].batch(rows).to_iter_dataset(_read_options())


def valid_batches(
  corpus: Corpus, *, batch_size: int | None = None, host: int = 0, hosts: int = 1
) -> grain.IterDataset:
  """The validation split, or its `valid_windows`, once and always in the same order.

  Every token but the first of the split is a target exactly once. The last window and
  the last batch are filled up, with `mask` 0 there, so the mean over the split is

    sum of (loss * mask) over all batches and hosts / sum of mask,

  whatever the batch size and the number of hosts; every host has as many batches.

  Args:
    corpus: to validate on.
    batch_size: global; None: that of the config.
    host: this process.
    hosts: number of processes.

  Returns:
    A dataset of dict(tokens, mask): int32 (batch_size / hosts, seq_len + 1) and
    float32 (batch_size / hosts, seq_len), 1 where `tokens[:, 1:]` counts.

  Raises:
    ValueError: if the hosts do not divide the batch size.
  """
  import grain

  batch_size = corpus.config.batch_size if batch_size is None else batch_size
  rows = _rows(batch_size, host, hosts)
  windows = grain.MapDataset.source(_ValidWindows(corpus, batch_size))
  return windows[host::hosts].batch(rows).to_iter_dataset(_read_options())


def iterator_at(batches: grain.IterDataset, step: int) -> grain.DatasetIterator:
  """An iterator whose next batch is that of a step, at the same cost for every step.

  Args:
    batches: from `train_batches` or `valid_batches`.
    step: number of batches that were taken before.

  Returns:
    The iterator.
  """
  iterator = iter(batches)
  iterator.set_state({'next_index': step})
  return iterator


def fingerprint(corpus: Corpus, seed: int) -> dict:
  """All that determines the stream of batches, to be compared before a resume.

  An iterator's state is one number, which any other stream accepts without a word.
  The number of hosts is not in it, for the stream does not depend on it.

  Args:
    corpus: that is trained on.
    seed: of `train_batches`.

  Returns:
    A flat JSON-able dict.
  """
  import grain

  config = corpus.config
  return {
    'source': config.source,
    'tokenizer': corpus.tokenizer.fingerprint,
    'train_text_sha256': corpus.stats['train'].text_sha256,
    'train_tokens_sha256': corpus.stats['train'].tokens_sha256,
    'valid_tokens_sha256': corpus.stats['valid'].tokens_sha256,
    'seq_len': config.seq_len,
    'batch_size': config.batch_size,
    'seed': seed,
    'order': 'windows shuffled in each epoch',
    # Below 1.0 the second number counts the breaking releases.
    'grain': '.'.join(grain.__version__.split('.')[:2]),
  }


def _read_options():
  import grain

  # One thread ahead by a few batches: slicing an array costs next to nothing.
  return grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def _rows(batch_size, host, hosts):
  """Rows of a global batch that one host has."""
  if not 0 <= host < hosts:
    raise ValueError(f'host={host} must be at least 0 and less than hosts={hosts}')
  if batch_size < 1 or batch_size % hosts:
    raise ValueError(f'batch_size={batch_size} must be a multiple of hosts={hosts}')
  return batch_size // hosts


class _TrainWindows:
  """Window i predicts tokens i * seq_len + 1 to (i + 1) * seq_len."""

  def __init__(self, corpus: Corpus):
    self._corpus = corpus

  def __len__(self):
    return (len(self._corpus.tokens['train']) - 1) // self._corpus.config.seq_len

  def __getitem__(self, index):
    return {'tokens': _window(self._corpus, 'train', index)}


class _ValidWindows:
  """The same of the validation split, with a partial last one, padded to batches."""

  def __init__(self, corpus: Corpus, batch_size: int):
    self._corpus = corpus
    total = -(-(len(corpus.tokens['valid']) - 1) // corpus.config.seq_len)
    count = min(corpus.config.valid_windows or total, total)
    self._chosen = np.arange(count) * total // count
    self._length = -(-count // batch_size) * batch_size

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    seq_len = self._corpus.config.seq_len
    tokens, mask = np.zeros(seq_len + 1, np.int32), np.zeros(seq_len, np.float32)
    if index < len(self._chosen):
      window = _window(self._corpus, 'valid', self._chosen[index])
      tokens[: len(window)] = window
      mask[: len(window) - 1] = 1
    return {'tokens': tokens, 'mask': mask}


def _window(corpus, split, index):
  """Up to seq_len + 1 tokens; the last window of a split may have fewer."""
  start = index * corpus.config.seq_len
  try:
    return corpus.tokens[split][start : start + corpus.config.seq_len + 1].astype(
      np.int32
    )
  except Exception as error:  # a disk that fails, say
    raise DataError(
      f'source={corpus.config.source!r}: {split} window {index} cannot be read: {error}'
    ) from error
