"""Checks of arguments, with messages that say what was given and what is allowed."""

import difflib
import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar('T')


def positive_int(name: str, value: Any) -> int:
  """`value` as an int of at least 1; numpy integers pass, bools and floats do not."""
  if isinstance(value, bool) or not hasattr(value, '__index__'):
    raise TypeError(
      f'`{name}` must be an int of at least 1, got {value!r} of type'
      f' {type(value).__name__}'
    )
  if isinstance(value, jax.Array):
    raise TypeError(
      f'`{name}` fixes shapes or a schedule and must be a Python int, not an array, got'
      f' {value}; under optax.inject_hyperparams name it in static_args'
    )
  value = operator.index(value)
  if value < 1:
    raise ValueError(f'`{name}` must be at least 1, got {value}')
  return value


def finite(name: str, value: Any, below: float = math.inf) -> Any:
  """`value` unless it is a number outside [0, below) or not finite; arrays pass."""
  if isinstance(value, jax.Array):
    return value
  if isinstance(value, (str, bool)) or not hasattr(value, '__float__'):
    raise TypeError(
      f'`{name}` must be a number, got {value!r} of type {type(value).__name__}'
    )
  if not 0.0 <= value < below:
    limit = 'finite' if below == math.inf else f'below {below}'
    raise ValueError(f'`{name}` must be at least 0 and {limit}, got {value}')
  return value


def floating(name: str, dtype: Any) -> Any:
  """`dtype` if it is real floating point or None."""
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f'`{name}` must be a floating-point dtype, got {dtype!r}')
  return dtype


def pattern(name: str, text: str) -> re.Pattern:
  """The compiled regular expression."""
  try:
    return re.compile(text)
  except (re.error, TypeError) as e:
    raise ValueError(f'`{name}`: {text!r} is not a regular expression: {e}') from e


def closest(name: str, known: Iterable[str]) -> str:
  """The tail of a message about an unknown name: the nearest one and all of them."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return f'{hint}known: {", ".join(known)}'


def named(what: str, value: str | T, table: Mapping[str, T]) -> T:
  """`table[value]` for a string, `value` itself if it is a function."""
  if not isinstance(value, str):
    if not callable(value):
      raise TypeError(
        f'`{what}` must be a function or one of {", ".join(sorted(table))}, got {value!r}'
      )
    return value
  if value not in table:
    raise ValueError(f'unknown `{what}` {value!r}; {closest(value, table)}')
  return table[value]
