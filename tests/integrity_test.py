"""The digest: one on every layout, another after any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import integrity

RNG = np.random.default_rng(0)


def leaves():
  """One leaf of every kind that a training state can hold."""
  x = RNG.standard_normal((8, 16)).astype(np.float32)
  return {
    'f32': x,
    'bf16': np.asarray(jnp.asarray(x, jnp.bfloat16)),
    'f8': np.asarray(jnp.asarray(x, jnp.float8_e4m3fn)),
    'i8': RNG.integers(-128, 127, (16, 8), np.int8),
    'u32': RNG.integers(0, 2**32, (8, 8), np.uint32),
    'bool': x > 0,
    'complex': (x + 1j * x[::-1]).astype(np.complex64),
    'scalar': np.float32(3),
  }


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_every_layout_has_the_digest_of_the_host_arrays(axis_type):
  tree = leaves()
  expected = integrity.digest(tree)
  for shape in ((8, 1), (2, 4)):
    mesh = jax.make_mesh(shape, ('a', 'b'), axis_types=(axis_type,) * 2)
    for spec in (P(), P('a', 'b'), P(('a', 'b')), P(None, 'b')):
      placed = {
        k: jax.device_put(x, NamedSharding(mesh, spec if x.ndim else P()))
        for k, x in tree.items()
      }
      assert integrity.digest(placed) == expected


def test_no_flip_and_no_swap_is_missed():
  x = RNG.integers(0, 2**32, 257, np.uint32)
  flipped = np.repeat(x[None], 500, 0)
  flipped[np.arange(500), RNG.integers(0, 257, 500)] ^= np.uint32(1) << RNG.integers(
    0, 32, 500, np.uint32
  )
  pairs = np.stack([RNG.permutation(257)[:2] for _ in range(300)])
  swapped = np.repeat(x[None], 300, 0)
  swapped[np.arange(300)[:, None], pairs] = x[pairs[:, ::-1]]
  of = jax.jit(jax.vmap(lambda x: jnp.stack(integrity._sums([x])[0])))
  found = np.asarray(of(np.concatenate([x[None], flipped, swapped])))
  assert not (found[1:] == found[0]).all(1).any()


def test_neither_dtype_nor_shape_nor_place_goes_unnoticed():
  zeros = {'a': np.zeros((2, 3), np.float32)}
  others = [
    {'a': np.zeros((3, 2), np.float32)},
    {'a': np.zeros((2, 3), np.int32)},
    {'a': -np.zeros((2, 3), np.float32)},
    {'b': np.zeros((2, 3), np.float32)},
  ]
  assert all(integrity.digest(zeros) != integrity.digest(x) for x in others)


def test_keys_count_as_their_data_and_64_bits_count_whole():
  a, b = jax.random.key(1), jax.random.key(2)
  assert integrity.digest(a) != integrity.digest(b)
  assert integrity.digest(a)[''][2] == 'key<fry>'
  for kind in (np.int64, np.float64, np.complex128):
    x = np.array([1, 2], kind)
    y = x.copy()
    y.view(np.uint8)[0] ^= 1  # the lowest bit, which 32 bits would not hold
    assert integrity.digest({'x': x}) != integrity.digest({'x': y})
    with jax.enable_x64(True):
      assert integrity.digest({'x': jnp.asarray(x)}) == integrity.digest({'x': x})
  assert integrity.digest(1) != integrity.digest(1 + 2**40)
  assert integrity.digest(1) != integrity.digest(True)


def test_a_tree_compiles_once():
  tree = {'a': jnp.ones((3, 5)), 'step': 1}
  integrity.digest(tree)
  before = integrity._sums._cache_size()
  integrity.digest({'a': jnp.zeros((3, 5)), 'step': 2})
  assert integrity._sums._cache_size() == before


def test_text_is_no_leaf():
  with pytest.raises(TypeError, match="leaf 'a/name' is a str"):
    integrity.digest({'a': {'name': 'x'}})


def test_a_sealed_record_notices_every_change():
  sealed = integrity.seal({'step': 7, 'lr': 0.1, 'shape': (1, 2)})
  assert integrity.unseal(sealed) == {'step': 7, 'lr': 0.1, 'shape': [1, 2]}
  for bad in (None, [], {}, {'record': {}}, sealed | {'record': {'step': 8}}):
    with pytest.raises(ValueError, match='record'):
      integrity.unseal(bad)


def test_differences_name_dotted_keys():
  old = {'config': {'lr': 0.1, 'model': {'rank': 8}}, 'data': {'files': 3}}
  new = {'config': {'lr': 0.2, 'model': {'rank': 4}}, 'data': {}}
  assert [*integrity.differences(old, old)] == []
  assert [*integrity.differences(old, new)] == [
    'config.lr: saved 0.1, now 0.2',
    'config.model.rank: saved 8, now 4',
    'data.files: saved 3, now absent',
  ]
  assert [*integrity.differences(old, new, ['config', 'data.files'])] == []
