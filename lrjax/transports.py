r"""What the inner state becomes when the basis changes.

A transport is `(change, inner_state) -> inner_state`; `change` multiplies by
:math:`C = P_{new}^\top P_{old}` (r, r), see `lrjax.types.Change`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.checks import finite
from lrjax.codecs.dynamic import stored_like, widened
from lrjax.roles import map_moments
from lrjax.types import Change


def keep(change: Change, inner: Any) -> Any:
  """The state as it is, read in the new basis (GaLore)."""
  return inner


def reset(change: Change, inner: Any) -> Any:
  """The state before the first update, counts included (FRUGAL)."""
  # Not zeros: some states hold constants, optax's Muon its coefficients.
  assert change.start is not None
  return change.start()


def rotate_abs(change: Change, inner: Any) -> Any:
  """First moments `C mu`, second moments `|C nu|` (DCT-AdamW)."""
  return _moments(inner, change.rotate, lambda nu: jnp.abs(change.rotate(nu)))


def rotate_square(change: Change, inner: Any) -> Any:
  """First moments `C mu`, second moments `(C*C) nu`, exact for independent entries."""
  return _moments(inner, change.rotate, change.square)


NAMES = dict(keep=keep, reset=reset, rotate_abs=rotate_abs, rotate=rotate_square)


def projection_aware(b1: float = 0.9, b2: float = 0.999) -> Callable:
  r"""Rotates Adam's moments as the statistics they estimate (LDAdam).

  .. math::
    V \leftarrow c_2 \left| (C * C)(V / c_2 - (M / c_1)^2) + (C M / c_1)^2 \right|,
    \quad M \leftarrow C M, \quad c_i = 1 - b_i^t

  after t updates: variances rotate by squares, and the squared mean is added again.

  Args:
    b1: decay of the inner optimizer's first moment.
    b2: decay of its second moment.

  Returns:
    A transport for inner states with `count`, `mu` and `nu`; others raise ValueError.
  """
  finite('b1', b1, below=1.0)
  finite('b2', b2, below=1.0)

  def rotate(change: Change, inner: Any) -> Any:
    if not all(hasattr(inner, name) for name in ('count', 'mu', 'nu')):
      raise ValueError(
        f'projection_aware needs an inner state with `count`, `mu` and `nu`, such as'
        f' that of lrjax.adam, got {type(inner).__name__}; use transport=keep or reset'
      )
    mu, nu = widened(inner.mu, signed=True), widened(inner.nu, signed=False)
    mu, nu = rotate_adam(change, mu, nu, inner.count, b1, b2)
    return inner._replace(
      mu=stored_like(mu, inner.mu, signed=True),
      nu=stored_like(nu, inner.nu, signed=False),
    )

  return rotate


def rotate_adam(
  change: Change,
  mu: jax.Array,
  nu: jax.Array,
  count: jax.Array,
  b1: float,
  b2: float,
) -> tuple[jax.Array, jax.Array]:
  """The formula of `projection_aware` on bare moments (r, k) after `count` updates."""
  # Before the first update both moments are zero and so is the result.
  c1, c2 = (1 - b ** jnp.maximum(count, 1) for b in (b1, b2))
  turned = change.rotate(mu)
  variance = change.square(nu / c2 - jnp.square(mu / c1))
  return turned, c2 * jnp.abs(variance + jnp.square(turned / c1))


def _moments(inner: Any, on_mu: Callable, on_nu: Callable) -> Any:
  """Maps the moments of an inner state; at least one must be there."""
  found = []

  def noted(f: Callable, signed: bool) -> Callable:
    def apply(x: Any) -> Any:
      found.append(x)
      return stored_like(f(widened(x, signed)), x, signed)

    return apply

  out = map_moments(inner, noted(on_mu, signed=True), noted(on_nu, signed=False))
  if not found:
    raise ValueError(
      f'rotating needs an inner state with moments `mu`, `nu` or `trace` (r, k), got'
      f' {type(inner).__name__}; use transport=keep or reset with this inner optimizer'
    )
  return out
