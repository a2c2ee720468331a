"""The methods an experiment can name, and how a config becomes a transformation."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

import lrjax
from experiments.config import Experiment
from lrjax.views import leaf_path

StateDtype = Literal['float32', 'bfloat16']
Inner = Literal['adam', 'lion', 'momentum', 'adafactor']
Schedule = optax.ScalarOrSchedule


def adamw(
  learning_rate: Schedule,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  matrix_scale: float = 1.0,
  state_dtype: StateDtype = 'float32',
) -> optax.GradientTransformation:
  """AdamW, both moments of one dtype; `optax.adamw` where that is float32.

  `matrix_scale` slows the matrices that GaLore would project, as its `scale` does: with
  it AdamW has the two learning rates of GaLore, and what differs is the rank alone.
  """
  adam = lrjax.adam(b1, b2, eps, mu_dtype=state_dtype, nu_dtype=state_dtype)
  matrices = lambda tree: jax.tree.map_with_path(
    lambda path, x: lrjax.hidden_kernels(leaf_path(path), x), tree
  )
  slow = (
    [] if matrix_scale == 1 else [optax.masked(optax.scale(matrix_scale), matrices)]
  )
  decay = optax.add_decayed_weights(weight_decay)
  return optax.chain(adam, *slow, decay, optax.scale_by_learning_rate(learning_rate))


def galore(
  learning_rate: Schedule,
  weight_decay: float = 0.0,
  rank: int | float = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  inner: Inner = 'adam',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  basis: str = 'eigh',
  side: str = 'short',
  moments_on_refresh: str = 'keep',
  stagger: bool = False,
  state_dtype: StateDtype = 'float32',
) -> optax.GradientTransformation:
  """`lrjax.galore` with its parts chosen by name."""
  return lrjax.galore(
    learning_rate,
    rank,
    update_proj_gap,
    scale,
    inner_optimizer(inner, b1, b2, eps, state_dtype),
    weight_decay,
    basis=basis,
    basis_dtype=None if state_dtype == 'float32' else jnp.dtype(state_dtype),
    side=side,
    moments_on_refresh=moments_on_refresh,
    stagger=stagger,
  )


METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'adamw': adamw,
  'galore': galore,
}


def inner_optimizer(
  name: Inner, b1: float, b2: float, eps: float, state_dtype: StateDtype
) -> optax.GradientTransformation:
  """The transformation that runs in the low-rank space."""
  makers: dict[str, Callable[[], optax.GradientTransformation]] = {
    'adam': lambda: lrjax.adam(b1, b2, eps, mu_dtype=state_dtype, nu_dtype=state_dtype),
    'lion': lambda: optax.scale_by_lion(b1, b2, mu_dtype=state_dtype),
    'momentum': lambda: optax.trace(b1, accumulator_dtype=state_dtype),
    'adafactor': lrjax.factored_rms,
  }
  return makers[name]()


def schedule(experiment: Experiment) -> optax.Schedule:
  """Learning rate over steps: linear warm-up from 0, then the config's decay."""
  o, warmup = experiment.optimizer, experiment.warmup
  left = max(experiment.steps - warmup, 1)
  decay = {
    'constant': optax.constant_schedule(o.learning_rate),
    'linear': optax.linear_schedule(
      o.learning_rate, o.final_fraction * o.learning_rate, left
    ),
    'cosine': optax.cosine_decay_schedule(o.learning_rate, left, o.final_fraction),
  }[o.schedule]
  rise = optax.linear_schedule(0.0, o.learning_rate, max(warmup, 1))
  return optax.join_schedules([rise, decay], [warmup])


def make(experiment: Experiment) -> optax.GradientTransformation:
  """The whole transformation of an experiment: clip, then the method."""
  o = experiment.optimizer
  method = METHODS[o.name](
    schedule(experiment), weight_decay=o.weight_decay, **o.options
  )
  clip = [optax.clip_by_global_norm(o.clip)] if o.clip else []
  return optax.chain(*clip, method)
