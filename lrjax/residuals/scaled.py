"""Residuals in full space, at the scale the inner optimizer gave to its own part."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.checks import closest, finite
from lrjax.types import Parts, Residual

MODES = ('official', 'paper')
GRANULARITIES = ('channel', 'tensor')


def fira(
  scale: float = 1.0,
  mode: str = 'official',
  *,
  per: str = 'channel',
  growth_limit: float = 1.01,
  floor: float | None = 0.0,
) -> Residual:
  r"""What the subspace misses, scaled like what it catches, joins the update (Fira).

  With :math:`\phi_j = \|U_{:,j}\| / \|R_{:,j}\|` for each column of R = P^T G, U the
  inner update, and L the limit on the growth of a norm (`limited`),

  - 'official': :math:`\Delta = \alpha P U + L((G - \alpha P R) \, \phi)`;
  - 'paper': :math:`\Delta = \alpha \, (P U + L((G - P R) \, \phi))`.

  The two agree at alpha = 1. Below it the code's residual is not shrunk by alpha, and
  holds a part of the gradient inside the subspace.

  Where P is orthonormal the residual is not formed: with a = alpha in the 'official' mode,
  else 1, and l what L divides by,

  .. math::
    \Delta &= c \, G + P (\alpha U - a c R), \quad c = \phi / \ell
      \text{ times } \alpha / a \\
    \|(G - a P R) \phi\|_F^2
      &= \sum_j \phi_j^2 \left(\|G_{:,j}\|^2 - a (2 - a) \|R_{:,j}\|^2\right)

  which is one product with P instead of two. Where a = 1 and P holds nearly all of G the
  difference of the sums keeps fewer digits, about :math:`10^{-7} \|G\|^2 / \|G - P R\|^2`.

  Args:
    scale: alpha.
    mode: the form of the official code, or that of the paper's Algorithm 1.
    per: one ratio for each column ('channel'), or one for the whole matrix ('tensor',
      the paper's Fira-matrix).
    growth_limit: how many times the norm may grow in one step; `math.inf` for no limit.
    floor: see `limited`.

  Returns:
    A `Residual` whose state is one number a matrix, the last norm.

  Raises:
    ValueError: for an unknown `mode` or `per`, a growth limit below 1.
  """
  finite('scale', scale)
  check_growth(growth_limit, floor)
  check_choice('mode', mode, MODES)
  check_choice('per', per, GRANULARITIES)
  inside, outside = (scale, 1.0) if mode == 'official' else (1.0, scale)

  def after(
    g: jax.Array, low: jax.Array, u: jax.Array, up: Callable, s: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    missed = (g - inside * up(low)) * ratio(u, low, per)
    missed, s = limited(missed, s, growth_limit, floor)
    return up(scale * u) + outside * missed, s

  def parts(
    total: Callable, low: jax.Array, u: jax.Array, s: jax.Array
  ) -> tuple[Parts, jax.Array]:
    phi = ratio(u, low, per)
    caught = jnp.sum(jnp.square(phi * low))
    missed = total(phi) - inside * (2 - inside) * caught
    c, s = shrunk(phi, jnp.sqrt(jnp.maximum(missed, 0)), s, growth_limit, floor)
    c = outside * c
    return Parts(scale * u - inside * c * low, c), s

  per_column = per == 'channel'
  return Residual(
    no_norm_yet, lambda g, s: g, after, per_column=per_column, parts=parts
  )


def scale_full(
  scale: float = 1.0,
  *,
  per: str = 'channel',
  growth_limit: float = 1.01,
  front: bool = False,
  floor: float | None = 0.0,
) -> Residual:
  r"""The raw gradient, scaled as the inner optimizer scaled its sketch (APOLLO).

  .. math::
    \Delta = \sqrt{\alpha} \, L(G \, s), \quad s_j = \|U_{:,j}\| / \|R_{:,j}\|

  with R = P^T G, U the inner update and L the limit on the growth of a norm (`limited`).

  Args:
    scale: alpha, which enters by its root, as in the official code.
    per: one ratio for each column ('channel'), or one for the whole matrix ('tensor').
    growth_limit: how many times the norm may grow in one step; `math.inf` for no limit.
    front: multiply by the root ahead of the limit instead of after it. The norm in
      memory then includes it, to no other effect but through the 1e-8 beside it.
    floor: see `limited`.

  Returns:
    A `Residual` whose state is one number a matrix, the last norm.

  Raises:
    ValueError: for an unknown `per`, a growth limit below 1.
  """
  finite('scale', scale)
  check_growth(growth_limit, floor)
  check_choice('per', per, GRANULARITIES)

  def parts(
    total: Callable, low: jax.Array, u: jax.Array, s: jax.Array
  ) -> tuple[Parts, jax.Array]:
    ahead, behind = (jnp.sqrt(scale), 1.0) if front else (1.0, jnp.sqrt(scale))
    phi = ahead * ratio(u, low, per)
    c, s = shrunk(phi, jnp.sqrt(total(phi)), s, growth_limit, floor)
    return Parts(None, behind * c), s

  def after(
    g: jax.Array, low: jax.Array, u: jax.Array, up: Callable, s: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    found, s = parts(lambda c: jnp.sum(jnp.square(c * g)), low, u, s)
    return found.c * g, s

  per_column = per == 'channel'
  return Residual(
    no_norm_yet,
    lambda g, s: g,
    after,
    per_column=per_column,
    parts=parts,
    any_basis=True,
  )


def limited(
  x: jax.Array,  # (d, k)
  last: jax.Array,  # [], the norm after the last step; negative: none yet
  growth_limit: float,
  floor: float | None,
) -> tuple[jax.Array, jax.Array]:
  """`x` with its Frobenius norm at most `growth_limit` times the last one (Fira).

  A norm that is not above `floor` is not remembered: after one zero the official code
  allows 1e-8, and grows from there by 1 % a step, over a thousand steps. With None
  every norm is, as in the official code. An `x` whose norm overflows becomes zero.

  Args:
    x: what is to be limited; its direction stays.
    last: the state.
    growth_limit: the largest allowed growth.
    floor: a number, or None.

  Returns:
    (limited x, state).

  >>> x, last = jnp.ones((1, 1)), jnp.float32(-1)
  >>> for raw in (1.0, 5.0, 5.0, 0.0, 0.1, 5.0):
  ...   y, last = limited(raw * x, last, 1.01, 0.0)
  ...   print(f'{y[0, 0]:.4f}', end=' ')
  1.0000 1.0100 1.0201 0.0000 0.1000 0.1010
  """
  return shrunk(x, jnp.linalg.norm(x), last, growth_limit, floor)


def shrunk(
  x: jax.Array,
  norm: jax.Array,  # []
  last: jax.Array,  # [], as in `limited`
  growth_limit: float,
  floor: float | None,
) -> tuple[jax.Array, jax.Array]:
  """`limited` of an x, or of a factor of what has this norm.

  >>> shrunk(jnp.float32(8), jnp.float32(5), jnp.float32(1), 1.25, 0.0)
  (Array(2., dtype=float32), Array(1.25, dtype=float32))
  """
  shrink = jnp.maximum(norm / (growth_limit * (last + 1e-8)), 1.0)
  shrink = jnp.where(last < 0, 1.0, shrink)
  known = jnp.isfinite(norm)
  kept = known if floor is None else known & (norm > floor)
  return jnp.where(known, x / shrink, 0.0), jnp.where(kept, norm / shrink, last)


def no_norm_yet(g: Any) -> jax.Array:
  """The state of `limited` before its first call."""
  return jnp.full([], -1, g.dtype)


def ratio(u: jax.Array, low: jax.Array, per: str) -> jax.Array:
  """How much larger u (r, k) is than low (r, k): (1, k) of columns, or (1, 1) of all."""
  axes = 0 if per == 'channel' else (0, 1)
  norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))
  return norm(u) / (norm(low) + 1e-8)


def check_growth(growth_limit: Any, floor: Any) -> None:
  """Refuses limits that would shrink what does not grow."""
  if not (isinstance(growth_limit, float) and math.isinf(growth_limit)):
    finite('growth_limit', growth_limit)
  if not isinstance(growth_limit, jax.Array) and not growth_limit >= 1:
    raise ValueError(f'`growth_limit` must be at least 1, got {growth_limit}')
  if floor is not None:
    finite('floor', floor)


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
  """Raises ValueError unless `value` is one of `known`."""
  if value not in known:
    raise ValueError(f'unknown `{name}` {value!r}; {closest(str(value), known)}')
