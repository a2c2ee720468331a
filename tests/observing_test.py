"""Diagnostics of subspaces, against what numpy says of the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import basis_of, gradients

import lrjax
from lrjax.observing import effective_rank
from lrjax.testing import trajectory

SHAPES = {'w': (6, 9), 'stack': (2, 8, 5)}
GALORE = dict(rank=3, update_proj_gap=2)


def states(tx, grads):
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  for g in grads:
    _, state = update(g, state)
    yield state


def test_measurements_are_those_of_numpy():
  grads = gradients(SHAPES, 5)
  plain = list(states(lrjax.scale_by_galore(**GALORE), grads))
  seen = list(states(lrjax.scale_by_galore(**GALORE, diagnostics=1), grads))
  for t, (g, a, b) in enumerate(zip(grads, plain, seen)):
    d, p = lrjax.diagnostics(b)['w'], basis_of(a, 'w')
    g = np.asarray(g['w'], float)
    caught, whole = np.sum((p.T @ g) ** 2), np.sum(g**2)
    assert float(d.captured_energy) == pytest.approx(caught / whole, rel=1e-5)
    # A difference of near numbers: relative to the gradient's norm.
    want = np.linalg.norm(g - p @ (p.T @ g))
    assert float(d.residual_norm) == pytest.approx(want, abs=1e-3 * whole**0.5)
    s = np.linalg.svd(g, compute_uv=False)
    share = s / s.sum()
    want = np.exp(-np.sum(share * np.log(share)))
    assert float(d.effective_rank) == pytest.approx(want, rel=1e-3)
    assert int(d.refreshes) == t // 2 + 1
    old = basis_of(plain[t - t % 2 - 1], 'w') if t > 1 else np.zeros_like(p)
    assert float(d.overlap) == pytest.approx(np.sum((old.T @ p) ** 2) / 3, rel=1e-4)


def test_a_stack_is_measured_matrix_by_matrix():
  grads = gradients(SHAPES, 3)
  tx = lrjax.scale_by_galore(**GALORE, diagnostics=1)
  *_, state = states(tx, grads)
  d = lrjax.diagnostics(state)['stack']
  assert {x.shape for x in d} == {(2,)}
  for i in range(2):
    *_, one = states(tx, [{'stack': g['stack'][i]} for g in grads])
    for a, b in zip(d, lrjax.diagnostics(one)['stack']):
      np.testing.assert_allclose(a[i], b, rtol=1e-4)


def test_updates_do_not_depend_on_being_measured():
  grads = gradients(SHAPES, 4)
  want, _ = trajectory(lrjax.scale_by_galore(**GALORE), grads[0], grads)
  out, _ = trajectory(lrjax.scale_by_galore(**GALORE, diagnostics=3), grads[0], grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), out, want)


def test_only_every_nth_update_is_measured():
  grads = gradients({'w': (6, 9)}, 4)
  tx = lrjax.scale_by_galore(**GALORE, diagnostics=3)
  seen = [lrjax.diagnostics(s)['w'].captured_energy for s in states(tx, grads)]
  assert seen[0] == seen[1] == seen[2] != seen[3]


def test_off_there_is_nothing():
  grads = gradients(SHAPES, 1)
  tx = lrjax.scale_by_galore(**GALORE)
  assert lrjax.diagnostics(tx.init(grads[0])) == {}
  with pytest.raises(ValueError, match='`diagnostics` must be at least 1, got -2'):
    lrjax.scale_by_galore(**GALORE, diagnostics=-2)


@pytest.mark.parametrize(
  ('g', 'want'),
  [(jnp.zeros((3, 4)), 0), (jnp.ones((5, 4)), 1), (1e-30 * jnp.eye(4), 4)],
)
def test_effective_rank(g, want):
  assert float(effective_rank(g)) == pytest.approx(want, abs=2e-2)
