"""What every ready-to-use optimizer adds to its rule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrjax.checks import finite
from lrjax.matrices import MatricesState, nodes


def assemble(
  rule: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """A rule, then decoupled weight decay in full space, then the learning rate.

  On a step the rule does not take, weights do not decay and schedules stand still.

  Args:
    rule: a transformation made by `on_matrices`, without learning rate.
    learning_rate: a number or a schedule.
    weight_decay: strength of the decay, times the learning rate; 0 leaves it out, and
      with it the need for params at `update`.
    mask: which leaves decay: a tree of bools or a function from params to one.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError, TypeError: if a number is negative, not finite, or not a number.
  """
  if not callable(learning_rate):
    finite('learning_rate', learning_rate)
  finite('weight_decay', weight_decay)
  decay = []
  if not isinstance(weight_decay, (int, float)) or weight_decay > 0:
    decay = [optax.add_decayed_weights(weight_decay, mask)]
  rule = optax.with_extra_args_support(rule)
  tail = optax.chain(*decay, optax.scale_by_learning_rate(learning_rate))

  def init(params: Any) -> tuple:
    return rule.init(params), tail.init(params)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple:
    u, rule_state = rule.update(updates, state[0], params, **extra)
    out, tail_state = tail.update(u, state[1], params, **extra)
    old, new = (nodes(s, MatricesState)[0].count for s in (state[0], rule_state))
    taken = old != new
    out = jax.tree.map(lambda x: jnp.where(taken, x, 0), out)
    held = jax.tree.map(lambda n, o: jnp.where(taken, n, o), tail_state, state[1])
    return out, (rule_state, held)

  return optax.GradientTransformationExtraArgs(init, update)
