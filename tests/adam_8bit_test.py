"""The 8-bit kernels of Adam: the codes of lrjax.dynamic8, whichever way blocks lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.codecs.dynamic import dynamic8, dynamic_map
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
  # Whole columns to a block, the last one short; a column; parts of one.
  [(8, 50, 256), (16, 70, 16), (32, 40, 8)],
  ids=['columns', 'column', 'parts'],
)
def test_the_codes_are_those_of_eight_bit(r, k, block):
  tx = eight_bit(adam(), block=block, min_size=0)
  g = jax.random.normal(jax.random.key(0), (3, r, k))
  g *= jnp.logspace(-4, 3, k)[None, None]
  g = g.at[:, :, 1].set(0)  # blocks of zeros

  @functools.partial(jax.jit, static_argnums=1)
  def run(g, implementation):
    state, out = tx.init(g[0]), []
    for x in g:
      if implementation is None:
        u, state = tx.update(x, state)
      else:
        u, state = adam_8bit(x, state, implementation=implementation)
      out.append(u)
    return jnp.stack(out), state

  want, last = run(g, None)
  for implementation in ('xla', 'interpret', 'gpu_interpret'):
    found, state = run(g, implementation)
    assert state.count == last.count == 3
    np.testing.assert_allclose(found, want, rtol=1e-6)
    for x, y in ((state.mu, last.mu), (state.nu, last.nu)):
      np.testing.assert_array_equal(x.codes, y.codes)
      np.testing.assert_allclose(x.scale, y.scale, rtol=1e-6)


@pytest.mark.parametrize('kind', ['step', 'none'])
def test_corrections_of_the_bias(kind):
  tx = adam(0.8, 0.95, 1e-3, bias_correction=kind)
  g = jax.random.normal(jax.random.key(1), (16, 128))
  state = eight_bit(tx, min_size=0).init(g)
  options = dict(b1=0.8, b2=0.95, eps=1e-3, bias_correction=kind)
  u, _ = adam_8bit(g, state, implementation='interpret', **options)
  want, _ = tx.update(g, tx.init(g))
  np.testing.assert_allclose(u, want, rtol=1e-5)


def test_second_moments_that_are_positive_stay_so():
  codec = dynamic8(False)
  nu = codec.encode(jnp.zeros((16, 128)))
  state = eight_bit(adam(), min_size=0).init(jnp.zeros((16, 128)))._replace(nu=nu)
  g = jnp.full((16, 128), 1e-6).at[0].set(1e3)
  _, new = adam_8bit(g, state, implementation='interpret')
  assert (codec.decode(new.nu) > 0).all()
