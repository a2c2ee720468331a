"""Newton-Schulz and the QR factors against singular values and closed forms."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from oracles.dct import newton_schulz as oracle
from samples import matrix

from lrjax import orthogonalize as ortho

TABLES = {
  'keller_jordan': (ortho.KELLER_JORDAN, 1.0, 0.6, 1.3),
  'dion_schedule': (ortho.DION_SCHEDULE, 1.0, 0.8, 1.2),
  'polar_express': (ortho.POLAR_EXPRESS, 1.02, 0.9, 1.1),
}


@pytest.mark.parametrize('name', TABLES)
def test_singular_values_come_near_one_and_vectors_stay(name):
  coefficients, factor, low, high = TABLES[name]
  for shape in ((4, 9), (9, 4)):
    x = matrix(shape)
    got = ortho.newton_schulz(x, coefficients, norm_factor=factor)
    if factor == 1.0:
      np.testing.assert_allclose(got, oracle(np.float64(x), coefficients), atol=1e-5)
    s = np.linalg.svd(got, compute_uv=False)
    assert low < s.min() and s.max() < high
    # With the same singular vectors the product with the polar factor is symmetric.
    small = got @ ortho.polar(x).T if shape[0] < shape[1] else got.T @ ortho.polar(x)
    np.testing.assert_allclose(small, small.T, atol=1e-5)


def test_polar_express_by_name_is_the_table_with_its_margin():
  x = matrix((4, 9))
  want = ortho.newton_schulz(x, ortho.POLAR_EXPRESS, norm_factor=1.02)
  np.testing.assert_allclose(ortho.polar_express(x), want, atol=1e-4)


def test_it_commutes_with_transposition_and_ignores_scale():
  x = matrix((4, 9))
  np.testing.assert_allclose(
    ortho.newton_schulz(x.T), ortho.newton_schulz(x).T, atol=1e-6
  )
  np.testing.assert_allclose(
    ortho.newton_schulz(1e6 * x), ortho.newton_schulz(x), atol=1e-5
  )


def test_zero_stays_zero():
  zero = jnp.zeros((3, 5))
  assert not ortho.newton_schulz(zero).any() and not ortho.polar(zero).any()


def test_bfloat16_is_good_to_a_digit():
  x = matrix((4, 9))
  half = ortho.newton_schulz(x, dtype=jnp.bfloat16)
  assert half.dtype == jnp.float32
  # The polynomials are steep: where they overshoot, 1 % of rounding becomes 5 %.
  np.testing.assert_allclose(half, ortho.newton_schulz(x), atol=0.1)
  s = np.linalg.svd(half, compute_uv=False)
  assert s.min() > 0.6 and s.max() < 1.3
  with pytest.raises(TypeError, match='`dtype` must be a floating-point'):
    ortho.newton_schulz(x, dtype=jnp.int8)


def test_polar_is_the_nearest_orthogonal_matrix():
  x = matrix((4, 9), decay=0.9)
  got = ortho.polar(x)
  np.testing.assert_allclose(got @ got.T, np.eye(4), atol=1e-5)
  # <x, polar(x)> is the sum of singular values, more than any other orthogonal one's.
  s = np.linalg.svd(x, compute_uv=False)
  np.testing.assert_allclose(jnp.sum(x * got), s.sum(), rtol=1e-5)


def test_factors_of_the_fans():
  factors = {n: f(16, 64) for n, f in ortho.FAN_SCALES.items()}
  assert factors == dict(none=1.0, kj=2.0, kimi=0.2 * 8, dion=2.0)
  factors = {n: f(64, 16) for n, f in ortho.FAN_SCALES.items()}
  assert factors == dict(none=1.0, kj=1.0, kimi=0.2 * 8, dion=math.sqrt(0.25))
