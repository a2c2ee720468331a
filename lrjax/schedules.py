"""Learning rates that recover after restarts."""

import jax.numpy as jnp
import optax

from lrjax.checks import finite, positive_int


def with_restarts(
  schedule: optax.Schedule, every: int, warmup: int, start: float = 0.0
) -> optax.Schedule:
  r"""A schedule with a linear rise after every restart.

  With :math:`j = k \bmod T` and, for :math:`k \ge T` and :math:`j < R`, the target
  :math:`s = \mathrm{schedule}(k - j + R)`, the value is
  :math:`s\,(c + (1 - c)\,j / R)`; elsewhere it is :math:`\mathrm{schedule}(k)`.

  On a cosine this is the jagged schedule of ReLoRA (c = 0), the quick recovery of
  restarts (c = 0.001, R = 10), and SST's warm-up after each swap of vectors. Events that
  are due at every multiple of T, such as those of `lrjax.factorized`, come right before
  the update whose count is k.

  Args:
    schedule: k -> learning rate, k from 0.
    every: T, updates between restarts.
    warmup: R, updates of each rise, less than `every`.
    start: c, the fraction of the target at a restart.

  Returns:
    A schedule.

  Raises:
    ValueError: for a warm-up as long as the period, or `start` outside of [0, 1].

  Examples:
    >>> rate = with_restarts(optax.constant_schedule(1.0), every=10, warmup=4)
    >>> [float(rate(k)) for k in (0, 9, 10, 12, 14)]
    [1.0, 1.0, 0.0, 0.5, 1.0]

  References:
    Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", 2023, arXiv
    2307.05695; Glentis et al., 2025, arXiv 2505.22922.
  """
  positive_int('every', every)
  if positive_int('warmup', warmup) >= every:
    raise ValueError(f'warmup must be less than every={every}, got {warmup}')
  if finite('start', start) > 1:
    raise ValueError(f'start must be at most 1, got {start}')

  def rate(k):
    k = jnp.asarray(k)
    j = k % every
    target = jnp.asarray(schedule(k - j + warmup))
    rising = target * (start + (1 - start) * j / warmup)
    return jnp.where((k >= every) & (j < warmup), rising, schedule(k))

  return rate
