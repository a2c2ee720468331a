"""What the data of a run are: one frozen dataclass of JSON-able fields."""

from __future__ import annotations  # makes every field's type a string to check by

import dataclasses
import difflib

SOURCES = ('stdlib', 'synthetic', 'files', 'hub')
FORMATS = ('auto', 'text', 'jsonl', 'parquet', 'arrayrecord')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from, how it becomes tokens, and how tokens become batches.

  Attributes:
    source: 'stdlib', the sources of the running Python's standard library;
      'synthetic', seeded text that is the same on every machine; 'files', local
      files; 'hub', a data set streamed through the package `datasets`.
    paths: for 'files', files, directories and glob patterns; for 'hub', the data
      files that the data set's builder reads (none: all of the split).
    valid_paths: the same for validation; none: a fraction of `paths`.
    format: of the files; 'auto' goes by the file name's ending.
    text_key: JSON key or Parquet column of the text; '' in ArrayRecord files whose
      records are the text itself.
    hub_name: name on the hub (`'allenai/c4'`) or of a builder (`'json'`).
    hub_config: configuration of the data set (`'en'`).
    hub_split: split to train on.
    hub_valid_split: split to validate on; None: a fraction of `hub_split`.
    hub_revision: commit of the data set; None: the newest one when first read.
    hub_documents: the first so many documents of `hub_split` are read.
    hub_valid_documents: the same for `hub_valid_split`.
    synthetic_bytes: size of the synthetic text.
    synthetic_seed: seed of the synthetic text.
    tokenizer: 'bytes', or the path of a tokenizer.json.
    end_token: the token that ends a document; None: the tokenizer's own, see
      `experiments.data.tokenizers`.
    seq_len: tokens a window predicts; it holds one more.
    batch_size: windows in a global batch, over all hosts.
    valid_fraction: share of the documents, chosen by a hash of their names, that is
      kept for validation.
    valid_windows: validate on at most so many windows, evenly spaced over the
      split; None: all of it.

  Raises:
    TypeError, ValueError: naming the field, its value and what is allowed.

  >>> DataConfig(seq_len=256).source
  'stdlib'
  >>> DataConfig(source='stdlb')
  Traceback (most recent call last):
  ValueError: source='stdlb' is not one of stdlib, synthetic, files, hub: did you mean
  'stdlib'?
  """

  source: str = 'stdlib'
  paths: tuple[str, ...] = ()
  valid_paths: tuple[str, ...] = ()
  format: str = 'auto'
  text_key: str = 'text'
  hub_name: str | None = None
  hub_config: str | None = None
  hub_split: str = 'train'
  hub_valid_split: str | None = None
  hub_revision: str | None = None
  hub_documents: int = 100_000
  hub_valid_documents: int = 10_000
  synthetic_bytes: int = 1 << 20
  synthetic_seed: int = 0
  tokenizer: str = 'bytes'
  end_token: str | None = None
  seq_len: int = 128
  batch_size: int = 16
  valid_fraction: float = 0.05
  valid_windows: int | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      self._check_type(field.name, getattr(self, field.name), field.type)
    self._check_choice('source', SOURCES)
    self._check_choice('format', FORMATS)
    for name in ('hub_documents', 'hub_valid_documents', 'synthetic_bytes', 'seq_len',
                 'batch_size', 'valid_windows'):  # fmt: skip
      self._check_at_least(name, 1)
    self._check_at_least('synthetic_seed', 0)
    if not 0 < self.valid_fraction < 1:
      raise ValueError(
        f'valid_fraction={self.valid_fraction!r} is not between 0 and 1 (both excluded)'
      )
    self._check_source()

  def _check_type(self, name, value, annotation):
    if annotation.startswith('tuple'):
      # A str would be read letter by letter; a list is what JSON gives back.
      strings = isinstance(value, tuple | list) and all(
        isinstance(v, str) for v in value
      )
      if not strings:
        raise TypeError(f'{name}={value!r} must be a tuple of str')
      object.__setattr__(self, name, tuple(value))
      return
    if value is None and annotation.endswith('None'):
      return
    expected = annotation.removesuffix(' | None')
    allowed = {'str': (str,), 'int': (int,), 'float': (float, int)}[expected]
    if isinstance(value, bool) or not isinstance(value, allowed):
      raise TypeError(
        f'{name}={value!r} must be {expected}, got {type(value).__name__}'
      )

  def _check_choice(self, name, allowed):
    value = getattr(self, name)
    if value not in allowed:
      close = difflib.get_close_matches(value, allowed, n=1, cutoff=0.4)
      hint = f': did you mean {close[0]!r}?' if close else ''
      raise ValueError(f'{name}={value!r} is not one of {", ".join(allowed)}{hint}')

  def _check_at_least(self, name, least):
    value = getattr(self, name)
    if value is not None and value < least:
      raise ValueError(f'{name}={value} must be at least {least}')

  def _check_source(self):
    if self.source == 'files' and not self.paths:
      raise ValueError("source='files' needs paths: files, directories or patterns")
    if self.source == 'hub' and not self.hub_name:
      raise ValueError("source='hub' needs hub_name, such as 'allenai/c4'")
    # Otherwise `paths` without `source` would train on something else in silence.
    if self.source not in ('files', 'hub'):
      for name in ('paths', 'valid_paths'):
        if getattr(self, name):
          raise ValueError(f"{name} is read by source='files' or 'hub', not by "
                           f'source={self.source!r}')  # fmt: skip
    if self.source == 'hub' and self.valid_paths and not self.hub_valid_split:
      raise ValueError("valid_paths with source='hub' needs hub_valid_split")
    if self.source != 'hub' and self.hub_name:
      raise ValueError(
        f"hub_name is read by source='hub', not by source={self.source!r}"
      )
