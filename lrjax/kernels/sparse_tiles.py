"""Products with a W that is formed tile by tile, on a TPU; see sparse_plus_low_rank."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lrjax.kernels import blocks
from lrjax.kernels.tiles import Tile
from lrjax.parameterizations.sparse import Shards

HIGHEST = jax.lax.Precision.HIGHEST
# Contractions of two matrices, without a transpose in memory.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


class Weight(NamedTuple):
  """W = a b + S: a (in, r), b (r, out), values and index (nnz,)."""

  a: jax.Array
  b: jax.Array
  values: jax.Array
  index: jax.Array


def dot(x: jax.Array, y: jax.Array, dims: tuple, precision: Any = None) -> jax.Array:
  """A product in float32 or wider."""
  dtype = jnp.promote_types(x.dtype, y.dtype)
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (dims, ((), ())),
    precision=precision,
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


def _one_hot(places: jax.Array, size: int) -> jax.Array:
  """(size, n), column i with a one in row `places[0, i]`."""
  row = jax.lax.broadcasted_iota(jnp.int32, (size, places.shape[1]), 0)
  return (row == places).astype(jnp.float32)


def _block(a: Any, b: Any, rows: Any, columns: Any, values: Any) -> jax.Array:
  """A block of W from blocks of a, b and its entries (1, 1, n)."""
  left = _one_hot(rows[0], a.shape[0]) * values[0].astype(jnp.float32)
  right = _one_hot(columns[0], b.shape[1])
  return dot(a[...], b[...], NN) + dot(left, right, NT, HIGHEST)


def _product_kernel(
  x: Any, a: Any, b: Any, rows: Any, columns: Any, values: Any, out: Any, total: Any, *,
  dims: tuple,
) -> None:  # fmt: skip
  @pl.when(pl.program_id(2) == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  W = _block(a, b, rows, columns, values)
  total[...] += dot(x[...], W.astype(x.dtype), dims)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    out[...] = total[...].astype(out.dtype)


def _values_kernel(
  x: Any, dy: Any, rows: Any, columns: Any, out: Any, total: Any, *, tokens: int
) -> None:
  i = pl.program_id(2)

  @pl.when(i == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  start = i * x.shape[0]
  ends = lambda ref: blocks.inside(ref[...], 0, start, tokens)
  total[...] += dot(ends(x), ends(dy), TN)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    left, right = (_one_hot(p[0], n) for p, n in zip((rows, columns), total.shape))
    picked = dot(total[...], left, TN, HIGHEST)  # (columns of the block, n)
    out[0] = jnp.sum(picked * right, axis=0, keepdims=True)


def tpu_product(
  backward: bool, x: jax.Array, W: Weight, *, shards: Shards, tile: Tile, interpret: Any
) -> jax.Array:
  """x W, or x W^T, with x (tokens, in) or (tokens, out)."""
  t, m, n = len(x), len(W.a) // shards[0], W.b.shape[1] // shards[1]
  bt = min(tile['t'], t)
  # Grid: tokens, blocks of the result, blocks that are summed over.
  at = (lambda f: lambda t, o, s: f(t, s, o)) if not backward else (lambda f: f)
  ins, outs = (n, m) if backward else (m, n)
  entries = _entries(W, shards)
  place = pl.BlockSpec(
    (1, 1, entries[0].shape[2]), at(lambda t, i, j: (i * shards[1] + j, 0, 0))
  )
  result = len(W.a) if backward else W.b.shape[1]
  return pl.pallas_call(
    functools.partial(_product_kernel, dims=NT if backward else NN),
    out_shape=jax.ShapeDtypeStruct((t, result), x.dtype),
    grid=(pl.cdiv(t, bt), *(shards if backward else shards[::-1])),
    in_specs=[
      pl.BlockSpec((bt, ins), lambda t, o, s: (t, s)),
      pl.BlockSpec((m, W.a.shape[1]), at(lambda t, i, j: (i, 0))),
      pl.BlockSpec((W.b.shape[0], n), at(lambda t, i, j: (0, j))),
      *[place] * 3,
    ],
    out_specs=pl.BlockSpec((bt, outs), lambda t, o, s: (t, o)),
    scratch_shapes=[pltpu.VMEM((bt, outs), jnp.float32)],
    compiler_params=blocks.tpu_params('parallel', 'parallel', 'arbitrary'),
    interpret=interpret,
  )(x, W.a, W.b, *entries)


def tpu_values(
  pair: tuple, W: Weight, *, shards: Shards, tile: Tile, interpret: Any
) -> jax.Array:
  x, dy = pair
  t, m, n = len(x), len(W.a) // shards[0], W.b.shape[1] // shards[1]
  bt = min(tile['t'], t)
  rows, columns, values = _entries(W, shards)
  place = pl.BlockSpec(
    (1, 1, values.shape[2]), lambda i, j, t: (i * shards[1] + j, 0, 0)
  )
  out = pl.pallas_call(
    functools.partial(_values_kernel, tokens=t),
    out_shape=jax.ShapeDtypeStruct(values.shape, jnp.float32),
    grid=(*shards, pl.cdiv(t, bt)),
    in_specs=[
      pl.BlockSpec((bt, m), lambda i, j, t: (t, i)),
      pl.BlockSpec((bt, n), lambda i, j, t: (t, j)),
      place,
      place,
    ],
    out_specs=place,
    scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
    compiler_params=blocks.tpu_params('parallel', 'parallel', 'arbitrary'),
    interpret=interpret,
  )(x, dy, rows, columns)
  return out.reshape(-1)


def _entries(W: Weight, shards: Shards) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rows, columns and values of each block's entries, (blocks, 1, n) each."""
  deal = lambda x: x.reshape(shards[0] * shards[1], 1, -1)
  width = W.b.shape[1] // shards[1]
  return deal(W.index // width), deal(W.index % width), deal(W.values)
