"""Monarch matrices: the official code, closed forms, the best projection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import monarch as oracle
from parity.inputs import read

import lrjax
from lrjax.models.llama import Llama
from lrjax.models.llama_config import LLAMA_SIZES
from lrjax.types import Split

META, OFFICIAL = read('monarch')
# (in, out, blocks of the input, of the output): even ones, and ones nothing divides.
SHAPES = [(16, 24, 4, 4), (24, 16, 2, 4), (10, 15, 4, 4), (13, 7, 5, 3), (3, 5, 3, 2)]


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


@functools.partial(jax.jit, static_argnums=0)
def _imported(p, W):
  """What is stored for W, the error told, and the dense form of what is stored."""
  split, error = p.from_dense(None, W)
  return split, error, p.materialize(split)


def _blocks(split, k, l):
  arrays = (np.asarray(split.train[n], np.float64) for n in ('w1', 'w2'))
  return oracle.blocks(*arrays, k, l)


@pytest.mark.parametrize('name', META['layers'])
def test_equals_the_official_layer(name):
  n, m, nblocks = META['layers'][name]
  r = {k: OFFICIAL[f'{name}/{k}'] for k in ('w1', 'w2', 'x', 'y', 'dw1', 'dw2', 'dx')}
  p = lrjax.monarch(nblocks)
  a, b = oracle.stored(r['w1'], r['w2'], (n, m))
  drawn = jax.eval_shape(lambda: p.init(jax.random.key(0), (n, m), jnp.float32)).train
  assert (drawn['w1'].shape, drawn['w2'].shape) == (a.shape, b.shape)
  train = {'w1': jnp.float32(a), 'w2': jnp.float32(b)}

  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def loss(train, x):
    y = p.apply(Split(train), x)
    return jnp.sin(y).sum(), y

  (_, y), (grads, dx) = jax.jit(loss)(train, jnp.float32(r['x']))
  da, db = oracle.stored(r['dw1'], r['dw2'], (n, m))
  for got, want in ((y, r['y']), (grads['w1'], da), (grads['w2'], db), (dx, r['dx'])):
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_what_is_not_stored_never_learns_in_the_official_layer():
  dw1, dw2 = (OFFICIAL[f'uneven/{k}'] for k in ('dw1', 'dw2'))
  kept = oracle.stored(dw1, dw2, (10, 15))
  for whole, stored in zip((dw1, dw2), kept):
    assert stored.size < whole.size
    np.testing.assert_allclose(np.sum(whole**2), np.sum(stored**2), rtol=1e-14)


def test_equals_the_official_projections():
  blocks = {'project': (4, 4)} | {
    f'project_{k}': v[2:4] for k, v in META['projections'].items()
  }
  for name, (k, l) in blocks.items():
    W, want = OFFICIAL[f'{name}/W'], OFFICIAL[f'{name}/dense']
    _, error, near = _imported(lrjax.monarch(k, l), jnp.float32(W))
    np.testing.assert_allclose(near, want, atol=5e-6)
    true = np.linalg.norm(W - want) / np.linalg.norm(W)
    np.testing.assert_allclose(error, true, rtol=1e-5)


@pytest.mark.parametrize('shape', SHAPES)
def test_rectangles_and_any_block_counts_project_at_the_least_error(shape):
  n, m, k, l = shape
  p, W = lrjax.monarch(k, l), _normal(n, m)
  split, error, near = _imported(p, jnp.float32(W))
  w1, w2 = _blocks(split, k, l)
  assert w1.shape[0] * w1.shape[1] == w2.shape[0] * w2.shape[2]
  np.testing.assert_allclose(near, oracle.dense(w1, w2)[:n, :m], atol=2e-6)
  want = oracle.error(W, k, l, w1.shape[1])
  np.testing.assert_allclose(error, want, rtol=2e-5, atol=2e-6)
  _, error, again = _imported(p, near)
  assert error < 2e-6
  np.testing.assert_allclose(again, near, atol=5e-6)


def test_no_refit_of_one_factor_to_another_lowers_the_error():
  n, m, k, l = 16, 24, 4, 2
  W = _normal(n, m)
  split, error, _ = _imported(lrjax.monarch(k, l), jnp.float32(W))
  w1, _ = _blocks(split, k, l)
  # With A = W of the first matrix alone, output block i is a least-squares problem.
  for seed in range(20):
    near = w1 + 10.0 ** -(seed % 5) * _normal(*w1.shape, seed=seed)
    A = oracle.block_diagonal(near).T.reshape(n, -1, l)
    lost = 0.0
    for i in range(l):
      fit = np.linalg.lstsq(A[:, :, i], W[:, i::l])[0]
      lost += np.sum((W[:, i::l] - A[:, :, i] @ fit) ** 2)
    assert np.sqrt(lost) / np.linalg.norm(W) > error - 1e-6


def test_one_block_is_low_rank():
  p = lrjax.monarch(1)
  split = p.init(jax.random.key(0), (12, 16), jnp.float32)
  x, (a, b) = _normal(3, 12), (split.train['w1'], split.train['w2'])
  assert a.shape == (12, 12)
  np.testing.assert_allclose(p.apply(split, jnp.float32(x)), x @ a @ b, atol=2e-6)


def test_the_discrete_fourier_transform_is_a_monarch_matrix():
  n = 16
  stride = np.arange(n).reshape(-1, 4).T.ravel()
  F = np.fft.fft(np.eye(n), norm='ortho')[stride]
  # Complex numbers as pairs: inputs (stride, pair), outputs (4, pair, 4).
  W = np.array([[F.real, F.imag], [-F.imag, F.real]])  # (from, to, in, out)
  W = W.reshape(2, 2, n, 4, 4).transpose(2, 0, 3, 1, 4).reshape(2 * n, 2 * n)
  _, error, _ = _imported(lrjax.monarch(4), jnp.float32(W))
  assert error < 1e-6


def test_starts():
  shape = (128, 64)

  def start(init):
    p = lrjax.monarch(4, init=init)
    split = jax.jit(lambda key: p.init(key, shape, jnp.float32))(jax.random.key(0))
    return _blocks(split, 4, 4)

  kaiming = start('kaiming')
  for w in kaiming:
    bound = w.shape[-1] ** -0.5
    assert 0.98 * bound < np.abs(w).max() <= bound
    # One standard deviation of this is 1.4 % for the 1024 entries of w2.
    np.testing.assert_allclose(w.std(), bound / 3**0.5, rtol=0.05)
  W = oracle.dense(*kaiming)
  np.testing.assert_allclose(W.std(), shape[0] ** -0.5 / 3, rtol=0.05)
  for w in start('ortho'):
    np.testing.assert_allclose(np.linalg.svd(w)[1], 1, atol=1e-5)
  # A quarter of the rank holds between a quarter and all of the energy 0.02^2.
  assert 0.01 < oracle.dense(*start('project')).std() < 0.02


def test_the_permutation_is_no_gather():
  p = lrjax.monarch(4)
  split = p.init(jax.random.key(0), (10, 15), jnp.float32)
  loss = lambda split, x: p.apply(split, x).sum()
  program = str(
    jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(split, jnp.ones((2, 10)))
  )
  assert 'gather' not in program and 'scatter' not in program


def test_no_cast_to_float16():
  # 1 + 2^-12 is no float16; under autocast the official product is one of halves.
  p = lrjax.monarch(4)
  split = Split({'w1': jnp.ones((4, 1)), 'w2': jnp.ones((1, 4))})
  x = jnp.full(4, 1 + 2.0**-12)
  y = p.apply(split, x)
  assert y.dtype == jnp.float32 and (y == x).all()


def test_the_dense_form_has_the_shuffle():
  # StructuredFFN starts its guide from the product of the two block diagonals alone.
  split = lrjax.monarch(4).init(jax.random.key(0), (16, 16), jnp.float32)
  w1, w2 = _blocks(split, 4, 4)
  plain = (oracle.block_diagonal(w2) @ oracle.block_diagonal(w1)).T
  W = lrjax.monarch(4).materialize(split)
  np.testing.assert_allclose(W, oracle.dense(w1, w2), atol=2e-6)
  assert np.linalg.norm(W - plain) > 0.5 * np.linalg.norm(W)


def test_training_ends_densely():
  p = lrjax.monarch(4)
  split = p.init(jax.random.key(0), (12, 16), jnp.float32)
  dense = lrjax.export({'q': p}, {'q': {'kernel': split.train}}, {})
  x = jnp.float32(_normal(3, 12))
  np.testing.assert_allclose(x @ dense['q']['kernel'], p.apply(split, x), atol=2e-6)


@pytest.mark.parametrize('size', ['60m', '130m', '350m', '1b'])
def test_parameters_are_those_of_the_formula(size):
  config = LLAMA_SIZES[size]
  D, F, V, L = (
    config.hidden_size,
    config.intermediate_size,
    config.vocab_size,
    config.num_layers,
  )
  ext = lambda n: -(-n // 4) * 4
  count = lambda n, m: min(ext(n), ext(m)) // 4 * (ext(n) + ext(m))
  kernels = 4 * count(D, D) + 2 * count(D, F) + count(F, D)
  # 5461 is no multiple of 4: 3 rows or columns of each MLP kernel are not stored.
  unstored = 3 * (ext(F) - F) * (D // 4)
  want = 2 * V * D + D + L * (kernels - unstored + 2 * D)
  make = lambda: Llama(config, kernel=lrjax.monarch(4), rngs=nnx.Rngs(0))
  _, params, _ = lrjax.modules.nnx.split(nnx.eval_shape(make))
  assert sum(x.size for x in jax.tree.leaves(params)) == want


def test_bad_input():
  with pytest.raises(ValueError, match='nblocks must be at most in = 3'):
    lrjax.monarch(4).init(jax.random.key(0), (3, 8), jnp.float32)
  with pytest.raises(ValueError, match='nblocks_out must be at most out = 3'):
    lrjax.monarch(4).from_dense(None, jnp.ones((8, 3)))
  with pytest.raises(ValueError, match='at least 1'):
    lrjax.monarch(0)
  with pytest.raises(TypeError, match='nblocks_out'):
    lrjax.monarch(4, 2.5)
  with pytest.raises(ValueError, match='kaiming'):
    lrjax.monarch(4, init='kaming')
