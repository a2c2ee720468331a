"""y = s (x a) b + x S without W in memory: each tile of it is formed where it is used."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lrjax.kernels import blocks
from lrjax.kernels.dispatch import Operation, dispatch
from lrjax.kernels.sparse_tiles import NN, NT, TN, Weight, dot, tpu_product, tpu_values
from lrjax.kernels.tiles import Tile
from lrjax.parameterizations import sparse
from lrjax.parameterizations.sparse import Shards


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

  >>> import jax.numpy as jnp
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
  into = lambda u, v, like: dot(u, v, TN).astype(like.dtype)
  a = into(x, dot(dy, W.b, NT).astype(x.dtype), W.a)
  b = into(dot(x, W.a, NN).astype(dy.dtype), dy, W.b)
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


def _whole(W: Weight, shards: Shards) -> jax.Array:
  low = dot(W.a, W.b, NN)
  return sparse.scatter(low, W.values.astype(low.dtype), W.index, shards)


def _xla_forward(x: jax.Array, W: Weight, shards: Shards) -> jax.Array:
  return dot(x, _whole(W, shards).astype(x.dtype), NN).astype(x.dtype)


def _xla_backward(dy: jax.Array, W: Weight, shards: Shards) -> jax.Array:
  return dot(dy, _whole(W, shards).astype(dy.dtype), NT).astype(dy.dtype)


def _xla_values(pair: tuple, W: Weight, shards: Shards) -> jax.Array:
  x, dy = pair
  return sparse.gather(dot(x, dy, TN), W.index, shards)


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
  'sparse_plus_low_rank', _xla_forward, functools.partial(tpu_product, False)
)
BACKWARD = _operation(
  'sparse_plus_low_rank', _xla_backward, functools.partial(tpu_product, True)
)
VALUES = _operation('sparse_plus_low_rank', _xla_values, tpu_values)
