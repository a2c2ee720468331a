"""Trained rank pruning: dense weights that are truncated to a low rank now and then.

Xu et al., "Trained Rank Pruning for Efficient Deep Neural Networks", 2020, arXiv
2004.14566. Every m updates each matrix becomes its truncated SVD; the sub-gradient of the
nuclear norm pulls it there. In the end it factorizes at almost no loss. In training
nothing is saved, and an SVD costs about `22 min(in, out)^3` flops: choose it to find out
what ranks a trained layer needs, not to train with less.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax.bases.orthonormal import mm
from lrjax.checks import finite, positive_int
from lrjax.parameterizations import factors
from lrjax.stacks import wide
from lrjax.types import PyTree, Split
from lrjax.views import Where, from_matrix, planner, to_matrix

# Singular values (p,), largest first -> how many of them stay, int32[].
Rule = Callable[[jax.Array], jax.Array]


def by_energy(fraction: float) -> Rule:
  """The fewest singular values whose squares sum to this fraction; the paper has 0.9.

  >>> int(by_energy(0.9)(jnp.array([3.0, 2.0, 1.0])))
  2
  """
  if not 0 < finite('energy', fraction) <= 1:
    raise ValueError(f'energy must be above 0 and at most 1, got {fraction}')

  def rule(s: jax.Array) -> jax.Array:
    held = jnp.cumsum(s * s)
    few = 1 + jnp.sum(held < fraction * held[-1], dtype=jnp.int32)
    # 1.0 must not drop what is below the rounding of the sum.
    return jnp.int32(s.size) if fraction == 1 else few

  return rule


def by_rank(rank: int | float) -> Rule:
  """So many singular values, or this fraction of them rounded down, at least one.

  >>> int(by_rank(2)(jnp.ones(5))), int(by_rank(0.5)(jnp.ones(5)))
  (2, 2)
  """
  if isinstance(rank, float):
    finite('rank', rank, below=1.0)
    return lambda s: jnp.int32(max(1, int(rank * s.size)))
  positive_int('rank', rank)
  return lambda s: jnp.int32(min(rank, s.size))


def by_value(threshold: float) -> Rule:
  """All singular values of at least this size, possibly none.

  >>> int(by_value(1.5)(jnp.array([3.0, 2.0, 1.0])))
  2
  """
  finite('threshold', threshold)
  return lambda s: jnp.sum(s >= threshold, dtype=jnp.int32)


def truncate(W: jax.Array, rule: Rule, *, gram: bool = False) -> jax.Array:
  """The best approximation of W (in, out) of the rank that the rule says.

  Args:
    W: the matrix; one that is not finite comes back as it is.
    rule: `by_energy`, `by_rank`, `by_value`, or any other function of the singular values.
    gram: by the eigenvectors of the smaller Gram matrix: several times cheaper, and a
      sharded W stays where it is. Singular values below 1e-3 of the largest are not told
      apart.

  Returns:
    An array like W.

  >>> print(truncate(jnp.diag(jnp.array([3.0, 2.0, 1.0])), by_rank(2)).diagonal())
  [3. 2. 0.]
  """
  return _guarded(W, W, gram, lambda s: _first(rule(s), s).astype(s.dtype))


def nuclear_subgradient(
  W: jax.Array, rule: Rule | None = None, *, gram: bool = False
) -> jax.Array:
  r""":math:`U_k V_k^\top`, a sub-gradient of the sum of the singular values of W.

  Args:
    W: a matrix (in, out); one that is not finite gives zeros.
    rule: which k; None: all singular values that are not zero up to rounding, so that of
      a truncated W these are the ones that were kept.
    gram: see `truncate`.

  Returns:
    An array like W.

  >>> print(nuclear_subgradient(jnp.diag(jnp.array([3.0, -2.0]))))
  [[ 1.  0.]
   [ 0. -1.]]
  """
  eps = lambda dtype: float(jnp.finfo(dtype).eps)
  # Rounding of the entries is below eps of the largest, that of an SVD a few times eps.
  rounding = max(2 * eps(W.dtype), 10 * eps(jnp.float32))
  least = max(rounding, 1e-3) if gram else rounding

  def factor(s: jax.Array) -> jax.Array:
    kept = s > least * s[0]
    kept = kept if rule is None else kept & _first(rule(s), s)
    return jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)

  return _guarded(W, jnp.zeros_like(W), gram, factor)


def to_factors(W: jax.Array, rule: Rule) -> Split:
  """W = ab for `lrjax.factorized`, on the host, at the rank that the rule says.

  Args:
    W: (..., in, out); a stack gets the largest rank in it, filled up with zeros.
    rule: see `truncate`.

  Returns:
    `a` (..., in, k) and `b` (..., k, out), balanced; k is at least 1.

  >>> to_factors(jnp.diag(jnp.array([3.0, 2.0, 1.0])), by_energy(0.9)).train['a'].shape
  (3, 2)
  """

  def one(W: jax.Array) -> tuple:
    U, s, Vt = factors.svd(W)
    k = rule(s)
    root = jnp.sqrt(jnp.where(_first(k, s), s, 0))
    return k, (U * root[None]).astype(W.dtype), (root[:, None] * Vt).astype(W.dtype)

  for _ in W.shape[:-2]:
    one = jax.vmap(one)
  k, a, b = one(W)
  k = max(1, int(k.max()))
  return Split({'a': a[..., :k], 'b': b[..., :k, :]})


class CountState(NamedTuple):
  """How many updates there were."""

  count: jax.Array


def add_nuclear_subgradient(
  weight: float,
  every: int = 1,
  *,
  rule: Rule | None = None,
  gram: bool = False,
  where: Where | None = None,
  weight_dimension_numbers: Any = None,
) -> optax.GradientTransformation:
  r"""Adds :math:`\lambda U_k V_k^\top` to gradients at updates 0, m, 2m, ...

  Put it first in a chain.

  Args:
    weight: :math:`\lambda`; the paper has 3e-4.
    every: m; that of the truncation, or 1 for the regularizer alone.
    rule: see `nuclear_subgradient`.
    gram: see `truncate`.
    where: which leaves, see `lrjax.on_matrices`.
    weight_dimension_numbers: the matrix axes, see there. Of a flax convolution (h, w, in,
      out) the paper's channel-wise form is the view ((0, 1, 2), 3), the spatial-wise one
      ((2, 0), (3, 1)) and network decoupling (2, (0, 1)).

  Returns:
    A transformation; its `update` needs `params`.

  >>> tx = add_nuclear_subgradient(0.1)
  >>> W = jnp.diag(jnp.array([3.0, 2.0]))
  >>> print(tx.update(jnp.zeros((2, 2)), tx.init(W), W)[0])
  [[0.1 0. ]
   [0.  0.1]]
  """
  finite('weight', weight)

  def change(w: jax.Array, g: jax.Array) -> jax.Array:
    return g + weight * wide(nuclear_subgradient(w, rule, gram=gram))

  return _every(every, 0, change, where, weight_dimension_numbers)


def truncate_rank(
  every: int,
  rule: Rule,
  *,
  gram: bool = False,
  where: Where | None = None,
  weight_dimension_numbers: Any = None,
) -> optax.GradientTransformation:
  """Makes every m-th update one that ends at truncated weights; moments are not touched.

  Put it last in a chain, after the learning rate: the update becomes W_k - W. The weights
  are then of rank k up to the rounding of that sum; in bfloat16 prefer `trp`, whose event
  sets them. Unlike the public code it leaves the weights alone before the first update,
  where truncation would only take 10 % of the energy of a random start.

  Args:
    every: m; the paper's script has 5.
    rule: see `truncate`.
    gram: see `truncate`.
    where: see `add_nuclear_subgradient`.
    weight_dimension_numbers: see `add_nuclear_subgradient`.

  Returns:
    A transformation; its `update` needs `params`.

  >>> tx = optax.chain(optax.sgd(0.1), truncate_rank(5, by_energy(0.9)))
  """

  def change(w: jax.Array, u: jax.Array) -> jax.Array:
    w = wide(w)
    new = truncate(w + u, rule, gram=gram)
    # Where nothing is cut off, not a bit of the update changes.
    return jnp.where(new == w + u, u, new - w)

  return _every(every, 1, change, where, weight_dimension_numbers)


def _first(k: jax.Array, s: jax.Array) -> jax.Array:
  """bool (p,), the first k singular values."""
  return jnp.arange(s.size) < k


def _guarded(
  W: jax.Array, otherwise: jax.Array, gram: bool, factor: Callable
) -> jax.Array:
  """W with its singular values multiplied by `factor(s)`; `otherwise` if that fails."""
  usable = jnp.isfinite(W).all()
  # LAPACK may never return from a matrix with an infinite entry.
  s, scaled = _spectrum(jnp.where(usable, wide(W), 0), gram)
  c = factor(s)
  new = jnp.where((c == 1).all(), wide(W), scaled(c))
  return jnp.where(usable & jnp.isfinite(new).all(), new, otherwise).astype(W.dtype)


def _spectrum(W: jax.Array, gram: bool) -> tuple[jax.Array, Callable]:
  """s (p,), and `c (p,) -> sum of c_i s_i u_i v_i'`."""
  if not gram:
    U, s, Vt = jnp.linalg.svd(W, full_matrices=False)
    return s, lambda c: mm(U * (c * s)[None], Vt)
  if W.shape[0] < W.shape[1]:
    s, scaled = _spectrum(W.T, gram)
    return s, lambda c: scaled(c).T
  squares, V = (x[..., ::-1] for x in jnp.linalg.eigh(mm(W.T, W)))
  s = jnp.sqrt(jnp.maximum(squares, 0))
  return s, lambda c: mm(mm(W, V) * c[None], V.T)


def _every(
  every: int, shift: int, change: Callable, where: Where | None, views: Any
) -> optax.GradientTransformation:
  """`(w, u) -> u` on each matrix where update number + shift is a multiple of `every`."""
  positive_int('every', every)
  plan_tree = planner(None, 'in', where, views)

  def leaf(plan: Any, w: jax.Array, u: jax.Array) -> jax.Array:
    if plan.reason:
      return u
    flat = lambda x: to_matrix(x, plan).reshape(-1, *plan.matrix)
    # One after the other, because a batch of decompositions needs much memory.
    new = jax.lax.map(lambda wu: change(*wu), (flat(w), flat(wide(u))))
    return from_matrix(new.reshape(*plan.stack, *plan.matrix), plan).astype(u.dtype)

  def init(params: PyTree) -> CountState:
    plan_tree(params)
    return CountState(jnp.zeros([], jnp.int32))

  def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple:
    if params is None:
      raise ValueError('ranks are those of the weights: `update` needs `params`')
    us, treedef = jax.tree.flatten(updates)
    run = lambda: [leaf(plan, w, u) for (plan, w), u in zip(plan_tree(params), us)]
    due = (state.count + shift) % every == 0
    updates = treedef.unflatten(jax.lax.cond(due, run, lambda: us))
    return updates, CountState(state.count + 1)

  return optax.GradientTransformation(init, update)
