r"""Weights kept in 8 bits and updated by stochastic rounding (Q-GaLore).

A float copy of the weights exists only within a step:

  params = int8_weights.quantize(params)
  ...
  weights = int8_weights.dequantize(params)
  grads = jax.grad(loss)(weights)
  updates, state = tx.update(grads, state, weights)
  params = int8_weights.apply_updates(key, params, updates)

A step moves a weight by less than its grid is wide. Rounded to the nearest it would never
move; rounded up with the probability of the fraction it moves as it should on average.
A kernel (..., m, n) takes `m n + 8 m ceil(n / group)` bytes instead of `4 m n`.

Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from lrjax.checks import positive_int
from lrjax.codecs.affine import Grid, codes_of, grid_of, stochastic, values_of
from lrjax.stacks import fold_in_path
from lrjax.types import PyTree
from lrjax.views import Where, chooser, leaf_path


class Int8(NamedTuple):
  """A kernel in 8 bits: `scale * (codes - zero)`.

  Attributes:
    codes: uint8, of the kernel's shape (..., n).
    scale: float32 (..., groups), one for each group along the last axis.
    zero: float32 (..., groups), the code of zero.
  """

  codes: jax.Array
  scale: jax.Array
  zero: jax.Array


def quantize(params: PyTree, where: Where | None = None, *, group: int = 256) -> PyTree:
  """Stores kernels in 8 bits, rounded to the nearest.

  Args:
    params: a tree of weights.
    where: which leaves, as in `lrjax.on_matrices`; default the hidden kernels. All others
      stay as they are.
    group: at most so many numbers along the last axis share scale and zero; groups of one
      row have equal sizes and no group spans two rows.

  Returns:
    The tree with an `Int8` in place of each chosen leaf.

  >>> params = {'kernel': jnp.ones((4, 8)), 'bias': jnp.ones(8)}
  >>> stored = quantize(params)
  >>> stored['kernel'].codes.dtype, stored['kernel'].scale.shape, stored['bias'].dtype
  (dtype('uint8'), (4, 1), dtype('float32'))
  """
  positive_int('group', group)
  choose = chooser(where)

  def one(path: Any, x: jax.Array) -> Any:
    if not choose(leaf_path(path), x):
      return x
    return _encode(x, -(-x.shape[-1] // group), jnp.round)

  return jax.tree.map_with_path(one, params)


def dequantize(params: PyTree, dtype: Any = jnp.float32) -> PyTree:
  """The weights as arrays.

  Args:
    params: made by `quantize`.
    dtype: of the leaves that are stored in 8 bits; others keep theirs.

  Returns:
    The tree that `quantize` was given, each weight at most half a grid step away.
  """
  return jax.tree.map(
    lambda x: _decode(x).astype(dtype) if _is_int8(x) else x, params, is_leaf=_is_int8
  )


def apply_updates(key: jax.Array | None, params: PyTree, updates: PyTree) -> PyTree:
  """`optax.apply_updates` for a tree with weights in 8 bits.

  Each weight is decoded, moved, and rounded onto a new grid of its group, up with the
  probability of the fraction. The ends of a grid bound it.

  Args:
    key: of the random numbers of this step; every leaf draws from it by its path. None
      rounds to the nearest and loses what is smaller than half a grid step.
    params: made by `quantize`.
    updates: arrays of the weights' shapes.

  Returns:
    The new tree, of the same types and shapes.

  >>> params = quantize({'kernel': jnp.array([[-1.0, 0.0, 1.0]])})
  >>> moved = apply_updates(jax.random.key(0), params, {'kernel': jnp.ones((1, 3))})
  >>> print(dequantize(moved)['kernel'].round(1))
  [[0. 1. 2.]]
  """

  def one(path: Any, x: Any, u: jax.Array) -> Any:
    if not _is_int8(x):
      return optax.apply_updates(x, u)
    rounding = jnp.round
    if key is not None:
      rounding = stochastic(fold_in_path(key, leaf_path(path)))
    moved = _decode(x) + u.astype(jnp.float32)
    return _encode(moved, x.scale.shape[-1], rounding)

  return jax.tree.map_with_path(one, params, updates, is_leaf=_is_int8)


def weight_specs(params: PyTree, specs: PyTree, where: Where | None = None) -> PyTree:
  """Partition specs of `quantize(params, where)`.

  Codes are split like the weights, scales and zeros along all axes but the last.

  Args:
    params: weights, or `jax.ShapeDtypeStruct`s.
    specs: the `PartitionSpec` of each of them.
    where: as given to `quantize`.

  Returns:
    The tree of `quantize(params, where)` with a `PartitionSpec` for each array.
  """
  choose = chooser(where)

  def one(path: Any, x: Any, spec: PartitionSpec) -> Any:
    if not choose(leaf_path(path), x):
      return spec
    rows = PartitionSpec(*spec[: len(x.shape) - 1])
    return Int8(spec, rows, rows)  # pyrefly: ignore

  return jax.tree.map_with_path(one, params, specs)


def _encode(x: jax.Array, groups: int, rounding: Any) -> Int8:
  blocks = _grouped(x, groups)
  grid = grid_of(blocks, 8)
  codes = codes_of(blocks, grid, 8, rounding)
  codes = codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
  return Int8(codes, grid.scale[..., 0], grid.zero[..., 0])


def _decode(x: Int8) -> jax.Array:
  grid = Grid(x.scale[..., None], x.zero[..., None])
  values = values_of(_grouped(x.codes, x.scale.shape[-1]), grid)
  return values.reshape(*x.codes.shape[:-1], -1)[..., : x.codes.shape[-1]]


def _grouped(x: jax.Array, groups: int) -> jax.Array:
  """(..., n) as (..., groups, size), filled up with zeros."""
  *rows, n = x.shape
  size = -(-n // groups)
  filled = jnp.pad(x, [(0, 0)] * len(rows) + [(0, groups * size - n)])
  return filled.reshape(*rows, groups, size)


def _is_int8(x: Any) -> bool:
  return isinstance(x, Int8)
