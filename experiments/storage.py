"""How weights are kept between the steps of a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import lrjax
from experiments.config import Experiment
from lrjax import int8_weights


class Storage(NamedTuple):
  """How weights are kept between steps.

  Attributes:
    encode: weights -> what the state holds.
    decode: its inverse, the weights of a step.
    move: (key, stored, weights, gradients, optimizer's state) -> (stored, state).
    specs: (weights, their specs) -> specs of what is stored.
  """

  encode: Callable[[Any], Any]
  decode: Callable[[Any], Any]
  move: Callable[[jax.Array, Any, Any, Any, Any], tuple[Any, Any]]
  specs: Callable[[Any, Any], Any]


def storage(experiment: Experiment, tx: optax.GradientTransformation) -> Storage:
  """What the config says of the weights, which `tx` moves."""
  o = experiment.optimizer
  if o.weights == 'int8':
    dtype = experiment.model.param_dtype

    def move(key: jax.Array, stored: Any, weights: Any, grads: Any, opt: Any) -> tuple:
      updates, opt = tx.update(grads, opt, weights)
      return int8_weights.apply_updates(key, stored, updates), opt

    return Storage(
      int8_weights.quantize,
      lambda stored: int8_weights.dequantize(stored, dtype),
      move,
      int8_weights.weight_specs,
    )
  step = lrjax.in_place(
    tx,
    stochastic=o.stochastic_rounding,
    seed=experiment.seed,
    implementation=None if o.kernels else 'xla',
  )
  return Storage(
    encode=lambda params: params,
    decode=lambda stored: stored,
    move=lambda key, stored, weights, grads, opt: step(stored, grads, opt),
    specs=lambda params, specs: specs,
  )
