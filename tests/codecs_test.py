"""What is lost when an array is stored in fewer bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lrjax
from lrjax.codecs.affine import pack, stochastic, unpack
from lrjax.codecs.dynamic import bisector, dynamic_map

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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, (3, 5), elements=FLOATS), st.sampled_from([4, 8]))
def test_affine_errs_by_half_a_step_of_its_group(x, bits):
  codec = lrjax.affine(bits, group=8)
  stored = codec.encode(x)
  assert stored['scale'].shape == stored['zero'].shape == (2,)
  assert ((stored['zero'] >= 0) & (stored['zero'] < 2**bits)).all()
  back = np.asarray(codec.decode(stored))
  scale = np.asarray(stored['scale'])[np.arange(15) // 8].reshape(3, 5)
  # A little more than half a step, for the rounding of float32 itself.
  assert (np.abs(back - x) <= scale * 0.501).all()
  assert (back[x == 0] == 0).all()


def test_affine_is_idempotent():
  x = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
  for bits in (4, 8):
    codec = lrjax.affine(bits, group=32)
    stored = codec.encode(x)
    again = codec.encode(codec.decode(stored))
    for name in stored.keys() - {'scale'}:
      np.testing.assert_array_equal(again[name], stored[name])
    np.testing.assert_allclose(again['scale'], stored['scale'], rtol=1e-6)


@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_affine_holds_a_group_on_one_side_of_zero(sign):
  # The clamped zero point of the official code makes a constant 1 of such a group.
  x = sign * jnp.linspace(5.0, 6.0, 16)
  codec = lrjax.affine(8, group=16)
  np.testing.assert_allclose(codec.decode(codec.encode(x)), x, atol=6 / 255)


def test_affine_refuses_other_bits():
  for bad in (2, 16, 4.5, None):
    with pytest.raises(ValueError, match='`bits` must be 4 or 8'):
      lrjax.affine(bad)


@pytest.mark.parametrize('columns', [1, 2, 5, 8])
def test_packing_is_a_bijection(columns):
  rng = np.random.default_rng(columns)
  codes = jnp.asarray(rng.integers(0, 16, (3, columns)), jnp.uint8)
  packed = pack(codes)
  assert sum(x.nbytes for x in packed.values()) == 3 * -(-columns // 2)
  assert all(x.size for x in packed.values())
  np.testing.assert_array_equal(unpack(packed), codes)


def test_stochastic_rounding_has_the_mean_of_x():
  x = np.array([0.0, 0.1, 0.5, -0.75, 3.0, 200.3], np.float32)
  keys = jax.random.split(jax.random.key(0), 10_000)
  drawn = np.asarray(jax.vmap(lambda k: stochastic(k)(jnp.asarray(x)))(keys))
  assert ((drawn == np.floor(x)) | (drawn == np.ceil(x))).all()
  fraction = x - np.floor(x)
  four_sigma = 4 * np.sqrt(fraction * (1 - fraction) / len(keys))
  assert (np.abs(drawn.mean(axis=0, dtype=np.float64) - x) <= four_sigma).all()
  np.testing.assert_array_equal(stochastic(keys[0])(jnp.asarray(x)), drawn[0])


@pytest.mark.parametrize('signed', [True, False])
def test_dynamic8_takes_the_nearest_code_of_its_block(signed):
  x = np.random.default_rng(1).standard_normal((4, 25)).astype(np.float32)
  x = x if signed else np.square(x)
  codec = lrjax.dynamic8(signed, block=32)
  stored = codec.encode(x)
  assert stored.codes.shape == x.shape
  assert stored.scale.shape == (4,)
  blocks = np.pad(x.T.ravel(), (0, 28)).reshape(4, 32)
  np.testing.assert_array_equal(stored.scale, np.abs(blocks).max(1))
  table = dynamic_map(signed)
  unit = blocks / np.abs(blocks).max(1, keepdims=True)
  want = np.abs(unit[..., None] - table).argmin(-1)
  if not signed:
    want = np.where(blocks > 0, np.maximum(want, 1), want)
  want = want.ravel()[:100].reshape(25, 4).T
  np.testing.assert_array_equal(stored.codes, want)
  at = np.repeat(np.asarray(stored.scale), 32)[:100].reshape(25, 4).T
  np.testing.assert_allclose(codec.decode(stored), table[want] * at, rtol=1e-6)


@pytest.mark.parametrize('signed', [True, False])
def test_codes_change_exactly_at_the_thresholds(signed):
  values = dynamic_map(signed)
  thresholds = (values[:-1] + values[1:]) / 2
  near = [np.nextafter(thresholds, np.float32(to)) for to in (-2, 2)]
  x = np.concatenate([thresholds, *near, values, [1e-8, 1e-30, 0.0]])
  x = x.astype(np.float32) if signed else np.abs(x).astype(np.float32)
  want = np.searchsorted(thresholds, x)
  np.testing.assert_array_equal(jax.jit(bisector(thresholds))(x), want)


def test_dynamic8_of_zeros_is_zero():
  for signed in (True, False):
    codec = lrjax.dynamic8(signed)
    assert not codec.decode(codec.encode(jnp.zeros((3, 4)))).any()


@pytest.mark.parametrize(
  'codec',
  [lrjax.affine(4), lrjax.affine(8), lrjax.dynamic8(), lrjax.dynamic8(signed=False)],
)
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_a_block_with_what_is_not_finite_is_not_finite(codec, bad):
  stored = codec.encode(jnp.ones((4, 2)).at[1, 0].set(bad))
  assert not all(jnp.isfinite(x).all() for x in jax.tree.leaves(stored))
  assert not jnp.isfinite(codec.decode(stored)[1, 0])
