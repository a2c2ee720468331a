"""FRUGAL's update in one pass over the gradient."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.kernels import blocks
from lrjax.kernels.blocks import Side
from lrjax.kernels.combine import check, combine, fits
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.tiles import Tile
from lrjax.residuals.plain import state_free
from lrjax.stacks import wide


def signed_residual(
  p: jax.Array,
  g: jax.Array,
  low: jax.Array,
  u: jax.Array,
  *,
  scale: float = 1.0,
  inactive_scale: float = 1.0,
  side: Side = 'in',
  implementation: str | None = None,
) -> jax.Array:
  r"""The update of `lrjax.residuals.state_free('sign')`.

  .. math:: \Delta = s_p \left(P U + s_i\, \mathrm{sign}(G - P R)\right)

  The kernels read G once and write the update, both products stay on chip. They are for
  one device, or for the inside of a `jax.shard_map`. They have been checked by
  interpretation and by lowering, not yet on a TPU or GPU.

  Args:
    p: P (d, r), orthonormal columns.
    g: the gradient as its leaf lies: (d, k) for side 'in', (k, d) for 'out'.
    low: R = P^T G, (r, k).
    u: the inner update (r, k).
    scale: s_p.
    inactive_scale: s_i.
    side: which axis of the leaf is compressed.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    The update in shape and dtype of g.

  Raises:
    ValueError: for shapes that do not fit, unknown names, and kernels that the device or
      the sizes do not allow.

  >>> p, g = jnp.eye(2, 1), jnp.array([[3.0], [-4.0]])
  >>> print(signed_residual(p, g, g[:1], jnp.array([[0.5]]), inactive_scale=0.1))
  [[ 0.5]
   [-0.1]]
  """
  sizes = blocks.sizes_of(p.shape, g.shape, side)
  check(sizes, low=low, u=u)
  options = dict(scale=scale, inactive_scale=inactive_scale, side=side)
  arrays = p, g, low, u
  return dispatch(SIGNED_RESIDUAL, implementation, sizes, g.dtype, *arrays, **options)


def _xla(
  p: jax.Array,
  g: jax.Array,
  low: jax.Array,
  u: jax.Array,
  *,
  scale: float,
  inactive_scale: float,
  side: Side,
) -> jax.Array:
  up = lambda x: blocks.up(p, x, 'in')
  matrix = wide(g if side == 'in' else g.T)
  residual = state_free('sign', inactive_scale, scale)
  out, _ = residual.after(matrix, low, u, up, ())
  return (out if side == 'in' else out.T).astype(g.dtype)


def _kernel(
  platform: str,
  p: jax.Array,
  g: jax.Array,
  low: jax.Array,
  u: jax.Array,
  *,
  scale: float,
  inactive_scale: float,
  **how: Any,
) -> jax.Array:
  c = jnp.full((1, low.shape[1]), scale * inactive_scale, jnp.float32)
  return combine(platform, p, g, scale * u, c, low, **how)


def _fits(platform: str, tile: Tile, sizes: Mapping[str, int], **options: Any) -> bool:
  return fits(platform, tile, sizes, lows=2)


SIGNED_RESIDUAL = Operation(
  'signed_residual',
  _xla,
  functools.partial(_kernel, 'tpu'),
  functools.partial(_kernel, 'gpu'),
  _fits,
)
