"""One matrix -> any tree: the lift of a MatrixTransform to an optax transformation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax import refreshing, sharding, stacks
from lrjax.checks import closest, positive_int
from lrjax.moments import Holding
from lrjax.observing import observed
from lrjax.recording import record
from lrjax.stacks import Slot, Stack, all_of, any_of, select
from lrjax.types import MatrixTransform
from lrjax.views import LeafPlan, Where, leaf_path, planner

GUARDS = ('tree', 'matrix')


class MatricesState(NamedTuple):
  """State of `on_matrices`.

  Attributes:
    count: int32[], steps taken.
    skipped: int32[], steps not taken because a gradient was not finite or too large.
    wants_gradient: bool[], whether a basis is to be found at the next step, from a
      gradient in full; where it is false `Projected` ones will do.
    slots: leaf path -> `Slot`, for each projected leaf.
    rest: state of the plain transformation on a dict, leaf path -> leaf, of the others.
  """

  count: jax.Array
  skipped: jax.Array
  wants_gradient: jax.Array
  slots: dict[str, Slot]
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
  diagnostics: int | None = None,
  fan_scale: Callable[[int, int], float] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Applies a one-matrix rule to every matrix of a tree, and `rest` to all else.

  Each leaf is seen as a stack of matrices (d, k), compressed side first, and the rule
  runs on each of them with its own state. A step on which a gradient is not finite, or
  has a norm above 1e15, changes nothing but `skipped`; where a step reads nothing of it but
  a projection, that is what has to be finite. A refresh that is due while a
  gradient is zero, or that fails, is made up for at the next good step.

  Args:
    rule: `rank -> MatrixTransform`.
    rank: an int; a fraction of the short side; rules `[(pattern, one of these)]`, the
      first pattern found in a leaf's path wins; `d -> rank`, of the compressed side, 0
      allowed; or None for rules without a rank. Matrices whose short side (for `d ->
      rank` the compressed one) is not larger than the rank go to `rest`.
    side: which axis is compressed: 'short' (the smaller one, `in` if square),
      'short_out' (likewise, `out` if square), 'long', 'in' or 'out'.
    where: which leaves are projected: a pattern searched in the path, or
      `(path, leaf) -> bool`; default `hidden_kernels`.
    weight_dimension_numbers: the matrix axes: a `View` for all leaves, rules
      `[(pattern, View or None)]`, a tree of Views, or a function from params to one.
      Default: the last two axes, all others a stack; a leaf of three axes whose first
      is the longest is taken for a DenseGeneral, and left to `rest` with a warning.
    rest: for the leaves that are not projected; default `optax.identity()`.
    seed: of the random numbers that refreshes draw, one stream per leaf path.
    guard: what a bad gradient holds back: the whole 'tree', or only its own 'matrix'
      (and all of `rest` if it is there). Weight decay outside knows of neither, but for
      'tree' in ready-made optimizers. `optax.MultiSteps` keeps a NaN in its sum: give it
      `should_skip_update_fn=optax.skip_not_finite`.
    diagnostics: measure the subspaces every so many steps, for `lrjax.diagnostics`;
      default never, at no cost.
    fan_scale: `(fan_in, fan_out) -> factor` of a matrix's updates.

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
  rule = functools.cache(
    _observed(rule, diagnostics) if diagnostics is not None else rule
  )
  factor = lambda plan: 1.0 if fan_scale is None else fan_scale(*plan.fans)

  def init(params: Any) -> MatricesState:
    plans = plan_tree(params)
    # Two arrays: one buffer cannot be donated twice.
    count, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
    if not plans:  # the placeholder by which optax.tree.map_params finds its way
      wants = jnp.asarray(False)
      return MatricesState(count, skipped, wants, params, plain.init(params))
    work = [(rule(p.rank), p, x) for p, x in plans if not p.reason]
    slots = {p.path: _init_slot(r, p, x) for r, p, x in work}
    rules = {p.path: r for r, p, _ in work}
    for plan, _ in plans:
      record(plan, slots.get(plan.path), rules.get(plan.path))
    wants = jnp.asarray(any(r.refresh is not None for r, *_ in work))
    return MatricesState(count, skipped, wants, slots, plain.init(_rest(plans)))

  def update(
    updates: Any,
    state: Any,
    params: Any = None,
    *,
    lifted: bool = False,
    lift_and_add: Callable | None = None,
    **extra: Any,
  ) -> tuple[Any, MatricesState]:
    like = stacks.in_full(updates)
    # What is handed to the compiler whole gets its placement from arrays of its shape.
    if sharding.is_explicit((updates, state)):
      lifted, lift_and_add = False, None
    plans = plan_tree(like)
    _check_like_init(plans, state, jax.eval_shape(init, like))
    if not plans:
      return updates, state

    def step(updates: Any, state: MatricesState, params: Any, extra: dict) -> tuple:
      leaves, treedef = jax.tree.flatten(updates, is_leaf=stacks.is_projected)
      here = [(p, x) for (p, _), x in zip(plans, leaves)]
      work = [
        Stack(rule(p.rank), p, x, state.slots[p.path], factor(p))
        for p, x in here
        if not p.reason
      ]
      due = refreshing.due(work, state.count)
      work = stacks.examine(work, due)
      g = _rest(here)
      rest_ok = all_of(stacks.bounded(x) for x in g.values())
      counted = jnp.asarray(True)
      if guard == 'tree':
        counted, work = _held_together(rest_ok, work)
      work = stacks.project(refreshing.refresh(work, due, state.count, counted, seed))
      taken, held = _held_together(rest_ok, work)
      if guard == 'tree':
        rest_ok, counted, work = taken, taken, held
      done = {s.plan.path: s.step(lifted, lift_and_add) for s in work}
      out = {path: u for path, (u, _) in done.items()}
      slots = {path: slot for path, (_, slot) in done.items()}

      rest_params = None
      if params is not None:
        flat = treedef.flatten_up_to(params)
        rest_params = _rest([(p, x) for (p, _), x in zip(plans, flat)])
      still = lambda x, like: jnp.where(rest_ok, x, 0).astype(like.dtype)
      g = jax.tree.map(still, g, g)
      moves = dict(move=rest_ok) if isinstance(plain, Holding) else {}
      u, rest_state = plain.update(g, state.rest, rest_params, **moves, **extra)
      out |= jax.tree.map(still, u, g)
      if not moves:
        rest_state = select(rest_ok, rest_state, state.rest)

      tick = lambda flag, n: jnp.where(flag, optax.safe_increment(n), n)
      count = tick(counted, state.count)
      after = [s._replace(slot=slots[s.plan.path]) for s in work]
      return treedef.unflatten([out[p.path] for p, _ in plans]), MatricesState(
        count=count,
        skipped=tick(~taken, state.skipped),
        wants_gradient=any_of(refreshing.due(after, count)),
        slots=slots,
        rest=rest_state,
      )

    # An update is placed like its gradient, or where that is projected like its leaf.
    placed = sharding.outside_explicit(
      step, (updates if like is updates or params is None else params, state)
    )
    return placed(updates, state, params, extra)

  return optax.GradientTransformationExtraArgs(init, update)


def nodes(tree: Any, kind: type | tuple[type, ...]) -> list:
  """All outermost subtrees of a type, states of lrjax in an optax state for example."""
  is_kind = lambda x: isinstance(x, kind)
  return [x for x in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(x)]


def _observed(rule: Callable, period: int) -> Callable:
  positive_int('diagnostics', period)
  return lambda rank: observed(rule(rank), period)


def _init_slot(rule: MatrixTransform, plan: LeafPlan, x: Any) -> Slot:
  return sharding.place_slot(stacks.init_slot(rule, plan, x), rule, plan, x)


def _held_together(rest_ok: jax.Array, work: list[Stack]) -> tuple:
  """(whether all gradients are good, the stacks with this for a flag)."""
  ok = all_of([rest_ok, *(s.ok for s in work)])
  return ok, [s._replace(ok=jnp.broadcast_to(ok, s.ok.shape)) for s in work]


def _rest(plans: list[tuple[LeafPlan, Any]]) -> dict[str, Any]:
  """The leaves that are not projected, by path."""
  return {p.path: x for p, x in plans if p.reason}


def _check_like_init(plans: list, state: Any, like: Any) -> None:
  """Raises where `state` is not `like`, what `init` makes of a tree like the updates."""
  if not isinstance(state, MatricesState):
    raise TypeError(
      f'update needs the MatricesState that init made, got {type(state).__name__}: the'
      f' state of another method'
    )
  if not plans:
    return
  if not isinstance(state.slots, dict) or state.slots.keys() != like.slots.keys():
    here, there = set(like.slots), set(state.slots)
    raise ValueError(
      f'updates do not have the projected leaves given to init: only in updates'
      f' {sorted(here - there)[:3]}, only in init {sorted(there - here)[:3]}'
    )
  for plan, _ in plans:
    slot, want = state.slots.get(plan.path), like.slots.get(plan.path)
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
