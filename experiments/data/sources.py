"""Where text comes from: every source is a stream of documents, each of one split.

A text file is a document, and so is each record of the other formats. A hash of the
name (the path relative to the directory that was given, then `#` and the number of the
record) decides the split, unless validation has paths or a hub split of its own.
A single text file is cut: its end is the validation split.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

from experiments.data import files, formats, synthetic
from experiments.data.config import DataConfig
from experiments.errors import DataError


class Document(NamedTuple):
  """A text and where it belongs."""

  name: str  # the same on every machine; decides the split
  text: bytes  # UTF-8
  split: str  # 'train' or 'valid'


def documents(config: DataConfig) -> Iterator[Document]:
  """All documents of a source, in an order that is the same every time.

  Args:
    config: of the data.

  Yields:
    Documents of both splits.

  Raises:
    FileNotFoundError: if nothing is at a path.
    ValueError: if a file is empty or not of its format.
    DataError: if a stream breaks off.
  """
  return _SOURCES[config.source](config)


def identity(config: DataConfig) -> dict:
  """What tells two sources apart without reading them.

  Paths, sizes and times of local files; names and limits of the others.

  Args:
    config: of the data.

  Returns:
    A JSON-able dict.
  """
  names = ['source', 'format', 'text_key', 'valid_fraction']
  names += [f for f in vars(config) if f.startswith(config.source)]
  found = {name: getattr(config, name) for name in names}
  for split, pairs in _local_files(config).items():
    found[split] = [(name, *_place_size_time(path)) for name, path in pairs]
  if config.source == 'hub':
    found |= {'paths': config.paths, 'valid_paths': config.valid_paths}
  return found


def split_of(name: str, valid_fraction: float) -> str:
  """'valid' for about the given share of names, 'train' for the rest.

  A hash of the name decides: adding a document moves no other.

  >>> [split_of(f'{i}.py', 0.5) for i in range(4)]
  ['valid', 'valid', 'train', 'train']
  """
  draw = int.from_bytes(
    hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()[:8], 'big'
  )
  return 'valid' if draw < valid_fraction * 2.0**64 else 'train'


def _place_size_time(path):
  status = os.stat(path)
  return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _local_files(config):
  """{'train': files, 'valid': files} of a config; one list if a hash splits them."""
  if config.source == 'stdlib':
    return {'train': files.stdlib_files()}
  given = {'train': config.paths, 'valid': config.valid_paths}
  if config.source == 'hub':  # patterns and addresses are the builder's to resolve
    return {
      split: [(p, p) for p in paths if os.path.isfile(p)]
      for split, paths in given.items()
    }
  found = {
    split: files.find_files(paths, config.format)
    for split, paths in given.items()
    if paths
  }
  train, valid = (
    {os.path.realpath(path) for _, path in found.get(split, [])}
    for split in ('train', 'valid')
  )
  if train & valid:
    raise ValueError(f'in paths and in valid_paths: {", ".join(sorted(train & valid))}')
  return found


def _stdlib(config):
  for name, path in files.stdlib_files():
    (text,) = formats.read(path, 'text', '')
    yield Document(name, text, split_of(name, config.valid_fraction))


def _files(config):
  listed = _local_files(config)
  by_hash = not config.valid_paths
  if by_hash and len(listed['train']) == 1:
    name, path = listed['train'][0]
    if _format(path, config) == 'text':
      yield from _cut(name, path, config.valid_fraction)
      return
  for split, pairs in listed.items():
    for name, path in pairs:
      format = _format(path, config)
      for index, text in enumerate(formats.read(path, format, config.text_key)):
        record = name if format == 'text' else f'{name}#{index}'
        chosen = split_of(record, config.valid_fraction) if by_hash else split
        yield Document(record, text, chosen)


def _format(path, config):
  return formats.format_of(path) if config.format == 'auto' else config.format


def _cut(name, path, valid_fraction):
  """A single text in two; `valid_fraction` is of its bytes."""
  (text,) = formats.read(path, 'text', '')
  cut = int(len(text) * (1 - valid_fraction))
  while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:  # within a character
    cut -= 1
  yield Document(name, text[:cut], 'train')
  yield Document(name, text[cut:], 'valid')


def _synthetic(config):
  fraction = config.valid_fraction
  generated = synthetic.texts(config.synthetic_bytes, config.synthetic_seed)
  for i, text in enumerate(generated):
    # Evenly, not by a hash: so that a small text has a validation split as well.
    split = 'valid' if int((i + 1) * fraction) > int(i * fraction) else 'train'
    yield Document(str(i), text, split)


def _hub(config):
  try:
    import datasets
  except ImportError as error:
    raise ImportError("source='hub' needs the package `datasets`") from error

  wanted = {'train': (config.hub_split, config.hub_documents)}
  paths = {config.hub_split: config.paths}
  if config.hub_valid_split:
    wanted['valid'] = (config.hub_valid_split, config.hub_valid_documents)
    paths[config.hub_valid_split] = config.valid_paths
  for split, (hub_split, limit) in wanted.items():
    stream = datasets.load_dataset(
      config.hub_name,
      config.hub_config,
      data_files={s: list(p) for s, p in paths.items() if p} or None,
      split=hub_split,
      revision=config.hub_revision,
      streaming=True,
    )
    for index, record in _records(stream.take(limit), config.hub_name):
      name = f'{hub_split}#{index}'
      where = f'{config.hub_name}, {name}'
      text = formats.text_field(record, config.text_key, where)
      by_hash = split_of(name, config.valid_fraction)
      yield Document(name, text, split if 'valid' in wanted else by_hash)


def _records(stream, source):
  iterator = iter(stream)
  for index in itertools.count():
    try:
      record = next(iterator)
    except StopIteration:
      return
    except Exception as error:  # whatever the network and the builder raise
      raise DataError(f'{source}: record {index} cannot be read: {error}') from error
    yield index, record


_SOURCES = {'stdlib': _stdlib, 'synthetic': _synthetic, 'files': _files, 'hub': _hub}
