"""P X + c F of a whole leaf, F the gradient or the sign of what a subspace misses."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lrjax.kernels import blocks
from lrjax.kernels.blocks import Side
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.tiles import Tile


def lift_and_add(
  p: jax.Array,
  g: jax.Array,
  x: jax.Array,
  c: jax.Array,
  y: jax.Array | None = None,
  *,
  side: Side = 'in',
  implementation: str | None = None,
) -> jax.Array:
  r"""An update with a part outside the subspace, from its parts.

  .. math:: \Delta = P X + c F, \quad F = G \text{ or } \mathrm{sign}(G - P Y)

  The first F is that of `lrjax.residuals.fira` on an orthonormal basis, the second that of
  `lrjax.state_free('sign')` (FRUGAL). The kernels read G once and write the update,
  products with P stay on chip. They are for one device, or for the inside of a
  `jax.shard_map(..., check_vma=False)`. They have been checked by interpretation and by
  lowering, not yet on a TPU or GPU.

  Args:
    p: P (d, r).
    g: the gradient G as its leaf lies: (d, k) for side 'in', (k, d) for 'out'.
    x: X (r, k).
    c: a factor of each column, (1, k).
    y: Y (r, k), for the sign; None: F is G.
    side: which axis of the leaf is compressed.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    The update in shape and dtype of g; the arithmetic is in float32 or wider.

  Raises:
    ValueError: for shapes that do not fit, unknown names, and kernels that the device or
      the sizes do not allow.

  >>> p, g = jnp.eye(2, 1), jnp.array([[3.0], [-4.0]])
  >>> x, c = jnp.array([[0.5]]), jnp.array([[0.1]])
  >>> print(lift_and_add(p, g, x, c), lift_and_add(p, g, x, c, g[:1]))
  [[ 0.8]
   [-0.4]] [[ 0.5]
   [-0.1]]
  """
  sizes = blocks.sizes_of(p.shape, g.shape, side)
  want = dict(x=(sizes['r'], sizes['k']), c=(1, sizes['k']), y=(sizes['r'], sizes['k']))
  for (name, shape), a in zip(want.items(), (x, c, y)):
    if a is not None and a.shape != shape:
      raise ValueError(f'`{name}` must be of shape {shape}, got {a.shape}')
  lows = (x,) if y is None else (x, y)
  c = c.reshape(blocks.along(side, 1, c.size))
  options = dict(side=side, signed=y is not None)
  return dispatch(
    LIFT_AND_ADD, implementation, sizes, g.dtype, p, c, g, *lows, **options
  )


def _xla(
  p: jax.Array,
  c: jax.Array,
  g: jax.Array,
  *lows: jax.Array,
  side: Side,
  signed: bool,
) -> jax.Array:
  x, *low = (blocks.up(p, low, side) for low in lows)
  return (x + c * _part(g.astype(x.dtype), *low)).astype(g.dtype)


def _tpu(
  p: jax.Array,
  c: jax.Array,
  g: jax.Array,
  *lows: jax.Array,
  side: Side,
  signed: bool,
  tile: Tile,
  interpret: Any,
) -> jax.Array:
  (d, r), (_, k) = p.shape, blocks.along(side, *g.shape)
  bd, bk = min(tile['d'], d), min(tile['k'], k)
  leaf = blocks.leaf_spec(side, bd, bk, lambda i, j: (i, j))
  return pl.pallas_call(
    functools.partial(_tpu_kernel, side=side),
    out_shape=jax.ShapeDtypeStruct(g.shape, g.dtype),
    # The blocks of P change slowest: where the tile holds all of d, P is read once.
    grid=(pl.cdiv(d, bd), pl.cdiv(k, bk)),
    in_specs=[
      pl.BlockSpec((bd, r), lambda i, j: (i, 0)),
      blocks.leaf_spec(side, 1, bk, lambda i, j: (0, j)),
      leaf,
      *(pl.BlockSpec((r, bk), lambda i, j: (0, j)) for _ in lows),
    ],
    out_specs=leaf,
    compiler_params=blocks.tpu_params('parallel', 'parallel'),
    interpret=interpret,
  )(p, c, g, *lows)


def _tpu_kernel(
  p_ref: Any, c_ref: Any, g_ref: Any, x_ref: Any, *refs: Any, side: Side
) -> None:
  *low_ref, out_ref = refs
  up = lambda ref: blocks.up(p_ref[...], ref[...], side)
  f = _part(g_ref[...].astype(jnp.float32), *map(up, low_ref))
  out_ref[...] = (up(x_ref) + c_ref[...] * f).astype(out_ref.dtype)


def _gpu(
  p: jax.Array,
  c: jax.Array,
  g: jax.Array,
  *lows: jax.Array,
  side: Side,
  signed: bool,
  tile: Tile,
  interpret: Any,
) -> jax.Array:
  (d, _), (_, k) = p.shape, blocks.along(side, *g.shape)
  return pl.pallas_call(
    functools.partial(_gpu_kernel, side=side, tile=tile),
    out_shape=jax.ShapeDtypeStruct(g.shape, g.dtype),
    grid=(pl.cdiv(k, tile['k']), pl.cdiv(d, tile['d'])),
    compiler_params=blocks.gpu_params(),
    interpret=interpret,
  )(p, c, g, *lows)


def _gpu_kernel(
  p_ref: Any, c_ref: Any, g_ref: Any, *refs: Any, side: Side, tile: Tile
) -> None:
  *low_refs, out_ref = refs
  ks = blocks.span(pl.program_id(0), tile['k'])
  ds = blocks.span(pl.program_id(1), tile['d'])
  here = blocks.along(side, ds, ks)

  def add(i: jax.Array, sums: tuple) -> tuple:
    rs = blocks.span(i, tile['r'])
    p = blocks.read(p_ref, ds, rs)
    up = lambda ref: blocks.up(p, blocks.read(ref, rs, ks), side)
    return tuple(s + up(ref) for s, ref in zip(sums, low_refs))

  zeros = jnp.zeros(blocks.along(side, tile['d'], tile['k']), jnp.float32)
  steps = pl.cdiv(p_ref.shape[1], tile['r'])
  inside, *low = jax.lax.fori_loop(0, steps, add, (zeros,) * len(low_refs))
  c = blocks.read(c_ref, *blocks.along(side, blocks.span(0, 1), ks))
  f = _part(blocks.read(g_ref, *here).astype(jnp.float32), *low)
  blocks.store(out_ref, *here, inside + c * f)


def _part(g: jax.Array, low: jax.Array | None = None) -> jax.Array:
  """G; given P Y, the sign of what it misses."""
  if low is None:
    return g
  # Not jnp.sign: its lowering asks which TPU it is for, where there may be none.
  up, down = (s.astype(low.dtype) for s in (g > low, g < low))
  return up - down


def _fits(
  platform: str, tile: Tile, sizes: Mapping[str, int], *, signed: bool, **options: Any
) -> bool:
  lows = 1 + signed
  if platform == 'gpu':
    operands = (tile['d'] + lows * tile['k']) * tile['r']
    return 4 * blocks.STAGES * operands <= blocks.SHARED
  r, d, k = sizes['r'], min(tile['d'], sizes['d']), min(tile['k'], sizes['k'])
  return 4 * (d * r + lows * r * k + 3 * d * k) <= blocks.VMEM


LIFT_AND_ADD = Operation('lift_and_add', _xla, _tpu, _gpu, _fits)
