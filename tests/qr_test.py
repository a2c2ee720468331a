"""Orthonormal columns by products, from columns good and bad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import matrix

import lrjax
from lrjax.bases.qr import balanced


def conditioned(n, r, condition):
  """(n, r) with singular values from 1 to 1 / condition in directions of no column."""
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.standard_normal((m, r)))[0] for m in (n, r))
  return jnp.asarray((u * np.geomspace(1, 1 / condition, r)) @ v.T, jnp.float32)


def awkward(n, r):
  good, wave = conditioned(n, r, 10), jnp.cos(jnp.arange(r))
  return {f'condition_1e{e}': conditioned(n, r, 10.0**e) for e in range(1, 9)} | {
    'bf16': conditioned(n, r, 1e3).astype(jnp.bfloat16).astype(jnp.float32),
    'graded': good * jnp.geomspace(1, 1e-30, r)[None],
    'huge': good * 1e30,
    'tiny': conditioned(n, r, 1e5) * 1e-30,
    'zero': jnp.zeros((n, r)),
    'ones': jnp.ones((n, r)),
    'rank_1': jnp.outer(jnp.arange(1.0, n + 1), wave),
    'one_row': jnp.zeros((n, r)).at[2].set(wave),
    'two_rows': good.at[1:-1].set(0),
    'a_zero_column': good.at[:, 1].set(0),
    'equal_columns': good.at[:, 2].set(good[:, 1]),
    'half_zero': good.at[:, r // 2 :].set(0),
  }


@pytest.mark.parametrize('shape', [(12, 12), (256, 64)])
def test_cholesky_qr_serves_every_matrix(shape):
  cases = awkward(*shape)
  each = jax.jit(lambda xs: jax.lax.map(lrjax.cholesky_qr, xs))
  out = each(jnp.stack(list(cases.values())))
  for (case, x), q in zip(cases.items(), out):
    q, x = np.asarray(q, np.float64), np.asarray(x, np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(shape[1]), atol=1e-5, err_msg=case)
    # What is filled up costs a column a few units in the last place of its length.
    missed = np.linalg.norm(x - q @ (q.T @ x), axis=0)
    assert (missed <= 1e-5 * np.linalg.norm(x, axis=0)).all(), case


def test_it_is_the_qr_whose_diagonal_is_positive():
  x = matrix((9, 3))
  q, upper = jnp.linalg.qr(x)
  want = q * jnp.sign(jnp.diagonal(upper))[None]
  np.testing.assert_allclose(lrjax.cholesky_qr(x), want, atol=1e-5)
  np.testing.assert_array_equal(lrjax.householder_qr(x), q)


def test_a_bad_matrix_leaves_the_others_of_its_stack_alone():
  good, bad = matrix((9, 3)), jnp.ones((9, 3))
  out = jax.jit(jax.vmap(lrjax.cholesky_qr))(jnp.stack([good, bad]))
  np.testing.assert_allclose(out[0], lrjax.cholesky_qr(good), atol=1e-6)
  np.testing.assert_allclose(out[1].T @ out[1], np.eye(3), atol=1e-5)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    for x in (np.random.default_rng(0).standard_normal((9, 3)), np.ones((9, 3))):
      q = lrjax.cholesky_qr(jnp.asarray(x))
      assert q.dtype == jnp.float64
      np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-14)


def test_balanced_columns_keep_their_span():
  x = conditioned(32, 6, 30)
  y = np.asarray(balanced(x), np.float64)
  np.testing.assert_allclose(y.T @ y, np.eye(6), atol=1e-3)
  q = np.linalg.qr(np.asarray(x, np.float64))[0]
  np.testing.assert_allclose(y, q @ (q.T @ y), atol=1e-5)
  assert not balanced(jnp.zeros((4, 2))).any()
