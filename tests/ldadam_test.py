"""LDAdam against its transcription, its identities, its memory, and its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import ldadam as oracle
from samples import gradients, matrix

import lrjax
from lrjax.bases.power import power_step
from lrjax.optimizers.ldadam import ldadam_rule
from lrjax.testing import trajectory

SHAPES = {'tall': (12, 8), 'wide': (8, 12), 'square': (8, 8)}


@pytest.mark.parametrize('feedback', [True, False])
def test_equals_the_transcription(feedback):
  grads = gradients(SHAPES, 12)
  tx = lrjax.scale_by_ldadam(3, error_feedback=feedback)
  out, state = trajectory(tx, grads[0], grads)
  for name in SHAPES:
    want, error = oracle.ldadam([g[name] for g in grads], rank=3, feedback=feedback)
    np.testing.assert_allclose(np.stack([u[name] for u in out]), want, atol=1e-5)
    if feedback:
      got = state.slots[name].state.error
      np.testing.assert_allclose(got, error, atol=1e-5)


def test_square_matrices_are_compressed_along_out_as_in_the_official_code():
  params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}
  rows = lrjax.coverage(lrjax.scale_by_ldadam(3), params).rows
  assert {r.path: r.side for r in rows} == dict(tall='out', wide='in', square='out')


def run(rule, grads):
  """The updates of one matrix and its states."""
  s = rule.init(grads[0])
  s, good = rule.refresh(jax.random.key(0), grads[0], s)
  assert good
  out, states, update = [], [], jax.jit(rule.update)
  for g in grads:
    u, s = update(g, s)
    out.append(u)
    states.append(s)
  return out, states


def test_nothing_is_left_over_at_full_rank():
  grads = [matrix((4, 6), seed, decay=1.0) for seed in range(4)]
  _, states = run(ldadam_rule(lrjax.svd(4)), grads)
  for s in states:
    P = np.asarray(s.basis)
    np.testing.assert_allclose(P @ P.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(s.error, np.zeros((4, 6)), atol=1e-5)
  # Without momentum and adaptivity the update is the gradient.
  plain = ldadam_rule(lrjax.svd(4), b1=0.0, eps=1e6)
  for g, u in zip(grads, run(plain, grads)[0]):
    np.testing.assert_allclose(1e6 * u, g, atol=1e-5)


def test_signs_of_the_basis_do_not_matter():
  grads = [matrix((8, 12), seed) for seed in range(5)]
  rule = ldadam_rule(lrjax.svd(3))
  want, states = run(rule, grads)
  s, update = states[1], jax.jit(rule.update)
  flip = jnp.array([1.0, -1.0, -1.0])
  s = s._replace(
    basis=s.basis * flip[None], inner=s.inner._replace(mu=s.inner.mu * flip[:, None])
  )
  for g, w in zip(grads[2:], want[2:]):
    u, s = update(g, s)
    np.testing.assert_allclose(u, w, atol=1e-5)


def test_gradients_within_one_subspace_need_no_feedback():
  Q = jnp.linalg.qr(matrix((8, 3)))[0]
  grads = [Q @ matrix((3, 12), seed) for seed in range(6)]
  out, states = run(ldadam_rule(lrjax.svd(3)), grads)
  want, _ = run(ldadam_rule(lrjax.svd(3), error_feedback=False), grads)
  np.testing.assert_allclose(states[-1].error, np.zeros((8, 12)), atol=1e-5)
  np.testing.assert_allclose(np.stack(out), np.stack(want), atol=1e-5)


def test_used_and_unused_add_up_to_gradient_and_momentum():
  grads = [matrix((8, 12), seed) for seed in range(4)]
  rule = ldadam_rule(lrjax.svd(3))
  _, states = run(rule, grads)
  weight = 0.908 / (1 - 0.908)
  for g, old, new in zip(grads[1:], states, states[1:]):
    a = g + old.error
    used = new.basis @ (new.basis.T @ a)
    momentum = old.basis @ old.inner.mu
    moved = new.basis @ (new.basis.T @ momentum)
    whole = used + weight * moved + new.error
    np.testing.assert_allclose(whole, a + weight * momentum, atol=1e-5)
    assert float(new.inner.nu.min()) >= 0


def test_the_subspace_follows_the_gradient():
  first, then = (
    matrix((8, 3)) @ matrix((3, 12), 1),
    matrix((8, 3), 2) @ matrix((3, 12), 3),
  )
  rule = ldadam_rule(lrjax.svd(3), error_feedback=False)
  _, states = run(rule, [first] + [then] * 40)
  missed = [float(jnp.linalg.norm(then - s.basis @ (s.basis.T @ then))) for s in states]
  assert missed[0] > 0.1
  assert missed[-1] < 0.02 * missed[0]


def test_a_power_step_shrinks_angles_by_the_squared_gap():
  b = jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.5]))
  p = jnp.linalg.qr(matrix((4, 2), decay=1.0))[0]
  angles = []
  for _ in range(6):
    p = power_step(b, p)
    angles.append(float(jnp.linalg.norm(p[2:])))
  np.testing.assert_allclose(angles[5] / angles[4], 0.25, rtol=0.05)


def test_a_zero_gradient_keeps_the_basis():
  g = matrix((8, 12))
  rule = ldadam_rule(lrjax.svd(3), error_feedback=False)
  _, (s,) = run(rule, [g])
  rest = s._replace(inner=s.inner._replace(mu=jnp.zeros_like(s.inner.mu)))
  u, new = rule.update(jnp.zeros_like(g), rest)
  np.testing.assert_array_equal(new.basis, s.basis)
  assert not u.any() and bool(jnp.isfinite(new.inner.nu).all())


@pytest.mark.parametrize('size', [1e-18, 1e12])
def test_tiny_and_huge_gradients_are_followed(size):
  g = matrix((8, 12))
  s = run(ldadam_rule(lrjax.eigh(3)), [g])[1][0]
  t = run(ldadam_rule(lrjax.eigh(3)), [size * g, size * g])[1][1]
  # One subspace: a power step on the same gradient moves the columns, not their span.
  np.testing.assert_allclose(s.basis @ s.basis.T, t.basis @ t.basis.T, atol=1e-5)


def test_the_error_is_state_that_clipping_does_not_see():
  # In the official code it lies in the gradients and is clipped, averaged, logged.
  grads = gradients({'w': (8, 12)}, 4)
  grads = [{'w': 5.0 * g['w']} for g in grads]
  clip = optax.clip_by_global_norm(1.0)
  clipped = [clip.update(g, clip.init(g))[0] for g in grads]
  tx = lrjax.scale_by_ldadam(3)
  want, _ = trajectory(tx, grads[0], clipped)
  out, state = trajectory(optax.chain(clip, tx), grads[0], grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out, want)
  assert state[1].slots['w'].state.error.any()


def test_settings_of_one_group_do_not_leak_into_the_next():
  # In the official code a group's projection type is the default of later groups.
  grads = gradients({'a': (8, 12), 'b': (8, 12)}, 2)
  one, two = lrjax.scale_by_ldadam(3, side='long'), lrjax.scale_by_ldadam(2)
  both = optax.partition({'one': one, 'two': two}, {'a': 'one', 'b': 'two'})
  out, _ = trajectory(both, grads[0], grads)
  want, _ = trajectory(two, {'b': grads[0]['b']}, [{'b': g['b']} for g in grads])
  for u, w in zip(out, want):
    np.testing.assert_array_equal(u['b'], w['b'])


def test_a_matrix_that_joins_late_counts_its_own_steps():
  # In the official code the count of bias correction is one for all.
  grads = gradients({'a': (8, 12), 'b': (8, 12)}, 4)
  late = [g | {'b': jnp.full((8, 12), jnp.nan)} for g in grads[:2]] + grads[2:]
  tx = lrjax.scale_by_ldadam(3, guard='matrix')
  out, state = trajectory(tx, grads[0], late)
  want, _ = trajectory(tx, grads[0], grads[2:])
  for u, w in zip(out[2:], want):
    np.testing.assert_allclose(u['b'], w['b'], atol=1e-5)
  counts = {n: int(s.state.inner.count) for n, s in state.slots.items()}
  assert counts == dict(a=4, b=2)


def test_the_error_can_be_stored_in_less():
  grads = gradients({'w': (8, 12)}, 3)
  want, _ = trajectory(lrjax.scale_by_ldadam(3), grads[0], grads)
  tx = lrjax.scale_by_ldadam(3, error_dtype=jnp.bfloat16)
  out, state = trajectory(tx, grads[0], grads)
  assert state.slots['w'].state.error.dtype == jnp.bfloat16
  for a, b in zip(out, want):  # bf16 has three digits; measured: 5e-4
    np.testing.assert_allclose(a['w'], b['w'], atol=5e-3)


@pytest.mark.parametrize(('d', 'k', 'r'), [(8, 12, 3), (4096, 11008, 512)])
def test_state_bytes(d, k, r):
  params = {'kernel': jax.ShapeDtypeStruct((d, k), jnp.float32)}
  size = lambda **kw: (
    lrjax.coverage(lrjax.scale_by_ldadam(r, **kw), params).rows[0].state_bytes
  )
  low = 4 * (r * d + 2 * r * k) + 8
  assert size(error_feedback=False) == low
  assert size() == low + 4 * d * k
  assert size(error_dtype=jnp.bfloat16) == low + 2 * d * k


def test_hyperparameters_can_be_injected():
  params = {'w': matrix((8, 12)), 'bias': jnp.ones(3)}
  static = ('rank', 'error_feedback')
  make = optax.inject_hyperparams(lrjax.ldadam, static_args=static)
  tx = make(learning_rate=0.1, rank=3, weight_decay=0.1)
  out, state = trajectory(tx, params, [params, params])
  want, _ = trajectory(
    lrjax.ldadam(0.1, rank=3, weight_decay=0.1), params, [params] * 2
  )
  np.testing.assert_allclose(out[1]['w'], want[1]['w'], atol=1e-5)
  assert {'learning_rate', 'rho', 'b1'} <= set(state.hyperparams)


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(rho=1.0), ValueError, '`rho`.*below 1.0, got 1.0'),
    (dict(b1=-0.1), ValueError, '`b1`.*got -0.1'),
    (dict(eps=-1.0), ValueError, '`eps`.*got -1.0'),
    (dict(error_dtype=jnp.int8), TypeError, '`error_dtype` must be a floating-point'),
    (dict(basis='gaussian'), ValueError, '`basis` must give one orthonormal P'),
    (dict(basis='svdd'), ValueError, "did you mean 'svd'"),
    (dict(side='shrot'), ValueError, "`side` 'shrot'; did you mean 'short'"),
    (dict(rank=0), ValueError, '`rank`.*got 0'),
    (dict(proj_type='std'), TypeError, "'proj_type'"),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.ldadam(1e-2, **{'rank': 4, **bad})
