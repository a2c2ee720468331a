"""Fixed supports: what is drawn, and what is put there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.parameterizations import sparse

SHAPE, KEY = (8, 12), jax.random.key(0)


def places(index, shards):
  """The rows and columns that a support means, block after block, by plain arithmetic."""
  (p, q), (m, n) = shards, (SHAPE[0] // shards[0], SHAPE[1] // shards[1])
  blocks = np.asarray(index).reshape(p * q, -1)
  return [
    (b // q * m + f // n, b % q * n + f % n) for b in range(p * q) for f in blocks[b]
  ]


@pytest.mark.parametrize('shards', [(1, 1), (2, 3), (4, 1)])
def test_a_support_is_sorted_unique_and_as_large_as_told_in_each_block(shards):
  index = sparse.uniform(KEY, SHAPE, 0.3, shards)
  blocks = np.asarray(index).reshape(np.prod(shards), -1)
  block = np.prod(SHAPE) // np.prod(shards)
  assert blocks.shape[1] == int(0.3 * block)
  assert (np.diff(blocks) > 0).all()
  assert blocks.min() >= 0 and blocks.max() < block
  assert index.dtype == jnp.int32
  assert len({*places(index, shards)}) == index.size


def test_every_place_is_equally_likely():
  draw = lambda key: sparse.uniform(key, SHAPE, 0.25)
  index = jax.vmap(draw)(jax.random.split(KEY, 4000))
  counts = np.bincount(np.asarray(index).reshape(-1), minlength=96)
  deviation = np.sqrt(4000 * 0.25 * 0.75)
  assert np.abs(counts - 1000).max() < 4.5 * deviation
  # Neighbours are drawn no more often together than other pairs.
  drawn = np.zeros((4000, 96))
  np.put_along_axis(drawn, np.asarray(index), 1, axis=1)
  together = (drawn[:, :-1] * drawn[:, 1:]).mean()
  np.testing.assert_allclose(together, 24 * 23 / (96 * 95), atol=0.005)


@pytest.mark.parametrize('shards', [(1, 1), (2, 3), (4, 1)])
def test_scatter_and_gather_mean_the_same_places(shards):
  rng = np.random.default_rng(1)
  W = rng.standard_normal(SHAPE).astype(np.float32)
  index = sparse.uniform(KEY, SHAPE, 0.3, shards)
  values = rng.standard_normal(index.shape).astype(np.float32)
  want = W.copy()
  for (i, j), v in zip(places(index, shards), values):
    want[i, j] += v
  got = sparse.scatter(jnp.asarray(W), jnp.asarray(values), index, shards)
  np.testing.assert_array_equal(got, want)
  taken = sparse.gather(jnp.asarray(W), index, shards)
  np.testing.assert_array_equal(taken, [W[p] for p in places(index, shards)])


def test_the_largest_are_taken_and_the_first_at_a_tie():
  scores = np.array([[1.0, 9.0, 1.0], [7.0, 1.0, 8.0]], np.float32)
  assert sparse.largest(jnp.asarray(scores), 0.5).tolist() == [1, 3, 5]
  assert sparse.largest(jnp.ones((2, 3)), 0.5).tolist() == [0, 1, 2]


def test_bad_supports_are_refused():
  for shards in ((3, 1), (1, 5)):
    with pytest.raises(ValueError, match=r'shards \(\d, \d\) .* shape \(8, 12\)'):
      sparse.uniform(KEY, SHAPE, 0.5, shards)
  with pytest.raises(ValueError, match=r'1/96 .* got 0\.01'):
    sparse.uniform(KEY, SHAPE, 0.01)
  with pytest.raises(ValueError, match='int32'):
    sparse.block_size(0.1, (2**16, 2**15), (1, 1))
  assert sparse.block_size(0.1, (2**16, 2**15), (1, 2)) == int(0.1 * 2**30)
  for share, error in ((0, ValueError), (1.5, ValueError), ('1', TypeError)):
    with pytest.raises(error, match='density'):
      sparse.check_fraction('density', share)
