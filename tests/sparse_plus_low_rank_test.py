"""SLTrain's product in kernels: value and gradient against a dense W in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.kernels import sparse_plus_low_rank_matmul
from lrjax.parameterizations import sparse

M, N, R = 256, 384, 8
# Tokens that no tile divides.
TOKENS = 200


def inputs(dtype=jnp.float32, shards=(2, 3), support=None):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  if support is None:
    support = sparse.uniform(jax.random.key(0), (M, N), 0.01, shards)
  return (
    normal(2, TOKENS // 2, M),
    normal(M, R) / 16,
    normal(R, N),
    normal(len(support)),
    support,
  )


def dense(x, a, b, values, index, scale, shards):
  """(y, gradients of sum(y c)) by W in float64."""
  wide = lambda x: np.asarray(x, np.float64)
  x, a, b, values = map(wide, (x, a, b, values))
  places = jnp.arange(1, len(index) + 1)
  at = np.asarray(sparse.scatter(jnp.zeros((M, N), int), places, index, shards))
  rows, columns = np.nonzero(at)
  order = at[rows, columns] - 1
  W = scale * a @ b
  W[rows, columns] += values[order]
  y = x @ W
  dy = cotangent(y)
  G = np.einsum('bti,bto->io', x, dy)
  dv = np.zeros(len(values))
  dv[order] = G[rows, columns]
  return y, (dy @ W.T, scale * G @ b.T, scale * a.T @ G, dv, (G * (a @ b)).sum())


def cotangent(y):
  return np.cos(np.arange(y.size)).reshape(y.shape)


def close(found, want, tolerance):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@functools.partial(jax.jit, static_argnums=(3, 4))
def value_and_gradients(floats, index, dy, shards, implementation):
  def run(x, a, b, values, scale):
    return sparse_plus_low_rank_matmul(
      x, a, b, values, index, scale=scale, shards=shards, implementation=implementation
    )

  y, pull = jax.vjp(run, *floats)
  return y, pull(dy.astype(y.dtype))


@pytest.mark.parametrize('implementation', ['xla', 'interpret'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['f32', 'bf16'])
def test_value_and_gradients(dtype, implementation):
  *floats, index = inputs(dtype)
  want = dense(*floats, index, 0.5, (2, 3))
  floats = (*floats, jnp.asarray(0.5, dtype))
  dy = jnp.asarray(cotangent(want[0]))
  found = value_and_gradients(floats, index, dy, (2, 3), implementation)
  # Sums of 200 to 384 products; in bfloat16 W is rounded before them, and dy b too.
  close(found, want, 2e-6 if dtype == jnp.float32 else 2e-2)


def test_blocks_with_their_entries_crowded():
  everything_first = jnp.tile(jnp.arange(163, dtype=jnp.int32), 6)
  *floats, index = inputs(support=everything_first)
  run = functools.partial(sparse_plus_low_rank_matmul, *floats, index, shards=(2, 3))
  found = jax.jit(lambda: run(implementation='interpret'))()
  close(found, dense(*floats, index, 1.0, (2, 3))[0], 1e-6)


def test_a_stack_of_layers():
  *one, index = inputs()
  two = [x[::-1] for x in one]
  options = dict(shards=(2, 3), implementation='interpret')
  run = lambda *floats: sparse_plus_low_rank_matmul(*floats, index, **options)
  found = jax.jit(jax.vmap(run))(*(jnp.stack(pair) for pair in zip(one, two)))
  want = [dense(*floats, index, 1.0, (2, 3))[0] for floats in (one, two)]
  close(found, np.stack(want), 1e-6)


def test_lowered_to_kernels_on_a_tpu_and_to_xla_elsewhere():
  *floats, index = inputs(jnp.bfloat16)
  floats = (*floats, jnp.bfloat16(0.5))
  dy = jnp.ones((2, TOKENS // 2, N), jnp.bfloat16)
  traced = value_and_gradients.trace(floats, index, dy, (2, 3), None)
  tpu, cuda = (
    traced.lower(lowering_platforms=(name,)).as_text() for name in ('tpu', 'cuda')
  )
  assert tpu.count('tpu_custom_call') == 3
  assert 'triton' not in cuda
  # Nothing of the size of W in memory, neither W nor its gradient.
  size = f'tensor<{M}x{N}x'
  assert size not in tpu and size in cuda


def test_blocks_that_are_no_tiles_are_left_to_xla():
  *floats, index = inputs(shards=(4, 3))
  run = functools.partial(sparse_plus_low_rank_matmul, *floats, index, shards=(4, 3))
  assert 'pallas_call' not in str(jax.make_jaxpr(run)())
  for name in ('interpret', 'gpu'):
    with pytest.raises(ValueError, match=f"'{name}'.*not supported.*here: xla(?!,)"):
      run(implementation=name)


def test_bad_shapes():
  x, a, b, values, index = inputs()
  with pytest.raises(ValueError, match='do not fit'):
    sparse_plus_low_rank_matmul(x, a.T, b, values, index)
  with pytest.raises(ValueError, match=r'shards \(3, 3\) must divide'):
    sparse_plus_low_rank_matmul(x, a, b, values, index, shards=(3, 3))
