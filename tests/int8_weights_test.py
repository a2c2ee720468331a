"""Weights in 8 bits: what rounding keeps, what it loses, and where it runs."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import matrix

import lrjax
from lrjax import int8_weights
from lrjax.int8_weights import Int8

PARAMS = {
  'layers': {'kernel': matrix((2, 6, 10))},
  'embed': {'embedding': matrix((6, 4))},
  'bias': jnp.ones(4),
}


def on_grid():
  """Weights whose grid has steps of 2^-8 exactly, all codes taken."""
  codes = np.random.default_rng(0).permutation(256).reshape(1, 256)
  return {'kernel': jnp.asarray((codes - 100) / 256, jnp.float32)}


def test_hidden_kernels_are_stored_and_the_rest_stays():
  stored = int8_weights.quantize(PARAMS, group=4)
  kernel = stored['layers']['kernel']
  assert kernel.codes.shape == (2, 6, 10)
  assert kernel.scale.shape == kernel.zero.shape == (2, 6, 3)
  assert stored['embed']['embedding'] is PARAMS['embed']['embedding']
  back = int8_weights.dequantize(stored, jnp.bfloat16)
  assert back['layers']['kernel'].dtype == jnp.bfloat16
  assert back['bias'].dtype == jnp.float32
  exact = int8_weights.dequantize(stored)['layers']['kernel']
  step = np.repeat(np.asarray(kernel.scale), 4, axis=-1)[..., :10]
  assert (np.abs(exact - PARAMS['layers']['kernel']) <= 0.501 * step).all()
  only = int8_weights.quantize(PARAMS, where='embed')
  assert isinstance(only['embed']['embedding'], Int8)
  assert only['layers']['kernel'] is PARAMS['layers']['kernel']


def test_bytes_are_those_of_the_formula():
  kernel = jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16)
  stored = jax.eval_shape(int8_weights.quantize, {'kernel': kernel})
  got = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))
  assert got == 4096 * 11008 + 2 * 4096 * 11008 // 256 * 4


def test_a_zero_update_leaves_weights_on_the_grid():
  stored = int8_weights.quantize(on_grid())
  jax.tree.map(
    np.testing.assert_array_equal, int8_weights.dequantize(stored), on_grid()
  )
  zero = jax.tree.map(jnp.zeros_like, on_grid())
  for key in (None, *jax.random.split(jax.random.key(0), 3)):
    moved = int8_weights.apply_updates(key, stored, zero)
    jax.tree.map(np.testing.assert_array_equal, moved, stored)


def test_small_updates_add_up_by_stochastic_rounding_alone():
  # Steps of a twentieth of the grid; the ends of the grid stay, so that it does.
  stored = int8_weights.quantize(on_grid())
  inside = (jnp.abs(on_grid()['kernel'] - 27.5 / 256) < 60 / 256).astype(jnp.float32)
  update = {'kernel': inside * 0.05 / 256}

  def run(stored, key):
    def body(stored, key):
      return int8_weights.apply_updates(key, stored, update), None

    return jax.lax.scan(body, stored, key)[0]

  keys = jax.random.split(jax.random.key(1), (64, 20))
  moved = jax.jit(jax.vmap(run, in_axes=(None, 0)))(stored, keys)
  shift = int8_weights.dequantize(moved)['kernel'] - on_grid()['kernel'][None]
  mean = np.asarray(shift, np.float64).mean(axis=0)[inside > 0] * 256
  # Each of 20 steps moves by one code with probability 1/20: 1 in the mean.
  sigma = np.sqrt(20 * 0.05 * 0.95 / 64)
  assert (np.abs(mean - 1.0) <= 4 * sigma).all()
  lost = stored
  for _ in range(20):
    lost = int8_weights.apply_updates(None, lost, update)
  jax.tree.map(np.testing.assert_array_equal, lost, stored)


def test_updates_are_those_of_optax_for_what_is_not_stored():
  stored = int8_weights.quantize(PARAMS)
  updates = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), PARAMS)
  key = jax.random.key(0)
  moved = jax.jit(int8_weights.apply_updates)(key, stored, updates)
  want = optax.apply_updates(PARAMS, updates)
  back = int8_weights.dequantize(moved)
  np.testing.assert_array_equal(back['bias'], want['bias'])
  limit = float(moved['layers']['kernel'].scale.max()) * 1.5
  np.testing.assert_allclose(
    back['layers']['kernel'], want['layers']['kernel'], atol=limit
  )
  again = jax.jit(int8_weights.apply_updates)(key, stored, updates)
  jax.tree.map(np.testing.assert_array_equal, again, moved)


def test_leaves_of_one_shape_draw_apart():
  w = {'kernel': matrix((4, 64))}
  stored = int8_weights.quantize({'a': w, 'b': w})
  u = {'kernel': jnp.full((4, 64), 1e-3)}
  moved = int8_weights.apply_updates(jax.random.key(0), stored, {'a': u, 'b': u})
  assert (moved['a']['kernel'].codes != moved['b']['kernel'].codes).any()


def test_trains_under_jit_with_any_optimizer():
  tx = lrjax.q_galore(0.2, 2, 4)
  target = matrix((6, 10), 3)
  params = int8_weights.quantize({'kernel': jnp.zeros((6, 10)).at[0].set(1.0)})
  state = tx.init(int8_weights.dequantize(params))
  loss = lambda p: jnp.sum((p['kernel'] - target) ** 2)

  @jax.jit
  def step(params, state, key):
    weights = int8_weights.dequantize(params)
    value, grads = jax.value_and_grad(loss)(weights)
    updates, state = tx.update(grads, state, weights)
    return int8_weights.apply_updates(key, params, updates), state, value

  values = []
  for key in jax.random.split(jax.random.key(0), 40):
    params, state, value = step(params, state, key)
    values.append(float(value))
  assert values[-1] < 0.2 * values[0]
  assert step._cache_size() == 1


def test_shards_like_the_weights():
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  params = {'kernel': matrix((2, 8, 64)), 'bias': jnp.ones(64)}
  specs = {'kernel': P(None, 'fsdp', 'tensor'), 'bias': P('tensor')}
  placed = int8_weights.weight_specs(params, specs)
  assert placed['kernel'] == Int8(specs['kernel'], P(None, 'fsdp'), P(None, 'fsdp'))
  assert placed['bias'] == P('tensor')
  named = lambda tree: jax.tree.map(
    lambda s: NamedSharding(mesh, s), tree, is_leaf=lambda x: isinstance(x, P)
  )
  make = jax.jit(
    lambda p: int8_weights.quantize(p, group=32), out_shardings=named(placed)
  )
  stored = make(jax.device_put(params, named(specs)))
  want = int8_weights.quantize(params, group=32)
  jax.tree.map(np.testing.assert_array_equal, stored, want)
  assert stored['kernel'].codes.sharding.spec == specs['kernel']
  # Scales are made where the weights are; they alone are gathered.
  text = make.lower(jax.device_put(params, named(specs))).compile().as_text()
  gathered = re.findall(r'\[([\d,]+)\]\S* all-gather\(', text)
  assert all(math.prod(map(int, x.split(','))) <= 2 * 8 * 2 for x in gathered)


def test_a_group_needs_a_size():
  with pytest.raises(ValueError, match='`group` must be at least 1, got 0'):
    int8_weights.quantize(PARAMS, group=0)
