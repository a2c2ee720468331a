"""Frozen dataclasses from plain mappings, strictly: every fault names its key.

Values come in layers: a preset, a file, the command line. `given` marks the leaves
of a layer with where they were given, `overlay` puts one layer over another, and
`build` checks the result against the annotations of the dataclass. Values are data
alone: nothing here imports, evaluates or expands what a user wrote.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from experiments.errors import ConfigError
from experiments.schema import (
  children,
  closest,
  expected,
  init_fields,
  item_type,
  members,
  walk,
)

T = TypeVar('T')

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


class Given(NamedTuple):
  """A leaf value with its source; text from a command line is parsed by field type."""

  value: Any
  source: str
  is_text: bool = False


class _Context(NamedTuple):
  source: str
  hints: Mapping[str, Any]
  known: list[str]


def build(
  cls: type[T],
  mapping: Mapping[str, Any],
  source: str = 'config',
  hints: Mapping[str, Any] | None = None,
  known: Iterable[str] = (),
) -> T:
  """Builds a dataclass from a nested mapping, refusing all that does not fit.

  Fields may be int, float, bool, str, Literal, tuples of these, unions of these with
  None, `Mapping[str, scalar]`, and dataclasses. An int is accepted for a float, a
  bool is never an int, NaN and infinity are refused.

  Args:
    cls: a dataclass; what its `__post_init__` raises is reported with the key.
    mapping: nested values, or values marked by `given`.
    source: what errors call the origin of unmarked values.
    hints: dotted key -> type in place of the annotation. A dict stands for a section
      with these names and types, all optional.
    known: further keys that a misspelt one may have meant.

  Returns:
    An instance of `cls`.

  Raises:
    ConfigError: naming source, dotted key, value, and what is allowed.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Data:
  ...   seq_len: int = 128
  >>> build(Data, {'seq_len': 256})
  Data(seq_len=256)
  >>> build(Data, {'seqlen': 256}, source='a.toml')
  Traceback (most recent call last):
  experiments.errors.ConfigError: a.toml: seqlen = 256: unknown key; did you mean
  seq_len?
  """
  hints = hints or {}
  known = [*(key for key, _ in walk(cls, hints)), *known]
  return _convert(cls, mapping, '', _Context(source, hints, known))


from_dict = build


def to_dict(value: Any) -> Any:
  """The plain, JSON-able form of a dataclass; `from_dict` is its exact inverse."""
  if dataclasses.is_dataclass(value):
    return {f.name: to_dict(getattr(value, f.name)) for f in init_fields(value)}
  if isinstance(value, Mapping):
    return {name: to_dict(item) for name, item in value.items()}
  return [to_dict(item) for item in value] if isinstance(value, tuple) else value


def given(mapping: Any, source: str, is_text: bool = False) -> Any:
  """The same nested mapping with every leaf marked as `Given` by this source."""
  if isinstance(mapping, Mapping):
    return {name: given(item, source, is_text) for name, item in mapping.items()}
  return Given(mapping, source, is_text)


def overlay(cls: Any, base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict:
  """Puts the values of `layer` over those of `base`, both marked by `given`.

  A field with metadata `follows='other'` belongs to the value of the field `other`
  (the options of a named method): where `layer` changes that value, what `base` had
  for the field is dropped.
  """
  merged = dict(base)
  for field in init_fields(cls) if dataclasses.is_dataclass(cls) else ():
    leader = field.metadata.get('follows')
    if leader in layer and leader in base and layer[leader][0] != base[leader][0]:
      merged.pop(field.name, None)
  for name, item in layer.items():
    if isinstance(item, Mapping) and isinstance(merged.get(name), Mapping):
      item = overlay(children(cls).get(name), merged[name], item)
    merged[name] = item
  return merged


def _convert(hint, item, key, context):
  if isinstance(hint, dict) or item_type(hint):
    return _section(hint, item, key, context)
  if dataclasses.is_dataclass(hint):
    return _dataclass(hint, item, key, context)
  if isinstance(item, Mapping):
    raise _fault(key, item, f'expected {expected(hint)}, got a section', context)
  item = item if isinstance(item, Given) else Given(item, context.source)
  if members(hint):
    return _union(hint, item, key, context)
  if typing.get_origin(hint) is Literal:
    return _choice(hint, item, key, context)
  if typing.get_origin(hint) is tuple:
    return _tuple(hint, item, key, context)
  return _scalar(hint, item, key, context)


def _fault(key, item, reason, context):
  """The error for one key; a section shows as the list of its names."""
  source, value = context.source, item
  leaf = item
  while isinstance(leaf, Mapping) and leaf:
    leaf, value = next(iter(leaf.values())), list(item)
  if isinstance(leaf, Given):
    source, value = leaf.source, leaf.value if leaf is item else value
  shown = key if re.fullmatch(r'[\w.-]{1,200}', key) else _repr.repr(key)
  # Python refuses to write out ints beyond 4300 digits, which 0x... can give.
  is_huge = type(value) is int and value.bit_length() > 1024
  value = 'a huge int' if is_huge else _repr.repr(value)
  return ConfigError(f'{source}: {shown} = {value}: {reason}')


def _section(hint, item, key, context):
  """The converted items of a section, by name."""
  if not isinstance(item, Mapping):
    names = ', '.join(children(hint))
    names = f' with the keys {names}' if names else ''
    raise _fault(key, item, f'this is a section{names}, not a value', context)
  values, names = {}, children(hint)
  for name, value in item.items():
    full = f'{key}.{name}' if key else str(name)
    if name not in names and not item_type(hint):
      near = closest(full, context.known)
      near = f'did you mean {near}?' if near else f'known here: {", ".join(names)}'
      raise _fault(full, value, f'unknown key; {near}', context)
    inner = names[name] if name in names else item_type(hint)
    values[name] = _convert(context.hints.get(full, inner), value, full, context)
  return values


def _dataclass(cls, item, key, context):
  values = _section(cls, item, key, context)
  prefix = f'{key}.' if key else ''
  for field in init_fields(cls):
    defaults = (field.default, field.default_factory)
    if field.name not in values and defaults == (dataclasses.MISSING,) * 2:
      raise ConfigError(f'{context.source}: {prefix}{field.name} is missing')
  try:
    return cls(**values)
  except (TypeError, ValueError) as error:
    # The first given key that the message names is the one to point at.
    for name in re.findall(r'\w+(?:\.\w+)*', str(error)):
      if (leaf := _lookup(item, name)) is not None:
        raise _fault(prefix + name, leaf, error, context) from error
    raise ConfigError(f'{context.source}: {key or cls.__name__}: {error}') from error


def _lookup(item, dotted):
  for name in dotted.split('.'):
    item = item.get(name) if isinstance(item, Mapping) else None
  return item


def _union(hint, item, key, context):
  has_none = types.NoneType in members(hint)
  if has_none and (item.value is None or (item.is_text and item.value == 'none')):
    return None
  kinds = [kind for kind in members(hint) if kind is not types.NoneType]
  for kind in kinds:
    try:
      return _convert(kind, item, key, context)
    except ConfigError:
      if len(kinds) == 1:
        raise
  raise _fault(key, item, f'expected {expected(hint)}', context)


def _choice(hint, item, key, context):
  allowed = typing.get_args(hint)
  for choice in allowed:
    value = _parse(type(choice), item.value) if item.is_text else item.value
    if type(value) is type(choice) and value == choice:
      return choice
  near = difflib.get_close_matches(str(item.value)[:200], map(str, allowed), 1)
  near = f'; did you mean {near[0]}?' if near else ''
  raise _fault(key, item, f'expected {expected(hint)}{near}', context)


def _tuple(hint, item, key, context):
  args, value = typing.get_args(hint), item.value
  if item.is_text:
    value = value.split(',') if value else []
  if not isinstance(value, (list, tuple)):
    raise _fault(key, item, f'expected {expected(hint)}', context)
  if args[-1] is ...:
    args = args[:1] * len(value)
  if len(value) != len(args):
    raise _fault(key, item, f'expected {len(args)} values', context)
  parts = zip(args, value)
  return tuple(_convert(a, item._replace(value=v), key, context) for a, v in parts)


def _scalar(kind, item, key, context):
  value = _parse(kind, item.value) if item.is_text else item.value
  if kind is float and type(value) is int:
    value = float(value) if abs(value) < 2**1023 else math.inf
  if type(value) is not kind:
    quoted = isinstance(value, str) and type(_parse(kind, value)) is kind
    got = f', got {type(value).__name__}' if not item.is_text else ''
    advice = '; write it without quotes' if quoted else ''
    raise _fault(key, item, f'expected {expected(kind)}{got}{advice}', context)
  if kind is float and not math.isfinite(value):
    raise _fault(key, item, 'expected a finite float', context)
  return value


def _parse(kind, text):
  """Command-line text as `kind`, or the text itself where it is no such literal."""
  if kind is bool:
    return {'true': True, 'false': False}.get(text, text)
  try:
    if kind is int and re.fullmatch(r'[+-]?(0|[1-9](_?[0-9])*)', text):
      return int(text)
    if kind is float and text.isascii() and text == text.strip():
      return float(text)
  except ValueError:
    pass
  return text
