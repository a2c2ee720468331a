"""Adam with a count for each factor vector."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrjax
from lrjax.resets import reset_moments, restart_all

SHAPES = {'a': (2, 6, 3), 'b': (2, 3, 5), 'bias': (5,), 'kernel': (6, 5)}


def trees(steps):
  rng = np.random.default_rng(0)
  draw = lambda: {
    n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()
  }
  return [draw() for _ in range(steps)]


def test_equal_counts_make_it_adamw():
  params, *grads = trees(5)
  ours = lrjax.vector_adam(0.1, 0.8, 0.95, weight_decay=0.1)
  theirs = optax.adamw(0.1, 0.8, 0.95, weight_decay=0.1)

  @jax.jit
  def run(grads):
    out = []
    for tx in (ours, theirs):
      w, state = params, tx.init(params)
      for g in grads:
        u, state = tx.update(g, state, w)
        w = optax.apply_updates(w, u)
      out.append(w)
    return out

  got, want = run(grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)


def test_each_vector_is_corrected_by_its_own_count():
  params, *grads = trees(5)
  tx = lrjax.scale_by_vector_adam()
  state = tx.init(params)
  assert jax.tree.map(jnp.shape, state.vector_count) == {
    'a': (2, 1, 3),
    'b': (2, 3, 1),
    'bias': (),
    'kernel': (),
  }
  update = jax.jit(tx.update)
  for g in grads[:3]:
    _, state = update(g, state)
  column = jnp.zeros((2, 1, 3), bool).at[1, 0, 2].set(True)
  state, touched = reset_moments(state, tx.init(params), {'a': column})
  assert (touched.entries, touched.zeros) == (13, 13)  # a count and two moments of six
  assert state.vector_count['a'].tolist() == [[[3, 3, 3]], [[3, 3, 0]]]
  u, state = update(grads[3], state)
  # A first step has the size of the learning rate.
  np.testing.assert_allclose(
    u['a'][1, :, 2], jnp.sign(grads[3]['a'][1, :, 2]), atol=1e-5
  )
  assert float(jnp.abs(jnp.abs(u['a'][0]) - 1).min()) > 1e-3
  everything, _ = restart_all(state, tx.init(params))
  assert not any(x.any() for x in jax.tree.leaves(everything))


def test_moments_are_float32_and_updates_of_the_gradient_s_dtype():
  g = {'a': jnp.ones((4, 2), jnp.bfloat16)}
  tx = lrjax.scale_by_vector_adam()
  u, state = tx.update(g, tx.init(g))
  assert (u['a'].dtype, state.mu['a'].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize('bad', [dict(b1=1.0), dict(b2=-0.1), dict(eps=-1.0)])
def test_bad_input(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    lrjax.scale_by_vector_adam(**bad)
