"""The 8-bit dynamic map of block-wise quantization (Dettmers et al., arXiv 2110.02861)."""

import numpy as np

import jax
import jax.numpy as jnp

from lrjax.checks import positive_int
from lrjax.codecs.affine import join, split
from lrjax.types import Codec


def dynamic8(signed: bool = True, block: int = 256) -> Codec:
  r"""Stores the nearest of 256 values of a map, times the largest magnitude of a block.

  The map has seven decades, each with twice as many steps as the one below: relative
  precision for small values, absolute precision for large ones, as moments need. Blocks
  run along the first axis first, so those of moments (r, k) run along the rank, and a
  split of k between devices cuts none of them where r k / devices divides by `block`.

  With `signed=False` what is positive never becomes zero, but the smallest positive value
  of the map: a second moment of zero would make the update infinite.

  Args:
    signed: whether values may be negative; first moments are, second moments are not.
    block: values that share a scale, a power of two; the last block may be shorter.

  Returns:
    A `Codec`. The stored form is a dict of `codes` (uint8, shape of x) and `scale`
    (float32, one a block): `1 + 4 / block` bytes a value.

  Raises:
    ValueError: if `block` is no power of two.

  >>> c = dynamic8()
  >>> c.decode(c.encode(jnp.array([1.0, -0.5, 1e-3, 0.0])))
  Array([ 1.        , -0.50078124,  0.00094375,  0.        ], dtype=float32)
  """
  block = positive_int('block', block)
  if block & (block - 1):
    raise ValueError(f'`block` must be a power of two, got {block}')
  table = dynamic_map(signed)
  thresholds = (table[:-1] + table[1:]) / 2
  if not signed:
    thresholds[0] = 0.0

  def encode(x: jax.Array) -> dict[str, jax.Array]:
    blocks = split(x.T, block)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True).astype(jnp.float32)
    unit = blocks / jnp.where(scale > 0, scale, 1)
    # A value on a threshold takes the lower code: so exact zeros stay zero.
    codes = jnp.searchsorted(thresholds, unit).astype(jnp.uint8)
    return dict(codes=join(codes, x.T.shape).T, scale=scale[:, 0])

  def decode(stored: dict[str, jax.Array]) -> jax.Array:
    codes = stored['codes'].T
    values = jnp.asarray(table)[split(codes, block)] * stored['scale'][:, None]
    return join(values, codes.shape).T

  return Codec(encode, decode)


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
