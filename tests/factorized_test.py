"""Plain factorized kernels against the code of Khodak et al. and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity.inputs import SMALL, read

import lrjax
from lrjax.models import LLAMA_SIZES, Llama
from lrjax.modules.nnx import split
from lrjax.types import Split

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (10, 6)) / 4
X = jax.random.normal(jax.random.key(1), (5, 10))


def factors(rank, seed=2):
  """Factors that are not balanced."""
  train = lrjax.factorized(rank, 'kaiming').init(
    jax.random.key(seed), (10, 6), 'float32'
  )
  return train.train


@pytest.mark.parametrize('name', SMALL)
def test_start_and_decay_are_the_official_ones(name):
  meta, recorded = read('fnl')
  want = {
    k.removeprefix(f'{name}/'): v for k, v in recorded.items() if k.startswith(name)
  }
  dense = jnp.asarray(want['dense'])
  rank = round(meta['rank_scale'] * min(dense.shape))
  train, _ = lrjax.factorized(rank).from_dense(KEY, dense)
  product = train.train['a'] @ train.train['b']
  np.testing.assert_allclose(product, want['a'] @ want['b'], atol=1e-6)
  params = {'q': {'kernel': {leaf: jnp.asarray(want[leaf]) for leaf in 'ab'}}}
  tx = lrjax.frobenius_decay(meta['coef'])
  g, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  for leaf in 'ab':
    np.testing.assert_allclose(
      g['q']['kernel'][leaf], want[f'decay/{leaf}'], atol=1e-6, err_msg=leaf
    )


def test_at_full_rank_it_is_the_dense_kernel():
  p = lrjax.factorized(6)
  train, error = p.from_dense(KEY, W)
  assert error < 1e-6
  np.testing.assert_allclose(p.apply(train, X), X @ W, atol=1e-6)


def test_below_full_rank_it_is_the_best_and_balanced():
  train, error = lrjax.factorized(3).from_dense(KEY, W)
  a, b = train.train['a'], train.train['b']
  s = np.linalg.svd(np.asarray(W, np.float64))[1]
  lost = np.linalg.norm(W - a @ b)
  np.testing.assert_allclose(lost, np.linalg.norm(s[3:]), rtol=1e-5)
  np.testing.assert_allclose(error, lost / np.linalg.norm(W), rtol=1e-5)
  np.testing.assert_allclose(a.T @ a, np.diag(s[:3]), atol=1e-5)
  np.testing.assert_allclose(b @ b.T, np.diag(s[:3]), atol=1e-5)


@pytest.mark.parametrize(
  'init, a, b',
  [
    # Standard deviations of the entries of (512, 384) at rank 64.
    ('xavier', (2 / 576) ** 0.5, (2 / 448) ** 0.5),
    ('kaiming', (3 * 512) ** -0.5, (3 * 64) ** -0.5),
    ('normal', (0.02**2 / 64) ** 0.25, (0.02**2 / 64) ** 0.25),
    ('spectral_ones', 512**-0.5, 384**-0.5),
  ],
)
def test_starts_have_their_variances(init, a, b):
  train = lrjax.factorized(64, init).init(KEY, (512, 384), jnp.float32).train
  # Of 25000 numbers, and at least 1 % is four standard deviations of that.
  np.testing.assert_allclose(jnp.std(train['a']), a, rtol=0.02)
  np.testing.assert_allclose(jnp.std(train['b']), b, rtol=0.02)
  if init == 'normal':
    np.testing.assert_allclose(jnp.std(train['a'] @ train['b']), 0.02, rtol=0.02)
  if init == 'spectral_ones':
    np.testing.assert_allclose(train['a'].T @ train['a'], np.eye(64), atol=1e-5)


def test_gradients_are_products_with_the_dense_one():
  train = factors(3)
  y = jax.random.normal(KEY, (5, 6))
  loss = lambda train: jnp.vdot(y, lrjax.factorized(3).apply(Split(train), X))
  g, G = jax.grad(loss)(train), X.T @ y
  np.testing.assert_allclose(g['a'], G @ train['b'].T, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(g['b'], train['a'].T @ G, rtol=1e-5, atol=1e-6)


def test_a_restart_balances_keeps_the_product_and_starts_the_optimizer_anew():
  p = lrjax.factorized(3, restart_every=20)
  cosine = optax.cosine_decay_schedule(1.0, 100)
  rate = lrjax.with_restarts(cosine, every=20, warmup=10, start=0.001)
  tx = optax.adam(rate)
  params = {'q': {'kernel': factors(3)}, 'norm': jnp.ones(3)}
  state = jax.tree.map(lambda x: x + 20, tx.init(params))
  plan, weights = {'q': p}, lrjax.Weights(params, {}, state)
  assert [k for k in range(50) if lrjax.due_events(plan, k)] == [20, 40]
  new, _ = lrjax.run_events(plan, {'restart'}, weights, 20, tx=tx)
  a, b = (new.params['q']['kernel'][leaf] for leaf in 'ab')
  want = params['q']['kernel']['a'] @ params['q']['kernel']['b']
  np.testing.assert_allclose(a @ b, want, atol=1e-5 * np.abs(want).max())
  np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-6)
  adam, schedule = new.opt_state
  assert not any(x.any() for x in jax.tree.leaves((adam.mu, adam.nu, adam.count)))
  assert schedule.count == 20
  np.testing.assert_allclose(rate(schedule.count), 0.001 * cosine(30), rtol=1e-6)


def test_a_change_of_gauge_changes_no_output():
  train = factors(3)
  R = jax.random.normal(KEY, (3, 3))
  other = {'a': train['a'] @ R, 'b': jnp.linalg.inv(R) @ train['b']}
  p = lrjax.factorized(3)
  want = p.apply(Split(train), X)
  np.testing.assert_allclose(p.apply(Split(other), X), want, atol=1e-5)


def test_gradient_descent_keeps_the_balance_to_second_order():
  """a'a - bb' changes by lr^2 times what does not depend on lr."""
  start, _ = lrjax.factorized(3).from_dense(KEY, W)
  loss = lambda train: jnp.sum((lrjax.factorized(3).apply(Split(train), X) - 1) ** 2)
  g = jax.grad(loss)(start.train)

  def drift(lr):
    # In float64: the drift is as small as the rounding of float32.
    step = lambda n: np.float64(start.train[n]) - lr * np.float64(g[n])
    a, b = step('a'), step('b')
    before = np.float64(start.train['a']), np.float64(start.train['b'])
    return a.T @ a - b @ b.T - (before[0].T @ before[0] - before[1] @ before[1].T)

  large, small = drift(1e-2), drift(5e-3)
  np.testing.assert_allclose(large, 4 * small, atol=1e-2 * np.abs(large).max())


@pytest.mark.parametrize(
  'size, rank, millions',
  [
    ('60m', 128, 42.77),
    ('130m', 256, 94.00),
    ('350m', 256, 185.22),
    ('1b', 512, 609.31),
  ],
)
def test_parameter_counts_are_the_published_ones(size, rank, millions):
  build = lambda: Llama(
    LLAMA_SIZES[size], kernel=lrjax.factorized(rank), rngs=nnx.Rngs(0)
  )
  _, params, _ = split(nnx.eval_shape(build))
  assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6, 2) == millions


def test_bad_input():
  with pytest.raises(ValueError, match=r'at most min\(in, out\) = 6.*got 7'):
    lrjax.factorized(7).init(KEY, (10, 6), jnp.float32)
  with pytest.raises(ValueError, match="unknown `init` 'xaver'; did you mean 'xavier'"):
    lrjax.factorized(3, 'xaver')  # pyrefly: ignore
  with pytest.raises(ValueError, match='rank'):
    lrjax.factorized(0).init(KEY, (10, 6), jnp.float32)
