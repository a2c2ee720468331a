"""A random subspace, drawn anew at each refresh."""

from typing import Any

import jax
import jax.numpy as jnp

from lrjax.bases.orthonormal import orthonormal
from lrjax.types import Basis


def random_orthogonal(rank: int) -> Basis:
  """r random orthonormal directions, uniform over all of them; the gradient is not seen.

  The Q of a Gaussian (d, r) = QR whose R has a positive diagonal: without that its
  distribution would follow the signs LAPACK happens to choose.

  Args:
    rank: number of columns; clipped to min(rank, d, k).

  Returns:
    A `Basis` whose state is P (d, r).

  >>> b = random_orthogonal(2)
  >>> p = b.fit(jax.random.key(0), jnp.ones((5, 3)), b.init(5, 3, jnp.float32))
  >>> bool(jnp.allclose(p.T @ p, jnp.eye(2), atol=1e-6))
  True
  """

  def fit(key: jax.Array, g: jax.Array, r: int, p: Any) -> jax.Array:
    q, upper = jnp.linalg.qr(jax.random.normal(key, (len(g), r), g.dtype))
    return jnp.where(jnp.diagonal(upper) < 0, -q, q)

  return orthonormal(rank, fit, signs=False)
