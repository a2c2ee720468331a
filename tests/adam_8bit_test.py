"""The 8-bit kernels of Adam: the codes of lrjax.dynamic8, whichever way blocks lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.codecs.dynamic import dynamic_map
from lrjax.eight_bit import eight_bit
from lrjax.kernels import adam_8bit, codes
from lrjax.moments import adam


@pytest.mark.parametrize('signed', [True, False], ids=['signed', 'unsigned'])
def test_nearest_is_exact_at_and_beside_every_threshold(signed):
  values, thresholds = codes.table().reshape(2, 2, 256)[0 if signed else 1]
  decades = np.float32(10.0) ** np.arange(-9, 1, dtype=np.float32)
  rng = np.random.default_rng(0)
  x = np.concatenate([thresholds[:-1], values, decades, [0, -0.0]])
  x = np.concatenate([x, 10 ** rng.uniform(-9, 0, 20_000), rng.uniform(size=20_000)])
  x = x.astype(np.float32)
  x = np.concatenate(
    [x, np.nextafter(x, np.float32(2)), np.nextafter(x, np.float32(-2))]
  )
  x = np.clip(np.concatenate([x, -x]) if signed else np.abs(x), -1, 1)
  lookup = lambda row: lambda i: jnp.asarray(codes.table())[row, i]
  found = jax.jit(lambda x: codes.nearest(x, codes.maps(lookup)[not signed]))(x)
  np.testing.assert_array_equal(found, np.searchsorted(thresholds[:-1], x))
  np.testing.assert_array_equal(values, dynamic_map(signed))


@pytest.mark.parametrize(
  'r, k, block',
  # Whole columns to a block, the last one short; blocks in parts of a column.
  [(8, 70, 256), (32, 70, 8)],
  ids=['columns', 'parts'],
)
def test_the_codes_are_those_of_eight_bit(r, k, block):
  tx = eight_bit(adam(), block=block, min_size=0)
  g = np.random.default_rng(0).standard_normal((3, r, k)).astype(np.float32)
  g *= np.logspace(-4, 3, k, dtype=np.float32)
  g[:, 0] *= 1e-5  # second moments below the map, but not zero
  g[:, :, 1] = 0
  start = jax.jit(tx.init)(g[0])

  def run(update):
    state, out = start, []
    update = jax.jit(update)
    for x in g:
      u, state = update(x, state)
      out.append(u)
    return np.stack(out), state

  want, last = run(tx.update)
  for implementation in ('interpret', 'gpu_interpret'):
    found, state = run(functools.partial(adam_8bit, implementation=implementation))
    assert state.count == last.count == 3
    # Updates are of about one, where float32 has steps of 6e-8.
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)
    for x, y in ((state.mu, last.mu), (state.nu, last.nu)):
      np.testing.assert_array_equal(x.codes, y.codes)
      np.testing.assert_allclose(x.scale, y.scale, rtol=1e-6)


def test_bad_moments_and_options():
  g = jnp.ones((2, 3))
  state = eight_bit(adam(), min_size=0).init(g)
  with pytest.raises(ValueError, match=r'`mu` must be a Dynamic8 of codes \(2, 3\)'):
    adam_8bit(g, adam().init(g))
  with pytest.raises(ValueError, match=r'`mu`.*\(3, 2\).*got'):
    adam_8bit(g.T, state)
  with pytest.raises(ValueError, match="unknown `bias_correction` 'late'"):
    adam_8bit(g, state, bias_correction='late')


def test_options_and_the_late_correction_of_the_bias():
  options = dict(b1=0.8, b2=0.95, eps=1e-3, bias_correction='step')
  tx = adam(**options)
  g = jax.random.normal(jax.random.key(1), (16, 128))
  state = jax.jit(eight_bit(tx, min_size=0).init)(g)
  run = functools.partial(adam_8bit, implementation='interpret', **options)
  u, _ = jax.jit(run)(g, state)
  want, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(g)
  np.testing.assert_allclose(u, want, rtol=1e-5)
