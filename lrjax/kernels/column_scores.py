"""How much of a gradient each column of an orthogonal Q holds; Q^T G is never written."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lrjax.bases.heaviest import NORMS
from lrjax.bases.qr import HIGHEST, mm
from lrjax.checks import named
from lrjax.kernels import blocks
from lrjax.kernels.blocks import Side
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.tiles import Tile
from lrjax.stacks import wide


def column_scores(
  q: jax.Array,
  g: jax.Array,
  *,
  norm: Literal['l1', 'l2'] = 'l1',
  side: Side = 'in',
  implementation: str | None = None,
) -> jax.Array:
  r"""The size of every row of Q^T G, by which `lrjax.dct` chooses its columns.

  .. math:: \sum_j |S_{ij}| \text{ or } \sum_j S_{ij}^2, \quad S = Q^\top G

  The kernels sum while S is on chip: d numbers leave it, not d k. Products are of full
  float32 precision, as the definition's. They are for one device, or for the inside of a
  `jax.shard_map`. They have been checked by interpretation and by lowering, not yet on a
  TPU or GPU.

  Args:
    q: Q (d, d), or some of its columns (d, n).
    g: the gradient as its leaf lies: (d, k) for side 'in', (k, d) for 'out'.
    norm: 'l1' or 'l2', the latter squared.
    side: which axis of the leaf is transformed.
    implementation: see `lrjax.kernels.dispatch`.

  Returns:
    (n,), float32 or wider.

  Raises:
    ValueError: for shapes that do not fit, unknown names, and kernels that the device or
      the sizes do not allow.

  >>> print(column_scores(jnp.eye(2), jnp.array([[1.0, -2.0], [0.0, 1.0]])))
  [3. 1.]
  """
  named('norm', norm, NORMS)
  sizes = blocks.sizes_of(q.shape, g.shape, side)
  options = dict(norm=norm, side=side)
  return dispatch(COLUMN_SCORES, implementation, sizes, g.dtype, q, g, **options)


def _xla(q: jax.Array, g: jax.Array, *, norm: str, side: Side) -> jax.Array:
  g = wide(g if side == 'in' else g.T)
  return NORMS[norm](mm(q.T, g)).sum(axis=1)


def _transformed(q: jax.Array, g: jax.Array, side: Side) -> jax.Array:
  """(Q^T G)^T of blocks: columns of S first, so that sums of its rows lie along lanes."""
  axis, _ = blocks.along(side, 0, 1)
  dims = ((axis,), (0,)), ((), ())
  return jax.lax.dot_general(
    wide(g), wide(q), dims, precision=HIGHEST, preferred_element_type=jnp.float32
  )


def _tpu(
  q: jax.Array, g: jax.Array, *, norm: str, side: Side, tile: Tile, interpret: Any
) -> jax.Array:
  (d, n), (_, k) = q.shape, blocks.along(side, *g.shape)
  bd, bk, bn = min(tile['d'], d), min(tile['k'], k), min(tile['r'], n)
  scores = pl.pallas_call(
    functools.partial(_tpu_kernel, norm=norm, side=side, d=d, k=k),
    out_shape=jax.ShapeDtypeStruct((1, n), jnp.float32),
    grid=(pl.cdiv(n, bn), pl.cdiv(k, bk), pl.cdiv(d, bd)),
    in_specs=[
      pl.BlockSpec((bd, bn), lambda m, j, i: (i, m)),
      blocks.leaf_spec(side, bd, bk, lambda m, j, i: (i, j)),
    ],
    out_specs=pl.BlockSpec((1, bn), lambda m, j, i: (0, m)),
    scratch_shapes=[pltpu.VMEM((bk, bn), jnp.float32)],
    compiler_params=blocks.tpu_params('parallel', 'arbitrary', 'arbitrary'),
    interpret=interpret,
  )(q, g)
  return scores[0]


def _tpu_kernel(
  q_ref: Any,
  g_ref: Any,
  out_ref: Any,
  sum_ref: Any,
  *,
  norm: str,
  side: Side,
  d: int,
  k: int,
) -> None:
  j, i = pl.program_id(1), pl.program_id(2)

  @pl.when((j == 0) & (i == 0))
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  @pl.when(i == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  on_d, on_k = blocks.along(side, 0, 1)
  start = i * q_ref.shape[0]
  q = blocks.inside(q_ref[...], 0, start, d)
  g = blocks.inside(g_ref[...], on_d, start, d)
  g = blocks.inside(g, on_k, j * sum_ref.shape[0], k)
  sum_ref[...] += _transformed(q, g, side)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    out_ref[...] += jnp.sum(NORMS[norm](sum_ref[...]), axis=0, keepdims=True)


def _gpu(
  q: jax.Array, g: jax.Array, *, norm: str, side: Side, tile: Tile, interpret: Any
) -> jax.Array:
  (_, n), (_, k) = q.shape, blocks.along(side, *g.shape)
  grid = pl.cdiv(n, tile['r']), pl.cdiv(k, tile['k'])
  parts = pl.pallas_call(
    functools.partial(_gpu_kernel, norm=norm, side=side, tile=tile),
    out_shape=jax.ShapeDtypeStruct((grid[1], n), jnp.float32),
    grid=grid,
    compiler_params=blocks.gpu_params(),
    interpret=interpret,
  )(q, g)
  return parts.sum(axis=0)


def _gpu_kernel(
  q_ref: Any, g_ref: Any, out_ref: Any, *, norm: str, side: Side, tile: Tile
) -> None:
  ns = blocks.span(pl.program_id(0), tile['r'])
  ks = blocks.span(pl.program_id(1), tile['k'])

  def add(i: jax.Array, s: jax.Array) -> jax.Array:
    ds = blocks.span(i, tile['d'])
    g = blocks.read(g_ref, *blocks.along(side, ds, ks))
    return s + _transformed(blocks.read(q_ref, ds, ns), g, side)

  s = jnp.zeros((tile['k'], tile['r']), jnp.float32)
  s = jax.lax.fori_loop(0, pl.cdiv(q_ref.shape[0], tile['d']), add, s)
  row = blocks.span(pl.program_id(1), 1)
  blocks.store(out_ref, row, ns, jnp.sum(NORMS[norm](s), axis=0)[None])


def _fits(platform: str, tile: Tile, sizes: Mapping[str, int], **options: Any) -> bool:
  d, k, n = tile['d'], tile['k'], tile['r']
  if platform == 'gpu':
    return 4 * blocks.STAGES * d * (n + k) <= blocks.SHARED
  return 4 * (d * n + d * k + 2 * k * n) <= blocks.VMEM


COLUMN_SCORES = Operation('column_scores', _xla, _tpu, _gpu, _fits)
