"""Householder Projector: a low-rank kernel with exactly orthonormal factors.

Song et al., "Householder Projector for Unsupervised Latent Semantics Discovery", 2023,
arXiv 2307.08012. The official layer builds two square products of reflections and keeps
r of their columns. Any r orthonormal columns are, up to signs, the first of a product of
r reflections alone, so that r are stored here; official layers import exactly.
"""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from lrjax.bases.orthonormal import mm
from lrjax.parameterizations import factors
from lrjax.parameterizations.factors import value
from lrjax.types import Parameterization, Split

# Squared lengths below this are no direction: such a vector reflects nothing.
_NO_DIRECTION = 1e-12


@value
def householder(rank: int, train_sigma: bool = False) -> Parameterization:
  r"""W = P diag(sigma) R^T with orthonormal P (in, r), R (out, r), whatever is trained.

  P is the first r columns of :math:`H(v_1) \cdots H(v_r)`, :math:`H(v) = I - 2 v v^\top /
  v^\top v`, of the columns of `v_in` (in, r); R likewise of `v_out` (out, r). By default
  sigma is 1, up to fixed signs that an import may need: every direction in P counts
  alike, and `householder_orthogonal(v_in)` gives these directions. No step of any size
  leaves the form.

  W does not depend on the length of a v, and gradients are orthogonal to it; but the
  angle that a step of Adam turns it is the learning rate over the size of its entries,
  0.05 at the start. Weight decay on v only makes later steps larger.

  Memory: r (in + out) trained numbers, r more with `train_sigma`, as many of each
  moment. FLOPs: 2 r (in + out) a token, as any low-rank kernel, and 4 r^2 (in + out) to
  build P and R in float32, once a forward pass.

  Choose it where orthonormal directions are the aim, as for finding semantic directions
  in a pretrained generator. As a plain way of training at low rank it costs more than
  `lrjax.factorized` and gains no capacity; with sigma at 1 it cannot even scale.

  Args:
    rank: r, at most min(in, out).
    train_sigma: whether sigma (r,) is trained, from 1; it may change sign.

  Returns:
    A Parameterization without events.

  Raises:
    ValueError: at `init` for a rank that does not fit.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> p = householder(2)
    >>> W = p.materialize(p.init(jax.random.key(0), (4, 3), jnp.float32))
    >>> jnp.linalg.svd(W)[1].round(5)
    Array([1., 1., 0.], dtype=float32)
  """

  def stored(v_in: jax.Array, v_out: jax.Array, sigma: jax.Array) -> Split:
    v = {'v_in': v_in, 'v_out': v_out}
    if train_sigma:
      return Split({**v, 'sigma': sigma})
    return Split(v, {'sign': jnp.sign(sigma)})

  def start(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    r = factors.check_rank(rank, shape)
    v_in, v_out = (
      0.05 * jax.random.normal(k, (n, r)) for k, n in zip(jax.random.split(key), shape)
    )
    split = stored(v_in, v_out, jnp.ones(r))
    return jax.tree.map(lambda a: a.astype(dtype), split)

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    r = factors.check_rank(rank, W.shape)
    P, s, Rt = factors.svd(W)
    (v_in, sign_in), (v_out, sign_out) = reflectors(P[:, :r]), reflectors(Rt[:r].T)
    split = stored(v_in, v_out, (s[:r] if train_sigma else 1) * sign_in * sign_out)
    lost = factors.relative_error(W, _materialize(split))
    return jax.tree.map(lambda a: a.astype(W.dtype), split), lost

  return Parameterization(
    init=start,
    from_dense=from_dense,
    apply=_apply,
    materialize=_materialize,
    axes={
      'v_in': ('in', None),
      'v_out': ('out', None),
      'sigma' if train_sigma else 'sign': (None,),
    },
  )


def householder_orthogonal(v: jax.Array) -> jax.Array:
  r"""The first r columns of a product of r reflections, orthonormal for any v.

  With unit columns Y of v, in compact WY form,

  .. math:: H(v_1) \cdots H(v_r) = I - Y T Y^\top, \quad
    T^{-1} = \mathrm{striu}(Y^\top Y) + I / 2

  Args:
    v: (n, r), r at most n; a column of zeros stands for no reflection.

  Returns:
    (n, r) in the dtype of v, computed in float32. For r = n any orthogonal matrix of
    determinant (-1)^n can be had.

  Raises:
    ValueError: for r above n.

  Examples:
    >>> Q = householder_orthogonal(jnp.array([[1.0, 0.0], [1.0, 2.0], [0.0, 1.0]]))
    >>> jnp.allclose(Q.T @ Q, jnp.eye(2), atol=1e-6)
    Array(True, dtype=bool)
  """
  n, r = v.shape
  if r > n:
    raise ValueError(f'v (n, r) must have at most n columns, got {v.shape}')
  Y = v.astype(jnp.float32)
  Y = Y * jax.lax.rsqrt(jnp.maximum(jnp.sum(Y * Y, 0, keepdims=True), _NO_DIRECTION))
  T_inverse = jnp.triu(mm(Y.T, Y), 1) + jnp.eye(r) / 2
  # Y^T applied to the first r unit vectors is the first r rows of Y.
  low = solve_triangular(T_inverse, Y[:r].T)
  return (jnp.eye(n, r) - mm(Y, low)).astype(v.dtype)


def reflectors(P: jax.Array) -> tuple[jax.Array, jax.Array]:
  """v (n, r) and signs (r,) with householder_orthogonal(v) * signs = P, orthonormal.

  LAPACK's QR of P keeps its reflectors below a diagonal of ones. A reflector that LAPACK
  leaves out (tau = 0) turns one sign here, so signs are read off the columns, not R.
  """
  n, r = P.shape
  h, _ = jnp.linalg.qr(P.astype(jnp.float32), mode='raw')
  v = jnp.tril(h.T, -1) + jnp.eye(n, r)
  return v, jnp.sign(jnp.sum(householder_orthogonal(v) * P, axis=0))


def _sigma(split: Split) -> jax.Array:
  return split.train['sigma'] if 'sigma' in split.train else split.fixed['sign']


def _apply(split: Split, x: jax.Array) -> jax.Array:
  P, R = (householder_orthogonal(split.train[n]) for n in ('v_in', 'v_out'))
  return factors.down(x, P * _sigma(split)[None]) @ R.T


def _materialize(split: Split) -> jax.Array:
  P, R = (householder_orthogonal(split.train[n]) for n in ('v_in', 'v_out'))
  return factors.product(P * _sigma(split)[None], R.T)
