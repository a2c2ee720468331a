"""When a subspace is found again."""

from typing import Any

import jax
import jax.numpy as jnp

from lrjax.checks import positive_int
from lrjax.types import Refresh


def every(period: int, *, stagger: bool = False) -> Refresh:
  """Refits at step 0 and then every `period` steps.

  Args:
    period: steps between refreshes, at least 1.
    stagger: spread the matrices of a tree evenly over the period, so that no single
      step after the first pays for all of them; those that are due are refreshed one
      after the other.

  Returns:
    A `Refresh` without state.

  >>> [bool(every(3).due((), jnp.int32(t), 0.0)) for t in range(5)]
  [True, False, False, True, False]
  """
  period = positive_int('update_proj_gap', period)

  def due(s: tuple, step: jax.Array, phase: jax.Array) -> jax.Array:
    if not stagger:
      return step % period == 0
    shift = jnp.floor(phase * period).astype(jnp.int32)
    return (step == 0) | ((step >= shift) & ((step - shift) % period == 0))

  def after(s: tuple, old: Any, new: Any) -> tuple:
    return s

  return Refresh(lambda: (), due, after, batched=not stagger)
