"""The kernels of Fira's residual against its definition, in every form it has."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.kernels import scaled_residual

D, K, R = 96, 72, 24


@functools.cache
def arrays():
  rng = np.random.default_rng(3)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  p = jnp.linalg.qr(normal(D, R))[0]
  # Unlike columns: a ratio for all of them is not that of any.
  g = normal(D, K) * jnp.linspace(0.1, 2, K)[None, :]
  return p, g, p.T @ g, normal(R, K)


@pytest.mark.parametrize('per', ['channel', 'tensor'])
@pytest.mark.parametrize('mode', ['official', 'paper'])
@pytest.mark.parametrize('last', [-1.0, 4.0, 1e6], ids=['first', 'limited', 'free'])
def test_forms_and_limits(mode, per, last):
  run = functools.partial(scaled_residual, scale=0.25, mode=mode, per=per)
  want, norm = run(*arrays(), jnp.float32(last), implementation='xla')
  found, state = run(*arrays(), jnp.float32(last), implementation='interpret')
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(state, norm, rtol=1e-5)
  if last > 0:
    assert (state < 1.02 * last) and (state > 4.01 or last == 4)


def test_a_subspace_that_misses_nothing():
  # The sums of squares cancel: what is left is rounding, and no root of a negative.
  p, g, low, u = arrays()
  g = p @ low
  run = functools.partial(scaled_residual, p, g, low, u, jnp.float32(5))
  want, _ = run(implementation='xla')
  found, state = run(implementation='interpret')
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  assert 0 <= state <= 5


def test_norms_that_overflow_leave_the_inside():
  p, g, low, u = arrays()
  run = functools.partial(scaled_residual, p, 1e25 * g, low, u, jnp.float32(5))
  want, kept = run(implementation='xla')
  found, state = run(implementation='interpret')
  np.testing.assert_allclose(want, p @ u, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  assert kept == state == 5
