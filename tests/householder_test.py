"""Householder: orthonormal by construction, exact imports, and the official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity.inputs import read

import lrjax
from lrjax.models.llama import Llama
from lrjax.models.llama_config import LLAMA_SIZES
from lrjax.parameterizations.householder import reflectors
from lrjax.types import Split

orthogonal = jax.jit(lrjax.householder_orthogonal)
KEY = jax.random.key(0)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reflections(v):
  """The product one by one, in float64."""
  Q = np.eye(len(v))
  for x in v.T.astype(np.float64):
    Q = Q - 2 * np.outer(Q @ x, x) / (x @ x)
  return Q


@pytest.mark.parametrize('n', [8, 64, 512])
def test_products_are_orthogonal(n):
  Q = np.asarray(orthogonal(0.05 * normal(n, n, n)))
  assert np.abs(Q.T @ Q - np.eye(n)).max() < 1e-5


@pytest.mark.parametrize('n', [5, 8, 33])
def test_any_size_equals_the_product_one_by_one(n):
  # The official fast product takes powers of two alone.
  v = normal(n, n, n)
  np.testing.assert_allclose(orthogonal(v), reflections(v), atol=1e-6)
  np.testing.assert_allclose(
    orthogonal(v[:, :3]), reflections(v[:, :3])[:, :3], atol=1e-6
  )
  assert np.sign(np.linalg.det(orthogonal(v))) == (-1) ** n


def test_some_columns_of_any_product_need_no_more_reflections():
  Q = reflections(normal(1, 9, 9))[:, :4]
  v, sign = jax.jit(reflectors)(Q.astype(np.float32))
  np.testing.assert_allclose(orthogonal(v) * sign[None], Q, atol=1e-6)


def test_the_length_of_a_vector_does_not_matter():
  v = normal(0, 9, 4)
  loss = lambda v: jnp.sum(jnp.sin(3 * orthogonal(v)))
  g = jax.grad(loss)(v)
  longer = v * np.array([[1e-3, 1, 50, 1]], np.float32)
  np.testing.assert_allclose(orthogonal(longer), orthogonal(v), atol=1e-6)
  np.testing.assert_allclose(np.sum(np.asarray(g) * v, axis=0), 0, atol=1e-5)


def test_a_vector_of_zeros_reflects_nothing():
  v = normal(0, 9, 4)
  v[:, 2] = 0
  without = reflections(v[:, [0, 1, 3]])
  np.testing.assert_allclose(orthogonal(v)[:, :2], without[:, :2], atol=1e-6)
  assert np.isfinite(jax.grad(lambda v: orthogonal(v).sum())(v)).all()


def test_rank_singular_values_are_one_after_any_step():
  p = lrjax.householder(3)
  split = p.init(KEY, (12, 7), jnp.float32)
  wild = jax.tree.map(lambda a: a + 100 * normal(a.size, *a.shape), split.train)
  s = np.linalg.svd(p.materialize(split._replace(train=wild)), compute_uv=False)
  np.testing.assert_allclose(s, [1, 1, 1, 0, 0, 0, 0], atol=1e-5)


def test_a_square_one_of_full_rank_keeps_norms():
  p, x = lrjax.householder(9), normal(1, 5, 9)
  y = p.apply(p.init(KEY, (9, 9), jnp.float32), x)
  norms = [np.linalg.norm(a, axis=1) for a in (x, y)]
  np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.parametrize('shape', [(12, 7), (7, 12), (9, 9)])
def test_import_is_exact_whatever_signs_lapack_takes(shape):
  # The official import copies LAPACK's array as it is: wrong where R has a -1.
  P = np.linalg.qr(normal(2, shape[0], 7))[0]
  R = np.linalg.qr(normal(3, shape[1], 7))[0]
  error = jax.jit(lrjax.householder(7).from_dense)(KEY, P @ R.T)[1]
  assert error < 1e-6
  W, x = normal(4, *shape), normal(5, 3, shape[0])
  full = lrjax.householder(min(shape), train_sigma=True)
  split, error = jax.jit(full.from_dense)(KEY, W)
  assert error < 1e-6
  np.testing.assert_allclose(full.apply(split, x), x @ W, atol=1e-5)


def test_import_of_unit_vectors_which_lapack_leaves_alone():
  W = np.eye(6, dtype=np.float32)
  split, error = lrjax.householder(6).from_dense(KEY, W)
  assert error < 1e-6
  np.testing.assert_allclose(lrjax.householder(6).materialize(split), W, atol=1e-6)


def test_import_with_ones_tells_the_error_of_the_nearest_one():
  W = normal(4, 12, 7)
  s = np.linalg.svd(W, compute_uv=False)
  lost = np.sqrt(np.sum((s[:3] - 1) ** 2) + np.sum(s[3:] ** 2)) / np.linalg.norm(s)
  error = lrjax.householder(3).from_dense(KEY, W)[1]
  np.testing.assert_allclose(error, lost, rtol=1e-5)


def test_directions_are_the_left_singular_vectors():
  # Official directions come from a product in another order than the forward pass.
  p = lrjax.householder(3)
  split = p.init(KEY, (12, 7), jnp.float32)
  P, W = orthogonal(split.train['v_in']), p.materialize(split)
  np.testing.assert_allclose(P @ (P.T @ W), W, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(P.T @ W, axis=1), 1, atol=1e-6)


def test_products_equal_the_official_ones():
  _, recorded = read('householder')
  for n in (8, 16):
    Q = orthogonal(recorded[f'{n}/raw'])
    assert np.abs(Q - recorded[f'{n}/Q']).max() < 5e-7
    assert np.abs(Q - recorded[f'{n}/fasthpp']).max() < 5e-7


def test_a_layer_equals_the_official_one():
  _, recorded = read('householder')
  r = {k.removeprefix('whole/'): v for k, v in recorded.items()}
  # There y = x Q(U)^T Q(V)^T, and Q(U)^T has the reflections of U in reverse.
  split = Split({'v_in': r['U'][:, ::-1], 'v_out': r['V']}, {'sign': jnp.ones(16)})
  apply = lambda train: lrjax.householder(16).apply(split._replace(train=train), r['x'])
  assert np.abs(apply(split.train) - r['y']).max() < 5e-6
  grads = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(apply(t)))))(split.train)
  # The raw entries are of size 0.05, so that their gradients reach 100.
  far = lambda got, want: np.abs(got - want).max() / np.abs(want).max()
  assert far(grads['v_in'], r['grad_U'][:, ::-1]) < 3e-6
  assert far(grads['v_out'], r['grad_V']) < 3e-6


@pytest.mark.parametrize('name', ['square', 'wide'])
def test_a_part_of_an_official_layer_is_imported_exactly(name):
  meta, recorded = read('householder')
  r = {k.removeprefix(f'{name}/'): v for k, v in recorded.items()}
  rank = meta['layers'][name][2]
  U, V = (r['U'], r['V']) if name == 'wide' else (r['V'], r['U'])
  W = (reflections(U)[:, :rank] @ reflections(V)[:rank]).T
  p = lrjax.householder(rank)
  split, error = p.from_dense(KEY, jnp.asarray(W, jnp.float32))
  assert error < 1e-6
  assert np.abs(p.apply(split, r['x']) - r['y']).max() < 5e-6


@pytest.mark.parametrize(
  'size, rank, millions',
  [
    ('60m', 128, 42.77),
    ('130m', 256, 94.0),
    ('350m', 256, 185.22),
    ('1b', 512, 609.31),
  ],
)
def test_as_many_numbers_as_any_low_rank_kernel(size, rank, millions):
  def count(kernel):
    model = lambda: Llama(LLAMA_SIZES[size], kernel=kernel, rngs=nnx.Rngs(0))
    params = nnx.state(nnx.eval_shape(model), nnx.Param)
    return sum(x.size for x in jax.tree.leaves(params))

  plain = count(lrjax.factorized(rank))
  assert round(plain / 1e6, 2) == millions
  assert count(lrjax.householder(rank)) == plain
  kernels = 7 * LLAMA_SIZES[size].num_layers
  assert count(lrjax.householder(rank, train_sigma=True)) == plain + kernels * rank


def test_bad_ranks_are_refused():
  with pytest.raises(ValueError, match=r'at most min\(in, out\) = 7.*got 8'):
    lrjax.householder(8).init(KEY, (12, 7), jnp.float32)
  with pytest.raises(TypeError, match='rank'):
    lrjax.householder(2.0).init(KEY, (12, 7), jnp.float32)
  with pytest.raises(ValueError, match=r'at most n columns, got \(3, 4\)'):
    lrjax.householder_orthogonal(jnp.ones((3, 4)))
