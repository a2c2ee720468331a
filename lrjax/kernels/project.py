"""R = P^T G: a gradient projected as it lies, P dequantized on the way."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from lrjax.kernels import blocks
from lrjax.kernels.blocks import Side
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.tiles import Tile


def project(
  p: jax.Array, g: jax.Array, *, side: Side = 'in', implementation: str | None = None
) -> jax.Array:
  r"""Projects a gradient onto a basis.

  .. math:: R = P^\top G

  The kernels read G once, tile by tile, and accumulate in float32. They are for one
  device, or for the inside of a `jax.shard_map`. They have been checked by
  interpretation and by lowering, not yet on a TPU or GPU.

  Args:
    p: P (d, r).
    g: the gradient as its leaf lies: (d, k) for side 'in', (k, d) for 'out'.
    side: which axis of the leaf is compressed.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    R (r, k), float32 or wider.

  Raises:
    ValueError: for shapes that do not fit, unknown names, and kernels that the device or
      the sizes do not allow.

  >>> p, g = jnp.eye(3, 2), jnp.arange(6.0).reshape(3, 2)
  >>> print(project(p, g))
  [[0. 1.]
   [2. 3.]]
  """
  sizes = blocks.sizes_of(p.shape, g.shape, side)
  return dispatch(PROJECT, implementation, sizes, g.dtype, p, g, side=side)


def _xla(p: jax.Array, g: jax.Array, *, side: Side) -> jax.Array:
  return blocks.down(p, g, side)


def _tpu(
  p: jax.Array, g: jax.Array, *, side: Side, tile: Tile, interpret: Any
) -> jax.Array:
  (d, r), (_, k) = p.shape, blocks.along(side, *g.shape)
  bd, bk = min(tile['d'], d), min(tile['k'], k)
  return pl.pallas_call(
    functools.partial(_tpu_kernel, side=side, d=d),
    out_shape=jax.ShapeDtypeStruct((r, k), jnp.float32),
    grid=(pl.cdiv(k, bk), pl.cdiv(d, bd)),
    in_specs=[
      pl.BlockSpec((bd, r), lambda j, i: (i, 0)),
      blocks.leaf_spec(side, bd, bk, lambda j, i: (i, j)),
    ],
    out_specs=pl.BlockSpec((r, bk), lambda j, i: (0, j)),
    compiler_params=blocks.tpu_params('parallel', 'arbitrary'),
    interpret=interpret,
  )(p, g)


def _tpu_kernel(p_ref: Any, g_ref: Any, out_ref: Any, *, side: Side, d: int) -> None:
  i = pl.program_id(1)

  @pl.when(i == 0)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  start = i * p_ref.shape[0]
  p = blocks.inside(p_ref[...], 0, start, d)
  g = blocks.inside(g_ref[...], blocks.along(side, 0, 1)[0], start, d)
  out_ref[...] += blocks.down(p, g, side)


def _gpu(
  p: jax.Array, g: jax.Array, *, side: Side, tile: Tile, interpret: Any
) -> jax.Array:
  (_, r), (_, k) = p.shape, blocks.along(side, *g.shape)
  return pl.pallas_call(
    functools.partial(_gpu_kernel, side=side, tile=tile),
    out_shape=jax.ShapeDtypeStruct((r, k), jnp.float32),
    grid=(pl.cdiv(k, tile['k']), pl.cdiv(r, tile['r'])),
    compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
  )(p, g)


def _gpu_kernel(
  p_ref: Any, g_ref: Any, out_ref: Any, *, side: Side, tile: Tile
) -> None:
  ks = blocks.span(pl.program_id(0), tile['k'])
  rs = blocks.span(pl.program_id(1), tile['r'])

  def add(i: jax.Array, out: jax.Array) -> jax.Array:
    ds = blocks.span(i, tile['d'])
    p = blocks.load(p_ref, ds, rs)
    g = blocks.load(g_ref, *blocks.along(side, ds, ks))
    return out + blocks.down(p, g, side)

  out = jnp.zeros((tile['r'], tile['k']), jnp.float32)
  out = jax.lax.fori_loop(0, pl.cdiv(p_ref.shape[0], tile['d']), add, out)
  blocks.store(out_ref, rs, ks, out)


def _fits(platform: str, tile: Tile, sizes: Any) -> bool:
  if platform == 'gpu':
    return True
  d, k, r = tile['d'], tile['k'], sizes['r']
  return 4 * (d * r + d * k + r * k) <= blocks.VMEM


PROJECT = Operation('project', _xla, _tpu, _gpu, _fits)
