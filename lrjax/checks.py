"""Checks of arguments, with messages that say what was given and what is allowed."""

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax

T = TypeVar('T')


def positive_int(name: str, value: Any) -> int:
  """`value` as an int of at least 1; numpy integers pass, bools and floats do not."""
  if isinstance(value, bool) or not hasattr(value, '__index__'):
    raise TypeError(
      f'`{name}` must be an int of at least 1, got {value!r} of type'
      f' {type(value).__name__}'
    )
  if isinstance(value, jax.core.Tracer):
    raise TypeError(
      f'`{name}` fixes shapes or a schedule and cannot be traced, got {value}; under'
      f' optax.inject_hyperparams name it in static_args'
    )
  value = operator.index(value)
  if value < 1:
    raise ValueError(f'`{name}` must be at least 1, got {value}')
  return value


def finite(name: str, value: Any, minimum: float = 0.0) -> Any:
  """`value` unless it is a number below `minimum` or not finite; arrays pass."""
  if isinstance(value, jax.Array):
    return value
  if isinstance(value, (str, bool)) or not hasattr(value, '__float__'):
    raise TypeError(
      f'`{name}` must be a number, got {value!r} of type {type(value).__name__}'
    )
  if not math.isfinite(value) or value < minimum:
    raise ValueError(f'`{name}` must be finite and at least {minimum}, got {value}')
  return value


def closest(name: str, known: Iterable[str]) -> str:
  """The tail of a message about an unknown name: the nearest one and all of them."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return f'{hint}known: {", ".join(known)}'


def named(what: str, value: str | T, table: Mapping[str, T]) -> T:
  """`table[value]` for a string, `value` itself otherwise."""
  if not isinstance(value, str):
    return value
  if value not in table:
    raise ValueError(f'unknown {what} {value!r}; {closest(value, table)}')
  return table[value]
