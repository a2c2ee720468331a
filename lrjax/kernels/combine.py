"""P X + c F of a whole leaf, F the gradient or the sign of what a subspace misses."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lrjax.kernels import blocks
from lrjax.kernels.blocks import Side
from lrjax.kernels.tiles import Tile


def combine(
  platform: str,
  p: jax.Array,  # (d, r)
  g: jax.Array,  # the leaf, as it lies
  x: jax.Array,  # (r, k)
  c: jax.Array,  # (1, k)
  low: jax.Array | None,  # (r, k)
  *,
  side: Side,
  tile: Tile,
  interpret: Any,
) -> jax.Array:
  """P X + c G, or P X + c sign(G - P low), as g lies and in its dtype; one pass over g."""
  c = c.reshape(blocks.along(side, 1, c.size))
  call = _tpu if platform == 'tpu' else _gpu
  lows = (x,) if low is None else (x, low)
  return call(p, c, g, *lows, side=side, tile=tile, interpret=interpret)


def _tpu(
  p: jax.Array,
  c: jax.Array,
  g: jax.Array,
  *lows: jax.Array,
  side: Side,
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
  f = _part(g_ref[...], *map(up, low_ref))
  out_ref[...] = (up(x_ref) + c_ref[...] * f).astype(out_ref.dtype)


def _gpu(
  p: jax.Array,
  c: jax.Array,
  g: jax.Array,
  *lows: jax.Array,
  side: Side,
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
  f = _part(blocks.read(g_ref, *here), *low)
  blocks.store(out_ref, *here, inside + c * f)


def _part(g: jax.Array, low: jax.Array | None = None) -> jax.Array:
  """G in float32; given P low, the sign of what it misses."""
  g = g.astype(jnp.float32)
  if low is None:
    return g
  # Not jnp.sign: its lowering asks which TPU it is for, where there may be none.
  up, down = (s.astype(jnp.float32) for s in (g > low, g < low))
  return up - down


def check(sizes: Mapping[str, int], **lows: jax.Array) -> None:
  """Raises ValueError naming one that is not (r, k)."""
  for name, x in lows.items():
    if x.shape != (want := (sizes['r'], sizes['k'])):
      raise ValueError(f'`{name}` must be (r, k) = {want}, got {x.shape}')


def fits(platform: str, tile: Tile, sizes: Mapping[str, int], lows: int) -> bool:
  """Whether a tile's working set fits on chip, with `lows` arrays (r, k)."""
  if platform == 'gpu':
    operands = (tile['d'] + lows * tile['k']) * tile['r']
    return 4 * blocks.STAGES * operands <= blocks.SHARED
  r, d, k = sizes['r'], min(tile['d'], sizes['d']), min(tile['k'], sizes['k'])
  return 4 * (d * r + lows * r * k + 3 * d * k) <= blocks.VMEM
