"""Penalties on factorized kernels, against autodiff of their definition."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrjax


def tree(seed=0):
  draw = lambda i, *shape: jax.random.normal(jax.random.key(seed + i), shape)
  stack = {'a': draw(0, 2, 6, 3), 'b': draw(1, 2, 3, 5), 'index': draw(2, 4)}
  return {'stack': {'kernel': stack}, 'q': {'kernel': draw(3, 6, 5)}}


def test_frobenius_decay_is_the_gradient_of_half_the_squared_norm():
  params, grads = tree(), tree(9)
  tx = lrjax.frobenius_decay(0.3)
  got, _ = tx.update(grads, tx.init(params), params)

  def norm(params):
    kernel = params['stack']['kernel']
    return 0.5 * jnp.sum((kernel['a'] @ kernel['b']) ** 2)

  extra = jax.grad(norm)(params)
  want = jax.tree.map(lambda g, e: g + 0.3 * e, grads, extra)
  chex.assert_trees_all_close(got, want, atol=1e-5, rtol=1e-5)


def test_decay_of_the_factors_penalises_the_nuclear_norm():
  """(|a|^2 + |b|^2) / 2 >= |ab|_*, with equality where a'a = bb'."""
  W = np.asarray(tree()['q']['kernel'])
  train = lrjax.factorized(5).from_dense(jax.random.key(0), W)[0].train
  half = sum(float(jnp.sum(x**2)) for x in train.values()) / 2
  np.testing.assert_allclose(half, np.linalg.svd(W)[1].sum(), rtol=1e-5)


def test_a_penalty_without_kernels_or_params_is_refused():
  tx = lrjax.frobenius_decay(0.1)
  with pytest.raises(ValueError, match="'a', 'b'"):
    tx.init({'q': jnp.ones((2, 2))})
  params = tree()
  with pytest.raises(ValueError, match='params'):
    tx.update(params, tx.init(params))


def test_the_gradient_keeps_its_dtype():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree())
  tx = optax.chain(lrjax.frobenius_decay(0.1), optax.sgd(1.0))
  u, _ = tx.update(half, tx.init(half), half)
  chex.assert_trees_all_equal_dtypes(u, half)
