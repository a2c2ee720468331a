"""One matrix -> any tree: the lift of a MatrixTransform to an optax transformation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax import sharding, stacks
from lrjax.checks import closest
from lrjax.recording import record
from lrjax.stacks import LARGEST, Slot, all_of, select
from lrjax.types import MatrixTransform
from lrjax.views import LeafPlan, Where, leaf_path, planner

GUARDS = ('tree', 'matrix')


class MatricesState(NamedTuple):
  """State of `on_matrices`.

  Attributes:
    count: int32[], steps taken.
    skipped: int32[], steps not taken because a gradient was not finite or too large.
    slots: the parameter tree with a `Slot` for each projected leaf and
      `optax.MaskedNode` for the others.
    rest: state of the plain transformation, on the leaves that are not projected.
  """

  count: jax.Array
  skipped: jax.Array
  slots: Any
  rest: optax.OptState


def on_matrices(
  rule: Callable[[Any], MatrixTransform],
  *,
  rank: Any = None,
  side: str = 'short',
  where: Where | None = None,
  weight_dimension_numbers: Any = None,
  rest: optax.GradientTransformation | None = None,
  seed: int = 0,
  guard: str = 'tree',
) -> optax.GradientTransformationExtraArgs:
  """Applies a one-matrix rule to every matrix of a tree, and `rest` to all else.

  Each leaf is seen as a stack of matrices (d, k), compressed side first, and the rule
  runs on each of them with its own state. A step on which a gradient is not finite, or
  exceeds 1e15, changes nothing but `skipped`. A refresh that is due while a gradient is
  zero, or that fails, is made up for at the next good step.

  Args:
    rule: `rank -> MatrixTransform`.
    rank: an int; a fraction of the short side; rules `[(pattern, one of these)]`, the
      first pattern found in a leaf's path wins; or None for rules without a rank.
      Matrices whose short side is not larger than the rank go to `rest`.
    side: which axis is compressed: 'short' (the smaller one, `in` if square), 'long',
      'in' or 'out'.
    where: which leaves are projected: a pattern searched in the path, or
      `(path, leaf) -> bool`; default `hidden_kernels`.
    weight_dimension_numbers: the matrix axes: a `View` for all leaves, rules
      `[(pattern, View or None)]`, a tree of Views, or a function from params to one.
      Default: the last two axes, all others a stack.
    rest: for the leaves that are not projected; default `optax.identity()`.
    seed: of the random numbers that refreshes draw, one stream per leaf path.
    guard: what a bad gradient holds back: the whole 'tree', or only its own 'matrix'
      (and all of `rest` if it is there).

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `MatricesState`.

  Raises:
    ValueError, TypeError: for arguments outside the lists above; at `init` for leaves
      that are empty or not real floating point; at `update` for a tree unlike `init`'s.

  >>> import lrjax
  >>> rule = lambda rank: lrjax.low_rank(lrjax.svd(rank), optax.identity())
  >>> tx = on_matrices(rule, rank=1)
  >>> params = {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}
  >>> updates, state = tx.update(params, tx.init(params))
  >>> state.slots['kernel'].state.basis.shape
  (3, 1)
  """
  if guard not in GUARDS:
    raise ValueError(f'unknown `guard` {guard!r}; {closest(str(guard), GUARDS)}')
  plan_tree = planner(rank, side, where, weight_dimension_numbers)
  plain = optax.with_extra_args_support(rest or optax.identity())
  rule = functools.cache(rule)

  def init(params: Any) -> MatricesState:
    treedef = jax.tree.structure(params)
    plans = plan_tree(params)
    slots = [_init_slot(rule, plan, x) for plan, x in plans]
    # Two arrays: one buffer cannot be donated twice.
    count, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
    rest_state = plain.init(_only_rest(plans, treedef, [x for _, x in plans]))
    return MatricesState(count, skipped, treedef.unflatten(slots), rest_state)

  def update(
    updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, MatricesState]:
    plans = plan_tree(updates)
    _check_like_init(plans, updates, state, jax.eval_shape(init, updates))

    def step(updates: Any, state: MatricesState, params: Any, extra: dict) -> tuple:
      leaves, treedef = jax.tree.flatten(updates)
      slots = treedef.flatten_up_to(state.slots)
      work = {
        i: stacks.examine(rule(plan.rank), plan, leaf, slot)
        for i, ((plan, _), leaf, slot) in enumerate(zip(plans, leaves, slots))
        if not plan.reason
      }
      only_rest = functools.partial(_only_rest, plans, treedef)
      rest_leaves = jax.tree.leaves(only_rest(leaves))
      rest_ok = all_of(stacks.largest(x) < LARGEST for x in rest_leaves)
      taken = all_of([rest_ok, *(s.ok for s in work.values())])
      counted = jnp.asarray(True)
      if guard == 'tree':
        rest_ok = counted = taken
        hold = lambda s: s._replace(ok=jnp.broadcast_to(taken, s.ok.shape))
        work = {i: hold(s) for i, s in work.items()}

      refreshed = stacks.refresh(list(work.values()), state.count, counted, seed)
      for i, s in zip(work, refreshed):
        leaves[i], slots[i] = s.step()

      rest_params = None
      if params is not None:
        rest_params = only_rest(treedef.flatten_up_to(params))
      still = lambda x: jnp.where(rest_ok, x, 0).astype(x.dtype)
      g = jax.tree.map(still, only_rest(leaves))
      u, rest_state = plain.update(g, state.rest, rest_params, **extra)
      u = treedef.flatten_up_to(
        jax.tree.map(lambda u, g: still(u).astype(g.dtype), u, g)
      )
      out = [u if p.reason else x for (p, _), u, x in zip(plans, u, leaves)]

      tick = lambda flag, n: jnp.where(flag, optax.safe_increment(n), n)
      return treedef.unflatten(out), MatricesState(
        count=tick(counted, state.count),
        skipped=tick(~taken, state.skipped),
        slots=treedef.unflatten(slots),
        rest=select(rest_ok, rest_state, state.rest),
      )

    placed = sharding.outside_explicit(step, (updates, state))
    return placed(updates, state, params, extra)

  return optax.GradientTransformationExtraArgs(init, update)


def nodes(tree: Any, kind: type) -> list:
  """All subtrees of one type, the states of lrjax inside an optax state for example."""
  is_kind = lambda x: isinstance(x, kind)
  return [x for x in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(x)]


def _init_slot(rule: Callable, plan: LeafPlan, x: Any) -> Slot | optax.MaskedNode:
  if plan.reason:
    record(plan, x, None)
    return optax.MaskedNode()
  one = rule(plan.rank)
  slot = sharding.place_slot(stacks.init_slot(one, plan, x), one, plan, x)
  record(plan, x, slot)
  return slot


def _only_rest(plans: list, treedef: Any, leaves: list) -> Any:
  """The tree with the leaves that are not projected."""
  keep = [x if p.reason else optax.MaskedNode() for (p, _), x in zip(plans, leaves)]
  return treedef.unflatten(keep)


def _check_like_init(plans: list, updates: Any, state: Any, like: Any) -> None:
  """Raises where `state` is not what `init` makes of a tree like `updates`, `like`."""
  if not isinstance(state, MatricesState):
    raise TypeError(
      f'update needs the MatricesState that init made, got {type(state).__name__}: the'
      f' state of another method'
    )
  is_slot = lambda x: isinstance(x, (Slot, optax.MaskedNode))
  treedef = jax.tree.structure(updates)
  try:
    slots = treedef.flatten_up_to(state.slots)
  except ValueError as e:
    here = {p.path for p, _ in plans}
    old = jax.tree.leaves_with_path(state.slots, is_leaf=is_slot)
    there = {leaf_path(p) for p, _ in old}
    raise ValueError(
      f'updates do not have the structure given to init: only in updates'
      f' {sorted(here - there)[:3]}, only in init {sorted(there - here)[:3]}'
    ) from e
  for (plan, _), slot, want in zip(plans, slots, treedef.flatten_up_to(like.slots)):
    if not _alike(slot, want):
      typed = lambda tree: jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', tree)
      raise ValueError(
        f'leaf {plan.path!r} of shape {plan.shape} does not fit the state: it needs'
        f' {typed(want)}, the state has {typed(slot)}'
      )
  # Only shapes: the dtype of `rest` may follow parameters or gradients.
  shapes = lambda tree: [
    (leaf_path(p), x.shape) for p, x in jax.tree.leaves_with_path(tree)
  ]
  wrong = set(shapes(state.rest)) ^ set(shapes(like.rest))
  if wrong:
    raise ValueError(
      f'updates do not fit the state of `rest`: {sorted(wrong)[:4]} are on one side only'
    )


def _alike(a: Any, b: Any) -> bool:
  """Whether two trees have the same structure, shapes and dtypes."""
  types = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  return jax.tree.structure(a) == jax.tree.structure(b) and types(a) == types(b)
