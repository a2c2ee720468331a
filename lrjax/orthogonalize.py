"""The orthogonal factor of a matrix, exactly or nearly, and the factors that go with it.

A matrix U S V^T becomes U V^T (polar) or U f(S) V^T with f near one (Newton-Schulz).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.checks import floating

Coefficients = Sequence[tuple[float, float, float]]

# Keller Jordan's constants for Muon: steepest at zero, ends within about [0.7, 1.2].
KELLER_JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
# The schedule of the Muon in microsoft/dion, which ends nearer to one.
DION_SCHEDULE: Coefficients = (
  (4.0848, -6.8946, 2.9270),
  (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037),
  (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
)
# Polar Express (Amsel et al., 2025, arXiv 2505.16932), the table of microsoft/dion: the
# best five quintics for singular values above 1e-3 of the norm, with a margin of 2 %.
POLAR_EXPRESS: Coefficients = (
  (8.156554524902461, -22.48329292557795, 15.878769915207462),
  (4.042929935166739, -2.808917465908714, 0.5000178451051316),
  (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
  (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
  (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz(
  x: jax.Array,
  coefficients: Coefficients = KELLER_JORDAN,
  *,
  norm_factor: float = 1.0,
  eps: float = 1e-7,
  dtype: Any = None,
) -> jax.Array:
  r"""Brings the singular values of a matrix near one by odd quintic polynomials.

  .. math::
    X_0 = X / (c \|X\|_F + \epsilon), \quad
    X_{i+1} = a_i X_i + (b_i A + c_i A^2) X_i, \quad A = X_i X_i^\top

  Matrix products only, over the shorter side: `len(coefficients) (4 n s^2 + 2 s^3)` flops
  for sides s <= n. Zero stays zero.

  Args:
    x: (m, n).
    coefficients: (a, b, c) of each step: `KELLER_JORDAN`, `DION_SCHEDULE`,
      `POLAR_EXPRESS` or your own.
    norm_factor: c, a margin above one; 1.02 belongs to `POLAR_EXPRESS`.
    eps: keeps a zero matrix from being divided by zero.
    dtype: of the arithmetic; default that of `x`. Muon's code has bfloat16, faster on
      accelerators, where entries are good to about 0.1, which the method bears.

  Returns:
    (m, n) in the dtype of `x`.

  Raises:
    TypeError: if `dtype` is not floating point.

  >>> import jax.numpy as jnp
  >>> x = newton_schulz(jnp.diag(jnp.array([3.0, 1.0])))
  >>> print(jnp.diag(x).round(1))
  [0.8 1.1]
  """
  floating('dtype', dtype)
  m, n = x.shape
  y = (x.T if m > n else x).astype(dtype or x.dtype)
  y = y / (norm_factor * jnp.linalg.norm(y) + eps)
  for a, b, c in coefficients:
    A = y @ y.T
    y = a * y + (b * A + c * A @ A) @ y
  return (y.T if m > n else y).astype(x.dtype)


def polar_express(x: jax.Array) -> jax.Array:
  """`newton_schulz` with the constants of `POLAR_EXPRESS`."""
  return newton_schulz(x, POLAR_EXPRESS, norm_factor=1.02, eps=1e-6)


def polar(x: jax.Array) -> jax.Array:
  """U V^T of the singular value decomposition (m, n); the reference for the above.

  Directions below 1e-6 of the largest singular value are left out, so zero stays zero.
  """
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  return (u * (s > 1e-6 * s[0])[None, :]) @ vt


def unscaled(fan_in: int, fan_out: int) -> float:
  """1."""
  return 1.0


def muon_scale(fan_in: int, fan_out: int) -> float:
  """max(1, fan_out / fan_in)^0.5, Keller Jordan's for Muon."""
  return math.sqrt(max(1.0, fan_out / fan_in))


def rms_scale(fan_in: int, fan_out: int) -> float:
  """0.2 max(fan_in, fan_out)^0.5, Kimi's: entries of the size Adam's updates have."""
  return 0.2 * math.sqrt(max(fan_in, fan_out))


def spectral_scale(fan_in: int, fan_out: int) -> float:
  """(fan_out / fan_in)^0.5, Dion's: learning rates carry over between widths."""
  return math.sqrt(fan_out / fan_in)


ORTHOGONALIZERS = dict(
  newton_schulz=newton_schulz, polar_express=polar_express, polar=polar
)
FAN_SCALES = dict(none=unscaled, kj=muon_scale, kimi=rms_scale, dion=spectral_scale)
