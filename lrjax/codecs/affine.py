"""Group-wise asymmetric codes of 8 or 4 bits, two 4-bit codes a byte (Q-GaLore)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lrjax.checks import positive_int
from lrjax.types import Codec

# Smallest range a group is given, as in the code of Q-GaLore.
NARROWEST = 1e-5


class Grid(NamedTuple):
  """The values `scale * (code - zero)`, code in 0 to 2^bits - 1; one grid a group."""

  scale: jax.Array
  zero: jax.Array


def affine(bits: int = 8, group: int = 256) -> Codec:
  r"""Stores integer codes between the smallest and the largest value of each group.

  .. math::
    s = \frac{\max(x, 0) - \min(x, 0)}{2^b - 1}, \quad
    z = -\mathrm{round}(\min(x, 0) / s), \quad
    c = \mathrm{round}(x / s) + z

  decoded to :math:`s (c - z)`, at most `s / 2` away. Zero is always on the grid, unlike
  in the code of Q-GaLore, whose clamped z cannot hold a group on one side of zero. The
  array is taken row by row, so the groups of a basis (d, r) run along the rank first, and
  a split of d between devices cuts none of them where r d / devices divides by `group`.

  Args:
    bits: 8 or 4; two codes of 4 bits share a byte.
    group: values that share a scale; the last group may be shorter.

  Returns:
    A `Codec`. The stored form is a dict of `codes` (uint8; shape of x, or half of its
    last axis at 4 bits, whose odd last column is kept in `odd`), `scale` and `zero`
    (float32, one a group): `bits / 8 + 8 / group` bytes a value.

  Raises:
    ValueError: for other bits.

  >>> c = affine(bits=4)
  >>> stored = c.encode(jnp.array([[-1.0, 0.0, 0.55, 2.0]]))
  >>> print(stored['codes'].shape, c.decode(stored).round(1))
  (1, 2) [[-1.   0.   0.6  2. ]]
  """
  if bits not in (4, 8):
    raise ValueError(f'`bits` must be 4 or 8, got {bits!r}')
  group = positive_int('group', group)

  def encode(x: jax.Array) -> dict[str, jax.Array]:
    blocks = split(x, group)
    grid = grid_of(blocks, bits)
    codes = join(codes_of(blocks, grid, bits, jnp.round), x.shape)
    codes = pack(codes) if bits == 4 else dict(codes=codes)
    return dict(codes, scale=grid.scale[:, 0], zero=grid.zero[:, 0])

  def decode(stored: dict[str, jax.Array]) -> jax.Array:
    codes = unpack(stored) if bits == 4 else stored['codes']
    grid = Grid(stored['scale'][:, None], stored['zero'][:, None])
    return join(values_of(split(codes, group), grid), codes.shape)

  return Codec(encode, decode)


def grid_of(x: jax.Array, bits: int) -> Grid:
  """The grids of groups (..., group), each with zero among its values."""
  low = jnp.minimum(x.min(axis=-1, keepdims=True), 0)
  high = jnp.maximum(x.max(axis=-1, keepdims=True), 0)
  # What is not finite passes into the scale, so that it stays visible.
  scale = jnp.maximum(high - low, NARROWEST) / (2**bits - 1)
  return Grid(scale.astype(jnp.float32), -jnp.round(low / scale).astype(jnp.float32))


def codes_of(x: jax.Array, grid: Grid, bits: int, rounding: Callable) -> jax.Array:
  """The codes (uint8) of values (..., group); `rounding` of x / scale to integers."""
  codes = rounding(x / grid.scale) + grid.zero
  return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)


def values_of(codes: jax.Array, grid: Grid) -> jax.Array:
  """The values (..., group) of codes."""
  return grid.scale * (codes.astype(jnp.float32) - grid.zero)


def stochastic(key: jax.Array) -> Callable:
  """Rounds up with the probability of the fraction, so that the mean is x.

  >>> print(stochastic(jax.random.key(0))(jnp.full(8, 2.25)))
  [2. 2. 2. 2. 2. 3. 2. 2.]
  """

  def rounding(x: jax.Array) -> jax.Array:
    low = jnp.floor(x)
    return low + (jax.random.uniform(key, x.shape) < x - low)

  return rounding


def pack(codes: jax.Array) -> dict[str, jax.Array]:
  """Codes below 16, two a byte along the last axis: columns 0 and 1, 2 and 3, ...

  An odd last column is kept by itself as `odd`, and `codes` is left out where it would
  be empty, so that the number of columns can be told from the shapes.
  """
  even = codes.shape[-1] // 2 * 2
  out = {}
  if even:
    out['codes'] = codes[..., 0:even:2] | (codes[..., 1:even:2] << 4)
  if codes.shape[-1] > even:
    out['odd'] = codes[..., even:]
  return out


def unpack(packed: dict[str, jax.Array]) -> jax.Array:
  """The codes that `pack` was given."""
  parts = []
  if 'codes' in packed:
    pair = jnp.stack([packed['codes'] & 15, packed['codes'] >> 4], axis=-1)
    parts.append(pair.reshape(*pair.shape[:-2], -1))
  if 'odd' in packed:
    parts.append(packed['odd'])
  return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def split(x: jax.Array, size: int) -> jax.Array:
  """All values in blocks (n_blocks, size), the last one filled up with zeros."""
  flat = x.reshape(-1)
  return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)


def join(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The array of which `split` made blocks."""
  if blocks.size > (size := math.prod(shape)):
    blocks = blocks.reshape(-1)[:size]
  return blocks.reshape(shape)
