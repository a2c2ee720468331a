"""Gradient accumulation in sketches, so that the sum over micro-batches stays small."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from lrjax.bases import gaussian
from lrjax.checks import positive_int
from lrjax.matrices import on_matrices
from lrjax.optimizers.assembly import Lift
from lrjax.refreshes import every
from lrjax.types import Basis, MatrixTransform


class SketchedSum(NamedTuple):
  """State of one matrix.

  Attributes:
    total: the sum of P' G (r, k) over the micro-batches of a step so far.
    sketch: the key of P, uint32[2].
    next_sketch: the key for the next step's micro-batches.
    count: int32, micro-batches in the sum.
  """

  total: jax.Array
  sketch: jax.Array
  next_sketch: jax.Array
  count: jax.Array


class DenseSum(NamedTuple):
  """The same of the leaves that are not compressed."""

  total: Any
  count: jax.Array


def accumulate_sketches(
  tx: optax.GradientTransformation, steps: int, rank: Any, **lift: Unpack[Lift]
) -> optax.GradientTransformationExtraArgs:
  r"""Updates by the mean of several gradients of which only sketches are kept (Flora).

  .. math:: \bar G = \frac{1}{n} P \sum_i P^\top G_i

  with P (d, r) of independent entries N(0, 1/r), drawn anew for each step from 8 bytes.
  `optax.MultiSteps` keeps the sum itself, `d k` numbers a matrix; here they are `r k`,
  and the mean is right on average only. Updates are zero but at every n-th call.

  Args:
    tx: what the mean is given to, any transformation.
    steps: n, micro-batches a step. Gradients that are not finite do not count.
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    **lift: see `lrjax.on_matrices`. Leaves that are not projected are summed as they are.

  Returns:
    An `optax.GradientTransformationExtraArgs`; its state is that of the sums and of `tx`.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Hao et al., `Flora: Low-Rank Adapters Are Secretly Gradient Compressors
    <https://arxiv.org/abs/2402.03293>`_, 2024

  >>> params = {'kernel': jnp.ones((8, 16))}
  >>> sums, state = accumulate_sketches(optax.adam(1e-2), 4, rank=2).init(params)
  >>> sums.slots['kernel'].state.total.shape
  (2, 16)
  """
  steps = positive_int('steps', steps)
  tx = optax.with_extra_args_support(tx)
  rule = lambda rank: _sketched_mean(gaussian(rank), steps)
  mean = on_matrices(rule, rank=rank, rest=_dense_mean(steps), **lift)

  def init(params: Any) -> tuple:
    return mean.init(params), tx.init(params)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple:
    summed: Any = mean.update(updates, state[0], params)
    g, sums = summed
    full = (sums.count != state[0].count) & (sums.count % steps == 0)
    act = lambda g, s: tx.update(g, s, params, **extra)
    wait = lambda g, s: (jax.tree.map(jnp.zeros_like, g), s)
    u, inner = jax.lax.cond(full, act, wait, g, state[1])
    return u, (sums, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def _sketched_mean(basis: Basis, steps: int) -> MatrixTransform:
  window = every(steps)

  def init(g: Any) -> SketchedSum:
    key = basis.init(*g.shape, g.dtype)
    low = jax.eval_shape(basis.down, key, g)
    total = jnp.zeros(low.shape, low.dtype)
    return SketchedSum(total, key, jnp.copy(key), jnp.zeros([], jnp.int32))

  def refresh(key: jax.Array, g: jax.Array, s: SketchedSum) -> tuple:
    return s._replace(next_sketch=basis.fit(key, g, s.sketch)), jnp.asarray(True)

  def update(g: jax.Array, s: SketchedSum) -> tuple[jax.Array, SketchedSum]:
    # A refresh may come late, after a zero gradient; a sum must not mix two sketches.
    key = jnp.where(s.count == 0, s.next_sketch, s.sketch)
    total, full = s.total + basis.down(key, g), s.count + 1 == steps
    out = jnp.where(full, basis.up(key, total, len(g)) / steps, 0)
    total, count = (jnp.where(full, 0, x) for x in (total, s.count + 1))
    return out, SketchedSum(total, key, s.next_sketch, count)

  due = lambda s, step, phase: window.due((), step, phase)
  return MatrixTransform(init, update, due, refresh)


def _dense_mean(steps: int) -> optax.GradientTransformation:
  def init(params: Any) -> DenseSum:
    return DenseSum(jax.tree.map(jnp.zeros_like, params), jnp.zeros([], jnp.int32))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, DenseSum]:
    total = jax.tree.map(jnp.add, state.total, updates)
    full = state.count + 1 == steps
    out = jax.tree.map(lambda x: jnp.where(full, x / steps, 0), total)
    total = jax.tree.map(lambda x: jnp.where(full, 0, x), total)
    return out, DenseSum(total, jnp.where(full, 0, state.count + 1))

  return optax.GradientTransformation(init, update)
