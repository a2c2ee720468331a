"""Orthonormal columns that span those of a tall matrix."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from lrjax.branches import rarely

HIGHEST = jax.lax.Precision.HIGHEST


def mm(a: jax.Array, b: jax.Array) -> jax.Array:
  """A B at full precision: what factorisations are fed with, on accelerators too."""
  return jnp.matmul(a, b, precision=HIGHEST)


def householder_qr(x: jax.Array) -> jax.Array:
  """Orthonormal columns (n, r) whose span holds that of `x` (n, r), for any `x`."""
  return jnp.linalg.qr(x)[0]


def cholesky_qr(x: jax.Array) -> jax.Array:
  r"""The same by products of matrices and Cholesky factors of Gram matrices (r, r).

  .. math:: L L^\top = X^\top X, \quad X \leftarrow X L^{-\top}, \quad \text{twice}

  Where columns depend on each other, in float32 from a condition of about 1e3 on once
  they have equal lengths, rounding noise fills `x` up to full rank and four more rounds,
  on Gram matrices with a shifted diagonal, precede these. About `8 n r^2` flops, 24 then.

  Accelerators run Householder's QR one matrix at a time; this is batched. Where rows are
  split over a mesh only r x r matrices cross it.

  Args:
    x: (n, r) with n >= r, finite.

  Returns:
    Q (n, r); where the columns of `x` are independent, Householder's but for signs: the
    diagonal of Q^T X is positive.

  References:
    Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020

  >>> q = cholesky_qr(jnp.array([[3.0, 3.0], [4.0, 4.0], [0.0, 2.0]]))
  >>> print(q.round(3))
  [[0.6 0. ]
   [0.8 0. ]
   [0.  1. ]]
  """
  q, gram = _whiten(_whiten(x)[0])
  # With a gram so near the identity the second round has left rounding alone. NaN, what
  # comes of a Cholesky factorisation that fails, compares as false.
  good = jnp.sum(jnp.square(gram - jnp.eye(len(gram), dtype=x.dtype))) < 0.25
  return rarely(~good, lambda x, q: _completed(x), lambda x, q: q, x, q)


def balanced(x: jax.Array) -> jax.Array:
  """The columns (n, r) made nearly orthonormal by one round, for any `x`.

  What a power step needs between its products: directions that have come to differ in
  size by a factor up to 1e2 are even again, smaller ones remain small.
  """
  # Shifted by what rounding may take from the least eigenvalue, so that it never fails.
  return _whiten(x, x.shape[1] * float(jnp.finfo(x.dtype).eps))[0]


def is_orthonormal(p: jax.Array, defect: float) -> jax.Array:
  """bool[], whether no entry of P^T P - I exceeds `defect`."""
  eye = jnp.eye(p.shape[1], dtype=p.dtype)
  # Not by the largest entry: on a CPU a maximum passes over NaN.
  return jnp.all(jnp.abs(mm(p.T, p) - eye) < defect)


def _whiten(y: jax.Array, shift: float = 0.0) -> tuple[jax.Array, jax.Array]:
  """One round, and the Gram matrix it began with."""
  gram = mm(y.T, y)
  eye = jnp.eye(len(gram), dtype=y.dtype)
  size = jnp.diagonal(gram)
  L = jnp.linalg.cholesky(gram + shift * eye * jnp.where(size > 0, size, 1)[None])
  # The inverse (r, r) is formed: a triangular solve would gather the rows of y.
  return mm(y, solve_triangular(L, eye, lower=True).T), gram


def _completed(x: jax.Array) -> jax.Array:
  """Orthonormal columns for any `x`, whatever its rank."""
  eps = jnp.finfo(x.dtype).eps
  unit = lambda y, size: y / jnp.where(size > 0, size, 1)[None]
  # Twice, since squares of entries near the ends of float32 would vanish or overflow.
  y = unit(x, jnp.abs(x).max(axis=0))
  y = unit(y, jnp.linalg.norm(y, axis=0))
  noise = jax.random.normal(jax.random.key(0), y.shape, y.dtype)
  y = y + 4 * eps * len(x) ** -0.5 * noise
  for _ in range(4):
    y = balanced(y)
  return _whiten(_whiten(y)[0])[0]
