"""Bases that do not look at the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax

COORDINATES = [lrjax.columns, lrjax.entries]


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


@pytest.mark.parametrize('make', COORDINATES)
def test_coordinates_are_distinct_ascending_and_uniform(make):
  b = make(2)
  start = b.init(5, 3, jnp.float32)
  fit = lambda key: b.fit(key, jnp.zeros((5, 3)), start)
  drawn = jax.jit(jax.vmap(fit))(jax.random.split(jax.random.key(1), 3000))
  assert drawn.dtype == start.dtype == jnp.int32
  assert drawn[0].shape == start.shape
  assert (drawn[:, 0] < drawn[:, 1]).all()
  share = np.bincount(np.asarray(drawn).ravel(), minlength=5) / drawn.size
  np.testing.assert_allclose(share, 0.2, atol=0.02)


@pytest.mark.parametrize('make', COORDINATES)
def test_coordinates_project_exactly(make):
  g = jax.random.normal(jax.random.key(0), (6, 4))
  b = make(2)
  s = b.fit(jax.random.key(1), g, b.init(6, 4, g.dtype))
  low = b.down(s, g)
  back = b.up(s, low, 6)
  assert low.shape == (2, 4) and int((back != 0).sum()) == 8
  np.testing.assert_array_equal(b.down(s, back), low)
  np.testing.assert_array_equal(jnp.where(back == 0, g, back), g)
  everything = make(9)
  s = everything.fit(jax.random.key(1), g, everything.init(6, 4, g.dtype))
  np.testing.assert_array_equal(everything.down(s, g), g)


@pytest.mark.parametrize('make', COORDINATES)
def test_moments_of_coordinates_that_stay_carry_over(make):
  """`change` equals lifting by the old basis and projecting by the new one."""
  b, g = make(3), jnp.zeros((6, 4))
  start = b.init(6, 4, g.dtype)
  old, new = (b.fit(jax.random.key(i), g, start) for i in (1, 2))
  x = jax.random.normal(jax.random.key(0), (3, 4))
  want = b.down(new, b.up(old, x, 6))
  change = b.change(old, new, 6)
  np.testing.assert_array_equal(change.rotate(x), want)
  np.testing.assert_array_equal(change.square(x), want)
  assert 0 < int((want != 0).sum()) < x.size
  if b.matrix is not None:
    P, Q = b.matrix(old, 6), b.matrix(new, 6)
    np.testing.assert_allclose(Q.T @ P @ x, want, atol=1e-6)
    np.testing.assert_array_equal(b.up(old, x, 6), P @ x)
