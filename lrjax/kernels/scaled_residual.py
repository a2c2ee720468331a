"""Fira's update in one pass over the gradient that writes no second one."""

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
from lrjax.residuals.scaled import fira, ratio, shrinkage
from lrjax.stacks import wide


def scaled_residual(
  p: jax.Array,
  g: jax.Array,
  low: jax.Array,
  u: jax.Array,
  last: jax.Array,
  *,
  scale: float = 1.0,
  mode: str = 'official',
  per: str = 'channel',
  growth_limit: float = 1.01,
  floor: float | None = 0.0,
  side: Side = 'in',
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  r"""The update of `lrjax.residuals.fira` for an orthonormal basis.

  .. math::
    \Delta = \alpha P U + \frac{\phi}{\ell} (G - a P R)
    = \frac{\phi}{\ell} G + P \left(\alpha U - \frac{a \phi}{\ell} R\right)

  with a = alpha in the 'official' mode, where l divides as the limit on the growth of a
  norm says. That norm needs the columns of G only as sums of squares,

  .. math::
    \|(G - a P R) \phi\|_F^2
    = \sum_j \phi_j^2 \left(\|G_{:,j}\|^2 - a (2 - a) \|R_{:,j}\|^2\right),

  so a first pass reads G for the sums, and a second one reads G and writes the update.
  In 'paper' mode a = 1, likewise the update times alpha: where P holds nearly all of G
  the difference of the sums keeps fewer digits, about `1e-7 |G|^2 / |G - P R|^2`.

  The kernels are for one device, or for the inside of a `jax.shard_map`. They have been
  checked by interpretation and by lowering, not yet on a TPU or GPU.

  Args:
    p: P (d, r), orthonormal columns.
    g: the gradient as its leaf lies: (d, k) for side 'in', (k, d) for 'out'.
    low: R = P^T G, (r, k).
    u: the inner update (r, k).
    last: the limit's state [], negative before the first step.
    scale: alpha.
    mode: 'official' or 'paper'.
    per: a ratio phi for each column ('channel'), or one for the matrix ('tensor').
    growth_limit: how many times the norm may grow in one step.
    floor: norms not above it are not remembered; None: all are.
    side: which axis of the leaf is compressed.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    (the update in shape and dtype of g, the limit's state).

  Raises:
    ValueError: for shapes that do not fit, unknown names, and kernels that the device or
      the sizes do not allow.

  >>> p, g = jnp.eye(2, 1), jnp.array([[3.0], [4.0]])
  >>> scaled_residual(p, g, g[:1], jnp.array([[1.5]]), jnp.float32(-1))
  (Array([[1.5],
         [2. ]], dtype=float32), Array(2., dtype=float32))
  """
  sizes = blocks.sizes_of(p.shape, g.shape, side)
  check(sizes, low=low, u=u)
  options = dict(
    scale=scale, mode=mode, per=per, growth_limit=growth_limit, floor=floor, side=side
  )
  arrays = p, g, low, u, last
  return dispatch(SCALED_RESIDUAL, implementation, sizes, g.dtype, *arrays, **options)


def _xla(
  p: jax.Array,
  g: jax.Array,
  low: jax.Array,
  u: jax.Array,
  last: jax.Array,
  *,
  scale: float,
  mode: str,
  side: Side,
  **limit: Any,
) -> tuple[jax.Array, jax.Array]:
  up = lambda x: blocks.up(p, x, 'in')
  matrix = wide(g if side == 'in' else g.T)
  out, last = fira(scale, mode, **limit).after(matrix, low, u, up, last)
  return (out if side == 'in' else out.T).astype(g.dtype), last


def _kernel(
  platform: str,
  p: jax.Array,
  g: jax.Array,
  low: jax.Array,
  u: jax.Array,
  last: jax.Array,
  *,
  scale: float,
  mode: str,
  per: str,
  growth_limit: float,
  floor: float | None,
  side: Side,
  **how: Any,
) -> tuple[jax.Array, jax.Array]:
  inside, outside = (scale, 1.0) if mode == 'official' else (1.0, scale)
  energy = lambda x, axis: jnp.sum(jnp.square(wide(x)), axis=axis)
  rest = energy(g, blocks.along(side, 0, 1)[0])
  rest = rest - inside * (2 - inside) * energy(low, 0)
  phi = ratio(u, low, per)
  norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(phi) * rest[None]), 0))
  shrink, last = shrinkage(norm, last, growth_limit, floor)
  phi = jnp.where(jnp.isfinite(norm), outside * phi / shrink, 0.0)
  x = scale * u - inside * phi * low
  c = jnp.broadcast_to(phi, (1, low.shape[1]))
  return combine(platform, p, g, x, c, None, side=side, **how), last


def _fits(platform: str, tile: Tile, sizes: Mapping[str, int], **options: Any) -> bool:
  return fits(platform, tile, sizes, lows=1)


SCALED_RESIDUAL = Operation(
  'scaled_residual',
  _xla,
  functools.partial(_kernel, 'tpu'),
  functools.partial(_kernel, 'gpu'),
  _fits,
)
