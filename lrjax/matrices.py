"""One matrix -> any tree: the lift of a MatrixTransform to an optax transformation."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrjax import sharding
from lrjax.checks import closest
from lrjax.recording import record
from lrjax.types import MatrixTransform
from lrjax.views import LeafPlan, Where, from_matrix, leaf_path, planner, to_matrix

# Above this a squared gradient comes near float32's end: the second moment would turn
# infinite and every later update zero, without a sign of it.
LARGEST = 1e15
GUARDS = ('tree', 'matrix')


class Slot(NamedTuple):
  """State of the matrices of one leaf; arrays lead with the leaf's stack axes.

  Attributes:
    overdue: int32, how often in a row the refresh that is due has failed; at least 1
      while it waits for a usable gradient, 0 when it is done.
    state: the rule's own state.
  """

  overdue: jax.Array
  state: Any


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
    slots, dense = [], []
    for plan, x in plan_tree(params):
      slot = optax.MaskedNode() if plan.reason else _init_slot(rule(plan.rank), plan, x)
      slots.append(slot)
      dense.append(x if plan.reason else optax.MaskedNode())
      record(plan, x, slot)
    rest_state = plain.init(treedef.unflatten(dense))
    # Two arrays: one buffer cannot be donated twice.
    count, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
    return MatricesState(count, skipped, treedef.unflatten(slots), rest_state)

  def update(
    updates: Any, state: MatricesState, params: Any = None, **extra: Any
  ) -> tuple[Any, MatricesState]:
    plans = plan_tree(updates)
    _check_like_init(plans, updates, state, jax.eval_shape(init, updates))

    def step(updates: Any, state: MatricesState, params: Any, extra: dict) -> tuple:
      leaves, treedef = jax.tree.flatten(updates)
      slots = treedef.flatten_up_to(state.slots)
      split = [
        (i, rule(p.rank), p, x, s)
        for i, ((p, _), x, s) in enumerate(zip(plans, leaves, slots))
        if not p.reason
      ]
      dense = [i for i, (p, _) in enumerate(plans) if p.reason]
      only_dense = lambda xs: treedef.unflatten(
        [x if p.reason else optax.MaskedNode() for (p, _), x in zip(plans, xs)]
      )

      largest = [_largest(to_matrix(x, p), len(p.stack)) for _, _, p, x, _ in split]
      ok = [a < LARGEST for a in largest]
      ok_rest = _all(_largest(leaves[i], 0) < LARGEST for i in dense)
      taken = _all([*ok, ok_rest])
      if guard == 'tree':
        ok, ok_rest = [jnp.broadcast_to(taken, o.shape) for o in ok], taken
      matrices = [
        _Matrices(r, p, x, s, o, a > 0)
        for (_, r, p, x, s), o, a in zip(split, ok, largest)
      ]
      moved = taken if guard == 'tree' else jnp.asarray(True)
      matrices = _refresh(matrices, state.count, moved, seed)

      out, new = list(leaves), list(slots)
      for (i, *_), m in zip(split, matrices):
        u, new_state = m.over_stack(m.rule.update)(m.g, m.slot.state)
        u = jnp.where(_over(m.ok, 2), u, 0)
        out[i] = from_matrix(u, m.plan).astype(leaves[i].dtype)
        new[i] = m.slot._replace(state=_select(m.ok, new_state, m.slot.state))

      dense_params = None
      if params is not None:
        dense_params = only_dense(treedef.flatten_up_to(params))
      zeroed = [
        jnp.where(ok_rest, x, 0) if p.reason else x for (p, _), x in zip(plans, leaves)
      ]
      u, rest_state = plain.update(
        only_dense(zeroed), state.rest, dense_params, **extra
      )
      u = treedef.flatten_up_to(u)
      for i in dense:
        out[i] = jnp.where(ok_rest, u[i], 0).astype(leaves[i].dtype)
      return treedef.unflatten(out), MatricesState(
        count=jnp.where(moved, optax.safe_increment(state.count), state.count),
        skipped=jnp.where(taken, state.skipped, optax.safe_increment(state.skipped)),
        slots=treedef.unflatten(new),
        rest=_select(ok_rest, rest_state, state.rest),
      )

    return sharding.outside_explicit(step, (updates, state))(
      updates, state, params, extra
    )

  return optax.GradientTransformationExtraArgs(init, update)


def nodes(tree: Any, kind: type) -> list:
  """All subtrees of one type, the states of lrjax inside an optax state for example."""
  is_kind = lambda x: isinstance(x, kind)
  return [x for x in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(x)]


class _Matrices(NamedTuple):
  """One leaf at work; `ok` (may be used) and `nonzero` are flags (*stack)."""

  rule: MatrixTransform
  plan: LeafPlan
  leaf: jax.Array
  slot: Slot
  ok: jax.Array
  nonzero: jax.Array

  @property
  def g(self) -> jax.Array:
    return _wide(to_matrix(self.leaf, self.plan))

  def over_stack(self, f: Callable) -> Callable:
    for _ in self.plan.stack:
      f = jax.vmap(f)
    return f


def _init_slot(rule: MatrixTransform, plan: LeafPlan, x: Any) -> Slot:
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  one = rule.init(jax.ShapeDtypeStruct(plan.matrix, dtype))
  stacked = lambda a: jnp.broadcast_to(a, plan.stack + jnp.shape(a))
  slot = Slot(jnp.zeros([], jnp.int32), one)
  return sharding.place_slot(jax.tree.map(stacked, slot), rule, plan, x)


def _refresh(
  matrices: list[_Matrices], step: jax.Array, moved: jax.Array, seed: int
) -> list[_Matrices]:
  """Runs the refreshes that are due, behind one scalar predicate for the whole tree.

  Where the step counts (`moved`), a refresh that cannot run now stays due.
  """
  at = [i for i, m in enumerate(matrices) if m.rule.refresh is not None]
  if not at:
    return matrices
  phases = _phases([matrices[i].plan.stack for i in at])
  due = []
  for i, phase in zip(at, phases):
    m = matrices[i]
    scheduled = m.over_stack(lambda s, p, due=m.rule.due: due(s, step, p))
    due.append((scheduled(m.slot.state, phase) | (m.slot.overdue > 0)) & moved)
  run = [d & matrices[i].ok & matrices[i].nonzero for i, d in zip(at, due)]

  def refresh_all() -> list:
    return [_refresh_leaf(matrices[i], r, step, seed) for i, r in zip(at, run)]

  def refresh_none() -> list:
    return [(matrices[i].slot.state, jnp.zeros_like(r)) for i, r in zip(at, run)]

  done = jax.lax.cond(~_all(~r for r in run), refresh_all, refresh_none)
  out = list(matrices)
  for i, d, r, (state, good) in zip(at, due, run, done):
    failed = out[i].slot.overdue + r.astype(jnp.int32)
    overdue = jnp.where(good, 0, jnp.maximum(failed, d.astype(jnp.int32)))
    out[i] = out[i]._replace(slot=Slot(overdue, state))
  return out


def _refresh_leaf(m: _Matrices, run: jax.Array, step: jax.Array, seed: int) -> tuple:
  """(state, done (*stack)) after refreshing those matrices of one leaf that are due."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(m.plan.path.encode()))
  keys = jax.random.split(jax.random.fold_in(key, step), m.plan.stack)
  assert m.rule.refresh is not None

  def one(run: jax.Array, key: jax.Array, g: jax.Array, state: Any) -> tuple:
    new, good = m.rule.refresh(key, g, state)
    accept = run & good
    # Untouched parts stay the same object, so that the cond does not copy them.
    pick = lambda n, o: o if n is o else jnp.where(accept, n, o)
    return jax.tree.map(pick, new, state), accept

  def idle(run: jax.Array, key: jax.Array, g: jax.Array, state: Any) -> tuple:
    return state, jnp.zeros_like(run)

  # LAPACK may never return from a matrix with an infinite entry.
  args = (run, keys, jnp.where(_over(m.ok, 2), m.g, 0), m.slot.state)
  if m.rule.batched or not m.plan.stack:
    all_at_once = m.over_stack(one)
    return jax.lax.cond(jnp.any(run), all_at_once, m.over_stack(idle), *args)
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(m.plan.stack) :]), args)
  each = lambda args: jax.lax.cond(args[0], one, idle, *args)
  some = lambda *args: jax.lax.map(each, args)
  out = jax.lax.cond(jnp.any(run), some, jax.vmap(idle), *flat)
  return jax.tree.map(lambda x: x.reshape(*m.plan.stack, *x.shape[1:]), out)


def _phases(stacks: list[tuple[int, ...]]) -> list[jax.Array]:
  """One number in [0, 1) for each matrix, evenly spread over all of them."""
  sizes = [functools.reduce(lambda a, b: a * b, s, 1) for s in stacks]
  phases, start = [], 0
  for stack, size in zip(stacks, sizes):
    part = np.arange(start, start + size) / sum(sizes)
    # Rounded up: a phase of 1/3 must not fall short of step 1 in a period of 3.
    part = np.nextafter(part.astype(np.float32), np.float32(2))
    phases.append(jnp.asarray(part.reshape(stack)))
    start += size
  return phases


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


def _wide(g: jax.Array) -> jax.Array:
  return g.astype(jnp.promote_types(g.dtype, jnp.float32))


def _largest(g: jax.Array, stack: int) -> jax.Array:
  return jnp.max(jnp.abs(_wide(g)), axis=tuple(range(stack, g.ndim)))


def _all(flags: Any) -> jax.Array:
  return functools.reduce(jnp.logical_and, map(jnp.all, flags), jnp.asarray(True))


def _over(flag: jax.Array, axes: int) -> jax.Array:
  """A flag per matrix with `axes` axes of size one behind."""
  return flag.reshape(*flag.shape, *(1,) * axes)


def _select(flag: jax.Array, new: Any, old: Any) -> Any:
  """`new` where `flag` (*stack) holds, else `old`, over trees."""
  pick = lambda n, o: n if n is o else jnp.where(_over(flag, n.ndim - flag.ndim), n, o)
  return jax.tree.map(pick, new, old)
