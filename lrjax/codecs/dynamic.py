"""The 8-bit dynamic map of block-wise quantization (Dettmers et al., arXiv 2110.02861)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.checks import positive_int
from lrjax.codecs.affine import join, split
from lrjax.types import Codec


class Dynamic8(NamedTuple):
  """An array in 8 bits.

  Attributes:
    codes: uint8, of the array's shape: places in the map.
    scale: float32 (n_blocks,), the largest magnitude of each block.
  """

  codes: jax.Array
  scale: jax.Array


def dynamic8(signed: bool = True, block: int = 256) -> Codec:
  r"""Stores the nearest of 256 values of a map, times the largest magnitude of a block.

  The map has seven decades, each with twice as many steps as the one below: relative
  precision for small values, absolute precision for large ones, as moments need. Blocks
  run along the first axis first, so those of moments (r, k) run along the rank, and a
  split of k between devices cuts none of them where r k / devices divides by `block`. Of
  a matrix split along its first axis each part must divide by `block`, or else the
  moments are gathered at every step.

  With `signed=False` what is positive never becomes zero, but the smallest positive value
  of the map: a second moment of zero would make the update infinite.

  Args:
    signed: whether values may be negative; first moments are, second moments are not.
    block: values that share a scale, a power of two; the last block may be shorter.

  Returns:
    A `Codec` whose stored form is a `Dynamic8`: `1 + 4 / block` bytes a value.

  Raises:
    ValueError: if `block` is no power of two.

  >>> c = dynamic8()
  >>> stored = c.encode(jnp.array([1.0, -0.5, 0.0]))
  >>> print(stored.codes, c.decode(stored).round(2))
  [255  35 127] [ 1.  -0.5  0. ]
  """
  block = positive_int('block', block)
  if block & (block - 1):
    raise ValueError(f'`block` must be a power of two, got {block}')
  table = dynamic_map(signed)
  nearest = bisector((table[:-1] + table[1:]) / 2)

  def encode(x: jax.Array) -> Dynamic8:
    blocks = in_blocks(x.T, block)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True).astype(jnp.float32)
    unit = blocks / jnp.where(scale > 0, scale, 1)
    codes = nearest(unit)
    if not signed:
      codes = jnp.maximum(codes, (blocks > 0).astype(jnp.uint8))
    return Dynamic8(join(codes, x.T.shape).T, scale.reshape(-1))

  def decode(stored: Dynamic8) -> jax.Array:
    codes = in_blocks(stored.codes.T, block)
    scale = stored.scale.reshape(*codes.shape[:-1], 1)
    return join(jnp.asarray(table)[codes] * scale, stored.codes.T.shape).T

  return Codec(encode, decode)


def in_blocks(x: jax.Array, block: int) -> jax.Array:
  """All values in blocks (..., block), the last one filled up with zeros."""
  # Flattened, a matrix whose axes are both split between devices would be gathered.
  if x.ndim > 1 and x.shape[-1] % block == 0:
    return x.reshape(*x.shape[:-1], -1, block)
  return split(x, block)


def bisector(thresholds: np.ndarray) -> Callable:
  """`x -> how many of 255 ascending thresholds lie below`, as uint8, for |x| <= 1.

  A table by sign, exponent and 8 bits of mantissa, then one comparison: no two thresholds
  lie so close that a place of the table holds both. Bisection takes 8 comparisons.
  """
  first, last = 102 << 8, 127 << 8  # 2^-25, below all thresholds but zero, and 1
  places = np.arange(first, last + 1, dtype=np.uint32) << 15
  smallest = places.view(np.float32), -(places | 0x7FFF).view(np.float32)
  smallest[0][0] = 0.0
  table = np.searchsorted(thresholds, np.concatenate(smallest)).astype(np.uint8)
  above = np.append(thresholds, np.float32(np.inf))

  def below(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.clip((bits & 0x7FFFFFFF) >> 15, first, last) - first
    guess = jnp.asarray(table)[place + jnp.where(x < 0, len(places), 0)]
    return guess + (x > jnp.asarray(above)[guess]).astype(jnp.uint8)

  return below


def widened(x: Any, signed: bool) -> Any:
  """A moment as it is computed with: decoded if it is stored in 8 bits."""
  return dynamic8(signed, block_of(x)).decode(x) if isinstance(x, Dynamic8) else x


def stored_like(x: jax.Array, like: Any, signed: bool) -> Any:
  """`x` in the form, or else the dtype, of `like`."""
  if isinstance(like, Dynamic8):
    return dynamic8(signed, block_of(like)).encode(x)
  return x.astype(like.dtype)


def block_of(x: Dynamic8) -> int:
  """The size of its blocks, a power of two, or one that is equivalent."""
  block = 1
  while -(-x.codes.size // block) > x.scale.size:
    block *= 2
  return block


def dynamic_map(signed: bool) -> np.ndarray:
  """The 256 values in ascending order: midpoints of steps in seven decades, 0 and 1."""
  f = np.float32
  decades = []
  for i in range(7):
    n = 2 ** (i + (not signed))
    # Counted from both ends by a float32 step, as torch does, to have the published bits.
    up, step = np.arange(n + 1), float((f(1) - f(0.1)) / f(n))
    edges = np.where(up < (n + 1) // 2, f(0.1) + step * up, 1 - step * (n - up))
    edges = edges.astype(f)
    decades.append((edges[:-1] + edges[1:]) / f(2) * f(10.0 ** (i - 6)))
  positive = np.concatenate(decades)
  negative = -positive if signed else positive[:0]
  return np.sort(np.concatenate([negative, np.array([0, 1], f), positive]))
