"""DSFormer: its factorizer against closed forms, its gradient, its two modes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import sparse_coding as oracle

import lrjax
from lrjax.models.llama import Llama
from lrjax.models.llama_config import LLAMA_SIZES
from lrjax.parameterizations import sparse_coding
from lrjax.types import Split
from lrjax.weights import Weights, due_events, run_events, split_at, step_events

KEY = jax.random.key(0)


def _normal(*shape, seed=0):
  return np.float32(np.random.default_rng(seed).standard_normal(shape))


@functools.partial(jax.jit, static_argnums=0)
def _imported(p, W):
  return p.from_dense(KEY, W)


@functools.partial(jax.jit, static_argnums=0)
def _round(p, split, k):
  """After one more round of the factorizer."""
  (event,) = p.events
  return event.weights(KEY, split, k)[0]


def _codes(split):
  """C (blocks, in, atoms) in float64."""
  index, values = (np.asarray(split.fixed[n]) for n in ('index', 'values'))
  C = np.zeros((*index.shape[:2], len(split.fixed['basis'])))
  np.put_along_axis(C, index, values.astype(float), axis=-1)
  return C


@pytest.mark.parametrize('coder', ['omp', 'one_shot'])
def test_codes_are_those_of_a_transcription(coder):
  K, D = _normal(20, 8), _normal(12, 8, seed=1)
  D /= np.linalg.norm(D, axis=1)[:, None] * np.arange(1, 13)[:, None]  # of any length
  if coder == 'one_shot':
    D = D[:6]  # beyond 8 atoms the fit by all of them is not unique

  @jax.jit
  def run(K, D):
    index = getattr(sparse_coding, coder)(K, D, 3)
    return sparse_coding.scatter(index, sparse_coding.refit(K, D, index), len(D))

  want = getattr(oracle, coder)(K.astype(float), D.astype(float), 3)
  # Coefficients up to 40, of atoms as short as 1/12.
  np.testing.assert_allclose(run(K, D), want, atol=1e-5 * np.abs(want).max())


def test_a_planted_code_is_found_at_once():
  D = np.linalg.qr(_normal(16, 16))[0][:12]
  C = np.zeros((30, 12), np.float32)
  for row in C:
    row[np.random.default_rng(int(row.size)).permutation(12)[:3]] = 1
  C *= _normal(30, 12, seed=2) + 2 * np.sign(_normal(30, 12, seed=2))
  index = jax.jit(sparse_coding.omp, static_argnums=2)(C @ D, D, 3)
  values = sparse_coding.refit(jnp.asarray(C @ D), jnp.asarray(D), index)
  np.testing.assert_allclose(sparse_coding.scatter(index, values, 12), C, atol=1e-5)


def test_as_many_numbers_as_the_short_side_hold_anything():
  W, x = _normal(6, 20), _normal(3, 6)
  p = lrjax.dsformer(6, 6, width=10, rounds=2)
  split, error = _imported(p, W)
  assert error < 1e-5
  np.testing.assert_allclose(p.apply(split, x), x @ W, atol=1e-5)


def test_as_many_numbers_as_atoms_are_the_truncated_svd():
  W = _normal(16, 12)
  _, error = _imported(lrjax.dsformer(4, 4, width=12, mode='factor', rounds=2), W)
  s = np.linalg.svd(W)[1]
  np.testing.assert_allclose(
    error, np.sqrt(np.sum(s[4:] ** 2) / np.sum(s**2)), rtol=1e-5
  )


@pytest.mark.parametrize('coder', ['omp', 'one_shot'])
def test_rounds_never_raise_the_error(coder):
  p = lrjax.dsformer(8, 3, width=6, coder=coder, rounds=1)
  W = _normal(24, 16)
  split, _ = _imported(p, W)
  errors = []
  for k in range(6):
    errors.append(np.linalg.norm(W - p.materialize(split)))
    index = np.sort(split.fixed['index'], axis=-1)
    assert index.shape == (3, 24, 3) and index.dtype == np.int32
    assert index.min() >= 0 and index.max() < 8
    assert (np.diff(index) > 0).all(), 'a row has an atom twice'
    split = _round(p, split, k)
  assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
  assert errors[-1] < 0.97 * errors[0]


def test_the_gradient_goes_straight_through():
  p = lrjax.dsformer(4, 2, width=6, rounds=1)
  split, _ = _imported(p, _normal(12, 16))
  x, out = _normal(5, 12, seed=1), _normal(5, 16, seed=2)

  @jax.jit
  def grads(split, x):
    loss = lambda K, x: jnp.sum(p.apply(split._replace(train=K), x) * out)
    return jax.grad(loss, argnums=(0, 1))(split.train, x)

  dK, dx = grads(split, x)
  np.testing.assert_allclose(dK, x.T @ out, atol=1e-5)
  np.testing.assert_allclose(dx, out @ p.materialize(split).T, atol=1e-5)
  # The gradient of K does not depend on what stands for it.
  other = {**split.fixed, 'basis': 2 * split.fixed['basis']}
  np.testing.assert_array_equal(grads(split._replace(fixed=other), x)[0], dK)


def test_with_a_lossless_factorizer_it_is_dense_training():
  W, x, y = _normal(8, 12), _normal(16, 8, seed=1), _normal(16, 12, seed=2)

  def path(p, split):
    @jax.jit
    def step(split, k):
      weights, _ = run_events({'q': p}, step_events({'q': p}), _tree(split), k)
      split = split_at('q', weights.params, weights.fixed)
      loss = lambda K: jnp.mean((p.apply(split._replace(train=K), x) - y) ** 2)
      return split._replace(train=split.train - 0.5 * jax.grad(loss)(split.train))

    for k in range(4):
      split = step(split, k)
    return split.train

  p = lrjax.dsformer(4, 4, width=4, rounds=1)
  dense = path(lrjax.dense(), Split(jnp.asarray(W)))
  np.testing.assert_allclose(path(p, _imported(p, W)[0]), dense, atol=1e-5)
  assert np.abs(dense - W).max() > 0.1


def _tree(split):
  fixed = {'q': {'fixed': dict(split.fixed)}} if split.fixed else {}
  return Weights({'q': {'kernel': split.train}}, fixed)


def test_codes_follow_the_latent_when_due():
  rare = lrjax.dsformer(4, 2, 6, refresh_every=5)
  assert not step_events({'q': rare})
  due = [k for k in range(12) if due_events({'q': rare}, k)]
  assert due == [5, 10]
  p = lrjax.dsformer(4, 2, 6, rounds=1)
  assert step_events({'q': p}) == {'refactorize'} and not due_events({'q': p}, 5)
  split, _ = _imported(p, _normal(12, 16))
  moved = split._replace(train=split.train + 0.3 * _normal(12, 16, seed=3))
  lost = lambda s: np.linalg.norm(moved.train - p.materialize(s))
  new = _round(p, moved, 1)
  assert lost(new) < 0.95 * lost(moved)
  np.testing.assert_array_equal(new.train, moved.train)


def test_frozen_places_keep_their_numbers_in_training():
  p = lrjax.dsformer(4, 2, 6, rounds=1, freeze_after=10)
  split, _ = _imported(p, _normal(12, 16))
  split = split._replace(train=_normal(12, 16, seed=3))
  before, after = _round(p, split, 9), _round(p, split, 10)
  moved = lambda s, name: bool((s.fixed[name] != split.fixed[name]).any())
  assert moved(before, 'index') and not moved(after, 'index')
  assert moved(after, 'values') and moved(after, 'basis')


def test_blocks_of_rows_are_blocks_of_columns_of_the_transpose():
  W = _normal(12, 10)
  across, error = _imported(lrjax.dsformer(4, 2, 4, blocks='in', rounds=1), W)
  p = lrjax.dsformer(4, 2, 4, rounds=1)
  split, want = _imported(p, W.T)
  np.testing.assert_allclose(error, want, rtol=1e-5)
  got = lrjax.dsformer(4, 2, 4, blocks='in', rounds=1).materialize(across)
  np.testing.assert_allclose(got, p.materialize(split).T, atol=1e-5)
  # What is stored is what is meant: block by block codes times basis.
  D = np.asarray(split.fixed['basis'], float)
  blocks = [c @ D[:, 4 * b : 4 * b + 4] for b, c in enumerate(_codes(split))]
  np.testing.assert_allclose(np.hstack(blocks), got.T, atol=1e-6)


def test_stripping_the_latent_keeps_the_function():
  p, q = (lrjax.dsformer(4, 2, 6, mode, rounds=1) for mode in ('stf', 'factor'))
  split, _ = _imported(p, _normal(12, 16))
  small, x = lrjax.strip_latent(split), _normal(3, 12)
  np.testing.assert_array_equal(q.apply(small, x), p.apply(split, x))
  assert {*small.train, *small.fixed} == {*q.axes}
  stack = jax.tree.map(lambda *a: jnp.stack(a), split, split)
  assert lrjax.strip_latent(stack).train['basis'].shape == (2, 4, 16)
  assert lrjax.strip_latent(small) is small


@pytest.mark.parametrize('mode', ['stf', 'factor'])
def test_nothing_dense_is_kept_for_the_backward_pass(mode):
  p = lrjax.dsformer(4, 2, 8, mode, rounds=1)
  split, _ = _imported(p, _normal(32, 32))
  run = lambda train, x: p.apply(split._replace(train=train), x)
  _, back = jax.vjp(run, split.train, _normal(2, 32))
  dense = [x for x in jax.tree.leaves(back) if x.size >= 32 * 32]
  # The latent is dense as it is.
  assert all(x is split.train for x in dense), [x.shape for x in dense]


def test_a_narrow_last_block_has_no_atom_outside_it():
  p = lrjax.dsformer(6, 2, 6, rounds=1)
  split, _ = _imported(p, _normal(12, 16))
  # Its four columns have four singular vectors; the other two atoms are rows.
  assert (np.linalg.norm(split.fixed['basis'][:, 12:], axis=1) > 0.1).all()


def test_a_zero_kernel_has_a_zero_code():
  p = lrjax.dsformer(4, 2, 6, rounds=1)
  split, error = _imported(p, jnp.zeros((12, 16)))
  assert error == 0 and not p.materialize(_round(p, split, 0)).any()


def test_parameters_are_those_of_the_formula():
  p = lrjax.dsformer(64, 16, mode='factor')
  split = jax.eval_shape(lambda: p.init(KEY, (768, 768), jnp.float32))
  sizes = {k: x.size for k, x in split.train.items()}
  assert sizes == {'values': 147_456, 'basis': 49_152}
  for size in ('60m', '130m', '350m', '1b'):
    c = LLAMA_SIZES[size]
    D, F = c.hidden_size, c.intermediate_size
    count = lambda n, m: n * 16 * -(-m // 64) + 64 * m
    kernels = 4 * count(D, D) + 2 * count(D, F) + count(F, D)
    want = 2 * c.vocab_size * D + D + c.num_layers * (kernels + 2 * D)
    make = lambda: Llama(c, kernel=p, rngs=nnx.Rngs(0))  # noqa: B023
    _, params, _ = lrjax.modules.nnx.split(nnx.eval_shape(make))
    assert sum(x.size for x in jax.tree.leaves(params)) == want


def test_bad_input():
  with pytest.raises(ValueError, match=r'nnz must be at most min\(atoms, width\) = 4'):
    lrjax.dsformer(4, 5)
  with pytest.raises(ValueError, match='width must be at most 16'):
    lrjax.dsformer(4, 2).init(KEY, (12, 16), jnp.float32)
  with pytest.raises(ValueError, match='atoms must be at most 12'):
    lrjax.dsformer(13, 2, 8).from_dense(KEY, jnp.ones((12, 16)))
  with pytest.raises(ValueError, match="unknown `mode` 'sft'"):
    lrjax.dsformer(4, 2, mode='sft')
  with pytest.raises(TypeError, match='atoms'):
    lrjax.dsformer(4.5, 2)
