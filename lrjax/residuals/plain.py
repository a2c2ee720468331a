"""Residuals that drop the rest of a gradient, or keep it for later."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.checks import finite, named
from lrjax.types import Codec, Parts, Residual


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

  return Residual(lambda g: (), lambda g, s: g, after, scale=scale)


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


# What a step takes of a gradient for which no state is kept.
STATE_FREE = dict(sign=jnp.sign, sgd=lambda g: g, no=jnp.zeros_like)


def state_free(
  rule: str | Callable = 'sign', inactive_scale: float = 1.0, scale: float = 1.0
) -> Residual:
  r"""What the subspace missed moves too, by a rule without state (FRUGAL).

  .. math:: \Delta = \mathrm{scale} \cdot
    \big(P U + \mathrm{inactive\_scale} \cdot f(G - P P^\top G)\big)

  The sign of the missed part is not orthogonal to P, so the update has a component in
  the subspace besides P U.

  Args:
    rule: f: 'sign', 'sgd' (the part itself), 'no' (nothing), or a function.
    inactive_scale: learning rate of the missed part, relative to that of P U.
    scale: factor of the whole update.

  Returns:
    A `Residual` without state.
  """
  f = named('inactive', rule, STATE_FREE)
  finite('inactive_scale', inactive_scale)
  finite('scale', scale)

  def after(
    g: jax.Array, low: jax.Array, u: jax.Array, up: Callable, s: tuple
  ) -> tuple[jax.Array, tuple]:
    return scale * (up(u) + inactive_scale * f(g - up(low))), s

  def parts(total: Callable, low: jax.Array, u: jax.Array, s: tuple) -> tuple:
    c = jnp.full((1, 1), scale * inactive_scale, low.dtype)
    if rule == 'sgd':
      return Parts(scale * u - c * low, c), s
    return Parts(scale * u, c, low), s

  return Residual(
    lambda g: (),
    lambda g, s: g,
    after,
    projects=True,
    scale=scale if rule == 'no' else None,
    parts=parts if rule in ('sign', 'sgd') else None,
  )
