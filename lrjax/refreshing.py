"""The refreshes of all matrices of a tree: which are due, and how they run."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.stacks import Slot, Stack, any_of, over, stream, wide
from lrjax.views import LeafPlan, to_matrix


def due(stacks: list[Stack], step: jax.Array) -> list[jax.Array]:
  """bool (*stack) for each: which matrices are to be refreshed at a step."""
  at = [s for s in stacks if s.rule.refresh is not None]
  shifts = iter(phases([s.plan.stack for s in at]))

  def one(s: Stack) -> jax.Array:
    if s.rule.refresh is None:
      return jnp.zeros(s.plan.stack, bool)
    asks: Any = s.rule.due
    scheduled = s.over_stack(lambda state, phase: asks(state, step, phase))
    now = scheduled(s.slot.state, next(shifts))
    # Left over from before, or done ahead of the step.
    return (now | (s.slot.overdue > 0)) & (s.slot.overdue >= 0)

  return [one(s) for s in stacks]


def refresh(
  stacks: list[Stack],
  due: list[jax.Array],
  step: jax.Array,
  moved: jax.Array,
  seed: int,
) -> list[Stack]:
  """Runs the refreshes that are due, behind one scalar predicate for all leaves.

  Where the step counts (`moved`), a refresh that cannot run now stays due.
  """
  at = {
    i: d & moved
    for i, (s, d) in enumerate(zip(stacks, due))
    if s.rule.refresh is not None
  }
  run = {
    i: d & stacks[i].ok & stacks[i].nonzero
    for i, d in at.items()
    if not stacks[i].projected
  }

  def refresh_all() -> dict:
    return {i: _refresh_leaf(stacks[i], r, step, seed) for i, r in run.items()}

  def refresh_none() -> dict:
    return {i: (stacks[i].slot.state, jnp.zeros_like(r)) for i, r in run.items()}

  done: dict = {}
  if run:
    any_runs = any_of(run.values())
    done = jax.lax.cond(any_runs, refresh_all, refresh_none)
  out = list(stacks)
  for i, d in at.items():
    overdue, state = out[i].slot.overdue, out[i].slot.state
    good = jnp.zeros_like(d)
    if i in run:
      overdue, (state, good) = overdue + run[i].astype(jnp.int32), done[i]
    overdue = jnp.where(good, 0, jnp.maximum(overdue, d.astype(jnp.int32)))
    out[i] = out[i]._replace(slot=Slot(overdue, state))
  return out


def _refresh_leaf(s: Stack, run: jax.Array, step: jax.Array, seed: int) -> tuple:
  """(state, done (*stack)) after refreshing those matrices of one leaf that are due."""
  keys = keys_of(s.plan, step, seed)
  each = _refresh_together if s.rule.batched or not s.plan.stack else _refresh_in_turn
  return each(s, run, keys)


def keys_of(plan: LeafPlan, step: jax.Array, seed: int) -> jax.Array:
  """A random key (*stack) for each matrix of a leaf."""
  return jax.random.split(jax.random.fold_in(stream(seed, plan.path), step), plan.stack)


def _refresh_together(s: Stack, run: jax.Array, keys: jax.Array) -> tuple:
  """All matrices in one batch, results kept where `run`."""
  refresh = s.rule.refresh
  assert refresh is not None

  def one(run: jax.Array, key: jax.Array, g: jax.Array, state: Any) -> tuple:
    new, good = refresh(key, g, state)
    accept = run & good
    # Untouched parts stay the same object, so that the cond does not copy them.
    pick = lambda n, o: o if n is o else jnp.where(accept, n, o)
    return jax.tree.map(pick, new, state), accept

  def idle(run: jax.Array, key: jax.Array, g: jax.Array, state: Any) -> tuple:
    return state, jnp.zeros_like(run)

  # LAPACK may never return from a matrix with an infinite entry.
  args = (run, keys, jnp.where(over(s.ok, 2), s.g, 0), s.slot.state)
  return jax.lax.cond(jnp.any(run), s.over_stack(one), s.over_stack(idle), *args)


def _refresh_in_turn(s: Stack, run: jax.Array, keys: jax.Array) -> tuple:
  """Only those matrices that are due, one after the other, in place."""
  refresh, plan = s.rule.refresh, s.plan
  assert refresh is not None and plan.axes is not None
  due = jnp.nonzero(run, size=run.size)
  sizes = tuple(1 if a in plan.axes[0] else n for a, n in enumerate(plan.shape))
  single = plan._replace(shape=sizes)
  front = range(run.ndim)

  def body(t: jax.Array, carry: tuple) -> tuple:
    at = [i[t] for i in due]
    # Cut out before it is made wide or transposed, which would copy the whole stack.
    g = pick_one(s.leaf, plan.axes[0], at).reshape(sizes)
    old = jax.tree.map(lambda x: pick_one(x, front, at), carry[0])
    new, good = refresh(
      pick_one(keys, front, at), wide(to_matrix(g, single)).reshape(plan.matrix), old
    )

    def put(x: jax.Array, n: jax.Array, o: jax.Array) -> jax.Array:
      # Untouched parts stay the same object, so that the loop does not carry them.
      return x if n is o else put_one(x, jnp.where(good, n, o), at)

    return jax.tree.map(put, carry[0], new, old), put_one(carry[1], good, at)

  return jax.lax.fori_loop(0, run.sum(), body, (s.slot.state, jnp.zeros_like(run)))


def pick_one(x: jax.Array, axes: Iterable[int], at: Sequence[jax.Array]) -> jax.Array:
  """The part of `x` at the indices `at` of `axes`, without these axes."""
  index: list = [slice(None)] * x.ndim
  for axis, i in zip(axes, at):
    # An array of one: a gather sends this part alone where `x` is split over the axis,
    # a dynamic slice the whole of `x`.
    index[axis] = i[None]
  shape = tuple(n for n, i in zip(x.shape, index) if isinstance(i, slice))
  return x.at[tuple(index)].get(mode='promise_in_bounds').reshape(shape)


def put_one(x: jax.Array, part: jax.Array, at: Sequence[jax.Array]) -> jax.Array:
  """`x` with `part` at the indices `at` of its first axes."""
  part = part.reshape(*(1,) * len(at), *x.shape[len(at) :])
  return jax.lax.dynamic_update_slice(x, part, (*at, *(0,) * (x.ndim - len(at))))


def phases(stacks: list[tuple[int, ...]]) -> list[jax.Array]:
  """One number in [0, 1) for each matrix, evenly spread over all of them."""
  sizes = [math.prod(s) for s in stacks]
  out, start = [], 0
  for stack, size in zip(stacks, sizes):
    part = np.arange(start, start + size) / sum(sizes)
    # Rounded up: a phase of 1/3 must not fall short of step 1 in a period of 3.
    part = np.nextafter(part.astype(np.float32), np.float32(2))
    out.append(jnp.asarray(part.reshape(stack)))
    start += size
  return out
