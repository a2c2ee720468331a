"""How each operation of lrjax.kernels is run for the sake of its time: one table."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lrjax
from lrjax import kernels
from lrjax.moments import AdamState
from lrjax.parameterizations import sparse

# Of SLTrain's product; the support is drawn block by block where blocks of 128 divide W.
TOKENS, DENSITY, BLOCK = 4096, 0.03, 128


class Matrices(NamedTuple):
  """What arguments are made of; what an operation does not take is never drawn.

  Attributes:
    p: (d, r), float32, columns of about unit length.
    leaf: a gradient or weights (d, k), of the dtype asked for.
    low: (r, k), float32.
    u: likewise.
    key: for more.
  """

  p: jax.Array
  leaf: jax.Array
  low: jax.Array
  u: jax.Array
  key: jax.Array


def draw(key: jax.Array, *shape: int) -> jax.Array:
  """Random numbers of variance one, by what compiles fast."""
  return jax.random.uniform(key, shape, minval=-math.sqrt(3), maxval=math.sqrt(3))


class Operation(NamedTuple):
  """How an operation is run.

  Attributes:
    inputs: `Matrices -> arguments`.
    call: `(*arguments, implementation) -> results`, both of one matrix. What it must move
      are their bytes, each argument read and each result written once.
    flops: `(d, k, r) -> FLOP` it must do in matrix products, the fewest that are dense.
    products: what these are computed in, of `timing.PRODUCTS`; none: the leaf's dtype.
    replaced: arguments that results replace in the next call, place to place.
  """

  inputs: Callable[[Matrices], tuple]
  call: Callable[..., tuple]
  flops: Callable[[int, int, int], int]
  products: str | None = 'float32'
  replaced: Mapping[int, int] = {}


def _single(f: Callable, **options: Any) -> Callable[..., tuple]:
  """An operation of one result."""
  return lambda *args, **how: (f(*args, **options, **how),)


def _product(d: int, k: int, r: int) -> int:
  return 2 * d * k * r


def _stored(m: Matrices, bits: int) -> Any:
  return lrjax.affine(bits).encode(m.p)


def _moments_8bit(m: Matrices) -> AdamState:
  mu, nu = lrjax.dynamic8(True), lrjax.dynamic8(False)
  return AdamState(jnp.int32(9), mu.encode(m.u), nu.encode(jnp.square(m.u)))


def _square(m: Matrices) -> jax.Array:
  d = len(m.p)
  return draw(m.key, d, d) / math.sqrt(d)


_lift = functools.partial(kernels.lift_and_apply, rate=1e-3, decay=0.1)


def _blocks(d: int, k: int) -> sparse.Shards:
  rows, columns = (1 if n % BLOCK else n // BLOCK for n in (d, k))
  return rows, columns


def _sparse_inputs(m: Matrices) -> tuple:
  (d, k), dtype = m.leaf.shape, m.leaf.dtype
  index = sparse.uniform(m.key, (d, k), DENSITY, _blocks(d, k))
  shapes = (TOKENS, d), (TOKENS, k), index.shape
  drawn = (draw(jax.random.fold_in(m.key, i), *n) for i, n in enumerate(shapes))
  x, dy, values = (x.astype(dtype) for x in drawn)
  return x, m.p.astype(dtype), m.low.astype(dtype), values, index, dy


def _sparse(
  x: Any, a: Any, b: Any, values: Any, index: Any, dy: Any, **how: Any
) -> tuple:
  """Forward and backward: they are run with one tile."""
  how |= dict(index=index, shards=_blocks(len(a), b.shape[1]))
  f = functools.partial(kernels.sparse_plus_low_rank_matmul, **how)
  y, pull = jax.vjp(f, x, a, b, values)
  return y, *pull(dy)


def _sparse_flops(d: int, k: int, r: int) -> int:
  # W; y, dx and the gradient of the values; those of a and b from the thin side.
  return 2 * d * k * r + 6 * TOKENS * d * k + 4 * TOKENS * r * (d + k)


# Of those that look up one row of tiles.json the first stands for all when tuned.
OPERATIONS = {
  'project': Operation(lambda m: (m.p, m.leaf), _single(kernels.project), _product),
  'project_bfloat16': Operation(
    lambda m: (m.p.astype(jnp.bfloat16), m.leaf),
    _single(kernels.project),
    _product,
    products=None,
  ),
  'project_int8': Operation(
    lambda m: (_stored(m, 8), m.leaf), _single(kernels.project, bits=8), _product
  ),
  'project_int4': Operation(
    lambda m: (_stored(m, 4), m.leaf), _single(kernels.project, bits=4), _product
  ),
  'low_rank_adam': Operation(
    lambda m: (m.p, m.leaf, m.low, jnp.square(m.low), jnp.int32(9)),
    kernels.low_rank_adam,
    _product,
    replaced={2: 1, 3: 2},
  ),
  'lift_and_apply': Operation(
    lambda m: (m.leaf, m.p, m.u), _single(_lift), _product, replaced={0: 0}
  ),
  'lift_and_apply_int8': Operation(
    lambda m: (m.leaf, _stored(m, 8), m.u),
    _single(_lift, bits=8),
    _product,
    replaced={0: 0},
  ),
  'lift_and_apply_int4': Operation(
    lambda m: (m.leaf, _stored(m, 4), m.u),
    _single(_lift, bits=4),
    _product,
    replaced={0: 0},
  ),
  'adam_8bit': Operation(
    lambda m: (m.low, _moments_8bit(m)),
    kernels.adam_8bit,
    lambda d, k, r: 0,
    replaced={1: 1},
  ),
  'lift_and_add': Operation(
    lambda m: (m.p, m.leaf, m.low, m.u[:1]), _single(kernels.lift_and_add), _product
  ),
  'lift_and_add_sign': Operation(
    lambda m: (m.p, m.leaf, m.low, m.u[:1], m.u),
    _single(kernels.lift_and_add),
    lambda d, k, r: 2 * _product(d, k, r),
  ),
  'column_scores': Operation(
    lambda m: (_square(m), m.leaf),
    _single(kernels.column_scores),
    lambda d, k, r: _product(d, k, d),
    products='highest',
  ),
  'sparse_plus_low_rank_matmul': Operation(
    _sparse_inputs, _sparse, _sparse_flops, products=None
  ),
}
