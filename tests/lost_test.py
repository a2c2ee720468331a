"""LOST: its start, its two parts, its import of dense kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lrjax
from lrjax.models import LLAMA_SIZES, Llama
from lrjax.parameterizations.factors import dense_init

KEY, SHAPE, RANK = jax.random.key(0), (12, 8), 3


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def draw(p, shape=SHAPE):
  return jax.jit(lambda key: p.init(key, shape, jnp.float32))(KEY)


def kernel_norm(p):
  return np.linalg.norm(p.materialize(draw(p)))


def wide(split):
  """All arrays in float64."""
  train = {n: np.asarray(x, np.float64) for n, x in split.train.items()}
  return *(train[n] for n in ('a', 'b', 'rows')), np.asarray(split.fixed['channels'])


def oracle(W, rank, k):
  """W_r, the rest, and the k channels of the rest with most energy, in float64."""
  U, s, Vt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
  top = (U[:, :rank] * s[:rank]) @ Vt[:rank]
  score = ((W - top) ** 2).sum(1)
  np.testing.assert_allclose(score.sum(), (s[rank:] ** 2).sum())
  return top, W - top, np.sort(np.argsort(-score, stable=True)[:k])


@pytest.mark.parametrize('sparse_init', ['original', 'complement'])
def test_start_is_the_split_of_a_random_kernel(sparse_init):
  p = lrjax.lost(RANK, 0.25, sparse_init=sparse_init)
  a, b, rows, channels = wide(draw(p))
  W = np.asarray(dense_init(KEY, SHAPE), np.float64)
  top, rest, want = oracle(W, RANK, 3)
  np.testing.assert_array_equal(channels, want)
  np.testing.assert_allclose(a @ b, top, atol=1e-7)
  np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-7)
  source = W if sparse_init == 'original' else rest
  np.testing.assert_allclose(rows, source[want], atol=1e-7)


def test_rescaled_start_has_the_norm_of_the_kernel_it_came_from():
  W = np.asarray(dense_init(KEY, SHAPE), np.float64)
  norm = lambda **options: kernel_norm(lrjax.lost(RANK, 0.25, act=None, **options))
  np.testing.assert_allclose(norm(rescale=True), np.linalg.norm(W), rtol=1e-5)
  assert norm() < 0.8 * np.linalg.norm(W)


def test_halves_with_all_complement_rows_are_the_first_kernel():
  p = lrjax.lost(RANK, 1.0, 0.5, None, 'complement', rescale=True)
  np.testing.assert_allclose(p.materialize(draw(p)), dense_init(KEY, SHAPE), atol=1e-7)


@pytest.mark.parametrize('act', [None, 'silu'])
def test_output_and_gradients_are_those_of_the_formulas(act):
  gamma, x, dy = 0.6, normal(1, 2, 5, 12), normal(2, 2, 5, 8)
  p = lrjax.lost(RANK, 0.25, gamma, act)
  split = draw(p)
  split = split._replace(train=jax.tree.map(lambda w: 10 * w, split.train))

  @jax.jit
  def run(train, x, dy):
    apply = lambda train, x: p.apply(split._replace(train=train), x)
    y, pull = jax.vjp(apply, train, x)
    return y, *pull(dy)

  y, got, dx = run(split.train, x, dy)
  a, b, rows, channels = wide(split)
  x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
  z = x @ a
  gate = 1 / (1 + np.exp(-z))
  u, slope = (
    (z, np.ones_like(z)) if act is None else (z * gate, gate * (1 + z * (1 - gate)))
  )
  thin = gamma * dy @ b.T * slope
  want_dx = thin @ a.T
  want_dx[..., channels] += (1 - gamma) * dy @ rows.T
  near = lambda got, want: np.testing.assert_allclose(got, want, atol=2e-6)
  near(y, gamma * u @ b + (1 - gamma) * x[..., channels] @ rows)
  near(dx, want_dx)
  near(got['a'], np.einsum('bti,btr->ir', x, thin))
  near(got['b'], gamma * np.einsum('btr,bto->ro', u, dy))
  near(got['rows'], (1 - gamma) * np.einsum('bti,bto->io', x[..., channels], dy))


def test_parts_alone_are_a_factorized_and_a_dense_kernel():
  p, x = lrjax.lost(RANK, 1.0, 0.25, None), normal(1, 5, 12)
  split = draw(p)
  zero = lambda *names: split._replace(
    train={n: 0 * w if n in names else w for n, w in split.train.items()}
  )
  low = lrjax.factorized(RANK).apply(split, x)
  np.testing.assert_allclose(p.apply(zero('rows'), x), 0.25 * low, atol=1e-6)
  dense = 0.75 * x @ split.train['rows']
  np.testing.assert_allclose(p.apply(zero('a', 'b'), x), dense, atol=1e-6)


def test_the_low_rank_part_alone_starts_as_factorized_does():
  # Not compiled as two programs, in which a compiler may fuse the same steps differently.
  kernels = lrjax.lost(RANK, 0.25), lrjax.factorized(RANK)
  ours, theirs = (p.init(KEY, SHAPE, jnp.float32) for p in kernels)
  for name, x in theirs.train.items():
    np.testing.assert_array_equal(ours.train[name], x)


def test_a_channel_that_is_not_chosen_passes_through_the_factors_alone():
  p, x = lrjax.lost(RANK, 0.25), jnp.broadcast_to(normal(1, 12), (12, 12))
  split = draw(p)
  channels = split.fixed['channels'].tolist()
  off = split._replace(train=split.train | {'b': 0 * split.train['b']})
  y = jax.jit(p.apply)(off, x + jnp.eye(12)) - jax.jit(p.apply)(off, x)
  assert np.flatnonzero(np.abs(y).max(1)).tolist() == channels


def test_choice_follows_the_channels_wherever_they_are():
  W, p = normal(3, *SHAPE), lrjax.lost(RANK, 0.25)
  order = np.random.default_rng(4).permutation(12)
  chosen = jax.jit(lambda W: p.from_dense(KEY, W)[0].fixed['channels'])
  assert sorted(order[chosen(W[order])]) == chosen(W).tolist()


def test_import_is_the_best_for_its_channels():
  W = normal(3, *SHAPE)
  p = lrjax.lost(RANK, 0.25, 0.6, None)
  split, error = jax.jit(p.from_dense)(KEY, W)
  channels = oracle(np.asarray(W, np.float64), RANK, 3)[2]
  np.testing.assert_array_equal(split.fixed['channels'], channels)
  others = np.delete(np.asarray(W, np.float64), channels, 0)
  left = np.linalg.svd(others, compute_uv=False)[RANK:]
  np.testing.assert_allclose(error, np.linalg.norm(left) / np.linalg.norm(W), rtol=1e-5)
  np.testing.assert_allclose(p.materialize(split)[channels], W[channels], atol=1e-6)


def test_counts_are_those_of_low_rank_and_one_percent_more():
  low = {'60m': 42770944, '130m': 93997824, '350m': 185222144, '1b': 609310720}
  ranks = {'60m': 128, '130m': 256, '350m': 256, '1b': 512}
  for size, rank in ranks.items():
    c = LLAMA_SIZES[size]
    D, F = c.hidden_size, c.intermediate_size
    rows = c.num_layers * (round(D / 100) * (4 * D + 2 * F) + round(F / 100) * D)
    make = functools.partial(Llama, c, kernel=lrjax.lost(rank))
    model = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
    params = lrjax.modules.nnx.split(model)[1]
    assert sum(x.size for x in jax.tree.leaves(params)) == low[size] + rows


@pytest.mark.parametrize(
  'options, error, message',
  [
    (dict(rank=9), ValueError, r'rank must be at most .* 8 .* got 9'),
    (dict(channel_ratio=0.0), ValueError, 'channel_ratio.*above 0'),
    (dict(channel_ratio=2), ValueError, 'channel_ratio.*at most 1, got 2'),
    (dict(channel_ratio=0.01), ValueError, 'at least one channel, 1/12'),
    (dict(gamma=1.0), ValueError, 'gamma.*factorized'),
    (dict(gamma='x'), TypeError, 'gamma'),
    (dict(act='swish'), ValueError, 'act'),
    (dict(sparse_init='rest'), ValueError, 'sparse_init'),
  ],
)
def test_bad_input_is_refused(options, error, message):
  with pytest.raises(error, match=message):
    lrjax.lost(**{'rank': 2, 'channel_ratio': 0.5} | options).init(
      KEY, SHAPE, jnp.float32
    )
