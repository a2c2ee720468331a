"""Dion against closed forms and its transcription."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import dion as oracle
from samples import gradients, matrix

import lrjax
from lrjax.bases.qr import householder_qr
from lrjax.optimizers.dion import orthonormal_power_step
from lrjax.testing import trajectory

SHAPES = {'wide': (8, 12), 'tall': (12, 8)}


@pytest.mark.parametrize('orth', ['qr', 'cholesky_qr'])
def test_equals_the_transcription(orth):
  grads = gradients(SHAPES, 12)
  tx = lrjax.scale_by_dion(3, 0.9, 'none', orth=orth)
  q = tx.init(grads[0]).slots['wide'].state.Q
  out, _ = trajectory(tx, grads[0], grads)
  for name in SHAPES:
    turn = (lambda x: x) if name == 'wide' else np.transpose
    want = oracle.dion([turn(g[name]) for g in grads], q, mu=0.9)
    got = np.stack([turn(u[name]) for u in out])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_factors_are_orthonormal_and_what_is_kept_is_projected():
  grads = gradients({'w': (8, 12)}, 3)
  tx = lrjax.scale_by_dion(3, 0.0, 'none')
  _, before = trajectory(tx, grads[0], grads[:2])
  out, after = trajectory(tx, grads[0], grads[2:], before)
  s = after.slots['w'].state
  np.testing.assert_allclose(jnp.linalg.norm(s.Q, axis=0), 1, atol=1e-6)
  B = before.slots['w'].state.mu + grads[2]['w']
  P = jnp.linalg.qr(B.T @ before.slots['w'].state.Q)[0]
  np.testing.assert_allclose(P.T @ P, np.eye(3), atol=1e-5)
  np.testing.assert_allclose(out[0]['w'], s.Q @ P.T, atol=1e-5)
  np.testing.assert_allclose(s.mu, B - B @ P @ P.T, atol=1e-5)


def test_once_singular_vectors_are_tracked_the_update_is_the_polar_factor():
  g = matrix((4, 6), decay=0.3)
  rule = orthonormal_power_step(4, 0.0, householder_qr)
  step, s = jax.jit(rule.update), rule.init(g)
  for _ in range(12):
    u, s = step(g, s)
  np.testing.assert_allclose(s.mu, 0, atol=1e-6)
  np.testing.assert_allclose(u, lrjax.polar(g), atol=1e-5)


@pytest.mark.parametrize('orth', ['qr', 'cholesky_qr'])
def test_a_zero_gradient_gives_a_zero_update_and_leaves_q_alone(orth):
  zero, g = {'w': jnp.zeros((8, 12))}, {'w': matrix((8, 12))}
  tx = lrjax.scale_by_dion(3, orth=orth)
  out, state = trajectory(tx, zero, [zero, g, g])
  assert not out[0]['w'].any()
  want, plain = trajectory(tx, zero, [g, g])
  np.testing.assert_array_equal(out[2]['w'], want[1]['w'])
  np.testing.assert_array_equal(state.slots['w'].state.Q, plain.slots['w'].state.Q)


def test_a_gradient_of_lower_rank_than_r_is_borne():
  g = {'w': jnp.ones((8, 12))}
  for orth in ('qr', 'cholesky_qr'):
    out, state = trajectory(lrjax.scale_by_dion(3, orth=orth), g, [g] * 3)
    for x in jax.tree.leaves((out, state)):
      assert jnp.isfinite(x).all()


def test_the_factor_is_of_fan_in_and_fan_out_whatever_the_side():
  g = {'wide': matrix((4, 16), decay=0.1), 'tall': matrix((16, 4), decay=0.1)}
  for side in ('short', 'long'):
    tx = lrjax.scale_by_dion(1, side=side)
    u, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(np.linalg.norm(u['wide'], ord=2), 2.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(u['tall'], ord=2), 0.5, rtol=1e-5)


@pytest.mark.parametrize(('d', 'k', 'rank'), [(8, 12, 3), (4096, 11008, 1024)])
def test_state_bytes(d, k, rank):
  params = {'w': jax.ShapeDtypeStruct((k, d), jnp.bfloat16)}
  counts = (
    4 + 4 + 1 + 4 + 4
  )  # steps, skipped, a flag, overdue, Lion's of the other leaves
  want = 4 * d * k + 4 * d * rank + counts
  assert lrjax.coverage(lrjax.scale_by_dion(rank), params).state_bytes == want


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(momentum=1.0), ValueError, '`momentum`.*below 1.0, got 1.0'),
    (dict(scaling='dino'), ValueError, "`scaling` 'dino'; did you mean 'dion'"),
    (dict(orth='cholesky'), ValueError, "did you mean 'cholesky_qr'"),
    (dict(orth=3), TypeError, '`orth` must be a function or one of'),
    (dict(rank=0), ValueError, '`rank` must be at least 1, got 0'),
    (dict(side='shrot'), ValueError, "did you mean 'short'"),
  ],
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.dion(0.01, **bad)
