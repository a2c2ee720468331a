"""What every ready-to-use optimizer adds to its rule."""

from typing import Any

import optax

from lrjax.checks import finite


def assemble(
  rule: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Chains a rule, decoupled weight decay in full space, and the learning rate.

  Args:
    rule: a transformation without learning rate.
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
  return optax.chain(rule, *decay, optax.scale_by_learning_rate(learning_rate))
