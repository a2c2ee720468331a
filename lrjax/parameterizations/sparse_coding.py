"""A matrix as sparse codes times a small basis: K (n, w) ~ C D, s numbers a row of C.

Alternating least squares over D (m, w) and C (n, m), whose rows are kept as `index` and
`values` (n, s). Orthogonal matching pursuit: Pati et al., "Orthogonal Matching Pursuit:
Recursive Function Approximation with Applications to Wavelet Decomposition", 1993. All
in float32 and of fixed shapes; for ONE matrix, to be vmapped.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lrjax.bases.orthonormal import mm
from lrjax.parameterizations import factors

# Damping of least squares, relative to the Gram matrix's diagonal.
DAMPING = 1e-6


class Code(NamedTuple):
  """C D.

  Attributes:
    index: (n, s) int32, which rows of the basis; distinct along s.
    values: (n, s), their coefficients.
    basis: D (m, w).
  """

  index: jax.Array
  values: jax.Array
  basis: jax.Array


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def fit(key: jax.Array, K: jax.Array, atoms: int, nnz: int, rounds: int) -> Code:
  """From a spectral start, rounds that use matching pursuit."""
  # Compiled even where the caller is not, for a loop is compiled anew at each such call.
  D = spectral(key, K, atoms)
  index = omp(K, D, nnz)
  again = lambda _, code: improve(K, code, omp(K, code.basis, nnz), True)
  return jax.lax.fori_loop(0, rounds, again, Code(index, refit(K, D, index), D))


def spectral(key: jax.Array, K: jax.Array, atoms: int) -> jax.Array:
  """The leading right singular vectors of K; beyond its rank rows of it at random."""
  _, s, Vt = factors.svd(K)
  D, found = jax.random.permutation(key, K)[:atoms], min(atoms, len(s))
  in_span = s[:found] > 1e-6 * s[0]
  return D.at[:found].set(jnp.where(in_span[:, None], Vt[:found], D[:found]))


def omp(K: jax.Array, D: jax.Array, nnz: int) -> jax.Array:
  """The index found by orthogonal matching pursuit: one atom at a time, then a refit."""
  G, R = mm(D, D.T), mm(K, D.T)
  norms = jnp.sqrt(jnp.diag(G))
  scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
  slots = jnp.arange(nnz)

  def pick(t: jax.Array, carry: tuple) -> tuple:
    index, values, taken = carry
    score = jnp.abs(R - mm(scatter(index, values, len(D)), G)) * scale[None]
    best = jnp.argmax(jnp.where(taken, -1, score), axis=1)
    index = jnp.where(slots[None] == t, best[:, None], index)
    taken = taken | (jnp.arange(len(D))[None] == best[:, None])
    return index, _solve(G, R, index, slots <= t), taken

  start = jnp.zeros((len(K), nnz), jnp.int32)
  carry = start, start.astype(jnp.float32), jnp.zeros(R.shape, bool)
  return jax.lax.fori_loop(0, nnz, pick, carry)[0]


def one_shot(K: jax.Array, D: jax.Array, nnz: int) -> jax.Array:
  """The index of the largest terms of K's least-squares fit by all atoms."""
  G = mm(D, D.T)
  C = jnp.linalg.solve(_damped(G), mm(D, K.T)).T
  return jax.lax.top_k(jnp.abs(C) * jnp.sqrt(jnp.diag(G))[None], nnz)[1]


def refit(K: jax.Array, D: jax.Array, index: jax.Array) -> jax.Array:
  """The values that fit K best with the atoms of `index`."""
  return _solve(mm(D, D.T), mm(K, D.T), index, jnp.ones(index.shape[1], bool))


def refit_basis(K: jax.Array, code: Code) -> jax.Array:
  """The basis that fits K best with these codes; atoms that nobody uses stay.

  Damped towards the old basis, not towards zero, so the error cannot grow.
  """
  C = scatter(code.index, code.values, len(code.basis))
  gram = _damped(mm(C.T, C))
  return code.basis + jnp.linalg.solve(gram, mm(C.T, K - mm(C, code.basis)))


def improve(
  K: jax.Array, code: Code, index: jax.Array, moves: jax.Array | bool
) -> Code:
  """A round: rows take the new index where that fits better, then the basis is refitted.

  Args:
    K: (n, w).
    code: what to improve.
    index: (n, s), the new one.
    moves: whether any row may take it.
  """
  D = code.basis
  old, new = (refit(K, D, i) for i in (code.index, index))
  better = (_lost(K, index, new, D) < _lost(K, code.index, old, D)) & moves
  index = jnp.where(better[:, None], index, code.index)
  code = Code(index, jnp.where(better[:, None], new, old), D)
  return code._replace(basis=refit_basis(K, code))


def scatter(index: jax.Array, values: jax.Array, atoms: int) -> jax.Array:
  """C (n, m)."""
  rows = jnp.arange(len(index))[:, None]
  return jnp.zeros((len(index), atoms), values.dtype).at[rows, index].add(values)


def _solve(G, R, index, live):
  """Least squares on the atoms of `index` whose slot is live; 0 on the others."""
  A = G[index[:, :, None], index[:, None, :]]
  both = live[:, None] & live[None]
  A = jnp.where(both[None], A, jnp.eye(len(live))[None])
  b = jnp.where(live[None], jnp.take_along_axis(R, index, axis=1), 0)
  return jnp.linalg.solve(jax.vmap(_damped)(A), b[..., None])[..., 0]


def _damped(gram):
  # The last term lets atoms that are 0, or that nobody uses, be solved for: by 0.
  return gram + jnp.diag(DAMPING * jnp.diag(gram) + 1e-30)


def _lost(K, index, values, D):
  return jnp.sum((K - mm(scatter(index, values, len(D)), D)) ** 2, axis=1)
