"""The kernels of Fira's residual against its definition, in every form it has."""

import functools

import jax
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
def test_forms_and_limits(mode, per):
  options = dict(scale=0.25, mode=mode, per=per)
  run = lambda name: jax.jit(
    functools.partial(scaled_residual, implementation=name, **options)
  )
  definition, kernel = run('xla'), run('interpret')
  norms = []
  for last in (-1.0, 4.0, 1e6):  # the first step; a norm that grows too fast; no such
    want, norm = definition(*arrays(), jnp.float32(last))
    found, state = kernel(*arrays(), jnp.float32(last))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, norm, rtol=1e-5)
    norms.append(state)
  first, limited, free = norms
  np.testing.assert_allclose(limited, 4 * 1.01, rtol=1e-6)
  assert first == free > 2 * limited


@functools.partial(jax.jit, static_argnums=4)
def _run(p, g, low, u, implementation):
  return scaled_residual(p, g, low, u, jnp.float32(5), implementation=implementation)


def test_a_subspace_that_misses_nothing():
  # The sums of squares cancel: what is left is rounding, and no root of a negative.
  p, g, low, u = arrays()
  g = p @ low
  run = functools.partial(_run, p, g, low, u)
  want, _ = run('xla')
  found, state = run('interpret')
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  assert 0 <= state <= 5


def test_norms_that_overflow_leave_the_inside():
  p, g, low, u = arrays()
  run = functools.partial(_run, p, 1e25 * g, low, u)
  want, kept = run('xla')
  found, state = run('interpret')
  np.testing.assert_allclose(want, p @ u, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  assert kept == state == 5


def test_bad_shapes():
  p, g, low, u = arrays()
  with pytest.raises(ValueError, match=r'`u` must be .* \(24, 72\), got \(72, 24\)'):
    scaled_residual(p, g, low, u.T, jnp.float32(-1))
  with pytest.raises(ValueError, match='unknown `mode`'):
    scaled_residual(p, g, low, u, jnp.float32(-1), mode='code')
