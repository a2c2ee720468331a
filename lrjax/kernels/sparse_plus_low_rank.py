"""y = s (x a) b + x S without W in memory: each tile of it is formed where it is used."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lrjax.kernels import blocks
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.tiles import Tile
from lrjax.parameterizations import sparse
from lrjax.parameterizations.sparse import Shards

HIGHEST = jax.lax.Precision.HIGHEST
# Contractions of two matrices, without a transpose in memory.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def sparse_plus_low_rank_matmul(
  x: jax.Array,
  a: jax.Array,
  b: jax.Array,
  values: jax.Array,
  index: jax.Array,
  *,
  scale: float | jax.Array = 1.0,
  shards: Shards = (1, 1),
  implementation: str | None = None,
) -> jax.Array:
  r"""The product of `lrjax.sltrain`, with a gradient of reverse mode.

  .. math:: y = x W, \quad W = s\, a b + S

  S holds `values` at a support as `lrjax.parameterizations.sparse` stores it. The
  definition forms W once a product, and once more in the backward pass with a gradient of
  W beside it. The TPU kernels form it tile by tile: a tile's n entries are the product
  :math:`E^\top \mathrm{diag}(v) F` of rows of two identities, and the gradient of the
  values is read from a tile of :math:`x^\top dy` the same way, since a TPU neither
  scatters nor gathers in its vector memory. Nothing of in x out numbers reaches memory.

  The blocks of the support are the tiles: `shards` must cut W in blocks of sizes that are
  multiples of 128, and XLA serves all others. So many shards make the support stratified,
  every block has as many places. With t tokens a tile, forming a block of m x n costs
  density m n / t of the product's flops, 1/8 for 128 x 128 at 3 % and 4096 tokens. Small
  blocks pay in traffic: x is read once for every n columns of y, n flops a byte in
  bfloat16, where a v5e wants 240. A GPU's tiles hold 128 tokens, the same kernel would
  cost four times the product there; XLA's scatter and one dense product are the better
  form, and there is no GPU kernel.

  The kernels are for one device, or for the inside of a `jax.shard_map`. They have been
  checked by interpretation and by lowering, not yet on a TPU.

  Args:
    x: (..., in).
    a: (in, r).
    b: (r, out).
    values: (nnz,).
    index: int32 (nnz,), the support, sorted in each block.
    scale: s.
    shards: the blocks of the support, see `lrjax.parameterizations.sparse`.
    implementation: see `lrjax.kernels.dispatch`; there is no 'gpu'.

  Returns:
    y (..., out) in the dtype of x.

  Raises:
    ValueError: for shapes that do not fit, and implementations that the device or the
      sizes do not allow.

  >>> a, b = jnp.ones((2, 1)), jnp.ones((1, 2))
  >>> S = jnp.array([5.0, 7.0]), jnp.array([0, 3])
  >>> print(sparse_plus_low_rank_matmul(jnp.eye(2), a, b, *S))
  [[6. 1.]
   [1. 8.]]
  """
  (m, r), n = a.shape, b.shape[1]
  if b.shape[0] != r or x.shape[-1] != m:
    raise ValueError(
      f'x {x.shape}, a {a.shape} and b {b.shape} do not fit: x (..., in), a (in, r) and'
      ' b (r, out)'
    )
  if m % shards[0] or n % shards[1]:
    raise ValueError(f'shards {shards} must divide a kernel of shape {(m, n)}')
  flat = x.reshape(-1, m)
  weight = Weight((scale * a).astype(a.dtype), b, values, index)
  y = _product(flat, weight, (shards, implementation))
  return y.reshape(*x.shape[:-1], n)


class Weight(NamedTuple):
  """W = a b + S: a (in, r), b (r, out), values and index (nnz,)."""

  a: jax.Array
  b: jax.Array
  values: jax.Array
  index: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, W: Weight, how: tuple) -> jax.Array:
  return _run(FORWARD, x, W, how)


def _forward(x: jax.Array, W: Weight, how: tuple) -> tuple:
  return _product(x, W, how), (x, W)


def _backward(how: tuple, saved: tuple, dy: jax.Array) -> tuple:
  # Behind the barrier, or the compiler finds that W was formed before and keeps it.
  (x, W), dy = jax.lax.optimization_barrier((saved, dy))
  dx = _run(BACKWARD, dy, W, how)
  values = _run(VALUES, (x, dy), W, how)
  # Products with x and dy from the thin side: the gradient of W is not formed.
  into = lambda u, v, like: _dot(u, v, TN).astype(like.dtype)
  a = into(x, _dot(dy, W.b, NT).astype(x.dtype), W.a)
  b = into(_dot(x, W.a, NN).astype(dy.dtype), dy, W.b)
  # Integers have no gradient.
  index: Any = None
  return dx, Weight(a, b, values.astype(W.values.dtype), index)


_product.defvjp(_forward, _backward)


def _run(operation: Operation, x: Any, W: Weight, how: tuple) -> jax.Array:
  shards, implementation = how
  first = jax.tree.leaves(x)[0]
  sizes = dict(t=len(first), d=len(W.a), k=W.b.shape[1], r=W.b.shape[0])
  sizes |= dict(rows=sizes['d'] // shards[0], columns=sizes['k'] // shards[1])
  sizes |= dict(entries=len(W.values) // math.prod(shards))
  return dispatch(operation, implementation, sizes, first.dtype, x, W, shards=shards)


def _dot(x: jax.Array, y: jax.Array, dims: tuple, precision: Any = None) -> jax.Array:
  """A product in float32 or wider."""
  dtype = jnp.promote_types(x.dtype, y.dtype)
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (dims, ((), ())),
    precision=precision,
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


def _whole(W: Weight, shards: Shards) -> jax.Array:
  low = _dot(W.a, W.b, NN)
  return sparse.scatter(low, W.values.astype(low.dtype), W.index, shards)


def _xla_forward(x: jax.Array, W: Weight, shards: Shards) -> jax.Array:
  return _dot(x, _whole(W, shards).astype(x.dtype), NN).astype(x.dtype)


def _xla_backward(dy: jax.Array, W: Weight, shards: Shards) -> jax.Array:
  return _dot(dy, _whole(W, shards).astype(dy.dtype), NT).astype(dy.dtype)


def _xla_values(pair: tuple, W: Weight, shards: Shards) -> jax.Array:
  x, dy = pair
  return sparse.gather(_dot(x, dy, TN), W.index, shards)


def _one_hot(places: jax.Array, size: int) -> jax.Array:
  """(size, n), column i with a one in row `places[0, i]`."""
  row = jax.lax.broadcasted_iota(jnp.int32, (size, places.shape[1]), 0)
  return (row == places).astype(jnp.float32)


def _block(a: Any, b: Any, rows: Any, columns: Any, values: Any) -> jax.Array:
  """A block of W from blocks of a, b and its entries (1, 1, n)."""
  left = _one_hot(rows[0], a.shape[0]) * values[0].astype(jnp.float32)
  right = _one_hot(columns[0], b.shape[1])
  return _dot(a[...], b[...], NN) + _dot(left, right, NT, HIGHEST)


def _product_kernel(
  x: Any, a: Any, b: Any, rows: Any, columns: Any, values: Any, out: Any, total: Any, *,
  dims: tuple,
) -> None:  # fmt: skip
  @pl.when(pl.program_id(2) == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  W = _block(a, b, rows, columns, values)
  total[...] += _dot(x[...], W.astype(x.dtype), dims)

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
  total[...] += _dot(ends(x), ends(dy), TN)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    left, right = (_one_hot(p[0], n) for p, n in zip((rows, columns), total.shape))
    picked = _dot(total[...], left, TN, HIGHEST)  # (columns of the block, n)
    out[0] = jnp.sum(picked * right, axis=0, keepdims=True)


def _tpu_product(
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


def _tpu_values(
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


def _no_gpu(*args: Any, **options: Any) -> jax.Array:
  raise AssertionError('the table of tiles has none for a GPU')


def _fits(platform: str, tile: Tile, sizes: Mapping[str, int], **options: Any) -> bool:
  """Whether the support's blocks are tiles, and all of a step fits on chip."""
  m, n, r, t = sizes['rows'], sizes['columns'], sizes['r'], tile['t']
  if platform == 'gpu' or m % 128 or n % 128:
    return False
  block = r * (m + n) + sizes['entries'] * (m + n) + 2 * m * n
  return 4 * (block + 2 * t * max(m, n)) <= blocks.VMEM


_operation: Callable = lambda name, xla, tpu: Operation(name, xla, tpu, _no_gpu, _fits)
FORWARD = _operation(
  'sparse_plus_low_rank', _xla_forward, functools.partial(_tpu_product, False)
)
BACKWARD = _operation(
  'sparse_plus_low_rank', _xla_backward, functools.partial(_tpu_product, True)
)
VALUES = _operation('sparse_plus_low_rank', _xla_values, _tpu_values)
