"""Flora against its transcription, its statistics, and its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import flora as oracle
from samples import gradients, matrix

import lrjax
from lrjax.optimizers import flora as flora_file
from lrjax.testing import trajectory

PLAIN = dict(multiply_by_parameter_scale=False)


def run(tx, grads):
  """The updates of leaf `w`, and its state after each."""
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  out, states = [], []
  for g in grads:
    u, state = update(g, state)
    out.append(np.asarray(u['w']))
    states.append(jax.device_get(state.slots['w'].state))
  return np.stack(out), states


def sketch(key, rank, d):
  return np.asarray(lrjax.gaussian(rank).matrix(jnp.asarray(key), d), np.float64)


@pytest.mark.parametrize('nesterov', [False, True], ids=['torch', 'flax'])
def test_equals_the_transcription(nesterov):
  grads = gradients({'w': (8, 12)}, 12)
  tx = lrjax.scale_by_flora(3, 4, nesterov=nesterov, **PLAIN)
  out, states = run(tx, grads)
  sketches = [sketch(s.sketch, 3, 8) for s in states]
  want = oracle.flora([g['w'] for g in grads], sketches, nesterov=nesterov)
  np.testing.assert_allclose(out, want, atol=1e-5)


def test_the_momentum_moves_into_the_new_sketch():
  """The official Flax code projects with the old key, then goes on with the new one."""
  grads = gradients({'w': (8, 12)}, 4)
  tx = lrjax.scale_by_flora(3, 3, optax.identity(), **PLAIN)
  _, states = run(tx, grads)
  before, after = states[2], states[3]
  old, new = sketch(before.sketch, 3, 8), sketch(after.sketch, 3, 8)
  assert np.abs(old - new).max() > 0.1
  want = 0.9 * new.T @ (old @ before.momentum) + 0.1 * new.T @ grads[3]['w']
  np.testing.assert_allclose(after.momentum, want, atol=1e-5)


def test_a_sketch_is_the_identity_on_average():
  b = lrjax.gaussian(2)
  keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(0), 10_000))
  p = jax.vmap(lambda key: b.matrix(key, 4))(keys)
  mean = jnp.einsum('ndr,ner->de', p, p) / len(p)
  np.testing.assert_allclose(mean, np.eye(4), atol=0.03)


def test_with_an_orthogonal_sketch_it_is_dense_momentum(monkeypatch):
  whole = lambda rank: lrjax.random_orthogonal(8)
  monkeypatch.setattr(flora_file, 'gaussian', whole)
  grads = gradients({'w': (8, 12)}, 9)
  tx = lrjax.scale_by_flora(
    7, 3, optax.identity(), clipping_threshold=None, **PLAIN
  )  # a basis of rank 8 all the same
  out, _ = trajectory(tx, grads[0], grads)
  dense, _ = trajectory(optax.ema(0.9, debias=False), grads[0], grads)
  for a, b in zip(out, dense):
    np.testing.assert_allclose(a['w'], b['w'], atol=1e-5)


def test_other_leaves_get_dense_momentum():
  params = {'w': matrix((8, 12)), 'bias': jnp.arange(1.0, 4)}
  tx = lrjax.flora(0.1, 2, base_optimizer=optax.identity(), clipping_threshold=None)
  out, _ = trajectory(tx, params, [params] * 2)
  rms = float(jnp.sqrt(jnp.mean(params['bias'] ** 2)))
  want = -0.1 * rms * (1 - 0.9**2) * params['bias']
  np.testing.assert_allclose(out[1]['bias'], want, rtol=1e-5)


def test_sketches_differ_between_leaves_and_layers():
  grads = gradients({'a': (8, 12), 'stack': (2, 8, 12)}, 1)
  tx = lrjax.scale_by_flora(3, **PLAIN)
  state = tx.update(grads[0], tx.init(grads[0]))[1]
  keys = [state.slots['a'].state.sketch, *state.slots['stack'].state.sketch]
  assert len({tuple(np.asarray(k)) for k in keys}) == 3


def test_state_bytes():
  for d, k, r in ((8, 12, 3), (2048, 5461, 512)):
    params = {'kernel': jax.ShapeDtypeStruct((d, k), jnp.float32)}
    row = lrjax.coverage(lrjax.scale_by_flora(r), params).rows[0]
    assert row.state_bytes == 4 * (r * k + d + k + 1 + 1) + 16 + 4


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(update_proj_gap=0), ValueError, 'must be at least 1, got 0'),
    (dict(b1=1.5), ValueError, '`b1` must be at least 0 and below 1.0, got 1.5'),
    (dict(clipping_threshold=-1.0), ValueError, '`clipping_threshold`.*got -1.0'),
    (dict(base_optimizer=optax.adafactor(0.1)), ValueError, 'needs parameters'),
    (dict(where='('), ValueError, 'not a regular expression'),
  ],
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.flora(1e-2, **{'rank': 4, **bad})
