"""The map of `lrjax.dynamic8` inside kernels: values of codes, and nearest codes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.codecs.dynamic import Dynamic8, dynamic_map

FIRST_DECADE = -7


class Map(NamedTuple):
  """The codes' map inside a kernel.

  Attributes:
    values: int32 codes -> the values of the map.
    thresholds: int32 i below 255 -> the i-th midpoint between values.
    signed: whether there are negative values.
  """

  values: Callable
  thresholds: Callable
  signed: bool


def maps(tables: Callable) -> tuple[Map, Map]:
  """The signed map and the other; `tables`: row of `table` -> a lookup in it."""
  return Map(tables(0), tables(1), True), Map(tables(2), tables(3), False)


def table() -> np.ndarray:
  """(4, 256): values and thresholds of the signed map, and of the other."""
  rows = []
  for signed in (True, False):
    values = dynamic_map(signed)
    rows += [values, np.append((values[:-1] + values[1:]) / 2, np.inf)]
  return np.stack(rows).astype(np.float32)


def nearest(x: jax.Array, of: Map) -> jax.Array:
  """int32 codes of the values nearest to x in [-1, 1]; the bits of `dynamic8`.

  Arithmetic finds the place to within one on both sides, two comparisons find it exactly.
  `dynamic8` looks up 13 bits of x instead, too long a table for a gather on a TPU.
  """
  size = jnp.abs(x)
  n = 1 if of.signed else 2  # steps of the first decade; each has twice as many
  before = jnp.zeros(x.shape, jnp.int32)
  unit = jnp.full(x.shape, 10.0 ** (-1 - FIRST_DECADE), jnp.float32)
  for i in range(1, -FIRST_DECADE):
    here = size >= np.float32(10.0 ** (FIRST_DECADE + i))
    before = jnp.where(here, n * (2**i - 1), before)
    unit = jnp.where(here, np.float32(10.0 ** (-1 - FIRST_DECADE - i)), unit)
  steps = (before + n).astype(jnp.float32)
  place = jnp.maximum((size * unit - 0.1) / 0.9 * steps, 0).astype(jnp.int32) + before
  if of.signed:
    place = jnp.where(x < 0, 126 - place, 128 + place)
  else:
    place = 1 + place
  low = jnp.clip(place - 1, 0, 253)
  above = lambda i: (x > of.thresholds(i)).astype(jnp.int32)
  return low + above(low) + above(low + 1)


def encode(x: jax.Array, of: Map, largest: Callable) -> Dynamic8:
  """Codes of x with the scales of their blocks, as `largest` finds them in |x|."""
  scale = largest(jnp.abs(x))
  codes = nearest(x / jnp.where(scale > 0, scale, 1), of)
  if not of.signed:
    codes = jnp.maximum(codes, (x > 0).astype(jnp.int32))
  return Dynamic8(codes.astype(jnp.uint8), scale)
