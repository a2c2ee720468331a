"""Bases that do not look at the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax


@pytest.mark.parametrize(('d', 'k', 'rank', 'r'), [(6, 9, 3, 3), (9, 6, 6, 6)])
def test_random_directions_are_orthonormal(d, k, rank, r):
  b = lrjax.random_orthogonal(rank)
  g, start = jnp.zeros((d, k)), b.init(d, k, jnp.float32)
  p = b.fit(jax.random.key(3), g, start)
  assert p.shape == start.shape == (d, r)
  np.testing.assert_allclose(p.T @ p, np.eye(r), atol=1e-6)
  assert not np.allclose(p, b.fit(jax.random.key(4), g, start))


def test_random_directions_are_uniform():
  """Moments of a uniform frame: mean 0, E p_i^2 = 1/d, no sign is preferred."""
  b = lrjax.random_orthogonal(3)
  start = b.init(4, 5, jnp.float32)
  keys = jax.random.split(jax.random.key(0), 4000)
  p = jax.jit(jax.vmap(lambda key: b.fit(key, jnp.zeros((4, 5)), start)))(keys)
  # Standard errors: 0.5 / sqrt(4000) = 0.008 and 0.35 * 0.5 / sqrt(4000) = 0.003.
  np.testing.assert_allclose(p.mean(0), 0, atol=0.035)
  np.testing.assert_allclose(jnp.square(p).mean(0), 0.25, atol=0.02)
  np.testing.assert_allclose((p > 0).mean(0), 0.5, atol=0.035)
