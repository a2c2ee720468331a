"""What is lost when an array is stored in fewer bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lrjax

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, (5, 3), elements=FLOATS))
def test_int8_errs_by_half_a_code_of_its_column(x):
  codec = lrjax.int8()
  stored = codec.encode(x)
  assert stored['codes'].dtype == jnp.int8
  assert stored['scale'].shape == (1, 3)
  scale = np.abs(x).max(axis=0)
  # A little more than half a code, for the rounding of float32 itself.
  assert (np.abs(codec.decode(stored) - x) <= scale / 254 * 1.001).all()
  again = codec.encode(codec.decode(stored))
  np.testing.assert_array_equal(again['codes'], stored['codes'])


def test_int8_along_another_axis():
  x = jnp.array([[1.0, 0.25], [1e-3, 5e-4]])
  np.testing.assert_allclose(
    lrjax.int8(axis=1).decode(lrjax.int8(axis=1).encode(x)), x, rtol=1e-2
  )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, (5, 3), elements=FLOATS))
def test_bf16_errs_by_half_of_its_last_bit(x):
  codec = lrjax.cast(jnp.bfloat16)
  back = codec.decode(codec.encode(x))
  assert back.dtype == jnp.float32
  assert (np.abs(back - x) <= 2.0**-8 * np.abs(x)).all()


@pytest.mark.parametrize('codec', [lrjax.int8(), lrjax.cast(jnp.bfloat16)])
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_what_is_not_finite_stays_visible(codec, bad):
  x = jnp.ones((4, 2)).at[1, 0].set(bad)
  back = codec.decode(codec.encode(x))
  assert not jnp.isfinite(back[1, 0])
  np.testing.assert_array_equal(back[:, 1], 1.0)


def test_cast_takes_floating_point_only():
  for bad in (jnp.int8, jnp.complex64, bool):
    with pytest.raises(TypeError, match='floating-point dtype'):
      lrjax.cast(bad)
