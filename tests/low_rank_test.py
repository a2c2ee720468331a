"""The loop: limits in which a low-rank method is one that is known in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import basis_of, gradients, matrix

import lrjax
from lrjax.testing import trajectory

SHAPES = {'tall': (9, 6), 'wide': (6, 9), 'square': (6, 6)}


def lifted(*args, rank=None, side='short', **parts):
  rule = lambda rank: lrjax.low_rank(*args, **parts)
  return lrjax.on_matrices(rule, rank=rank, side=side)


def test_full_rank_without_state_returns_every_gradient():
  grads = gradients(SHAPES, 5)
  tx = lifted(lrjax.svd(99), optax.identity(), refresh=lrjax.every(3))
  out, _ = trajectory(tx, grads[0], grads)
  for u, g in zip(out, grads):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), u, g)


def test_full_rank_on_the_long_side_is_exact_on_the_refresh_only():
  grads = gradients({'wide': (6, 9)}, 2)
  tx = lifted(lrjax.svd(99), optax.identity(), side='long', refresh=lrjax.every(9))
  out, _ = trajectory(tx, grads[0], grads)
  miss = [float(jnp.linalg.norm(u['wide'] - g['wide'])) for u, g in zip(out, grads)]
  assert miss[0] < 1e-5
  assert miss[1] > 0.1


def test_full_rank_momentum_with_rotation_is_plain_momentum():
  grads = gradients(SHAPES, 6)
  tx = lifted(
    lrjax.svd(99),
    optax.trace(0.9),
    refresh=lrjax.every(2),
    transport=lrjax.rotate_square,
  )
  out, _ = trajectory(tx, grads[0], grads)
  want, _ = trajectory(optax.trace(0.9), grads[0], grads)
  for u, w in zip(out, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), u, w)


def test_updates_stay_in_the_span_of_a_basis_that_only_refreshes_change():
  grads = gradients({'w': (8, 10)}, 7)
  tx = lrjax.scale_by_galore(rank=3, update_proj_gap=3)
  state, bases = tx.init(grads[0]), []
  update = jax.jit(tx.update)
  for g in grads:
    u, state = update(g, state)
    p, u = basis_of(state, 'w'), np.asarray(u['w'])
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(p @ (p.T @ u), u, atol=1e-5)
    assert np.linalg.matrix_rank(u, tol=1e-4) == 3
    bases.append(p)
  changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(bases)]
  assert changed == [False, False, True, False, False, True]


def test_the_part_missed_at_a_refresh_is_the_tail_of_the_spectrum():
  g = {'w': matrix((8, 12))}
  tx = lifted(lrjax.svd(3), optax.identity(), rank=3)
  u, _ = tx.update(g, tx.init(g))
  s = np.linalg.svd(g['w'], compute_uv=False)
  missed = float(jnp.sum((g['w'] - u['w']) ** 2))
  assert missed == pytest.approx(float((s[3:] ** 2).sum()), rel=1e-4)


def test_a_constant_gradient_of_low_rank_passes_whole():
  g = {'w': jnp.outer(jnp.arange(1.0, 7), jnp.arange(8.0))}
  tx = lifted(lrjax.svd(2), optax.identity(), rank=2, refresh=lrjax.every(2))
  for u in trajectory(tx, g, [g] * 4)[0]:
    np.testing.assert_allclose(u['w'], g['w'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['keep', 'rotate'])
def test_signs_of_the_basis_matter_to_kept_moments_only(name):
  grads = gradients({'w': (6, 9)}, 6)
  tx = lrjax.scale_by_galore(rank=3, update_proj_gap=4, moments_on_refresh=name)
  _, state = trajectory(tx, grads[0], grads[:1])
  flips = jnp.array([[1.0, -1.0, -1.0]])
  slot = state.slots['w']
  inner = slot.state.inner._replace(mu=flips.T * slot.state.inner.mu)
  turned = slot.state._replace(basis=slot.state.basis * flips, inner=inner)
  flipped = state._replace(slots={'w': slot._replace(state=turned)})
  a, _ = trajectory(tx, grads[0], grads[1:], state)
  b, _ = trajectory(tx, grads[0], grads[1:], flipped)
  differences = [float(jnp.abs(x['w'] - y['w']).max()) for x, y in zip(a, b)]
  assert differences[:3] == [0.0, 0.0, 0.0]
  assert (max(differences[3:]) > 1e-2) == (name == 'keep')
  assert name == 'keep' or max(differences[3:]) < 1e-5


def test_error_feedback_loses_nothing():
  grads = gradients({'w': (6, 9)}, 6)
  tx = lifted(
    lrjax.svd(2),
    optax.identity(),
    rank=2,
    refresh=lrjax.every(3),
    residual=lrjax.error_feedback(),
  )
  out, state = trajectory(tx, grads[0], grads)
  total = sum(u['w'] for u in out) + state.slots['w'].state.residual
  np.testing.assert_allclose(total, sum(g['w'] for g in grads), atol=1e-5)
  assert float(jnp.linalg.norm(state.slots['w'].state.residual)) > 0.1


def test_two_sided_projects_from_both_sides():
  grads = gradients({'w': (6, 9)}, 2)
  tx = lifted(lrjax.two_sided(lrjax.svd(2)), optax.identity(), rank=2)
  out, state = trajectory(tx, grads[0], grads)
  u, _, vt = np.linalg.svd(grads[0]['w'])
  left, right = u[:, :2] @ u[:, :2].T, vt[:2].T @ vt[:2]
  for got, g in zip(out, grads):
    np.testing.assert_allclose(got['w'], left @ g['w'] @ right, atol=1e-5)
  assert state.slots['w'].state.basis.right.shape == (9, 2)


def test_two_sided_momentum_of_full_rank_rotates_to_plain_momentum():
  grads = gradients({'w': (5, 7)}, 4)
  tx = lifted(
    lrjax.two_sided(lrjax.svd(99)),
    optax.trace(0.9),
    refresh=lrjax.every(2),
    transport=lrjax.rotate_square,
  )
  # On the side of 7 five directions are kept, which hold every gradient if they turn
  # within one space.
  grads = [{'w': g['w'] @ grads[0]['w'].T @ grads[0]['w']} for g in grads]
  out, _ = trajectory(tx, grads[0], grads)
  want, _ = trajectory(optax.trace(0.9), grads[0], grads)
  for u, w in zip(out, want):
    np.testing.assert_allclose(u['w'], w['w'], atol=1e-5)


def test_a_basis_for_another_side_is_refused_at_init():
  svd = lrjax.svd(2)
  narrow = svd._replace(up=lambda p, low, d: p[:-1] @ low)
  tx = lifted(narrow, optax.identity())
  with pytest.raises(ValueError, match=r'does not fit .* \(4, 6\).* back to \(3, 6\)'):
    tx.init({'w': matrix((4, 6))})


def test_bias_correction_follows_the_sum():
  grads = gradients({'w': (4, 6)}, 3)

  def run(bias_correction, wrap):
    inner = lrjax.adam(bias_correction=bias_correction)
    rule = lambda rank: wrap(lrjax.low_rank(lrjax.svd(2), inner))
    return trajectory(lrjax.on_matrices(rule, rank=2), grads[0], grads)[0]

  out = run('none', lambda tx: lrjax.bias_corrected(tx, 0.9, 0.999))
  for u, w in zip(out, run('step', lambda tx: tx)):
    np.testing.assert_allclose(u['w'], w['w'], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('scale', [0.0, 0.25, 4.0])
def test_drop_scales_the_update(scale):
  g = {'w': matrix((4, 6))}
  tx = lifted(lrjax.svd(99), optax.identity(), residual=lrjax.drop(scale))
  u, _ = tx.update(g, tx.init(g))
  np.testing.assert_allclose(u['w'], scale * g['w'], atol=1e-5)


@pytest.mark.parametrize(
  'inner',
  [optax.adamw(1e-3), optax.lamb(1e-3), optax.scale_by_factored_rms()],
  ids=['decay', 'trust_ratio', 'shapes'],
)
def test_an_inner_that_needs_parameters_is_refused_at_construction(inner):
  with pytest.raises(ValueError, match=r'needs parameters.*outside'):
    lrjax.low_rank(lrjax.svd(2), inner)


def test_parts_that_do_not_fit_are_refused_at_construction():
  adam, svd = lrjax.adam(), lrjax.svd(2)
  with pytest.raises(ValueError, match='one matrix P; use transport=keep or reset'):
    lrjax.low_rank(svd._replace(matrix=None), adam, transport=lrjax.rotate_square)
  with pytest.raises(ValueError, match='orthonormal basis; a random sketch is none'):
    sketch = svd._replace(orthonormal=False)
    lrjax.low_rank(sketch, adam, residual=lrjax.error_feedback())
  with pytest.raises(ValueError, match='moments `mu`, `nu` or `trace`'):
    lrjax.low_rank(svd, lrjax.factored_rms(), transport=lrjax.rotate_abs)
  with pytest.raises(TypeError, match=r'optax.GradientTransformation, got .adam'):
    lrjax.low_rank(svd, 'adam')


def test_other_errors_of_an_inner_are_not_mistaken_for_missing_parameters():
  def update(g, state, params=None):
    raise RuntimeError('mine')

  with pytest.raises(RuntimeError, match='mine'):
    lrjax.low_rank(lrjax.svd(2), optax.GradientTransformation(lambda p: (), update))
