"""Refreshes without a decomposition of the whole: GaLore 2's and power iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import matrix

import lrjax
from lrjax.bases.orthonormal import signed_cosines
from lrjax.testing import trajectory

RANK = 4


def caught(p, g):
  return float(jnp.sum((p.T @ g) ** 2))


@pytest.mark.parametrize('shape', [(32, 48), (48, 32)])
def test_galore_2_catches_what_an_exact_svd_would(shape):
  g = matrix(shape, decay=0.9)
  b = lrjax.randomized_svd(RANK)
  p = b.fit(jax.random.key(0), g, b.init(*shape, g.dtype))
  best = float(np.sum(np.linalg.svd(g, compute_uv=False)[:RANK] ** 2))
  assert caught(p, g) > 0.99 * best


def test_galore_2_is_exact_for_gradients_of_low_rank():
  grads = [
    {'w': matrix((12, RANK), t, 1.0) @ matrix((RANK, 20), t + 9)} for t in range(3)
  ]
  tx = lrjax.scale_by_galore(
    RANK, 1, 1.0, optax.identity(), basis='randomized_svd'
  )  # a new subspace each step
  for u, g in zip(trajectory(tx, grads[0], grads)[0], grads):
    np.testing.assert_allclose(u['w'], g['w'], atol=1e-5)


def test_power_iteration_converges_by_the_squared_ratio_of_singular_values():
  decay = 0.8
  g = matrix((16, 24), decay=decay)
  best = np.linalg.svd(g)[0][:, :RANK]
  b = lrjax.subspace_iteration(RANK)
  p = b.init(16, 24, g.dtype)
  tangents = []
  for _ in range(6):
    p = b.fit(None, g, p)
    cosine = np.linalg.svd(best.T @ p)[1].min()
    tangents.append(np.sqrt(1 - cosine**2) / cosine)
  shrink = np.divide(tangents[1:], tangents[:-1])
  # The bound is on the largest angle, reached once faster directions have died out.
  assert shrink[-1] < decay**2 + 0.02
  assert max(shrink) < 1


def test_cholesky_qr_finds_the_basis_of_householder_qr():
  g = matrix((16, 24))
  start = signed_cosines(16, RANK, g.dtype)
  plain, fast = (
    lrjax.subspace_iteration(RANK, orth=orth).fit(None, g, start)
    for orth in (lrjax.householder_qr, lrjax.cholesky_qr)
  )
  np.testing.assert_allclose(fast, plain, atol=1e-4)
  np.testing.assert_allclose(fast.T @ fast, np.eye(RANK), atol=1e-5)


@pytest.mark.parametrize('bad', [0.0, jnp.nan, jnp.inf])
def test_power_iteration_keeps_its_basis_on_a_gradient_it_cannot_use(bad):
  tx = lrjax.scale_by_galore(RANK, 1, basis='subspace_iteration')
  g = {'w': matrix((8, 12))}
  update = jax.jit(tx.update)
  before = update(g, tx.init(g))[1]
  after = update({'w': jnp.full((8, 12), bad)}, before)[1]
  basis = lambda state: state.slots['w'].state.basis
  np.testing.assert_array_equal(basis(after), basis(before))
