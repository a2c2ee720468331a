"""Accumulation in sketches: the sketch of the sum, at the end of each window."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import gradients

import lrjax
from lrjax.testing import trajectory

STEPS, RANK = 3, 4


def sketched(g, key):
  p = lrjax.gaussian(RANK).matrix(key, 8)
  return p @ (p.T @ g)


def test_sketches_of_micro_batches_sum_to_the_sketch_of_their_sum():
  grads = gradients({'w': (8, 12), 'stack': (2, 8, 12)}, 2 * STEPS)
  tx = lrjax.accumulate_sketches(optax.identity(), STEPS, RANK)
  state, update, keys = tx.init(grads[0]), jax.jit(tx.update), []
  for t, g in enumerate(grads):
    u, state = update(g, state)
    slot = {name: s.state for name, s in state[0].slots.items()}
    if (t + 1) % STEPS:
      assert not any(x.any() for x in jax.tree.leaves(u))
      continue
    window = grads[t + 1 - STEPS : t + 1]
    mean = jax.tree.map(lambda *x: sum(x) / STEPS, *window)
    want = sketched(mean['w'], slot['w'].sketch)
    np.testing.assert_allclose(u['w'], want, atol=1e-5)
    want = jax.vmap(sketched)(mean['stack'], slot['stack'].sketch)
    np.testing.assert_allclose(u['stack'], want, atol=1e-5)
    assert not slot['w'].total.any()
    keys += [slot['w'].sketch, *slot['stack'].sketch]
  assert len({tuple(np.asarray(k)) for k in keys}) == 6


def test_the_optimizer_sees_one_mean_a_window():
  grads = gradients({'w': (8, 12)}, 2 * STEPS)
  grads = [g | {'bias': jnp.arange(3.0) + t} for t, g in enumerate(grads)]
  adam = optax.adam(0.1)
  tx = lrjax.accumulate_sketches(adam, STEPS, RANK)
  out, state = trajectory(tx, grads[0], grads)
  plain, _ = trajectory(
    optax.MultiSteps(adam, STEPS).gradient_transformation(), grads[0], grads
  )
  for u, want in zip(out, plain):
    np.testing.assert_allclose(u['bias'], want['bias'], atol=1e-6)
  assert int(state[1][0].count) == 2


def test_a_bad_micro_batch_is_left_out():
  grads = gradients({'w': (8, 12)}, STEPS)
  bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads[0])
  tx = lrjax.accumulate_sketches(optax.sgd(1.0), STEPS, RANK)
  want, _ = trajectory(tx, grads[0], grads)
  out, _ = trajectory(tx, grads[0], [grads[0], bad, *grads[1:]])
  assert not out[1]['w'].any()
  np.testing.assert_array_equal(out[-1]['w'], want[-1]['w'])


def test_a_sum_never_mixes_two_sketches():
  """A zero gradient at the start of a window delays the new sketch."""
  grads = gradients({'w': (8, 12)}, 2 * STEPS)
  grads[STEPS] = jax.tree.map(jnp.zeros_like, grads[0])
  tx = lrjax.accumulate_sketches(optax.identity(), STEPS, RANK)
  out, state = trajectory(tx, grads[0], grads)
  mean = sum(g['w'] for g in grads[STEPS:]) / STEPS
  want = sketched(mean, state[0].slots['w'].state.sketch)
  np.testing.assert_allclose(out[-1]['w'], want, atol=1e-5)


def test_state_bytes():
  params = {'kernel': jax.ShapeDtypeStruct((2048, 5461), jnp.float32)}
  row = lrjax.coverage(lrjax.accumulate_sketches(optax.sgd(1.0), 4, 64), params).rows[0]
  assert row.state_bytes == 4 * 64 * 5461 + 2 * 8 + 2 * 4


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match='`steps` must be at least 1, got 0'):
    lrjax.accumulate_sketches(optax.sgd(1.0), 0, 4)
