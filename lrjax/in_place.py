"""Weights and state moved in one step, without a tree of updates in between."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrjax.kernels import lift_and_add, lift_and_apply
from lrjax.kernels.blocks import Side
from lrjax.matrices import MatricesState, nodes
from lrjax.recording import noted
from lrjax.stacks import fold_in_path
from lrjax.types import Lifted
from lrjax.views import LeafPlan, from_matrix, leaf_path, to_matrix


def in_place(
  tx: optax.GradientTransformation,
  *,
  stochastic: bool = False,
  seed: int = 0,
  implementation: str | None = 'xla',
) -> Callable:
  r"""`tx.update` and `optax.apply_updates` in one, where the update need not be formed.

  .. math:: W \leftarrow W - \eta\, (\alpha P U + \lambda W)

  For the leaves whose update is a lifted one (those of `lrjax.projectable`), on
  accelerators W is read and written once by `lrjax.kernels.lift_and_apply` and the update
  (m, n) is not written at all. Those whose update has a part outside the subspace (Fira,
  FRUGAL) get it from `lrjax.kernels.lift_and_add`, which reads the gradient and writes the
  update. All other leaves move as by optax. Jit it with weights and state donated.

  Args:
    tx: the optimizer: a ready-made one of lrjax, or a chain of `scale_by_*` and links that
      multiply updates by a number. What adds to updates (weight decay of optax, noise)
      cannot stand in such a chain; `weight_decay` of ready-made ones can.
    stochastic: round bfloat16 weights of such leaves up with the probability of the
      fraction instead of to the nearest: small updates then count.
    seed: of the rounding.
    implementation: see `lrjax.kernels.dispatch`. The default, 'xla', is right on every
      mesh; None takes the device's kernel, on one device or inside `jax.shard_map`.

  Returns:
    `(params, grads, state, **extra) -> (params, state)`; the same numbers as by updates,
    up to rounding. `grads` may hold `Projected` leaves.

  >>> import lrjax
  >>> tx = lrjax.galore(1e-2, rank=1, weight_decay=0.1)
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> params, state = in_place(tx)(params, params, tx.init(params))
  >>> print(f"{params['kernel'][0, 0]:.4f}")
  0.9981
  """
  tx = optax.with_extra_args_support(tx)
  add = functools.partial(lift_and_add, implementation=implementation)
  add = None if implementation == 'xla' else add

  def step(params: Any, grads: Any, state: Any, **extra: Any) -> tuple[Any, Any]:
    updates, new = tx.update(
      grads, state, params, lifted=True, lift_and_add=add, **extra
    )
    seen, _ = noted(tx, params)
    slots = {k: v for m in nodes(new, MatricesState) for k, v in m.slots.items()}
    key = None
    if stochastic:
      steps = sum(m.count for m in nodes(new, MatricesState))
      key = jax.random.fold_in(jax.random.key(seed), steps)

    def move(path: Any, w: jax.Array, u: Any) -> Any:
      if not isinstance(u, Lifted):
        return optax.apply_updates(w, u)
      name = leaf_path(path)
      plan, rule = seen.rules[name]
      subspace: Any = rule.subspace
      basis = over_stack(plan, lambda s: subspace(s, plan.matrix[0]))
      rounds = key is not None and w.dtype == jnp.bfloat16
      keys = fold_in_path(key, name) if rounds else None
      return _moved(w, basis(slots[name].state), u, plan, keys, implementation)

    is_leaf = lambda x: x is None
    return jax.tree.map_with_path(move, params, updates, is_leaf=is_leaf), new

  return step


def over_stack(plan: LeafPlan, f: Callable) -> Callable:
  """`f` of one matrix, for all of a leaf."""
  for _ in plan.stack:
    f = jax.vmap(f)
  return f


def _moved(
  w: jax.Array, p: jax.Array, u: Lifted, plan: LeafPlan, key: Any, implementation: Any
) -> jax.Array:
  """The new weights of one leaf."""
  side: Side = 'out' if plan.in_order and plan.side == 'out' else 'in'
  keys = None if key is None else jax.random.split(key, plan.stack)

  def one(w: jax.Array, p: jax.Array, low: jax.Array, key: Any = None) -> jax.Array:
    return lift_and_apply(
      w,
      p,
      low,
      rate=-1.0,
      decay=u.decay,
      side=side,
      key=key,
      implementation=implementation,
    )

  seen = w if plan.in_order else to_matrix(w, plan)
  args = (seen, p, u.low) if keys is None else (seen, p, u.low, keys)
  new = over_stack(plan, one)(*args)
  return new if plan.in_order else from_matrix(new, plan)
