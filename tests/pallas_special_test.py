"""What is special about single kernels: memory, rounding, agreement with Adam."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

import lrjax
from lrjax import kernels
from lrjax.kernels import rounding, tiles
from tests.pallas_cases import basis, leaf, normal
from tests.pallas_test import CALLS, H100

# All sizes differ, so that a shape tells what an array is.
D, K, R = 384, 640, 24


def matrices(side, dtype=jnp.bfloat16):
  """Weights, P and a low-rank array."""
  rng = np.random.default_rng(0)
  w = jnp.asarray(leaf(rng, D, K, side), dtype)
  return w, jnp.asarray(basis(rng, D, R)), jnp.asarray(normal(rng, R, K))


def step(w, mu, nu, p, g, rate, key, side, implementation=None):
  """W <- W - rate P adam(P^T G)."""
  how = dict(side=side, implementation=implementation)
  n, mu, nu = kernels.low_rank_adam(p, g, mu, nu, jnp.int32(3), **how)
  return kernels.lift_and_apply(w, p, n, rate=rate, key=key, **how), mu, nu


@pytest.mark.parametrize('side', ['in', 'out'])
@pytest.mark.parametrize('platform', CALLS)
def test_a_step_writes_the_weights_once_and_in_place(platform, side):
  w, p, low = matrices(side)
  args = (w, low, low, p, w, jnp.float32(0.1), jax.random.key(0))
  size = 'x'.join(map(str, w.shape))

  def lowered(implementation):
    run = functools.partial(step, side=side, implementation=implementation)
    traced = jax.jit(run, donate_argnums=(0, 1, 2)).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  # One line is one operation, which ends with the type of what it writes.
  writes = lambda text: re.findall(rf'%\S+ = (.*)tensor<{size}x\w+>$', text, re.M)
  with use_abstract_mesh(H100):
    text = lowered(None)
    (kernel,) = writes(text)
    assert CALLS[platform] in kernel
    assert len(writes(lowered('xla'))) > 1
  assert text.count('output_operand_alias<') == 3  # of W, M and V
  assert text.count('tf.aliasing_output') == 3


@pytest.mark.parametrize('correction', ['moments', 'step', 'none'])
def test_low_rank_adam_is_adam_of_the_projected_gradient(correction):
  # So few bits make sums exact in any order: P^T G near 0 would magnify the difference.
  g, p, _ = (jnp.round(8 * x) for x in matrices('in', jnp.float32))
  tx = lrjax.adam(0.8, 0.99, 1e-6, bias_correction=correction, mu_dtype=jnp.bfloat16)

  def both(state, g, b1):
    want, new = tx.update(p.T @ g, state)
    found = kernels.low_rank_adam(
      *(p, g, state.mu, state.nu, state.count),
      **dict(b1=b1, b2=0.99, eps=1e-6, bias_correction=correction),
    )
    return (want, new.mu, new.nu), found, new

  run, state = jax.jit(both), tx.init(jnp.zeros((R, K)))
  for i in range(3):
    want, found, state = run(state, (i + 1) * g, jnp.float32(0.8))
    for x, y in zip(found, want, strict=True):
      assert x.dtype == y.dtype
      # M in bfloat16 may be rounded the other way.
      rtol = 2**-8 if x.dtype == jnp.bfloat16 else 1e-5
      x, y = (np.asarray(a, np.float32) for a in (x, y))
      np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def test_blocks_of_any_size_are_rounded_by_the_same_bits():
  w, p, n = matrices('in')
  run = functools.partial(
    kernels.lift_and_apply,
    rate=2.0**-6,
    key=jax.random.key(1),
    implementation='interpret',
  )
  # With so few bits all sums are exact, in any order.
  args = w, jnp.round(8 * p), jnp.round(n)
  found = []
  for size in (128, 256):
    with tiles.only({'d': size, 'k': size}):
      found.append(np.asarray(run(*args), np.float32))
  np.testing.assert_array_equal(*found)
  nearest = run(*args, **dict(key=None, implementation='xla'))
  assert (found[0] != np.asarray(nearest, np.float32)).any()


def test_stochastic_rounding_is_right_on_average():
  n = 2**16
  at = rounding.positions(jnp.zeros((n, 1), jnp.int32), jnp.arange(n)[:, None], n)
  bits = rounding.random_bits(at, rounding.words(jax.random.key(5)))
  rounded = jax.jit(rounding.stochastic_bf16)
  for fraction in (0.0, 0.1, 0.9):
    x = np.full((n, 1), -(1 + 2.0**-7 * fraction), np.float32)
    up = np.mean(np.asarray(rounded(x, bits), np.float32) != -1)
    # Five standard deviations of a mean of n draws, and none where nothing is left over.
    assert abs(up - fraction) <= 5 * np.sqrt(fraction * (1 - fraction) / n) + 2**-16


def test_random_bits_are_balanced_and_differ_between_keys_and_neighbours():
  at = jnp.arange(4096, dtype=jnp.uint32)
  one, two = (
    rounding.random_bits(at, rounding.words(jax.random.key(i))) for i in (0, 1)
  )
  ones = lambda x: np.unpackbits(np.asarray(x).view(np.uint8)).mean()
  for x in (one, two, one ^ two, one[1:] ^ one[:-1]):
    # 131072 bits: half of them, to seven standard deviations.
    assert abs(ones(x) - 0.5) < 0.01


def test_what_is_not_finite_stays_so():
  x = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
  found = rounding.stochastic_bf16(x, jnp.full(3, 2**32 - 1, jnp.uint32))
  np.testing.assert_array_equal(np.asarray(found, np.float32), x)


def test_arrays_that_do_not_fit():
  w, p, n = matrices('in')
  apply = functools.partial(kernels.lift_and_apply, rate=0.1)
  with pytest.raises(ValueError, match=r'(384, 24).*(640, 384).*has 640 rows'):
    apply(w.T, p, n)
  with pytest.raises(ValueError, match=r'N must be .*24, 640.*got \(640, 24\)'):
    apply(w, p, n.T)
  with pytest.raises(ValueError, match='weights in bfloat16, these are in float32'):
    apply(w.astype(jnp.float32), p, n, key=jax.random.key(0))
  with pytest.raises(ValueError, match=r'use jax\.vmap'):
    apply(w[None], p[None], n[None])
  with pytest.raises(ValueError, match='moments must be'):
    kernels.low_rank_adam(p, w, n, n.T, jnp.int32(0))
  with pytest.raises(ValueError, match=r"'moment'.*did you mean 'moments'"):
    kernels.low_rank_adam(p, w, n, n, jnp.int32(0), bias_correction='moment')


def test_bases_stored_otherwise():
  w, p, _ = matrices('in')
  with pytest.raises(ValueError, match=r'group=256.*as they were'):
    kernels.project(jax.eval_shape(lrjax.affine(4, 128).encode, p), w, bits=4)
  with pytest.raises(ValueError, match='4 or 8, got 3'):
    kernels.project(jax.eval_shape(lrjax.affine(4).encode, p), w, bits=3)
  with pytest.raises(TypeError, match=r'lrjax\.affine stores'):
    kernels.project(dict(codes=p, level=p), w)
  # Of an odd rank, the last 4-bit column is kept apart: no kernel reads it.
  codec = lrjax.affine(4)
  odd = jax.jit(codec.encode)(p[:, :23])
  with pytest.raises(ValueError, match=r'supported here: xla$'):
    kernels.project(odd, w, bits=4, implementation='interpret')
  want = np.asarray(jax.jit(codec.decode)(odd)).T @ np.asarray(w, np.float32)
  found = jax.jit(functools.partial(kernels.project, bits=4))(odd, w)
  np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
