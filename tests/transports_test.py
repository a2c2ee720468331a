"""What moments become at a refresh."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import matrix

import lrjax
from lrjax import transports
from lrjax.low_rank import dense_change
from lrjax.moments import AdamState
from lrjax.types import Change

C = np.asarray(matrix((3, 3)))
MU, NU = np.asarray(matrix((3, 5), 1)), np.square(matrix((3, 5), 2))
ADAM = AdamState(jnp.int32(7), jnp.asarray(MU), jnp.asarray(NU))
change = dense_change(jnp.eye(3), jnp.asarray(C).T)


def paid(x):
  raise AssertionError('keep and reset must not pay for the change of basis')


unused = Change(paid, paid)


def test_keep_and_reset():
  assert lrjax.keep(unused, ADAM) is ADAM
  assert lrjax.reset(unused._replace(start=lambda: 'start'), ADAM) == 'start'


def test_reset_leaves_the_constants_of_a_state_alone():
  # Zeros in place of its coefficients would end every update of Muon.
  muon = optax.contrib.scale_by_muon()
  rule = lambda rank: lrjax.low_rank(
    lrjax.svd(rank), muon, refresh=lrjax.every(1), transport=lrjax.reset
  )
  tx, g = lrjax.on_matrices(rule, rank=2), {'w': matrix((4, 6))}
  u, state = tx.update(g, tx.init(g))
  again, state = tx.update(g, state)
  np.testing.assert_allclose(again['w'], u['w'], atol=1e-5)
  assert float(jnp.abs(u['w']).max()) > 0.1
  assert int(state.slots['w'].state.inner.count) == 1


@pytest.mark.parametrize(
  ('transport', 'nu'),
  [(lrjax.rotate_square, np.square(C) @ NU), (lrjax.rotate_abs, np.abs(C @ NU))],
)
def test_rotations(transport, nu):
  out = transport(change, ADAM)
  np.testing.assert_allclose(out.mu, C @ MU, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(out.nu, nu, rtol=1e-5, atol=1e-6)
  assert int(out.count) == 7
  assert float(out.nu.min()) >= 0


@pytest.mark.parametrize('transport', [lrjax.rotate_square, lrjax.rotate_abs])
def test_no_change_of_basis_changes_no_moment(transport):
  out = transport(dense_change(jnp.eye(3), jnp.eye(3)), ADAM)
  np.testing.assert_array_equal(out.mu, ADAM.mu)
  np.testing.assert_array_equal(out.nu, ADAM.nu)


def test_rotations_find_moments_inside_optax_states():
  low = jnp.asarray(MU)
  inner = optax.chain(optax.scale_by_lion(), optax.trace(0.9), optax.scale(2.0))
  state = inner.init(low)
  state = (state[0]._replace(mu=low), optax.TraceState(low), *state[2:])
  out = lrjax.rotate_square(change, state)
  np.testing.assert_allclose(out[0].mu, C @ MU, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(out[1].trace, C @ MU, rtol=1e-5, atol=1e-6)
  assert type(out[0]) is type(state[0])


def test_rotations_keep_the_stored_dtype():
  half = ADAM._replace(mu=ADAM.mu.astype(jnp.bfloat16))
  out = lrjax.rotate_square(change, half)
  assert (out.mu.dtype, out.nu.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(out.mu.astype(float), C @ MU, atol=2e-2)  # of bf16


def test_states_without_moments_are_refused():
  state = lrjax.factored_rms().init(jnp.asarray(MU))
  with pytest.raises(
    ValueError, match=r'`mu`, `nu` or `trace`.*got tuple.*keep or reset'
  ):
    lrjax.rotate_square(change, state)


def test_every_name_is_a_function():
  assert transports.NAMES['rotate'] is lrjax.rotate_square
  names = {'keep', 'reset', 'rotate', 'rotate_abs', 'rotate_first'}
  assert set(transports.NAMES) == names


def test_projection_aware_is_the_formula_of_ldadam():
  t, b1, b2 = 7, 0.908, 0.99
  c1, c2 = 1 - b1**t, 1 - b2**t
  turned = C.astype(float) @ MU
  variance = np.square(C.astype(float)) @ (NU / c2 - np.square(MU / c1))
  out = lrjax.projection_aware(b1, b2)(change, ADAM)
  np.testing.assert_allclose(out.mu, turned, rtol=1e-5, atol=1e-6)
  # The difference of two terms of size 10: relative to those, 1e-6.
  want = c2 * np.abs(variance + np.square(turned / c1))
  np.testing.assert_allclose(out.nu, want, rtol=1e-4, atol=1e-5)
  assert int(out.count) == t


def test_projection_aware_moves_a_permutation_exactly():
  P = jnp.asarray([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]])
  out = lrjax.projection_aware()(dense_change(jnp.eye(3), P.T), ADAM)
  np.testing.assert_array_equal(out.mu, P @ MU)
  np.testing.assert_allclose(out.nu, jnp.abs(P) @ NU, rtol=1e-4)


def test_projection_aware_before_the_first_update_keeps_zeros():
  start = AdamState(jnp.int32(0), jnp.zeros((3, 5)), jnp.zeros((3, 5)))
  out = lrjax.projection_aware()(change, start)
  assert not out.mu.any()
  assert not out.nu.any()


def test_projection_aware_needs_a_count_and_two_moments():
  state = optax.scale_by_lion().init(jnp.asarray(MU))
  with pytest.raises(ValueError, match=r'`count`, `mu` and `nu`.*ScaleByLionState'):
    lrjax.projection_aware()(change, state)
