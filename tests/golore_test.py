"""GoLore: the switch to random subspaces, its moments, and its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import golore as oracle
from samples import gradients, matrix

import lrjax
from lrjax.testing import trajectory


def bases(tx, grads):
  """P of leaf `w` after each gradient."""
  state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
  for g in grads:
    state = update(g, state)[1]
    out.append(np.asarray(state.slots['w'].state.basis.basis))
  return out


def test_equals_the_transcription():
  grads = gradients({'w': (8, 12)}, 12)
  tx = lrjax.scale_by_golore(3, 3, 0.25, random_after=4)
  out, _ = trajectory(tx, grads[0], grads)
  p = bases(tx, grads)
  want = oracle.golore(
    [g['w'] for g in grads],
    rank=3,
    gap=3,
    scale=0.25,
    random_after=4,
    drawn=[p[6], p[9]],
  )
  np.testing.assert_allclose(np.stack([u['w'] for u in out]), want, atol=1e-5)


def test_subspaces_are_random_from_the_first_refresh_after_the_switch():
  g = {'w': matrix((8, 12))}
  leading = np.linalg.svd(g['w'])[0][:, :3]
  tx = lrjax.scale_by_golore(3, 3, random_after=4)
  caught = [np.linalg.norm(leading.T @ p) ** 2 / 3 for p in bases(tx, [g] * 12)]
  assert min(caught[:6]) > 1 - 1e-5  # refreshes at steps 0 and 3, the next at 6
  assert max(caught[6:]) < 0.9
  draws = bases(tx, [g] * 10)
  assert np.abs(draws[6] - draws[9]).max() > 0.1
  for p in draws:
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-5)


def test_zero_is_random_throughout():
  g = {'w': matrix((8, 12))}
  leading = np.linalg.svd(g['w'])[0][:, :3]
  p = bases(lrjax.scale_by_golore(3, 3, random_after=0), [g])[0]
  assert np.linalg.norm(leading.T @ p) ** 2 / 3 < 0.9


def test_the_rotated_momentum_is_stored():
  """The official code loses it: its stored momentum never sees the refresh step."""
  grads = gradients({'w': (6, 9)}, 3)
  tx = lrjax.scale_by_golore(
    2, 2, 1.0, optax.trace(0.9), random_after=2
  )  # the refresh at step 2 is random
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  slots = []
  for g in grads:
    state = update(g, state)[1]
    slots.append(state.slots['w'].state)
  before, after = slots[1], slots[2]
  change = after.basis.basis.T @ before.basis.basis
  low = after.basis.basis.T @ grads[2]['w']
  want = 0.9 * change @ before.inner.trace + low
  np.testing.assert_allclose(after.inner.trace, want, atol=1e-5)


def test_second_moments_are_kept():
  state = lrjax.adam().init(jnp.zeros((2, 3)))._replace(nu=jnp.ones((2, 3)))
  state = state._replace(mu=jnp.ones((2, 3)))
  change = lrjax.Change(lambda x: 2 * x, lambda x: 4 * x)
  moved = lrjax.rotate_first(change, state)
  np.testing.assert_array_equal(moved.mu, 2 * state.mu)
  np.testing.assert_array_equal(moved.nu, state.nu)


def test_the_first_basis_is_not_fitted_after_the_switch():
  dear = []

  def first(rank):
    b = lrjax.svd(rank)

    def fit(key, g, p):
      jax.debug.callback(lambda: dear.append(1))
      return b.fit(key, g, p)

    return b._replace(fit=fit)

  grads = gradients({'stack': (2, 6, 9)}, 6)
  tx = lrjax.scale_by_golore(2, 2, random_after=2, basis=first)
  trajectory(tx, grads[0], grads)
  jax.effects_barrier()
  assert len(dear) in (1, 2)  # at step 0 for the stack; not at steps 2 and 4


def test_switched_bases_must_keep_alike_states():
  b = lrjax.switched(lrjax.svd(2), lrjax.gaussian(2), after=1)
  with pytest.raises(ValueError, match='two whose states are alike'):
    b.init(5, 7, jnp.float32)
  with pytest.raises(ValueError, match='`after` must be at least 0, got -1'):
    lrjax.switched(lrjax.svd(2), lrjax.svd(2), after=-1)


def test_state_bytes():
  for d, k, r in ((8, 12, 3), (2048, 5461, 512)):
    tx = lrjax.scale_by_golore(r, random_after=100)
    params = {'kernel': jax.ShapeDtypeStruct((d, k), jnp.float32)}
    row = lrjax.coverage(tx, params).rows[0]
    assert row.state_bytes == 4 * (r * d + 2 * r * k + 3)


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(random_after=-1), ValueError, '`random_after` must be at least 0.*got -1'),
    (dict(random_after='80%'), TypeError, '`random_after` must be a number'),
    (dict(update_proj_gap=0), ValueError, '`update_proj_gap`.*got 0'),
    (dict(basis='svdd'), ValueError, "did you mean 'svd'"),
    (
      dict(base_optimizer=optax.identity()),
      ValueError,
      'rotating needs an inner state',
    ),
  ],
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.golore(1e-2, **{'rank': 4, 'random_after': 10, **bad})
