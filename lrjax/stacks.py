"""The matrices of one leaf at work: their state, their step, their refresh."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrjax import sharding
from lrjax.types import Lifted, MatrixTransform, Projected
from lrjax.views import LeafPlan, from_matrix, to_matrix

# Above this a squared gradient comes near float32's end: the second moment would turn
# infinite and every later update zero, without a sign of it.
LARGEST = 1e15


class Slot(NamedTuple):
  """State of the matrices of one leaf; arrays lead with the leaf's stack axes.

  Attributes:
    overdue: int32, how often in a row the refresh that is due has failed; at least 1
      while it waits for a usable gradient, 0 when it is done.
    state: the rule's own state.
  """

  overdue: jax.Array
  state: Any


class Stack(NamedTuple):
  """One projected leaf during a step.

  Attributes:
    rule: what is done to each matrix.
    plan: how the leaf is a stack of matrices.
    leaf: its gradient, in full or `Projected`.
    slot: their state.
    scale: factor of the updates.
    ok: bool (*stack), whether the gradient may be used; set by `examine`.
    nonzero: bool (*stack), whether it can set a basis; likewise.
    low: P'G (*stack, r, k) where the rule needs nothing else; set by `project`.
  """

  rule: MatrixTransform
  plan: LeafPlan
  leaf: Any
  slot: Slot
  scale: float = 1.0
  ok: Any = None
  nonzero: Any = None
  low: Any = None

  @property
  def projected(self) -> bool:
    """Whether only P'G is here."""
    return is_projected(self.leaf)

  @property
  def g(self) -> jax.Array:
    """The gradient as (*stack, d, k), float32 or wider."""
    return wide(to_matrix(self.leaf, self.plan))

  def over_stack(self, f: Callable) -> Callable:
    """`f` of one matrix, for all of them."""
    for _ in self.plan.stack:
      f = jax.vmap(f)
    return f

  def energy(self) -> jax.Array:
    """The sum of squares of each gradient (*stack), or of its projection."""
    assert self.plan.axes is not None
    if self.projected:
      _check_projected(self.rule, self.plan, self.leaf)
      return squares(self.leaf.low, (-2, -1))
    # In the leaf's own layout: a transposed one would be written out for this alone.
    return squares(self.leaf, (*self.plan.axes[1], *self.plan.axes[2]))

  def step(self, lifted: bool = False) -> tuple[Any, Slot]:
    """The leaf's update and its state; nothing moves where `ok` is false.

    With `lifted` the update is a `Lifted` where the rule can do with it.
    """
    rule, state = self.rule, self.slot.state
    if rule.steps is None:
      held = (self.ok,) * rule.holds
      u, new = self.over_stack(rule.update)(self.g, state, *held)
      new = new if held else select(self.ok, new, state)
      # Selected in the leaf's own layout: XLA folds a transpose into the product that
      # makes u, but not with a select between them.
      u = jnp.where(spread(self.ok, self.plan), from_matrix(u, self.plan), 0)
    else:
      d, (_, move, up) = self.plan.matrix[0], rule.steps
      u, new = self.over_stack(move)(self.low, state, self.ok)
      u = sharding.gather_low(u, self.slot, rule, self.plan)
      if not lifted:
        u = self.over_stack(lambda u, s: up(u, s, d))(u, new)
        u = from_matrix(u, self.plan)
    u = u if self.scale == 1 else self.scale * u
    # A state that was started over asks for a refresh; a rule without one is done.
    slot = Slot(self.slot.overdue * (rule.refresh is not None), new)
    if lifted and rule.steps is not None:
      return Lifted(u, jnp.zeros([]), self.leaf.shape, self.leaf.dtype), slot
    return u.astype(self.leaf.dtype), slot


def examine(stacks: list[Stack], due: list[jax.Array]) -> list[Stack]:
  """The stacks with flags that tell which gradients are good.

  Where a projection is all that a step needs, `project` looks at it instead, and the
  gradient itself is read once more only if a refresh is due.
  """
  now = any_of(due)
  later = [i for i, s in enumerate(stacks) if s.rule.steps and not s.projected]

  def energies() -> list[jax.Array]:
    return [stacks[i].energy() for i in later]

  def unseen() -> list[jax.Array]:
    return [jnp.ones_like(x) for x in jax.eval_shape(energies)]

  known = dict(zip(later, jax.lax.cond(now, energies, unseen) if later else []))

  def look(i: int, s: Stack) -> Stack:
    energy = known[i] if i in known else s.energy()
    return s._replace(ok=energy < LARGEST**2, nonzero=energy > 0)

  return [look(i, s) for i, s in enumerate(stacks)]


def project(stacks: list[Stack]) -> list[Stack]:
  """The stacks with P'G where that is all a step needs, and flags that saw it."""

  def one(s: Stack) -> Stack:
    if s.rule.steps is None:
      return s
    down, state = s.rule.steps.down, s.slot.state
    low = wide(s.leaf.low) if s.projected else s.over_stack(down)(s.g, state)
    low = sharding.divide_low(low, s.slot, s.rule, s.plan)
    # P has no row that is zero for good: what is not finite in G is not finite here.
    return s._replace(low=low, ok=s.ok & (squares(low, (-2, -1)) < LARGEST**2))

  return [one(s) for s in stacks]


def init_slot(rule: MatrixTransform, plan: LeafPlan, x: Any) -> Slot:
  """The state of a leaf before its first step; `x` may be abstract."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  one = rule.init(jax.ShapeDtypeStruct(plan.matrix, dtype))
  stacked = lambda a: jnp.broadcast_to(a, plan.stack + jnp.shape(a))
  return jax.tree.map(stacked, Slot(jnp.zeros([], jnp.int32), one))


def due(stacks: list[Stack], step: jax.Array) -> list[jax.Array]:
  """bool (*stack) for each: which matrices are to be refreshed at a step."""
  at = [s for s in stacks if s.rule.refresh is not None]
  shifts = iter(phases([s.plan.stack for s in at]))

  def one(s: Stack) -> jax.Array:
    if s.rule.refresh is None:
      return jnp.zeros(s.plan.stack, bool)
    asks: Any = s.rule.due
    scheduled = s.over_stack(lambda state, phase: asks(state, step, phase))
    # The second: left over from before.
    return scheduled(s.slot.state, next(shifts)) | (s.slot.overdue > 0)

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


def is_projected(x: Any) -> bool:
  """Whether a leaf is a projected gradient."""
  return isinstance(x, Projected)


def in_full(updates: Any) -> Any:
  """The tree with an abstract array for each projected gradient."""
  if not any(map(is_projected, jax.tree.leaves(updates, is_leaf=is_projected))):
    return updates
  whole = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_projected(x) else x
  return jax.tree.map(whole, updates, is_leaf=is_projected)


def _check_projected(rule: MatrixTransform, plan: LeafPlan, leaf: Projected) -> None:
  if rule.steps is None:
    raise TypeError(
      f'leaf {plan.path!r}: this method needs the gradient in full, and got what'
      ' lrjax.projected_value_and_grad makes for another one'
    )
  *stack, _, k = leaf.low.shape
  if (*stack, k) != (*plan.stack, plan.matrix[1]) or leaf.side != plan.side:
    raise ValueError(
      f'leaf {plan.path!r}: a projected gradient of shape {leaf.low.shape}, side'
      f' {leaf.side!r}, where {(*plan.stack, "r", plan.matrix[1])}, side'
      f' {plan.side!r}, is compressed'
    )


def _refresh_leaf(s: Stack, run: jax.Array, step: jax.Array, seed: int) -> tuple:
  """(state, done (*stack)) after refreshing those matrices of one leaf that are due."""
  keys = jax.random.split(
    jax.random.fold_in(stream(seed, s.plan.path), step), s.plan.stack
  )
  each = _refresh_together if s.rule.batched or not s.plan.stack else _refresh_in_turn
  return each(s, run, keys)


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


def stream(seed: int, path: str) -> jax.Array:
  """A random key of its own for each leaf path."""
  return fold_in_path(jax.random.key(seed), path)


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
  """A key of its own for each leaf path, from one key."""
  # Two words of a cryptographic hash: no two paths share them, as they may a checksum.
  digest = hashlib.sha256(path.encode()).digest()
  for word in (digest[:4], digest[4:8]):
    key = jax.random.fold_in(key, int.from_bytes(word, 'big'))
  return key


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


def squares(g: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
  """The sum of squares over some axes or all; not finite where an entry is not."""
  # Not the largest entry: XLA's maximum on a CPU passes over NaN from about 64 x 64
  # entries on, and takes twice as long.
  return jnp.sum(jnp.square(wide(g)), axis=axes)


def bounded(g: jax.Array) -> jax.Array:
  """bool[], whether an array is fit for an update; false where an entry is NaN."""
  return squares(g) < LARGEST**2


def all_of(flags: Iterable[jax.Array]) -> jax.Array:
  """bool[], whether all entries of all flags hold."""
  return functools.reduce(jnp.logical_and, map(jnp.all, flags), jnp.asarray(True))


def wide(g: jax.Array) -> jax.Array:
  """`g` in float32, or wider if it is."""
  return g.astype(jnp.promote_types(g.dtype, jnp.float32))


def any_of(flags: Iterable[jax.Array]) -> jax.Array:
  """bool[], whether an entry of one of the flags holds."""
  return ~all_of(~flag for flag in flags)


def over(flag: jax.Array, axes: int) -> jax.Array:
  """A flag with `axes` axes of size one behind."""
  return flag.reshape(*flag.shape, *(1,) * axes)


def spread(flag: jax.Array, plan: LeafPlan) -> jax.Array:
  """A flag (*stack) against the leaf's own axes."""
  assert plan.axes is not None
  stack = plan.axes[0]
  sizes = [n if a in stack else 1 for a, n in enumerate(plan.shape)]
  return flag.reshape(sizes)


def select(flag: jax.Array, new: Any, old: Any) -> Any:
  """`new` where `flag` (*stack) holds, else `old`, over trees."""
  pick = lambda n, o: n if n is o else jnp.where(over(flag, n.ndim - flag.ndim), n, o)
  return jax.tree.map(pick, new, old)
