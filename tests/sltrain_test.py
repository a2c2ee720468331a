"""SLTrain: what it keeps, where it starts, how it is sharded."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lrjax
from lrjax.models import LLAMA_SIZES, Llama

KEY = jax.random.key(0)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def draw(p, shape):
  return jax.jit(lambda key: p.init(key, shape, jnp.float32))(KEY)


def test_kernel_and_gradients_are_those_of_the_formulas():
  p = lrjax.sltrain(3, 0.2, alpha=4.0)
  split = draw(p, (10, 6))
  split.train['b'] = 0.1 * normal(1, 3, 6)
  x, dy = normal(2, 2, 7, 10), normal(3, 2, 7, 6)

  @jax.jit
  def run(train, x, dy):
    apply = lambda train, x: p.apply(split._replace(train=train), x)
    y, pull = jax.vjp(apply, train, x)
    return y, *pull(dy)

  y, got, dx = run(split.train, x, dy)
  wide = lambda a: np.asarray(a, np.float64)
  a, b, v = (wide(split.train[n]) for n in ('a', 'b', 'values'))
  i, j = np.divmod(np.asarray(split.fixed['index']), 6)
  W = 4 / 3 * a @ b
  W[i, j] += v
  G = np.einsum('bti,bto->io', wide(x), wide(dy))
  near = lambda got, want: np.testing.assert_allclose(got, want, atol=3e-6)
  near(p.materialize(split), W)
  near(y, wide(x) @ W)
  near(dx, wide(dy) @ W.T)
  near(got['a'], 4 / 3 * G @ b.T)
  near(got['b'], 4 / 3 * a.T @ G)
  near(got['values'], G[i, j])


def test_start_is_sparse_alone_and_its_factor_moves_second():
  p = lrjax.sltrain(8, 0.1)
  split = draw(p, (64, 96))
  bound = 64**-0.5
  for name in ('a', 'values'):
    x = np.asarray(split.train[name])
    assert np.abs(x).max() <= bound
    np.testing.assert_allclose(x.std(), bound / 3**0.5, rtol=0.1)
  W = np.asarray(p.materialize(split))
  assert (W != 0).sum() == int(0.1 * 64 * 96)
  np.testing.assert_allclose(W.std(), (0.1 / 3 / 64) ** 0.5, rtol=0.1)
  loss = lambda train: jnp.sum(
    p.apply(split._replace(train=train), normal(1, 5, 64)) ** 2
  )
  moved = {
    n: bool((g != 0).any()) for n, g in jax.jit(jax.grad(loss))(split.train).items()
  }
  assert moved == {'a': False, 'b': True, 'values': True}


def test_three_percent_of_the_entries_make_a_kernel_of_full_rank():
  # Each row and column needs an entry: density * 384 is well above log(384).
  split = draw(lrjax.sltrain(4, 0.03), (384, 384))
  split.train['b'] = 0.1 * normal(1, 4, 384)
  W = np.asarray(lrjax.sltrain(4, 0.03).materialize(split), np.float64)
  assert np.linalg.matrix_rank(W) == 384


def test_all_entries_without_factors_train_like_a_dense_kernel():
  p, W, x = lrjax.sltrain(2, 1.0), normal(1, 6, 4), normal(2, 5, 6)
  train = {'a': jnp.zeros((6, 2)), 'b': jnp.zeros((2, 4)), 'values': W.reshape(-1)}
  split = lrjax.Split(train, {'index': jnp.arange(24, dtype=jnp.int32)})
  loss = lambda p, split: (
    lambda train: jnp.sum(jnp.sin(p.apply(split._replace(train=train), x)))
  )
  ours = jax.jit(jax.grad(loss(p, split)))(train)
  want = jax.jit(jax.grad(loss(lrjax.dense(), lrjax.Split(W))))(W)
  assert not ours['a'].any() and not ours['b'].any()
  np.testing.assert_allclose(W - 0.1 * ours['values'].reshape(6, 4), W - 0.1 * want)


@pytest.mark.parametrize('act', [None, 'silu'])
def test_nothing_dense_is_kept_for_the_backward_pass(act):
  p, n = lrjax.sltrain(2, 0.05, act=act), 64
  split, x = draw(p, (n, n)), normal(1, 3, n)
  apply = lambda f: lambda train, x: f(split._replace(train=train), x)
  kept = lambda f: max(
    a.size for a in jax.tree.leaves(jax.vjp(apply(f), split.train, x)[1])
  )
  assert kept(p.apply) == int(0.05 * n * n)
  if p.materialize:
    assert kept(lambda split, x: x @ p.materialize(split)) == n * n


def test_a_compiled_stack_of_kernels_holds_no_stack_of_dense_ones():
  p, n, layers = lrjax.sltrain(2, 0.02), 64, 16
  draw = lambda key: p.init(key, (n, n), jnp.float32)
  stack = jax.eval_shape(jax.vmap(draw), jax.random.split(KEY, layers))

  def dense_kernels(apply):
    def loss(train, fixed, x):
      step = lambda x, split: (jnp.tanh(apply(split, x)), None)
      return jax.lax.scan(step, x, lrjax.Split(train, fixed))[0].sum()

    x = jax.ShapeDtypeStruct((2, n), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(stack.train, stack.fixed, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * n * n)

  plain = dense_kernels(lambda split, x: x @ p.materialize(split))
  assert plain > layers
  assert dense_kernels(p.apply) < 6


def test_gradients_have_the_dtypes_of_what_they_are_for():
  p = lrjax.sltrain(2, 0.2)
  split, x = draw(p, (8, 6)), normal(1, 5, 8).astype(jnp.bfloat16)
  loss = lambda train, x: p.apply(split._replace(train=train), x).sum()
  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(split.train, x)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, (split.train, x))


def test_counts_are_the_published_ones_and_an_index_takes_four_bytes():
  """The official index takes eight."""
  ranks = {'60m': 128, '130m': 256, '350m': 256, '1b': 512}
  counts = {}
  for size, rank in ranks.items():
    make = functools.partial(Llama, LLAMA_SIZES[size], kernel=lrjax.sltrain(rank))
    model = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
    _, params, rest = lrjax.modules.nnx.split(model)
    leaves = jax.tree.leaves_with_path(params)
    counts[size] = sum(x.size for _, x in leaves)
    values = sum(x.size for path, x in leaves if 'values' in jax.tree_util.keystr(path))
    index = jax.tree.leaves(rest)
    assert sum(x.size * x.dtype.itemsize for x in index) == 4 * values
  millions = {size: round(n / 1e6, 2) for size, n in counts.items()}
  assert millions == {'60m': 43.53, '130m': 96.55, '350m': 194.29, '1b': 645.55}


def test_silu_stands_between_the_factors_alone():
  p = lrjax.sltrain(3, 0.2, alpha=None, act='silu')
  split = draw(p, (10, 6))
  split.train['b'] = normal(1, 3, 6)
  x = normal(2, 5, 10)
  z = np.asarray(x @ split.train['a'], np.float64)
  S = np.zeros((10, 6))
  S.flat[np.asarray(split.fixed['index'])] = split.train['values']
  want = np.tanh(1) * (z / (1 + np.exp(-z))) @ np.asarray(split.train['b']) + x @ S
  np.testing.assert_allclose(p.apply(split, x), want, atol=1e-5)


def test_values_go_to_the_largest_errors_when_asked_to():
  W = normal(1, 12, 16)
  error = {
    how: lrjax.sltrain(4, 0.2, import_support=how).from_dense(KEY, W)[1]
    for how in ('random', 'largest')
  }
  U, s, Vt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
  missed = np.sort(np.abs(W - (U[:, :4] * s[:4]) @ Vt[:4]), axis=None)
  left = np.linalg.norm(missed[: -int(0.2 * 192)])
  np.testing.assert_allclose(error['largest'], left / np.linalg.norm(W), rtol=1e-5)
  assert error['largest'] < 0.8 * error['random']


def test_each_device_adds_the_values_of_its_own_block():
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  place = {'in': 'fsdp', 'out': 'tensor', None: None}

  def collectives(**shards):
    p = lrjax.sltrain(4, 0.1, **shards)
    split = jax.eval_shape(lambda: p.init(KEY, (32, 48), jnp.float32))

    def spread(name, x):
      spec = PartitionSpec(*(place[a] for a in p.axes[name]))
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    arrays = lrjax.Split(
      *({n: spread(n, x) for n, x in part.items()} for part in split)
    )
    out = NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))
    with jax.set_mesh(mesh):
      text = jax.jit(p.materialize, out_shardings=out).lower(arrays).compile().as_text()
    return sum(
      text.count(f' {name}(') for name in ('all-gather', 'all-reduce', 'all-to-all')
    )

  assert collectives(in_shards=2, out_shards=4) == 0
  assert collectives() > 0


@pytest.mark.parametrize(
  'options, error, message',
  [
    (dict(rank=0), ValueError, 'rank'),
    (dict(rank=7), ValueError, r'rank must be at most .* 6 .* \(8, 6\), got 7'),
    (dict(density=0.0), ValueError, 'density.*above 0 and at most 1, got 0'),
    (dict(density=1.1), ValueError, 'density.*got 1.1'),
    (dict(density='3%'), TypeError, 'density'),
    (dict(density=0.01), ValueError, 'density must leave at least one entry'),
    (dict(alpha=0.0), ValueError, 'alpha'),
    (dict(act='swish'), ValueError, 'act'),
    (dict(act='silu', restart_every=5), ValueError, 'restart'),
    (dict(restart_every=0), ValueError, 'every'),
    (dict(in_shards=3), ValueError, r'shards must divide .* got shards \(3, 1\)'),
    (dict(out_shards=0), ValueError, 'out_shards'),
    (dict(out_shards=(2,)), TypeError, 'out_shards'),
    (dict(import_support='best'), ValueError, 'import_support'),
  ],
)
def test_bad_input_is_refused(options, error, message):
  with pytest.raises(error, match=message):
    lrjax.sltrain(**{'rank': 2, 'density': 0.5} | options).init(
      KEY, (8, 6), jnp.float32
    )
