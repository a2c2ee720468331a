"""The matrices of one leaf at work: their state, their step, their refresh."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrjax.dividing import at_leaf
from lrjax.types import Lifted, MatrixTransform, Parts, Projected
from lrjax.views import LeafPlan, from_matrix, to_matrix

# Above this a squared gradient comes near float32's end: the second moment would turn
# infinite and every later update zero, without a sign of it.
LARGEST = 1e15


class Slot(NamedTuple):
  """State of the matrices of one leaf; arrays lead with the leaf's stack axes.

  Attributes:
    overdue: int32, how often in a row the refresh that is due has failed; at least 1
      while it waits for a usable gradient, 0 when it is done; -1 where it was done ahead of
      a step (`lrjax.sketched_refresh`), until that step.
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
  def thin(self) -> bool:
    """Whether a step needs nothing of the gradient but P'G."""
    return is_thin(self.rule)

  @property
  def g(self) -> jax.Array:
    """The gradient as (*stack, d, k), float32 or wider."""
    return wide(to_matrix(self.leaf, self.plan))

  def over_stack(self, f: Callable) -> Callable:
    """`f` of one matrix, for all of them."""

    def one(*args: Any) -> Any:
      with at_leaf(self.plan, self.projected):
        return f(*args)

    for _ in self.plan.stack:
      one = jax.vmap(one)
    return one

  def energy(self) -> jax.Array:
    """The sum of squares of each gradient (*stack), or of its projection."""
    assert self.plan.axes is not None
    if self.projected:
      _check_projected(self.rule, self.plan, self.leaf)
      return squares(self.leaf.low, (-2, -1))
    # In the leaf's own layout: a transposed one would be written out for this alone.
    return squares(self.leaf, (*self.plan.axes[1], *self.plan.axes[2]))

  def step(
    self, lifted: bool = False, lift_and_add: Callable | None = None
  ) -> tuple[Any, Slot]:
    """The leaf's update and its state; nothing moves where `ok` is false.

    With `lifted` the update is a `Lifted` where the rule can do with it; `lift_and_add`
    forms an update from its parts, see `lrjax.kernels.lift_and_add`.
    """
    rule, state = self.rule, self.slot.state
    if rule.steps is None:
      held = (self.ok,) * rule.holds
      u, new = self.over_stack(rule.update)(self.g, state, *held)
      new = new if held else select(self.ok, new, state)
      # Selected in the leaf's own layout: XLA folds a transpose into the product that
      # makes u, but not with a select between them.
      u = self.where_ok(from_matrix(u, self.plan))
    elif self.thin:
      d, (_, move, up, _) = self.plan.matrix[0], rule.steps
      thin = self.over_stack(lambda low, s, ok: move(low, None, s, ok))
      parts, new = thin(self.low, state, self.ok)
      u = Lifted(parts.x, jnp.zeros([]), self.leaf.shape, self.leaf.dtype)
      if not lifted:
        u = self.over_stack(lambda x, s: up(x, s, d))(parts.x, new)
        u = from_matrix(u, self.plan)
    else:
      u, new = self.lift(lift_and_add)
    u = u if self.scale == 1 else jax.tree.map(lambda x: self.scale * x, u)
    # A state that was started over asks for a refresh; a rule without one is done.
    slot = Slot(self.slot.overdue * (rule.refresh is not None), new)
    return u if isinstance(u, Lifted) else u.astype(self.leaf.dtype), slot

  def lift(self, lift_and_add: Callable | None) -> tuple[jax.Array, Any]:
    """The update and the state of a rule whose steps read the gradient once more."""
    plan, steps, subspace = self.plan, self.rule.steps, self.rule.subspace
    assert plan.axes is not None and steps is not None
    d, k = plan.matrix

    def one(leaf: jax.Array, state: Any, ok: jax.Array) -> tuple:
      """Of one matrix as it lies."""
      g = wide(leaf)
      lies = lambda x: from_matrix(jnp.broadcast_to(x, (d, k)), plan.one)
      total = lambda c: squares(lies(c) * g)
      low = steps.down(to_matrix(g, plan.one), state)
      (x, c, y), new = steps.move(low, total, state, ok)
      if lift_and_add and subspace and x is not None and plan.in_order:
        c = jnp.broadcast_to(c, (1, k))
        return lift_and_add(subspace(new, d), leaf, x, c, y, side=plan.side), new
      return formed(Parts(x, lies(c), y), g, lambda x: lies(steps.up(x, new, d))), new

    stack, front = plan.axes[0], range(len(plan.stack))
    leaf = jnp.moveaxis(self.leaf, stack, front)
    u, new = self.over_stack(one)(leaf, self.slot.state, self.ok)
    return self.where_ok(jnp.moveaxis(u, front, stack)), new

  def where_ok(self, u: jax.Array) -> jax.Array:
    """An update as the leaf lies, zero where the gradient is not fit for one."""
    return jnp.where(spread(self.ok, self.plan), u, 0)


def formed(parts: Parts, g: Any, up: Callable) -> jax.Array:
  """The update P x + c f, from `up` = x -> P x."""
  x, c, y = parts
  if c is None:
    return up(x)
  f = c * (g if y is None else jnp.sign(g - up(y)))
  return f if x is None else up(x) + f


def examine(stacks: list[Stack], due: list[jax.Array]) -> list[Stack]:
  """The stacks with flags that tell which gradients are good.

  Where a projection is all that a step needs, `project` looks at it instead, and the
  gradient itself is read once more only if a refresh is due.
  """
  now = any_of(due)
  later = [i for i, s in enumerate(stacks) if s.thin and not s.projected]

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
    if s.rule.steps is None or not s.thin:
      return s
    down, state = s.rule.steps.down, s.slot.state
    low = wide(s.leaf.low) if s.projected else s.over_stack(down)(s.g, state)
    # A product with P spreads what is not finite; rows that are not chosen are not read.
    return s._replace(low=low, ok=s.ok & (squares(low, (-2, -1)) < LARGEST**2))

  return [one(s) for s in stacks]


def init_slot(rule: MatrixTransform, plan: LeafPlan, x: Any) -> Slot:
  """The state of a leaf before its first step; `x` may be abstract."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  one = rule.init(jax.ShapeDtypeStruct(plan.matrix, dtype))
  stacked = lambda a: jnp.broadcast_to(a, plan.stack + jnp.shape(a))
  return jax.tree.map(stacked, Slot(jnp.zeros([], jnp.int32), one))


def is_thin(rule: MatrixTransform) -> bool:
  """Whether updates are P x, and need nothing of a gradient but P'G."""
  return rule.steps is not None and rule.steps.thin


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
  if not is_thin(rule):
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
