"""Bases that store P (d, r) with orthonormal columns, fitted to a gradient (d, k)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.bases.qr import balanced, cholesky_qr, is_orthonormal, mm
from lrjax.checks import positive_int
from lrjax.types import Basis, Sketch

# Largest |P'P - I| of a factorisation that is believed; healthy ones stay below 1e-5.
DEFECT = 1e-3


def svd(rank: int, *, signs: bool = True) -> Basis:
  """The leading left singular vectors, by LAPACK's full decomposition.

  The reference for the others: exact, and the slowest. About `4 k d^2 + 22 d^3` flops.

  Args:
    rank: number of columns; clipped to min(rank, d, k).
    signs: make the entry of largest magnitude in each column positive. Without it the
      signs are LAPACK's and differ between libraries, layouts and devices.

  Returns:
    A `Basis` whose state is P (d, r).

  >>> g = jnp.diag(jnp.array([3.0, 1.0, 2.0]))
  >>> b = svd(2)
  >>> print(b.fit(None, g, b.init(3, 3, g.dtype)))
  [[1. 0.]
   [0. 0.]
   [0. 1.]]
  """

  def fit(key: Any, g: jax.Array, r: int, p: jax.Array) -> jax.Array:
    return jnp.linalg.svd(g, full_matrices=False)[0][:, :r]

  return orthonormal(rank, fit, signs=signs)


def eigh(rank: int, *, signs: bool = True) -> Basis:
  """The same subspace from the eigenvectors of the smaller Gram matrix.

  As exact as `svd` for directions whose singular value is above 1e-3 of the largest
  (float32), 4 to 13 times cheaper on a CPU. About `2 k s^2 + 9 s^3` flops, s = min(d, k).

  It serves s up to about 2048. Above, and on accelerators, which factorise the matrices
  of a stack one after the other, take `subspace_iteration` or `randomized_svd`: of real
  gradients they catch over 99 % of as much.

  Args:
    rank: number of columns; clipped to min(rank, d, k).
    signs: see `svd`.

  Returns:
    A `Basis` whose state is P (d, r).
  """

  def fit(key: Any, g: jax.Array, r: int, p: jax.Array) -> jax.Array:
    d, k = g.shape
    if d <= k:
      return _leading(mm(g, g.T), r)
    # Squaring loses small singular values, so G V is orthonormalised, not divided.
    return cholesky_qr(_ordered(g, r))

  return orthonormal(rank, fit, signs=signs)


def randomized_svd(
  rank: int,
  *,
  oversample: int = 8,
  power_steps: int = 1,
  signs: bool = True,
  orth: Callable = cholesky_qr,
) -> Basis:
  r"""A randomized range finder with power steps (Halko et al., 2011, arXiv 0909.4061).

  .. math:: Y = (G G^\top)^q G \Omega, \quad P = U_r, \quad Y = U S V^\top

  Matrix products alone, but for factors of `l x l` matrices: `2 d k l (1 + 2q)` flops and
  some `d l^2`, l = r + oversample. Of a gradient split over a mesh nothing is gathered.

  Args:
    rank: number of columns; clipped to min(rank, d, k).
    oversample: extra random columns, dropped at the end.
    power_steps: q; 0 caught 95 % and 1 caught 99.4 % of the best energy on a slowly
      decaying spectrum.
    signs: see `svd`.
    orth: `Y (n, r) -> Q (n, r)`, makes columns orthonormal.

  Returns:
    A `Basis` whose state is P (d, r).
  """

  def start(key: jax.Array, p: jax.Array, d: int, k: int) -> jax.Array:
    l = min(p.shape[1] + oversample, d, k)
    return jax.random.normal(key, (k, l), p.dtype)

  products = ('up', *('down', 'up') * power_steps)
  finish = lambda y, p: orth(_ordered(y, p.shape[1]))
  return by_products(rank, Sketch(start, products, balanced, finish), signs=signs)


def subspace_iteration(
  rank: int, *, steps: int = 1, signs: bool = True, orth: Callable = cholesky_qr
) -> Basis:
  r"""Power steps that start from the previous basis, for gradients that turn slowly.

  .. math:: Y = G (G^\top P), \quad P \leftarrow U, \quad Y = U S V^\top

  The cheapest fit: `4 d k r` flops a step and some `d r^2`, products alone but for
  factors of `r x r` matrices. The first one starts from a fixed random subspace (signed
  cosines), so it is as good as a randomized one without oversampling. Of a gradient split
  over a mesh nothing is gathered: what crosses it is as large as P and P^T G.

  Args:
    rank: number of columns; clipped to min(rank, d, k).
    steps: power steps a fit.
    signs: see `svd`.
    orth: `Y (n, r) -> Q (n, r)`, makes columns orthonormal: `lrjax.cholesky_qr` or
      `lrjax.householder_qr`.

  Returns:
    A `Basis` whose state is P (d, r).
  """

  sketch = Sketch(
    start=lambda key, p, d, k: p,
    products=('down', 'up') * steps,
    between=balanced,
    finish=lambda y, p: orth(_ordered(y, p.shape[1])),
  )
  return by_products(rank, sketch, signs=signs, init=signed_cosines)


def by_products(
  rank: int, sketch: Sketch, *, signs: bool = True, init: Callable | None = None
) -> Basis:
  """A `Basis` with P (d, r) as its state, found by products with g alone."""

  def fit(key: Any, g: jax.Array, r: int, p: jax.Array) -> jax.Array:
    x = sketch.start(key, p, *g.shape)
    for i, product in enumerate(sketch.products):
      x = mm(g.T if product == 'down' else g, sketch.between(x) if i else x)
    return sketch.finish(x, p)

  finish = lambda y, p: checked(sketch.finish(y, p), signs)
  basis = orthonormal(rank, fit, signs=signs, init=init)
  return basis._replace(sketch=sketch._replace(finish=finish))


def orthonormal(
  rank: int, fit: Callable, *, signs: bool = True, init: Callable | None = None
) -> Basis:
  """A `Basis` with P (d, r) as its state, from `(key, g, r, P) -> P`.

  Args:
    rank: number of columns; clipped to min(rank, d, k).
    fit: finds P; a result that is not orthonormal is replaced by NaN, which the loop
      refuses.
    signs: see `svd`.
    init: `(d, r, dtype) -> P`; default the first r unit vectors.

  Returns:
    The `Basis`.
  """
  rank = positive_int('rank', rank)

  def start(d: int, k: int, dtype: Any) -> jax.Array:
    r = min(rank, d, k)
    return jnp.eye(d, r, dtype=dtype) if init is None else init(d, r, dtype)

  def refit(key: Any, g: jax.Array, p: jax.Array) -> jax.Array:
    return checked(fit(key, g, p.shape[1], p), signs)

  return Basis(start, refit, down, up, lambda p, d: p)


def checked(p: jax.Array, signs: bool) -> jax.Array:
  """P, with `fix_signs` or not; NaN where its columns are not orthonormal."""
  good = is_orthonormal(p, DEFECT)
  return jnp.where(good, fix_signs(p) if signs else p, jnp.nan)


def down(p: jax.Array, g: jax.Array) -> jax.Array:
  """P^T G: (d, r), (d, k) -> (r, k)."""
  # Written as (G^T P)^T: where g is a transposed leaf, XLA multiplies the leaf as it lies;
  # P^T G takes 2.7 times as long there on a CPU, and as long as this one elsewhere.
  return (g.T @ p).T


def up(p: jax.Array, low: jax.Array, d: int) -> jax.Array:
  """P X: (d, r), (r, k) -> (d, k)."""
  return p @ low


def fix_signs(p: jax.Array) -> jax.Array:
  """Flips columns so that the entry of largest magnitude, the first at a tie, is positive.

  >>> print(fix_signs(jnp.array([[0.6, 0.8], [-0.8, 0.6]])))
  [[-0.6  0.8]
   [ 0.8  0.6]]
  """
  at = jnp.argmax(jnp.abs(p), axis=0, keepdims=True)
  largest = jnp.take_along_axis(p, at, axis=0)
  return jnp.where(largest < 0, -p, p)


def cosines(d: int, r: int, dtype: Any) -> jax.Array:
  """The first r columns (d, r) of the orthonormal DCT-II; column j has frequency j."""
  i, j = jnp.arange(d, dtype=dtype), jnp.arange(r, dtype=dtype)
  c = jnp.cos(jnp.pi / d * (i[:, None] + 0.5) * j[None, :])
  return c * jnp.sqrt(jnp.where(j == 0, 1.0, 2.0) / d)[None, :].astype(dtype)


def signed_cosines(d: int, r: int, dtype: Any) -> jax.Array:
  """r orthonormal columns (d, r) without structure a gradient could hide from."""
  flips = np.random.default_rng(d).choice([-1.0, 1.0], size=(d, 1))
  return jnp.asarray(flips, dtype) * cosines(d, r, dtype)


def _ordered(y: jax.Array, r: int) -> jax.Array:
  """Y V: its r largest left singular vectors, in order, of lengths not yet one."""
  return mm(y, _leading(mm(y.T, y), r))


def _leading(gram: jax.Array, r: int) -> jax.Array:
  """Eigenvectors of the r largest eigenvalues, largest first."""
  return jnp.linalg.eigh(gram)[1][:, ::-1][:, :r]
