"""SST: gradients against closed forms, the sampling law, and what its events touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lrjax
from lrjax.models.llama import Llama
from lrjax.models.llama_config import LLAMA_SIZES
from lrjax.parameterizations.sst import chances, sample, spectrum_of
from lrjax.weights import split_at

SHAPE, RANK, P = (7, 10), 3, 7
KEY = jax.random.key(0)
EVERY, ROUND = 5, 15  # 7 / 3 is 3 iterations of 5 updates, rounded up
KERNEL = lrjax.sst(RANK, EVERY)
PLAN = {'q': KERNEL}


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def far(got, want):
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


X, Y = normal(1, 20, SHAPE[0]), normal(2, 20, SHAPE[1])
DENSE = normal(3, *SHAPE)


def loss(kernel, train, split):
  return jnp.mean((kernel.apply(split._replace(train=train), X) - Y) ** 2)


grad = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)


def gradient(W):
  """dL/dW in float64."""
  X64 = X.astype(np.float64)
  return 2 * X64.T @ (X64 @ W - Y) / Y.size


@functools.partial(jax.jit, static_argnums=(0, 3))
def after(name, split, k, kernel=KERNEL):
  """The kernel after an event."""
  weights = lrjax.Weights({'q': {'kernel': split.train}}, {'q': {'fixed': split.fixed}})
  new, _ = lrjax.run_events({'q': kernel}, [name], weights, k)
  return split_at('q', new.params, new.fixed)


@functools.cache
def imported(kernel=KERNEL, W=DENSE):
  return kernel.from_dense(KEY, jnp.asarray(W))[0]


def moved(split):
  """The kernel after an update of an optimizer."""
  step = lambda a: a - 0.1 * normal(a.size, *a.shape)
  return split._replace(train=jax.tree.map(step, split.train))


def with_sigma(split, sigma):
  return split._replace(train={**split.train, 'sigma': sigma})


def test_import_is_the_svd():
  split, error = KERNEL.from_dense(KEY, jnp.asarray(DENSE))
  s = spectrum_of(split)
  assert error < 1e-5
  assert far(KERNEL.materialize(split), DENSE) < 1e-5
  assert far(s.sigma, np.linalg.svd(DENSE, compute_uv=False)) < 1e-5
  for Q in (s.U, s.V):
    assert np.abs(Q.T @ Q - np.eye(P)).max() < 1e-5


def test_gradients_are_those_of_the_dense_kernel_without_the_factor_sigma():
  split = imported()
  s, omega = spectrum_of(split), split.fixed['omega']
  grads = grad(KERNEL, split.train, split)
  G = gradient(DENSE)
  assert far(grads['sigma'], np.diag(s.V.T @ G @ s.U)) < 1e-5
  assert far(grads['u'], G.T @ s.V[:, omega]) < 1e-5
  assert far(grads['v'], G @ s.U[:, omega]) < 1e-5

  def plain(u, v):
    W = (s.V.at[:, omega].set(v) * s.sigma[None]) @ s.U.at[:, omega].set(u).T
    return jnp.mean((X @ W - Y) ** 2)

  true = jax.jit(jax.grad(plain, (0, 1)))(split.train['u'], split.train['v'])
  root = np.asarray(s.sigma[omega])[None]
  assert far(true[0], grads['u'] * root) < 1e-5
  assert far(true[1], grads['v'] * root) < 1e-5


def test_a_step_of_sigma_moves_W_within_its_pairs():
  split = imported()
  s, G, lr = spectrum_of(split), gradient(DENSE), 0.1
  g = grad(KERNEL, split.train, split)['sigma']
  W = KERNEL.materialize(with_sigma(split, split.train['sigma'] - lr * g))
  want = DENSE - lr * (s.V * np.diag(s.V.T @ G @ s.U)[None]) @ s.U.T
  assert far(W, want) < 1e-5


def test_a_step_of_all_pairs_to_first_order():
  kernel = lrjax.sst(P)
  split = imported(kernel)
  s, G, lr = spectrum_of(split), gradient(DENSE), 1e-4
  g = grad(kernel, split.train, split)
  train = jax.tree.map(lambda w, g: w - lr * g, split.train, g)
  step = kernel.materialize(split._replace(train=train)) - kernel.materialize(split)
  want = np.zeros(SHAPE)
  for sigma, u, v in zip(*(np.asarray(a, np.float64) for a in (s.sigma, s.U.T, s.V.T))):
    du, dv = G.T @ v, G @ u
    # Unit length takes away what lies along the vectors.
    du, dv = du - u * (u @ du), dv - v * (v @ dv)
    want -= lr * (v @ G @ u * np.outer(v, u))
    want -= lr * sigma * (np.outer(dv, u) + np.outer(v, du))
  # The difference of two W loses digits, and lr leaves a second order.
  assert far(step, want) < 5e-3


def test_normalize_gives_unit_vectors_and_no_negative_sigma():
  split = moved(imported())
  split = with_sigma(split, split.train['sigma'].at[2].set(-0.5))
  new = after('normalize', split, 1)
  assert far(KERNEL.materialize(new), KERNEL.materialize(split)) < 1e-6
  assert float(new.train['sigma'].min()) == new.train['sigma'][2] == 0
  for name in 'uv':
    np.testing.assert_allclose(np.linalg.norm(new.train[name], axis=0), 1, atol=1e-6)
    want = split.fixed[f'all_{name}']
    np.testing.assert_array_equal(new.fixed[f'all_{name}'], want)


def test_sigma_grows_again_from_zero():
  split = with_sigma(imported(), jnp.zeros(P))
  grads = grad(KERNEL, split.train, split)
  assert all(np.abs(g).min(axis=0).max() > 0 for g in jax.tree.leaves(grads))


def test_no_dense_array_waits_for_the_backward_pass():
  _, pull = jax.vjp(KERNEL.apply, imported(), X)
  assert SHAPE not in {x.shape for x in jax.tree.leaves(pull)}


def test_pairs_that_do_not_train_stay_bit_identical():
  split = imported()
  new = after('resample', moved(split), EVERY)
  rest = np.setdiff1d(np.arange(P), split.fixed['omega'])
  for name in ('all_u', 'all_v'):
    np.testing.assert_array_equal(new.fixed[name][:, rest], split.fixed[name][:, rest])
    changed = new.fixed[name] != split.fixed[name]
    assert changed[:, split.fixed['omega']].all()


@pytest.mark.parametrize('k', [EVERY, ROUND])
def test_a_resample_leaves_W_and_takes_other_pairs(k):
  split = moved(imported())
  new = after('resample', split, k)
  assert far(KERNEL.materialize(new), KERNEL.materialize(split)) < 1e-5
  assert (new.fixed['omega'] != split.fixed['omega']).any()
  np.testing.assert_array_equal(
    new.fixed['all_u'][:, new.fixed['omega']], new.train['u']
  )


def test_a_round_ends_with_the_svd():
  split = moved(imported())
  s = spectrum_of(after('resample', split, ROUND))
  W = np.asarray(KERNEL.materialize(split))
  assert far(s.sigma, np.linalg.svd(W, compute_uv=False)) < 1e-5
  for Q in (s.U, s.V):
    assert np.abs(Q.T @ Q - np.eye(P)).max() < 1e-5
  # Between rounds vectors are as training left them.
  U = spectrum_of(after('resample', split, ROUND - EVERY)).U
  assert np.abs(U.T @ U - np.eye(P)).max() > 1e-2


def test_the_length_of_a_round_can_be_told():
  split = moved(imported())
  due = lrjax.sst(RANK, EVERY, iterations=2)
  U = spectrum_of(after('resample', split, 2 * EVERY, due)).U
  assert np.abs(U.T @ U - np.eye(P)).max() < 1e-5


def test_resampling_is_due_at_every_iteration_and_normalizing_at_every_step():
  assert [k for k in range(16) if lrjax.due_events(PLAN, k)] == [5, 10, 15]
  assert lrjax.step_events(PLAN) == {'normalize'}


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('k', [EVERY, ROUND])
def test_moments_of_vectors_start_anew_and_those_of_sigma_once_a_round(k, stacked):
  one = lambda key: KERNEL.init(key, SHAPE, jnp.float32)
  split = jax.vmap(one)(jax.random.split(KEY, 2)) if stacked else one(KEY)
  params, fixed = {'q': {'kernel': split.train}}, {'q': {'fixed': split.fixed}}
  tx = optax.adam(0.1)
  state = jax.tree.map(jnp.ones_like, tx.init(params))
  run = jax.jit(lambda w, k: lrjax.run_events(PLAN, ['resample'], w, k, tx=tx))
  new, touched = run(lrjax.Weights(params, fixed, state), k)
  sizes = {name: 2 * x.size for name, x in split.train.items()}
  reset = {'u', 'v', 'sigma'} if k == ROUND else {'u', 'v'}
  assert touched['resample'].zeros == sum(sizes[name] for name in reset)
  for moment in (new.opt_state[0].mu, new.opt_state[0].nu):
    for name, x in moment['q']['kernel'].items():
      assert (x == (0 if name in reset else 1)).all()
  assert new.opt_state[0].count == 1


def test_chances_are_half_uniform_and_half_by_size():
  sigma = np.array([4.0, 1.0, 0.0, 5.0], np.float32)
  want = [0.325, 0.175, 0.125, 0.375]
  np.testing.assert_allclose(chances(sigma), want, atol=1e-6)
  np.testing.assert_allclose(chances(np.ones(4, np.float32)), 0.25, atol=1e-6)
  np.testing.assert_allclose(chances(np.zeros(4, np.float32)), 0.25, atol=1e-6)
  draws = lambda n: jax.vmap(lambda key: sample(key, sigma, n))(
    jax.random.split(KEY, 20_000)
  )
  seen = np.bincount(np.ravel(draws(1)), minlength=4) / 20_000
  np.testing.assert_allclose(seen, want, atol=0.015)  # four standard errors
  pairs = np.asarray(draws(2))
  assert (pairs[:, 0] < pairs[:, 1]).all()
  # The chance of (0, 1), one after the other, in either order.
  both = want[0] * want[1] * (1 / (1 - want[0]) + 1 / (1 - want[1]))
  seen = np.mean((pairs == [0, 1]).all(axis=1))
  np.testing.assert_allclose(seen, both, atol=0.01)  # four standard errors
  np.testing.assert_array_equal(sample(KEY, sigma, 4), np.arange(4))


@pytest.mark.parametrize('shape, rank, ratio', [(768, 64, 0.168), (2048, 128, 0.1255)])
def test_trained_numbers_of_one_kernel(shape, rank, ratio):
  kernel = lrjax.sst(rank)
  init = lambda: kernel.init(KEY, (shape, shape), jnp.float32).train
  train = jax.eval_shape(init)
  count = sum(x.size for x in jax.tree.leaves(train))
  assert count == 2 * rank * shape + shape
  np.testing.assert_allclose(count / shape**2, ratio, atol=5e-5)
  adam = jax.tree.leaves(jax.eval_shape(lambda: optax.adam(0.1).init(init())))
  assert sum(x.size for x in adam) == 2 * count + 1


@pytest.mark.parametrize(
  'size, rank', [('60m', 64), ('130m', 64), ('350m', 64), ('1b', 128)]
)
def test_trained_numbers_of_a_model(size, rank):
  config = LLAMA_SIZES[size]
  model = lambda kernel: nnx.eval_shape(
    lambda: Llama(config, kernel=kernel, rngs=nnx.Rngs(0))
  )
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  graph = nnx.split(model(lrjax.sst(rank)), nnx.Param, ...)
  plain = nnx.state(model(lrjax.factorized(rank)), nnx.Param)
  D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
  # As many as a low-rank model of this rank, and p = D for each of the seven kernels.
  assert count(graph[1]) == count(plain) + 7 * L * D
  assert count(graph[2]) == L * (4 * D * 2 * D + 3 * D * (D + F) + 7 * rank)


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match=r'at most min\(in, out\) = 7.*got 8'):
    lrjax.sst(8).init(KEY, SHAPE, jnp.float32)
  with pytest.raises(ValueError, match='`iterations` must be at least 1, got 0'):
    lrjax.sst(2, iterations=0)
  with pytest.raises(ValueError, match='`every` must be at least 1, got 0'):
    lrjax.sst(2, 0)
