"""Weights moved in one step: the numbers of update and apply_updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrjax

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)
PARAMS = {
  'wide': {'kernel': draw(8, 12)},
  'tall': {'kernel': draw(2, 12, 8)},
  'heads': {'kernel': draw(12, 2, 5)},
  'norm': {'scale': draw(8)},
}
GRADS = [jax.tree.map(lambda x: draw(*x.shape), PARAMS) for _ in range(3)]
HEADS = [('heads', lrjax.View(0, (1, 2)))]
make = functools.partial(
  lrjax.galore, 1e-2, 3, update_proj_gap=2, weight_dimension_numbers=HEADS
)
METHODS = {
  'galore': make(),
  'decay': make(weight_decay=0.3),
  'masked_decay': make(
    weight_decay=0.3,
    mask=lambda tree: jax.tree.map_with_path(lambda p, _: 'tall' in str(p), tree),
  ),
  'q_galore': lrjax.q_galore(1e-2, 3, weight_dimension_numbers=HEADS),
  'chain': optax.chain(
    optax.clip(0.5),
    lrjax.scale_by_galore(3, weight_dimension_numbers=HEADS),
    optax.scale_by_learning_rate(1e-2),
  ),
  'fira': lrjax.fira(1e-2, 3, weight_dimension_numbers=HEADS),
}


def by_updates(tx, params, grads, state):
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def run(step, params, state, grads=GRADS):
  for g in grads:
    params, state = step(params, g, state)
  return params, state


def both(tx, params=PARAMS, grads=GRADS, **options):
  """What updates and steps in place make of the same gradients."""
  plain = jax.jit(lambda p, g, s: by_updates(tx, p, g, s))
  step = jax.jit(lrjax.in_place(tx, **options))
  return [run(f, params, tx.init(params), grads) for f in (plain, step)]


@pytest.mark.parametrize('name', METHODS)
def test_it_equals_updates(name):
  want, got = both(METHODS[name])
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), got, want)
  moved = jax.tree.map(lambda a, b: not np.allclose(a, b), got[0], PARAMS)
  assert all(jax.tree.leaves(moved))


KERNELS = {
  'galore': lrjax.galore(1e-2, 8, weight_decay=0.3),
  'fira': lrjax.fira(1e-2, 8),
  'frugal': lrjax.frugal(1e-2, 0.1),
}


@pytest.mark.parametrize('name', KERNELS)
def test_the_kernel_of_a_tpu_gives_the_same(name):
  params = {'a': {'kernel': draw(128, 256)}, 'b': {'kernel': draw(2, 256, 128)}}
  grads = [jax.tree.map(lambda x: draw(*x.shape), params)]
  tx = KERNELS[name]
  want, got = both(tx, params, grads, implementation='interpret')
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), got, want)
  step = lrjax.in_place(tx, implementation='interpret')
  text = str(jax.make_jaxpr(step)(params, grads[0], tx.init(params)))
  assert text.count('pallas_call[') == len(params)


def test_bfloat16_weights_round_to_the_nearest_or_by_chance():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  want, got = both(make(), half)
  for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0])):
    assert a.dtype == jnp.bfloat16
    # Updates are rounded once more on their way than steps in place.
    np.testing.assert_allclose(a.astype('f4'), b.astype('f4'), rtol=2**-7, atol=1e-3)
  tiny = lrjax.galore(1e-5, 3, weight_dimension_numbers=HEADS)
  _, still = both(tiny, half)
  _, moved = both(tiny, half, stochastic=True)
  _, again = both(tiny, half, stochastic=True)
  kernel = lambda out: np.asarray(out[0]['tall']['kernel'], 'f4')
  assert (kernel(still) == np.asarray(half['tall']['kernel'], 'f4')).mean() > 0.95
  assert (kernel(moved) != np.asarray(half['tall']['kernel'], 'f4')).sum() >= 1
  np.testing.assert_array_equal(kernel(moved), kernel(again))


def test_projected_gradients_and_bad_ones():
  params = {'kernel': draw(6, 8), 'bias': draw(8)}
  tx = lrjax.galore(1e-2, 2, weight_decay=0.1)
  step = jax.jit(lrjax.in_place(tx))
  params, state = step(params, params, tx.init(params))
  p = state[0].slots['kernel'].state.basis
  g = draw(6, 8)
  low = lrjax.Projected(p.T @ g, (6, 8), jnp.float32, 'in')
  want = step(params, {'kernel': g, 'bias': g[0]}, state)
  got = step(params, {'kernel': low, 'bias': g[0]}, state)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), got, want)
  bad, held = step(params, {'kernel': g.at[0, 0].set(jnp.nan), 'bias': g[0]}, state)
  jax.tree.map(np.testing.assert_array_equal, bad, params)
  assert held[0].skipped == 1


def test_no_update_is_formed_where_a_kernel_runs():
  """In the program lowered for a TPU nothing of the weights' size is added to them."""
  params = {'kernel': jnp.zeros((128, 256))}
  tx = lrjax.galore(1e-2, 8)
  low = lrjax.Projected(jnp.ones((8, 256)), (128, 256), jnp.float32, 'in')
  step = jax.jit(lrjax.in_place(tx, implementation=None), donate_argnums=(0, 2))
  traced = step.trace(params, {'kernel': low}, jax.eval_shape(tx.init, params))
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'tpu_custom_call' in text
  products = [x for x in text.splitlines() if 'dot_general' in x]
  assert not any('tensor<128x256xf32>' in x for x in products)


def test_what_adds_to_updates_cannot_stand_behind():
  tx = optax.chain(lrjax.scale_by_galore(3), optax.add_decayed_weights(0.1))
  params = {'kernel': draw(8, 12)}
  with pytest.raises(ValueError, match='Lifted'):
    lrjax.in_place(tx)(params, params, tx.init(params))
