"""Tracking a subspace by steps along geodesics."""

from typing import Any

import jax
import jax.numpy as jnp

from lrjax.bases.orthonormal import mm, orthonormal
from lrjax.checks import finite
from lrjax.types import Basis

SQUARINGS = 6  # (F'F)^64: a ratio of 0.9 between singular values becomes 1e-6


def grassmann(rank: int, *, step_size: float = 0.5) -> Basis:
  r"""Turns one direction of P towards what it misses (SubTrack, arXiv 2502.01586).

  .. math::
    X = G / \|G\|_F, \quad A = P^\top X, \quad F = -2 (X - P A) A^\top
    \approx s\, u v^\top, \\
    P \leftarrow P + (P v (\cos \theta - 1) - u \sin \theta)\, v^\top, \quad
    \theta = \min(\eta s, \pi / 2)

  F is the slope of :math:`\|X - P P^\top X\|^2` on the Grassmann manifold, (s, u, v) its
  leading singular triple; P moves along the geodesic of that triple by the angle theta
  and stays orthonormal. About `8 d k r` flops, no factorisation. It needs a start: see
  `switched`.

  Args:
    rank: number of columns; clipped to min(rank, d, k).
    step_size: eta. Because X is normalised it does not depend on the gradient's scale; 0.5
      is Newton's step for a gradient of rank one. The official code has raw gradients
      instead, 10 to 10000 here, and no limit on the angle.

  Returns:
    A `Basis` whose state is P (d, r).

  >>> b = grassmann(1)
  >>> g, p = jnp.array([[0.1], [1.0]]), jnp.array([[0.0], [1.0]])
  >>> p = b.fit(None, g, p)
  >>> print(f'{p[0, 0]:.3f} {p[1, 0]:.3f}')
  0.099 0.995
  """
  finite('step_size', step_size)

  def fit(key: Any, g: jax.Array, r: int, p: jax.Array) -> jax.Array:
    x = g / jnp.maximum(jnp.linalg.norm(g), jnp.finfo(g.dtype).tiny)
    A = mm(p.T, x)
    F = -2 * mm(x - mm(p, A), A.T)
    # Rounding leaves a part of F inside the subspace, which would bend P.
    F = F - mm(p, mm(p.T, F))
    s, u, v = leading(F)
    theta = jnp.minimum(step_size * s, jnp.pi / 2)
    p = p + jnp.outer(mm(p, v) * (jnp.cos(theta) - 1) - u * jnp.sin(theta), v)
    # One step of Newton's iteration takes away what rounding adds over many fits.
    return 1.5 * p - 0.5 * mm(p, mm(p.T, p))

  return orthonormal(rank, fit, signs=False)


def leading(
  f: jax.Array,  # (d, r)
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The largest singular value with its vectors u (d,), v (r,), by squaring f' f."""
  gram = mm(f.T, f)
  tiny = jnp.finfo(f.dtype).tiny
  unit = lambda m: m / jnp.maximum(jnp.trace(m), tiny)
  power = unit(gram)
  for _ in range(SQUARINGS):
    power = unit(mm(power, power))
  v = power[jnp.argmax(jnp.diagonal(power))]
  v = v / jnp.maximum(jnp.linalg.norm(v), tiny)
  u = mm(f, v)
  s = jnp.linalg.norm(u)
  return s, u / jnp.maximum(s, tiny), v
