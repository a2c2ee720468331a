"""Which layers train: an optimizer whose state exists for the active layers alone."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax import sharding, stacks
from lrjax.checks import positive_int
from lrjax.draws import check_active, checked, drawer, log_scores, resolve
from lrjax.layers import Group, Layers, find_layers, stack, unstack
from lrjax.matrices import MatricesState
from lrjax.recording import Row, rows_seen, tree_bytes
from lrjax.stacks import all_of, select
from lrjax.views import Where, leaf_path


class SampledState(NamedTuple):
  """State of `sampled_layers`.

  Attributes:
    count: int32[], steps taken.
    skipped: int32[], steps not taken because a gradient was not finite or too large.
    active: int32 (n,), the layers that train, ascending.
    log_probabilities: float32 (L,) where they were computed from parameters, else ().
    layers: inner state of the active layers; of all of them, each with its own, if the
      transformation was made with `compact=False`.
    rest: state of the transformation of the leaves outside the layers.
  """

  count: jax.Array
  skipped: jax.Array
  active: jax.Array
  log_probabilities: Any
  layers: optax.OptState
  rest: optax.OptState


# States whose `count` says which steps were taken.
COUNTED = (MatricesState, SampledState)


def sampled_layers(
  inner: optax.GradientTransformation,
  n_active: int | float,
  period: int,
  *,
  order: str | Callable[[jax.Array], jax.Array] = 'random',
  probabilities: Any = None,
  inactive: Callable[[jax.Array], jax.Array] | None = None,
  compact: bool = True,
  where: Where | None = None,
  rest: optax.GradientTransformation | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Trains n of L layers at a time; the others have no optimizer state.

  At steps 0, K, 2K, ... the n active layers are drawn anew, without replacement:

  .. math:: S = \mathrm{top}_n(\log p_l + \mathrm{Gumbel}_l)

  and `inner` starts afresh on them. It sees their rows alone, as a dict of (n, ...)
  arrays by path, whether the model stacks its layers on a leading axis or numbers them.
  State: that of `inner` for n layers, that of `rest`, and n + 2 integers (and L numbers
  where probabilities come from parameters). What is drawn follows from (seed, t // K)
  alone, so a resumed run goes on with the same layers. A step on which a gradient is not
  finite, or has a norm above 1e15, changes nothing but `skipped`.

  Args:
    inner: of the active layers; its learning-rate schedules restart with them, so put
      the learning rate outside.
    n_active: n, an int, or a fraction of the layers (rounded, halves to even).
    period: K, steps between draws.
    order: 'random'; 'ascending', 'descending' (n after n layers, going round), 'mirror'
      (half of them from each end towards the middle; n even; an odd middle layer is
      left out); or `round -> layers (n,)`, all different, with round = t // K.
    probabilities: for 'random': None (all alike); L numbers, need not sum to one; or a
      function from parameters to these, called at `init`. A layer with probability 0
      is drawn only where no other is left.
    inactive: gradients -> updates of the inactive layers; default zeros.
    compact: False keeps a state for every layer, with its own count, frozen while the
      layer is inactive. Costs L/n times the memory and runs the layers one by one;
      random numbers of refreshes are then those of equal step in all layers.
    where: which leaves belong to layers, see `lrjax.layers.find_layers`.
    rest: of all other leaves; default `inner`.
    seed: of the draws.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `SampledState`.

  Raises:
    ValueError, TypeError: for arguments outside these; at `init` for more active layers
      than layers, another number of probabilities, or layers unlike each other.

  >>> tx = sampled_layers(optax.sgd(1.0), 1, 10, order='descending')
  >>> grads = {'layers': {'w': jnp.ones((3, 2))}, 'head': jnp.ones(2)}
  >>> updates, state = tx.update(grads, tx.init(grads))
  >>> print(updates['layers']['w'].sum(1), updates['head'].sum())
  [ 0.  0. -2.] -2.0
  """
  period = positive_int('period', period)
  check_active(n_active)
  draw = drawer(order, seed)
  chances = checked(probabilities, order, n_active)
  inner = optax.with_extra_args_support(inner)
  plain = inner if rest is None else optax.with_extra_args_support(rest)

  def init_rows(leaves: Sequence[Any], layers: Layers, n: int) -> Any:
    blank = {g.path: _blank(leaves[g.leaves[0]], g, n) for g in layers.groups}
    if compact:
      return inner.init(blank)
    one = inner.init({path: _row(x) for path, x in blank.items()})
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers.count, *x.shape)), one)

  def init(params: Any) -> SampledState:
    count, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
    layers, leaves = find_layers(params, where), jax.tree.leaves(params)
    n = resolve(n_active, layers.count, order)
    active = jnp.arange(n, dtype=jnp.int32)
    scores = log_scores(chances, params, layers.count)
    if not leaves:  # the placeholder by which optax.tree.map_params finds its way
      state = inner.init(params), plain.init(params)
      return SampledState(count, skipped, active, scores, *state)
    if not layers.count:
      warnings.warn(
        f'no leaf belongs to a layer, so all train at every step; choose the layers with'
        f' `where`. Leaves: {", ".join(layers.rest)}',
        stacklevel=2,
      )
    state = init_rows(leaves, layers, n), plain.init(layers.outside(leaves))
    if rows_seen() is not None:
      paths = [leaf_path(p) for p, _ in jax.tree.leaves_with_path(params)]
      _report(paths, leaves, layers, n, lambda some: init_rows(leaves, some, n))
    return SampledState(count, skipped, active, scores, *state)

  def update(
    updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, SampledState]:
    layers = find_layers(updates, where)
    _check_like_init(state, jax.eval_shape(init, updates))
    if not jax.tree.leaves(updates):
      return updates, state

    def step(updates: Any, state: Any, params: Any, extra: dict) -> tuple:
      leaves, treedef = jax.tree.flatten(updates)
      weights = None if params is None else treedef.flatten_up_to(params)
      see = lambda part: None if weights is None else part(weights)

      def resample() -> tuple:
        scores = state.log_probabilities if callable(chances) else chances
        args = layers.count, len(state.active), scores
        active = draw(state.count // period, *args) if layers.count else state.active
        if not compact:
          return active, state.layers
        return active, _restart(state.layers, init_rows(leaves, layers, len(active)))

      active, inner_state = jax.lax.cond(
        state.count % period == 0, resample, lambda: (state.active, state.layers)
      )
      rows = lambda leaves: layers.rows(leaves, active)
      run: Any = inner.update if compact else _one_by_one(inner.update, active)
      u, inner_state = run(rows(leaves), inner_state, see(rows), **extra)
      out = {}
      for g in layers.groups:
        out |= zip(g.leaves, _spread(u[g.path], leaves, g, active, inactive))
      always: Any = plain.update
      u, rest = always(layers.outside(leaves), state.rest, see(layers.outside), **extra)
      out |= {i: u[path] for path, i in layers.rest.items()}

      ok = all_of(stacks.bounded(x) for x in leaves)
      out = [jnp.where(ok, out[i], 0).astype(x.dtype) for i, x in enumerate(leaves)]
      moved = state._replace(
        count=optax.safe_increment(state.count),
        active=active,
        layers=inner_state,
        rest=rest,
      )
      held = state._replace(skipped=optax.safe_increment(state.skipped))
      return treedef.unflatten(out), select(ok, moved, held)

    placed = sharding.outside_explicit(step, (updates, state))
    return placed(updates, state, params, extra)

  return optax.GradientTransformationExtraArgs(init, update)


def only_active(state: Any, params: Any, where: Where | None = None) -> Any:
  """`params` with zeros for the layers that are not active, for decay that spares them.

  Args:
    state: a `SampledState`.
    params: the parameters.
    where: as given to `sampled_layers`.

  Returns:
    A tree like `params`.
  """
  layers, (leaves, treedef) = find_layers(params, where), jax.tree.flatten(params)
  out = list(leaves)
  for g in layers.groups:
    x = stack(leaves, g)
    on = jnp.zeros(layers.count, bool).at[state.active].set(True)
    kept = jnp.where(on.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    for i, row in zip(g.leaves, unstack(kept, g)):
      out[i] = row
  return treedef.unflatten(out)


def _blank(x: Any, group: Group, n: int) -> Any:
  """n rows of a group's leaf, placed like it."""
  row = x.shape[1:] if group.stacked else x.shape
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((n, *row), x.dtype)
  return sharding.place_rows(jnp.zeros((n, *row), x.dtype), x, group.stacked)


def _row(x: Any) -> Any:
  """The first of the rows."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  return x[0]


def _restart(old: Any, fresh: Any) -> Any:
  """`fresh`, but matrices count on, so that no random numbers come twice."""

  def keep(old: Any, fresh: Any) -> Any:
    if not isinstance(old, MatricesState):
      return fresh
    slots = {
      path: slot._replace(overdue=jnp.ones_like(slot.overdue))
      for path, slot in fresh.slots.items()
    }
    return fresh._replace(count=old.count, skipped=old.skipped, slots=slots)

  is_lift = lambda x: isinstance(x, MatricesState)
  return jax.tree.map(keep, old, fresh, is_leaf=is_lift)


def _one_by_one(update: Callable, active: jax.Array) -> Callable:
  """`update` of single layers, on rows and the states of all layers."""

  def run(rows: Any, state: Any, params: Any, **extra: Any) -> tuple:
    here = jax.tree.map(lambda x: x[active], state)
    one = lambda args: update(args[0], args[1], args[2], **extra)
    # Not a vmap, which would refresh a layer whenever another one is due.
    u, new = jax.lax.map(one, (rows, here, params))
    return u, jax.tree.map(lambda all, x: all.at[active].set(x), state, new)

  return run


def _spread(
  u: jax.Array, leaves: list, group: Group, active: jax.Array, inactive: Any
) -> list[jax.Array]:
  """The updates of a group's leaves from those of the active rows."""
  g = stack(leaves, group)
  base = jnp.zeros_like(g) if inactive is None else inactive(g)
  whole = base.at[active].set(
    u.astype(g.dtype), indices_are_sorted=True, unique_indices=True
  )
  return unstack(whole, group)


def _report(
  paths: list[str], leaves: list, layers: Layers, n: int, init_rows: Callable
) -> None:
  """Notes in a coverage report what the layers cost."""
  seen = rows_seen()
  assert seen is not None
  cost = lambda some: tree_bytes(
    jax.eval_shape(lambda: init_rows(layers._replace(groups=some)))
  )
  nothing = cost(())
  for g in layers.groups:
    inside = seen.get(g.path)
    size, first = cost((g,)) - nothing, paths[g.leaves[0]]
    note = f'{n} of {layers.count} layers active'
    for i in g.leaves:
      shape = tuple(leaves[i].shape)
      row = Row(paths[i], shape, '', None, 0, size, note)
      if inside is not None and not inside.note:
        row = row._replace(side=inside.side, rank=inside.rank, stack=inside.stack)
      if paths[i] != first:
        row = row._replace(state_bytes=0, note=f'{note}; state counted at {first}')
      seen[paths[i]] = row
  for path, x in layers.outside(leaves).items():
    row = Row(path, tuple(x.shape), '', None, 0, None, 'always active')
    seen.setdefault(path, row)


def _check_like_init(state: Any, like: SampledState) -> None:
  """Raises where `state` is not `like`, what `init` makes of a tree like the updates."""
  if not isinstance(state, SampledState):
    raise TypeError(
      f'update needs the SampledState that init made, got {type(state).__name__}: the'
      f' state of another method'
    )
  # Only shapes: dtypes may follow parameters or gradients.
  shapes = lambda tree: {
    (leaf_path(p), x.shape) for p, x in jax.tree.leaves_with_path(tree)
  }
  wrong = shapes(state) ^ shapes(like)
  if wrong:
    raise ValueError(
      f'updates do not fit the state: {sorted(wrong)[:4]} are on one side only'
    )
