"""ReLoRA against its official code, its closed forms, and the defects of that code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity.inputs import read

import lrjax
from lrjax.models import LLAMA_SIZES, Llama
from lrjax.parameterizations.relora import pruned_at_random, pruned_by_magnitude


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def moved(p, shape=(10, 6), dtype=jnp.float32):
  """A kernel in the middle of a cycle."""
  split = p.init(jax.random.key(0), shape, dtype)
  noise = lambda x: x + normal(x.size, *x.shape).astype(x.dtype) / 4
  return split._replace(train=jax.tree.map(noise, split.train))


def merge(p, split, k=6):
  (event,) = p.events
  return event.weights(jax.random.key(k), split, jnp.int32(k))


def gradients(p, split):
  x, g = normal(1, 5, split.fixed['kernel'].shape[0]), normal(2, 5, 6)
  loss = lambda train: jnp.sum(p.apply(split._replace(train=train), x) * g)
  return jax.grad(loss)(split.train)


def touched_moments(p, params, opt_state, tx, k=6):
  """The state of `tx` after a merge of the one kernel at `q`, and what was counted."""
  fixed = {
    'q': {'fixed': {'kernel': normal(3, *params['q']['kernel']['a'].shape[:-1], 6)}}
  }
  weights = lrjax.Weights(params, fixed, opt_state)
  new, touched = lrjax.run_events({'q': p}, {'merge'}, weights, k, tx=tx)
  return new.opt_state, touched['merge']


@pytest.mark.parametrize('moments', ['zero', 'magnitude'])
def test_equals_the_official_code(moments):
  meta, recorded = read('relora')
  plain = optax.warmup_cosine_decay_schedule(0, meta['lr'], 2, 20, 0.1 * meta['lr'])
  rate = lrjax.with_restarts(plain, meta['every'], meta['restart_warmup_steps'])
  p = lrjax.relora(meta['rank'], meta['every'], meta['alpha'], moments, prune=0.6)
  tx = lrjax.adam(eps=meta['eps'][moments])
  drawn = iter(recorded[f'{moments}/drawn'])
  split, _ = p.from_dense(jax.random.key(0), jnp.asarray(recorded['start']))
  params = {'q': {'kernel': {**split.train, 'a': jnp.asarray(next(drawn))}}}
  weights = lrjax.Weights(params, {'q': {'fixed': split.fixed}}, tx.init(params))

  @jax.jit
  def step(weights, x, g, lr):
    def loss(params):
      one = lrjax.Split(params['q']['kernel'], weights.fixed['q']['fixed'])
      return jnp.sum(p.apply(one, x) * g)

    u, state = tx.update(jax.grad(loss)(weights.params), weights.opt_state)
    params = jax.tree.map(lambda w, u: w - lr * u, weights.params, u)
    return weights._replace(params=params, opt_state=state)

  run = jax.jit(functools.partial(lrjax.run_events, {'q': p}, {'merge'}, tx=tx))
  worst, merges = 0.0, []
  for k in range(21):
    if lrjax.due_events({'q': p}, k):
      weights, _ = run(weights, k)
      weights.params['q']['kernel']['a'] = jnp.asarray(next(drawn))
      merges.append(k)
    if k:
      got = weights.params['q']['kernel'] | weights.fixed['q']['fixed']
      for name in ('kernel', 'a', 'b'):
        want = recorded[f'{moments}/{name}'][k - 1]
        worst = max(worst, float(np.abs(got[name] - want).max()))
    if k < 20:
      weights = step(weights, recorded['x'][k], recorded['g'][k], rate(k))
  assert merges == [6, 11, 16]
  assert next(drawn, None) is None
  # Weights are of size 1 and updates of lr 0.05 are summed.
  assert worst < 2e-6


def test_jagged_cosine_is_a_cosine_with_restarts():
  (at, want), peak = read('relora')[1]['schedule'], 1.0
  plain = optax.warmup_cosine_decay_schedule(0, peak, 500, 20000, 0.1 * peak)
  rate = lrjax.with_restarts(plain, every=5000, warmup=100)
  np.testing.assert_allclose(rate(at.astype(np.int32)), want, atol=1e-6)


def test_merges_right_after_the_update_whose_rate_is_zero():
  (event,) = lrjax.relora(2, 5).events
  assert [k for k in range(20) if event.due(k)] == [6, 11, 16]
  (event,) = lrjax.relora(2, 1).events
  assert [k for k in range(5) if event.due(k)] == [2, 3, 4]


def test_merging_keeps_the_function_and_gains_rank():
  p, x = lrjax.relora(2, 5), normal(4, 3, 10)
  split = start = moved(p)
  for k in (6, 11):
    new, touched = merge(p, split, k)
    np.testing.assert_allclose(p.apply(new, x), p.apply(split, x), atol=1e-5)
    assert touched == {'a': True, 'b': True}
    assert not new.train['b'].any()
    assert float(jnp.abs(new.train['a']).max()) <= 10**-0.5
    split = new._replace(train=new.train | {'b': normal(k, 2, 6)})
  ranks = [
    np.linalg.matrix_rank(s.fixed['kernel'] - start.fixed['kernel'], tol=1e-4)
    for s in (new, merge(p, split, 16)[0])
  ]
  assert ranks == [4, 6]


def test_a_merge_is_summed_in_float32_and_rounded_once():
  p = lrjax.relora(2, 5)
  split = moved(p, dtype=jnp.bfloat16)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), split)
  s = 32 / 2
  want = wide.fixed['kernel'] + s * wide.train['a'] @ wide.train['b']
  got = merge(p, split)[0].fixed['kernel']
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    got, jnp.asarray(want, jnp.float32).astype(jnp.bfloat16)
  )


def test_all_of_w_moves_as_in_dense_training_where_a_is_orthogonal():
  p, n = lrjax.relora(6, 1, alpha=6.0), 6
  split, _ = p.from_dense(jax.random.key(0), normal(0, n, n))
  a = jnp.linalg.qr(normal(1, n, n))[0]
  x, g = normal(2, 4, n), normal(3, 4, n)
  loss = lambda b: jnp.sum(p.apply(split._replace(train={'a': a, 'b': b}), x) * g)
  b = -0.1 * jax.grad(loss)(split.train['b'])
  W = p.materialize(split._replace(train={'a': a, 'b': b}))
  np.testing.assert_allclose(W, split.fixed['kernel'] - 0.1 * x.T @ g, atol=1e-5)


def test_wrapping_trained_weights_leaves_a_gradient():
  # The public code sets a to 0 beside b, and neither moves until the first merge.
  p = lrjax.relora(3, 5)
  split, error = p.from_dense(jax.random.key(0), normal(0, 10, 6))
  np.testing.assert_array_equal(p.materialize(split), normal(0, 10, 6))
  grads = gradients(p, split)
  assert error == 0
  assert not grads['a'].any()
  assert jnp.abs(grads['b']).min() > 1e-3


def test_a_trained_scale_survives_a_merge():
  # The public code sets theta to 0 beside b, and tanh(0) b = 0 has no gradient at all.
  p, x = lrjax.relora(3, 5, alpha=None), normal(4, 3, 10)
  split = moved(p)
  want = np.tanh(split.train['theta']) * (split.train['a'] @ split.train['b'])
  np.testing.assert_allclose(
    p.materialize(split), split.fixed['kernel'] + want, atol=1e-6
  )
  new, touched = merge(p, split)
  np.testing.assert_allclose(p.apply(new, x), p.apply(split, x), atol=1e-5)
  assert touched == {'a': True, 'b': True, 'theta': True}
  assert new.train['theta'] == 1
  assert jnp.abs(gradients(p, new)['b']).min() > 1e-3


def test_magnitude_pruning_keeps_exactly_the_largest_of_each_matrix():
  size = jax.random.permutation(jax.random.key(0), jnp.arange(1.0, 101)).reshape(10, 10)
  stack = jnp.stack([-size, 1000 * size])
  new = pruned_by_magnitude(0.9)(jax.random.key(1), stack, jnp.zeros_like(stack))
  np.testing.assert_array_equal(new, jnp.where(size > 90, stack, 0))


def test_random_pruning_keeps_the_fraction_told():
  x = jnp.ones((100, 100))
  new = pruned_at_random(0.7)(jax.random.key(1), x, jnp.zeros_like(x))
  assert abs(float(new.sum()) - 3000) < 4 * np.sqrt(10000 * 0.7 * 0.3)
  assert not pruned_at_random(1.0)(jax.random.key(1), x, jnp.zeros_like(x)).any()


def test_pruning_leaves_counts_alone_and_starts_vectors_anew():
  change = lambda x: pruned_by_magnitude(0.5)(jax.random.key(1), x, jnp.zeros_like(x))
  assert change(jnp.full((1, 4), 7)).tolist() == [[7] * 4]
  assert change(jnp.arange(3.0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize('moments', ['zero', 'random', 'magnitude'])
def test_pruned_moments_are_counted_and_others_stay(moments):
  # A public port reported resets that had touched nothing.
  p, tx = lrjax.relora(3, 5, moments=moments, prune=0.5), lrjax.adam()
  params = {'q': {'kernel': {'a': normal(0, 2, 5, 3), 'b': normal(1, 2, 3, 6)}}}
  params |= {'norm': jnp.ones(4)}
  noise = lambda x: normal(7, *x.shape) if x.ndim else x + 41
  state = jax.tree.map(noise, tx.init(params))
  new, touched = touched_moments(p, params, state, tx)
  moments_of = lambda s: jax.tree.leaves((s.mu['q'], s.nu['q']))
  zeroed = sum(int((x == 0).sum()) for x in moments_of(new))
  assert int(touched.entries) == 2 * 2 * (15 + 18)
  assert zeroed == int(touched.zeros)
  # 15 and 18 entries a matrix: 8 and 9 of them are not above the median.
  fraction = zeroed / int(touched.entries)
  want = {'zero': 1.0, 'magnitude': (8 + 9) / 33}
  if moments == 'random':
    assert abs(fraction - 0.5) < 4 * 0.5 / np.sqrt(132)
  else:
    assert fraction == want[moments]
  for old, x in zip(moments_of(state), moments_of(new)):
    np.testing.assert_array_equal(jnp.where(x == 0, old, x), old)
  assert new.count == 41
  np.testing.assert_array_equal(new.mu['norm'], state.mu['norm'])
  np.testing.assert_array_equal(new.nu['norm'], state.nu['norm'])


def test_packed_moments_are_not_pruned_in_part():
  p = lrjax.relora(3, 5, moments='magnitude')
  tx = lrjax.eight_bit(lrjax.adam(), min_size=0)
  params = {'q': {'kernel': {'a': normal(0, 5, 3), 'b': normal(1, 3, 6)}}}
  with pytest.raises(ValueError, match='cannot be pruned in part'):
    touched_moments(p, params, tx.init(params), tx)


@pytest.mark.parametrize(
  ('size', 'rank', 'trained'),
  [
    ('60m', 128, 42_770_000),
    ('130m', 256, 94_000_000),
    ('350m', 256, 185_220_000),
    ('1b', 512, 609_310_000),
  ],
)
def test_parameter_counts(size, rank, trained):
  config, kernel = LLAMA_SIZES[size], lrjax.relora(rank, 1000)
  model = nnx.eval_shape(lambda: Llama(config, kernel=kernel, rngs=nnx.Rngs(0)))
  _, params, rest = lrjax.modules.nnx.split(model)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
  others = 2 * config.vocab_size * D + (2 * L + 1) * D
  assert count(params) == others + L * rank * (8 * D + 3 * (D + F))
  assert round(count(params), -4) == trained
  assert count(rest) == L * (4 * D * D + 3 * D * F)


@pytest.mark.parametrize(
  ('call', 'error', 'match'),
  [
    (lambda: lrjax.relora(2, 0), ValueError, 'every'),
    (lambda: lrjax.relora(0, 5), ValueError, 'rank'),
    (lambda: lrjax.relora(2, 5, moments='half'), ValueError, 'half'),
    (lambda: lrjax.relora(2, 5, prune=1.5), ValueError, 'at most 1'),
    (
      lambda: lrjax.relora(9, 5).init(jax.random.key(0), (8, 12), jnp.float32),
      ValueError,
      'rank must be at most',
    ),
  ],
)
def test_bad_input(call, error, match):
  with pytest.raises(error, match=match):
    call()
