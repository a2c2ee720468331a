"""Residuals that keep the gradient's own scale: dropped, or fed back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.checks import finite
from lrjax.types import Residual


def drop(scale: float = 1.0) -> Residual:
  """The update is `scale * up(u)`; the rest of the gradient is forgotten (GaLore).

  Args:
    scale: factor of the update, alpha of the GaLore paper.

  Returns:
    A `Residual` without state.
  """
  finite('scale', scale)

  def after(
    g: jax.Array, low: jax.Array, u: jax.Array, up: Callable, s: tuple
  ) -> tuple[jax.Array, tuple]:
    return up(scale * u), s

  return Residual(lambda g: (), lambda g, s: g, after)


def error_feedback(scale: float = 1.0) -> Residual:
  r"""The update is `scale * up(u)`; what the subspace missed is added to the next gradient.

  .. math:: G_t \leftarrow G_t + E_t, \quad E_{t+1} = G_t - P P^\top G_t

  Args:
    scale: factor of the update.

  Returns:
    A `Residual` whose state is E (d, k), of the gradient's accumulation dtype.
  """
  finite('scale', scale)

  def after(
    g: jax.Array, low: jax.Array, u: jax.Array, up: Callable, s: Any
  ) -> tuple[jax.Array, jax.Array]:
    return up(scale * u), g - up(low)

  init = lambda g: jnp.zeros(g.shape, g.dtype)
  return Residual(init, lambda g, s: g + s, after, projects=True)
