"""How weights are kept between the steps of a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from experiments.config import Experiment
from lrjax import int8_weights


class Storage(NamedTuple):
  """How weights are kept between steps.

  Attributes:
    encode: weights -> what the state holds.
    decode: its inverse, the weights of a step.
    move: (key, stored, updates) -> stored.
    specs: (weights, their specs) -> specs of what is stored.
  """

  encode: Callable[[Any], Any]
  decode: Callable[[Any], Any]
  move: Callable[[jax.Array, Any, Any], Any]
  specs: Callable[[Any, Any], Any]


def storage(experiment: Experiment) -> Storage:
  """What the config says of the weights."""
  if experiment.optimizer.weights == 'int8':
    dtype = experiment.model.param_dtype
    return Storage(
      int8_weights.quantize,
      lambda stored: int8_weights.dequantize(stored, dtype),
      int8_weights.apply_updates,
      int8_weights.weight_specs,
    )
  return Storage(
    encode=lambda params: params,
    decode=lambda stored: stored,
    move=lambda key, stored, updates: optax.apply_updates(stored, updates),
    specs=lambda params, specs: specs,
  )
