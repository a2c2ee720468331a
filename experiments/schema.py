"""What a config dataclass declares: keys, types, meanings, and the nearest key.

A type is an annotation, or a dict from names to types: a section known at run time.
"""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Scalar = bool | int | float | str | None


def one_of(names: Iterable[str]) -> Any:
  """The type `Literal` of names that are known at run time.

  >>> one_of(['adamw', 'galore'])
  typing.Literal['adamw', 'galore']
  """
  return typing.cast(Any, Literal)[tuple(names)]


def init_fields(cls: Any) -> list[dataclasses.Field]:
  """The fields of a dataclass that its constructor takes."""
  return [field for field in dataclasses.fields(cls) if field.init]


def children(hint: Any) -> Mapping[str, Any]:
  """Names and types inside a section; empty for a leaf."""
  if isinstance(hint, dict):
    return hint
  if not dataclasses.is_dataclass(hint):
    return {}
  annotations = typing.get_type_hints(hint)
  return {field.name: annotations[field.name] for field in init_fields(hint)}


def item_type(hint: Any) -> Any:
  """The type of the values of a `Mapping[str, X]` or `dict[str, X]`; else None."""
  is_mapping = typing.get_origin(hint) in (Mapping, dict)
  return typing.get_args(hint)[1] if is_mapping else None


def members(hint: Any) -> tuple:
  """The members of a union; empty for other types."""
  is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if is_union else ()


def walk(
  hint: Any, hints: Mapping[str, Any] | None = None, prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """Yields (dotted key, type) of every section and leaf, in order of definition.

  Args:
    hint: a dataclass.
    hints: dotted key -> type in place of the annotation.
    prefix: put before each key.
  """
  hints = hints or {}
  for name, inner in children(hint).items():
    inner = hints.get(prefix + name, inner)
    yield prefix + name, inner
    yield from walk(inner, hints, f'{prefix}{name}.')


def meanings(cls: Any) -> dict[str, str]:
  """First sentence on each field in the `Attributes:` part of the docstrings.

  >>> @dataclasses.dataclass
  ... class Data:
  ...   '''Where text comes from.
  ...
  ...   Attributes:
  ...     seq_len: tokens in a
  ...       sequence. The last one is only a target.
  ...   '''
  ...   seq_len: int = 128
  >>> meanings(Data)
  {'seq_len': 'tokens in a sequence'}
  """
  texts = {}
  for base in getattr(cls, '__mro__', ()):
    _, _, attributes = inspect.cleandoc(base.__doc__ or '').partition('Attributes:\n')
    attributes = re.split(r'^(?=\S)', attributes, maxsplit=1, flags=re.MULTILINE)[0]
    for entry in re.split(r'^  (?=\w+: )', attributes, flags=re.MULTILINE)[1:]:
      name, text = ' '.join(entry.split()).split(': ', 1)
      texts.setdefault(name, re.split(r'\.(?: |$)', text)[0])
  return texts


def expected(hint: Any) -> str:
  """How messages call a type: `int or none`, `one of a, b`, `list of int`."""
  args = typing.get_args(hint)
  if hint is types.NoneType:
    return 'none'
  if children(hint) or item_type(hint):
    return 'section'
  if members(hint):
    return ' or '.join(map(expected, args))
  if typing.get_origin(hint) is Literal:
    return 'one of ' + ', '.join(map(str, args))
  if typing.get_origin(hint) is tuple and args[-1] is ...:
    return f'list of {expected(args[0])}'
  if typing.get_origin(hint) is tuple:
    return f'list ({", ".join(map(expected, args))})'
  return hint.__name__


def closest(key: str, known: Iterable[str]) -> str | None:
  """The known dotted key nearest to a misspelt one, its last part counting most.

  >>> closest('optimizer.rnak', ['optimizer.name', 'optimizer.options.rank'])
  'optimizer.options.rank'
  """

  def likeness(candidate):
    ends = _ratio(key.rpartition('.')[2], candidate.rpartition('.')[2])
    return (ends > 0.6) * (2 * ends + _ratio(key, candidate))

  best = max(known, key=likeness, default=None)
  return best if best is not None and likeness(best) else None


def _ratio(a, b):
  return difflib.SequenceMatcher(None, a[:200], b[:200]).ratio()
