"""Trion against closed forms, its transcription and the defects of the released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import dct as oracle
from samples import gradients, matrix

import lrjax
from lrjax.orthogonalize import DION_SCHEDULE, KELLER_JORDAN, newton_schulz
from lrjax.testing import trajectory

SHAPES = {'wide': (8, 12), 'tall': (12, 8)}


@pytest.mark.parametrize('coefficients', [KELLER_JORDAN, DION_SCHEDULE])
def test_equals_the_transcription(coefficients):
  grads = gradients(SHAPES, 12)
  tx = lrjax.scale_by_trion(
    3, 0.9, 'none', orthogonalize=lambda x: newton_schulz(x, coefficients)
  )
  out, _ = trajectory(tx, grads[0], grads)
  for name in SHAPES:
    turn = (lambda x: x) if name == 'wide' else np.transpose
    want = oracle.trion(
      [turn(g[name]) for g in grads], rank=3, mu=0.9, coefficients=coefficients
    )
    got = np.stack([turn(u[name]) for u in out])
    # Five quintics of slope up to 8 enlarge the 1e-7 of float32.
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_at_full_rank_without_decay_nothing_stays_and_the_update_is_orthonormal():
  g = {'w': matrix((8, 12), decay=0.9)}
  basis = lambda rank: lrjax.dct(8)
  tx = lrjax.scale_by_trion(3, 0.0, 'none', basis=basis)
  u, state = jax.jit(tx.update)(g, tx.init(g))
  np.testing.assert_allclose(state.slots['w'].state.mu, 0, atol=1e-5)
  s = np.linalg.svd(u['w'], compute_uv=False)
  assert s.min() > 0.6 and s.max() < 1.3
  # DCT and Newton-Schulz commute with the rotation by Q.
  np.testing.assert_allclose(u['w'], newton_schulz(g['w']), atol=1e-5)


def test_momentum_keeps_whole_what_the_basis_misses():
  grads = gradients({'w': (8, 12)}, 3)
  tx = lrjax.scale_by_trion(2, 0.5)
  _, state = trajectory(tx, grads[0], grads[:2])
  b = state.slots['w'].state.mu + grads[2]['w']
  _, state = trajectory(tx, grads[0], grads[2:], state)
  index = np.asarray(state.slots['w'].state.basis)
  s = oracle.dct2(8).T @ np.float64(b)
  s[index] *= 0.5
  want = oracle.dct2(8) @ s
  np.testing.assert_allclose(state.slots['w'].state.mu, want, atol=1e-5)


@pytest.mark.parametrize('scaling', ['kj', 'kimi', 'dion', 'none'])
def test_factors_are_of_fan_in_and_fan_out_whatever_the_side(scaling):
  def sizes(fan_in, fan_out):
    return dict(
      kj=max(1, fan_out / fan_in) ** 0.5,
      kimi=0.2 * max(fan_in, fan_out) ** 0.5,
      dion=(fan_out / fan_in) ** 0.5,
      none=1.0,
    )[scaling]

  g = {'wide': matrix((4, 16)), 'tall': matrix((16, 4))}
  tx = lrjax.scale_by_trion(2, scaling=scaling, orthogonalize=lrjax.polar)
  u, _ = jax.jit(tx.update)(g, tx.init(g))
  for name, x in g.items():
    largest = np.linalg.norm(u[name], ord=2)
    np.testing.assert_allclose(largest, sizes(*x.shape), rtol=1e-5)


def test_a_zero_gradient_gives_a_zero_update():
  g = {'w': jnp.zeros((8, 12)), 'bias': jnp.zeros(3)}
  tx = lrjax.scale_by_trion(2)
  u, _ = jax.jit(tx.update)(g, tx.init(g))
  assert not u['w'].any() and not u['bias'].any()


def test_other_leaves_get_adam_at_the_ratio_of_the_official_rates():
  g = {'w': matrix((8, 12)), 'bias': jnp.ones(3)}
  tx = lrjax.trion(0.02, rank=2)
  u, _ = jax.jit(tx.update)(g, tx.init(g))
  np.testing.assert_allclose(u['bias'], -3e-4, rtol=1e-4)


def test_defect_fft_orientation_of_tall_and_wide_matrices():
  # At full rank with mu = 0 nothing may be left, at the first step or later.
  grads = gradients(SHAPES, 3)
  basis = lambda rank: lrjax.dct(8, path='fft')
  tx = lrjax.scale_by_trion(3, 0.0, basis=basis)
  for n in range(1, 4):
    _, state = trajectory(tx, grads[0], grads[:n])
    for slot in state.slots.values():
      np.testing.assert_allclose(slot.state.mu, 0, atol=1e-5)


@pytest.mark.parametrize(('d', 'k', 'rank'), [(8, 12, 3), (4096, 11008, 256)])
def test_state_bytes(d, k, rank):
  params = {'w': jax.ShapeDtypeStruct((k, d), jnp.bfloat16)}
  counts = (
    4 + 4 + 1 + 4 + 4
  )  # steps, skipped, a flag, overdue, Adam's of the other leaves
  want = 4 * d * k + 4 * rank + counts
  assert lrjax.coverage(lrjax.scale_by_trion(rank), params).state_bytes == want


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(momentum=1.0), ValueError, '`momentum`.*below 1.0, got 1.0'),
    (dict(momentum='x'), TypeError, '`momentum` must be a number'),
    (dict(scaling='kimmi'), ValueError, "`scaling` 'kimmi'; did you mean 'kimi'"),
    (dict(scaling=1.0), TypeError, '`scaling` must be a function or one of'),
    (dict(update_proj_gap=0), ValueError, '`update_proj_gap`.*got 0'),
    (dict(rank=0), ValueError, '`rank` must be at least 1, got 0'),
    (dict(basis='dtc'), ValueError, "`basis` 'dtc'; did you mean 'dct'"),
    (dict(orthogonalize='pola'), ValueError, "did you mean 'polar'"),
    (dict(moment=0.9), TypeError, "'moment'"),
  ],
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.trion(0.02, **bad)
