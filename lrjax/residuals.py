"""What becomes of the part of a gradient that the subspace misses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.checks import finite
from lrjax.types import Codec, Residual


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


def error_feedback(scale: float = 1.0, codec: Codec | None = None) -> Residual:
  r"""The update is `scale * up(u)`; what the subspace missed is added to the next gradient.

  .. math:: G_t \leftarrow G_t + E_t, \quad E_{t+1} = G_t - P P^\top G_t

  Args:
    scale: factor of the update.
    codec: how E is stored between steps, such as `lrjax.int8()`; default as it is. What
      it rounds away is lost: for `int8` up to 0.4 % of the largest entry of a column.

  Returns:
    A `Residual` whose state is E (d, k), of the gradient's accumulation dtype, or what
    the codec makes of it.
  """
  finite('scale', scale)
  encode = codec.encode if codec else lambda e: e
  decode = codec.decode if codec else lambda e: e

  def after(
    g: jax.Array, low: jax.Array, u: jax.Array, up: Callable, s: Any
  ) -> tuple[jax.Array, Any]:
    return up(scale * u), encode(g - up(low))

  init = lambda g: encode(jnp.zeros(g.shape, g.dtype))
  before = lambda g, s: g + decode(s).astype(g.dtype)
  return Residual(init, before, after, projects=True)
