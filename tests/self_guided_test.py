"""Self-guided training against its official code and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity.inputs import SMALL, read

import lrjax
from lrjax.models import LLAMA_SIZES, Llama
from lrjax.modules.nnx import kernels, split
from lrjax.types import Split

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 10))


def fixed(alpha):
  return {'alpha': jnp.float32(alpha), 'rest': jnp.float32(1 - alpha)}


def kernel(alpha, skip=False):
  """A kernel whose guide has gone its own way, at some alpha."""
  p = lrjax.self_guided(3, 8, skip=skip)
  train = p.init(KEY, (10, 6), jnp.float32).train
  guide = train['guide'] + jax.random.normal(KEY, (10, 6))
  return p, Split({**train, 'guide': guide}, fixed(alpha))


@pytest.mark.parametrize('name', SMALL)
def test_training_is_the_official_one(name):
  meta, recorded = read('self_guided')
  want = {k.partition('/')[2]: v for k, v in recorded.items() if k.startswith(name)}
  p = lrjax.self_guided(meta['rank'], meta['guide_steps'])
  plan, tx = {'q': p}, optax.sgd(meta['lr'])
  leaves = ('a', 'b', 'guide')
  params = {'q': {'kernel': {leaf: jnp.asarray(want[leaf][0]) for leaf in leaves}}}
  start = {'q': {'fixed': fixed(1.0)}}

  @jax.jit
  def run(weights):
    def step(weights, args):
      k, x, y = args
      weights, _ = lrjax.run_events(plan, lrjax.step_events(plan), weights, k, tx=tx)
      now = weights.fixed['q']['fixed']

      def loss(params):
        out = p.apply(Split(params['q']['kernel'], now), x)
        return 0.5 * jnp.mean((out - y) ** 2), out

      g, out = jax.grad(loss, has_aux=True)(weights.params)
      u, state = tx.update(g, weights.opt_state)
      params = optax.apply_updates(weights.params, u)
      new = lrjax.Weights(params, weights.fixed, state)
      return new, (params['q']['kernel'], now['alpha'], out)

    steps = jnp.arange(len(want['x'])), want['x'], want['y']
    return jax.lax.scan(step, weights, steps)[1]

  path, alpha, out = run(lrjax.Weights(params, start, tx.init(params)))
  np.testing.assert_allclose(alpha, want['alpha'], atol=1e-6)
  np.testing.assert_allclose(out, want['out'], atol=2e-6)
  for leaf in leaves:
    np.testing.assert_allclose(path[leaf], want[leaf][1:], atol=1e-6)


def test_both_branches_are_the_same_function_at_the_start():
  p = lrjax.self_guided(3, 8)
  start = p.init(KEY, (10, 6), jnp.float32)
  ab = lrjax.factorized(3).init(KEY, (10, 6), jnp.float32)
  assert start.fixed['alpha'] == 1
  np.testing.assert_array_equal(start.train['a'], ab.train['a'])
  want = lrjax.factorized(3).apply(ab, X)
  np.testing.assert_allclose(p.apply(start, X), want, atol=1e-6)
  for alpha in (0.0, 0.4):
    other = start._replace(fixed=fixed(alpha))
    np.testing.assert_allclose(p.apply(other, X), want, atol=1e-6)


@pytest.mark.parametrize('skip', [False, True])
def test_alpha_goes_from_the_guide_to_the_factors(skip):
  p, split = kernel(1.0, skip)
  np.testing.assert_allclose(p.apply(split, X), X @ split.train['guide'], atol=1e-6)
  p, split = kernel(0.0, skip)
  low = (X @ split.train['a']) @ split.train['b']
  np.testing.assert_array_equal(p.apply(split, X), low)
  p, split = kernel(0.3, skip)
  mixed = 0.3 * X @ split.train['guide'] + 0.7 * low
  np.testing.assert_allclose(p.apply(split, X), mixed, atol=1e-6)


def test_gradients_are_those_of_the_branches_that_are_used():
  def grads(alpha, skip):
    p, split = kernel(alpha, skip)
    loss = lambda train: jnp.sum(jnp.sin(p.apply(split._replace(train=train), X)))
    return jax.jit(jax.grad(loss))(split.train)

  assert not grads(1.0, False)['a'].any() and grads(1.0, False)['guide'].any()
  assert not grads(0.0, True)['guide'].any() and grads(0.0, True)['b'].any()
  mixed = grads(0.3, False)
  jax.tree.map(np.testing.assert_array_equal, mixed, grads(0.3, True))
  assert all(bool(g.any()) for g in mixed.values())


def test_the_guide_fades_by_a_cosine_and_is_skipped_as_often_as_it_has_faded():
  keys = jax.random.split(KEY, 2000)

  def alphas(skip):
    event = lrjax.self_guided(3, 8, skip=skip).events[0]
    _, split = kernel(1.0)
    alpha = lambda key, k: event.weights(key, split, k)[0].fixed['alpha']
    over_keys = jax.vmap(alpha, (0, None))
    return jax.jit(jax.vmap(over_keys, (None, 0)))(keys, jnp.arange(12))

  k = np.minimum(np.arange(12), 8)
  want = 0.5 * (1 + np.cos(np.pi * k / 8))
  np.testing.assert_allclose(alphas(False), np.tile(want[:, None], 2000), atol=1e-6)
  skipping = np.asarray(alphas(True))
  # Three standard deviations of a mean of 2000.
  np.testing.assert_allclose((skipping > 0).mean(1), want, atol=0.034)
  np.testing.assert_allclose(skipping.max(1), want, atol=1e-6)
  assert not skipping[8:].any()


def test_factors_move_from_the_first_update_in_bfloat16():
  _, split = kernel(1.0)
  event = lrjax.self_guided(3, 1000).events[0]
  new, _ = event.weights(KEY, split, jnp.int32(1))
  half = {name: x.astype(jnp.bfloat16) for name, x in new.fixed.items()}
  assert half['alpha'] == 1 and 0 < half['rest'] < 1e-5


def test_a_dense_kernel_becomes_the_guide():
  W = jax.random.normal(KEY, (10, 6))
  p = lrjax.self_guided(3, 8)
  split, error = p.from_dense(KEY, W)
  assert error == 0
  np.testing.assert_allclose(p.apply(split, X), X @ W, atol=1e-6)
  U, s, Vt = np.linalg.svd(W, full_matrices=False)
  product = split.train['a'] @ split.train['b']
  np.testing.assert_allclose(product, (U[:, :3] * s[:3]) @ Vt[:3], atol=1e-5)


def test_a_stripped_model_is_the_factorized_one():
  """Its trees are those of a model built so, and nothing changes after T updates."""
  build = lambda kernel: nnx.Sequential(
    lrjax.modules.nnx.Dense(10, 6, kernel=kernel, rngs=nnx.Rngs(0)),
    lrjax.modules.nnx.Dense(6, 4, kernel=kernel, rngs=nnx.Rngs(1)),
  )
  model, small = build(lrjax.self_guided(3, 8)), build(lrjax.factorized(3))
  graphdef, params, fixed = split(model)
  plan, tx = kernels(model), optax.adam(0.1)
  _, state = tx.update(params, tx.init(params))
  weights = lrjax.Weights(params, fixed, state)
  weights, _ = lrjax.run_events(plan, {'guide'}, weights, 8, tx=tx)
  before = nnx.merge(graphdef, weights.params, weights.fixed)(X)
  new = lrjax.resize(plan, lrjax.strip_guide, weights, tx=tx)
  graphdef, params, fixed = split(small)
  assert jax.tree.structure(new.params) == jax.tree.structure(params)
  assert new.fixed == {} and not jax.tree.leaves(fixed)
  after = nnx.merge(graphdef, new.params, fixed)(X)
  np.testing.assert_allclose(after, before, atol=1e-6)
  assert jax.tree.structure(new.opt_state) == jax.tree.structure(tx.init(params))
  for leaf in ('a', 'b'):
    mu = (s[0].mu['layers'][0]['kernel'][leaf] for s in (state, new.opt_state))
    np.testing.assert_array_equal(*mu)
  assert new.opt_state[0].count == 1


def test_parameter_counts():
  """Those of the dense and of the factorized kernels together, then these alone."""
  count = lambda kernel: sum(
    x.size
    for x in jax.tree.leaves(
      split(
        nnx.eval_shape(
          lambda: Llama(LLAMA_SIZES['60m'], kernel=kernel, rngs=nnx.Rngs(0))
        )
      )[1]
    )
  )
  # 58.07M and 42.77M; 32.78M of both are the embedding, the head and the norms.
  rest = 2 * 32000 * 512 + 512 * 17
  both = count(lrjax.dense()) + count(lrjax.factorized(128)) - rest
  assert count(lrjax.self_guided(128, 10)) == both


def test_bad_input():
  with pytest.raises(ValueError, match='guide_steps'):
    lrjax.self_guided(3, 0)
  with pytest.raises(ValueError, match='unknown `init`'):
    lrjax.self_guided(3, 8, init='spectra')  # pyrefly: ignore
  with pytest.raises(ValueError, match='rank must be at most'):
    lrjax.self_guided(7, 8).init(KEY, (10, 6), jnp.float32)
