"""One step of power iteration from the subspace at hand."""

import jax
import jax.numpy as jnp

from lrjax.bases.orthonormal import mm


def power_step(
  b: jax.Array,  # (d, k), of a scale whose squares neither vanish nor overflow
  p: jax.Array,  # (d, r), orthonormal
) -> jax.Array:
  r"""The Q factor (d, r) of :math:`B (B^\top P)`; P itself where B is zero.

  Unlike a fit of `subspace_iteration` it leaves the columns as QR makes them, close to
  the old ones where B changes slowly, so that moments can follow.

  >>> b, p = jnp.diag(jnp.array([2.0, 1.0])), jnp.full((2, 1), 0.5**0.5)
  >>> for _ in range(8):
  ...   p = power_step(b, p)
  >>> print(jnp.abs(p).round(4).T)
  [[1. 0.]]
  """
  q = jnp.linalg.qr(mm(b, mm(b.T, p)))[0]
  return jnp.where(jnp.isfinite(q).all() & b.any(), q, p)
