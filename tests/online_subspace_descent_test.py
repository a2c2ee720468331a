"""Online subspace descent against its transcription, closed forms, and its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import online_subspace_descent as oracle
from samples import gradients, matrix

import lrjax
from lrjax.optimizers.online_subspace_descent import gradient
from lrjax.testing import trajectory


def states(tx, grads):
  """The state of leaf `w` after each gradient."""
  state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
  for g in grads:
    state = update(g, state)[1]
    out.append(jax.device_get(state.slots['w'].state))
  return out


@pytest.mark.parametrize('penalty', [0.0, 0.3], ids=['code', 'paper'])
def test_equals_the_transcription(penalty):
  grads = gradients({'w': (8, 12)}, 12)
  tx = lrjax.scale_by_online_subspace_descent(3, 20, 0.25, penalty=penalty)
  out, state = trajectory(tx, grads[0], grads)
  want, p = oracle.online_subspace_descent(
    [g['w'] for g in grads], rank=3, rate=1 / 20, scale=0.25, penalty=penalty
  )
  # Two Adams, one behind the other, pass float32 noise of small entries on; updates are
  # of size 0.25.
  np.testing.assert_allclose(np.stack([u['w'] for u in out]), want, atol=5e-5)
  np.testing.assert_allclose(state.slots['w'].state.loop.basis, p, atol=5e-5)


def test_the_closed_form_is_the_derivative():
  g, p = matrix((8, 12)), matrix((8, 3), 1)

  def loss(p):
    x = g / jnp.linalg.norm(g)
    gram = p.T @ p
    return jnp.sum((p @ (p.T @ x) - x) ** 2) + 0.3 * jnp.sum((gram - jnp.eye(3)) ** 2)

  np.testing.assert_allclose(gradient(p, g, 0.3), jax.grad(loss)(p), atol=1e-6)
  zero = gradient(p, jnp.zeros((8, 12)))
  np.testing.assert_array_equal(zero, jnp.zeros((8, 3)))


def test_on_a_constant_gradient_p_finds_its_leading_directions():
  g = {'w': matrix((8, 12), decay=0.5)}
  tx = lrjax.scale_by_online_subspace_descent(3, basis_optimizer=optax.sgd(0.3))
  # Started away from them, from where SGD on the loss must find back.
  state = tx.init(g)
  slot = state.slots['w']
  start = jnp.linalg.qr(matrix((8, 3), seed=5, decay=1.0))[0]
  loop = slot.state.loop._replace(basis=start)
  moving = slot.state._replace(loop=loop, phase=jnp.int32(1))
  state = state._replace(slots={'w': slot._replace(state=moving)}, count=jnp.int32(1))
  missed = lambda p, x: jnp.sum((p @ (p.T @ x) - x) ** 2)
  x = np.asarray(g['w'] / jnp.linalg.norm(g['w']))

  def step(state, _):
    state = tx.update(g, state)[1]
    p = state.slots['w'].state.loop.basis
    return state, (p, missed(p, x))

  _, (ps, losses) = jax.jit(lambda s: jax.lax.scan(step, s, length=600))(state)
  p, losses = np.asarray(ps[-1]), [missed(start, x), *losses]
  assert (np.diff(losses) < 1e-6).all()
  best = np.linalg.svd(x)[0][:, :3]
  cosines = np.linalg.svd(best.T @ np.linalg.qr(p)[0])[1]
  assert cosines.min() > 0.999


def test_p_moves_after_the_update_and_not_on_the_gradient_it_was_fitted_to():
  grads = gradients({'w': (6, 9)}, 3)
  tx = lrjax.scale_by_online_subspace_descent(
    2, 10, 1.0, base_optimizer=optax.identity()
  )
  out, _ = trajectory(tx, grads[0], grads)
  after = [s.loop.basis for s in states(tx, grads)]
  before = [after[0], *after[:-1]]
  np.testing.assert_array_equal(after[0], before[1])
  assert np.abs(after[1] - before[1]).max() > 1e-3
  for u, p, g in zip(out, before, grads):
    np.testing.assert_allclose(u['w'], p @ (p.T @ g['w']), atol=1e-5)


def test_retraction_makes_p_orthonormal_again_and_leaves_its_span():
  g = {'w': matrix((6, 9))}
  tx = lrjax.scale_by_online_subspace_descent(
    2, basis_optimizer=optax.set_to_zero(), retract_every=3
  )
  update, bent = jax.jit(tx.update), jnp.array([[1.1, 0.2], [0.0, 0.9]])
  state = update(g, tx.init(g))[1]
  slot = state.slots['w']
  p = slot.state.loop.basis
  loop = slot.state.loop._replace(basis=p @ bent)
  slots = {'w': slot._replace(state=slot.state._replace(loop=loop))}
  held = update(g, state._replace(slots=slots, count=jnp.int32(2)))[1]
  np.testing.assert_array_equal(held.slots['w'].state.loop.basis, p @ bent)
  new = update(g, held)[1].slots['w'].state.loop.basis
  np.testing.assert_allclose(new, p, atol=1e-6)  # upper triangular, positive diagonal


def test_state_bytes():
  for d, k, r in ((8, 12, 3), (2048, 5461, 512)):
    tx = lrjax.scale_by_online_subspace_descent(r)
    params = {'kernel': jax.ShapeDtypeStruct((d, k), jnp.float32)}
    numbers, counts = 3 * r * d + 2 * r * k, 4
    row = lrjax.coverage(tx, params).rows[0]
    assert row.state_bytes == 4 * (numbers + counts)


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (
      dict(update_proj_gap=0),
      ValueError,
      '`update_proj_gap` must be at least 1, got 0',
    ),
    (dict(penalty=-1.0), ValueError, '`penalty` must be at least 0.*got -1.0'),
    (dict(retract_every=1.5), TypeError, '`retract_every` must be an int.*got 1.5'),
    (dict(base_optimizer=optax.adafactor(0.1)), ValueError, 'needs parameters'),
    (dict(side='shrot'), ValueError, "did you mean 'short'"),
  ],
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.online_subspace_descent(1e-2, **{'rank': 4, **bad})
