"""SubTrack++ and the tracking of subspaces it rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import subtrack as oracle
from samples import gradients, matrix

import lrjax
from lrjax.bases.grassmann import leading
from lrjax.testing import trajectory


def start(d, r, seed=3):
  return jnp.linalg.qr(matrix((d, r), seed, decay=1.0))[0]


def missed(p, g):
  return float(jnp.sum((g - p @ (p.T @ g)) ** 2) / jnp.sum(g**2))


def test_equals_the_transcription():
  grads = gradients({'w': (8, 12)}, 12)
  tx = lrjax.scale_by_subtrack(3, 3, 0.25)
  out, _ = trajectory(tx, grads[0], grads)
  want = oracle.subtrack([g['w'] for g in grads], rank=3, gap=3, scale=0.25)
  # The transport subtracts squares of nearly equal size; updates are of size 1.
  np.testing.assert_allclose(np.stack([u['w'] for u in out]), want, atol=5e-5)


def test_one_step_equals_the_closed_form():
  g, p = matrix((8, 12)), start(8, 3)
  for step_size in (0.1, 0.5, 100.0):  # the last beyond a right angle
    new = lrjax.grassmann(3, step_size=step_size).fit(None, g, p)
    x = np.asarray(g / jnp.linalg.norm(g), np.float64)
    want = oracle.turned(np.asarray(p, np.float64), x, step_size)
    np.testing.assert_allclose(new, want, atol=2e-6)


def test_the_leading_triple_is_that_of_the_svd():
  f = matrix((9, 5), decay=0.9)
  s, u, v = leading(f)
  want_u, want_s, want_vt = np.linalg.svd(f)
  assert s == pytest.approx(want_s[0], rel=1e-5)
  want = np.outer(want_u[:, 0], want_vt[0])
  np.testing.assert_allclose(jnp.outer(u, v), want, atol=1e-5)


def test_small_steps_lose_ever_less_of_a_constant_gradient():
  g, p = matrix((8, 12), decay=0.5), start(8, 3)
  b = lrjax.grassmann(3)
  _, ps = jax.lax.scan(lambda p, _: (b.fit(None, g, p),) * 2, p, length=300)
  losses = [missed(p, g) for p in ps[::10]]
  assert (np.diff(losses) < 1e-6).all()
  best = np.linalg.svd(g)[0][:, :3]
  assert losses[-1] < missed(best, g) + 1e-3


def test_p_stays_orthonormal_for_1000_refreshes():
  grads = jnp.stack([matrix((8, 12), seed) for seed in range(1000)])
  b = lrjax.grassmann(3, step_size=5.0)
  p, _ = jax.lax.scan(lambda p, g: (b.fit(None, g, p), None), start(8, 3), grads)
  assert jnp.abs(p.T @ p - jnp.eye(3)).max() < 1e-5


@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e6])
def test_the_step_does_not_depend_on_the_gradients_scale(scale):
  """The official angle does: with eta 10000 it wraps around many times."""
  g, p = matrix((8, 12)), start(8, 3)
  b = lrjax.grassmann(3)
  np.testing.assert_allclose(b.fit(None, scale * g, p), b.fit(None, g, p), atol=1e-5)


def test_a_gradient_inside_the_subspace_moves_nothing():
  p = start(8, 3)
  b = lrjax.grassmann(3)
  np.testing.assert_allclose(b.fit(None, p @ matrix((3, 12)), p), p, atol=1e-6)
  np.testing.assert_allclose(b.fit(None, jnp.zeros((8, 12)), p), p, atol=1e-6)


def test_tall_and_square_matrices_are_tracked_too():
  """The official code multiplies by I - P'P = 0 there, and never moves them."""
  shapes = {'tall': (12, 8), 'wide': (8, 12), 'square': (8, 8)}
  grads = gradients(shapes, 4)
  tx = lrjax.scale_by_subtrack(3, 3)
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  bases = []
  for g in grads:
    state = update(g, state)[1]
    bases.append({n: s.state.basis.basis for n, s in state.slots.items()})
  for name in shapes:
    assert jnp.abs(bases[3][name] - bases[2][name]).max() > 0.01
    assert jnp.abs(bases[1][name] - bases[0][name]).max() == 0


def test_moments_move_before_the_update_and_from_the_last_basis():
  """The official code: after it, and from the first basis."""
  grads = gradients({'w': (8, 12)}, 7)
  tx = lrjax.scale_by_subtrack(3, 3)
  state, update, slots = tx.init(grads[0]), jax.jit(tx.update), []
  for g in grads:
    state = update(g, state)[1]
    slots.append(state.slots['w'].state)
  before, after = slots[5], slots[6]  # the second turn, at step 6
  turn = after.basis.basis.T @ before.basis.basis
  low = after.basis.basis.T @ grads[6]['w']
  np.testing.assert_allclose(
    after.inner.mu, 0.9 * turn @ before.inner.mu + 0.1 * low, atol=1e-5
  )
  c1, c2 = 1 - 0.9**6, 1 - 0.999**6
  m, v = (np.asarray(x, np.float64) for x in (before.inner.mu, before.inner.nu))
  _, nu = oracle.transported(np.asarray(turn, np.float64), m, v, c1, c2)
  want = 0.999 * nu + 0.001 * low**2
  np.testing.assert_allclose(after.inner.nu, want, atol=1e-6)


def test_without_recovery_updates_stay_in_the_subspace():
  grads = gradients({'w': (8, 12)}, 4)
  tx = lrjax.scale_by_subtrack(3, 3, recovery=False)
  out, state = trajectory(tx, grads[0], grads)
  p = state.slots['w'].state.basis.basis
  np.testing.assert_allclose(p @ (p.T @ out[-1]['w']), out[-1]['w'], atol=1e-5)


def test_state_bytes():
  for d, k, r in ((8, 12, 3), (2048, 5461, 512)):
    params = {'kernel': jax.ShapeDtypeStruct((d, k), jnp.float32)}
    row = lrjax.coverage(lrjax.scale_by_subtrack(r), params).rows[0]
    assert row.state_bytes == 4 * (r * d + 2 * r * k + 1 + 3)


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(step_size=-1.0), ValueError, '`step_size` must be at least 0.*got -1.0'),
    (dict(b1=1.0), ValueError, '`b1` must be at least 0 and below 1.0, got 1.0'),
    (dict(update_proj_gap=0), ValueError, '`update_proj_gap`.*got 0'),
    (dict(basis='gausian'), ValueError, "did you mean 'gaussian'"),
    (dict(moments_on_refresh='rotat'), ValueError, "did you mean 'rotate'"),
  ],
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.subtrack(1e-2, **{'rank': 4, **bad})
