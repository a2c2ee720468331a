"""Every kernel against its oracle, interpreted; lowered for TPU and CUDA.

A new operation adds its row to the `CASES` of a file of them. No TPU or GPU is needed:
what these tests cannot see is whether the machine code of a kernel is right, and how fast
it is.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from tests import pallas_cases, pallas_residual_cases
from tests.pallas_cases import D, K, R

CASES = [*pallas_cases.CASES, *pallas_residual_cases.CASES]

CALLS = {'tpu': 'tpu_custom_call', 'cuda': '__gpu$xla.gpu.triton'}
# Triton's lowering asks which GPU it is for.
H100 = AbstractMesh(
  (1,),
  ('x',),
  axis_types=(AxisType.Auto,),
  abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu'),
)
INTERPRETED = ['interpret', 'gpu_interpret']

each_case = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
each_side = pytest.mark.parametrize('side', ['in', 'out'])


def inputs(case, side, dtype=jnp.float32, sizes=(D, K, R)):
  rng = np.random.default_rng(zlib.crc32(case.name.encode()))
  arrays = jax.tree.map(jnp.asarray, case.make(rng, *sizes, side))
  return tuple(x.astype(dtype) if i in case.leaves else x for i, x in enumerate(arrays))


def expected(case, arrays, side):
  floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  wide = lambda x: np.asarray(x, np.float64) if floating(x) else np.asarray(x)
  return case.oracle(*jax.tree.map(wide, arrays), side=side)


def bound(case, side, implementation):
  return functools.partial(case.run, side=side, implementation=implementation)


def check(found, want):
  """Equal to a few roundings of what each result is stored in."""
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    tolerance = 1e-5 if x.dtype == jnp.float32 else float(jnp.finfo(x.dtype).eps)
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize('implementation', ['xla', *INTERPRETED])
@pytest.mark.parametrize(
  'side, dtype',
  [('in', jnp.float32), ('out', jnp.bfloat16)],
  ids=['in-f32', 'out-bf16'],
)
@each_case
def test_equal_to_the_oracle(case, side, dtype, implementation):
  arrays = inputs(case, side, dtype)
  found = jax.jit(bound(case, side, implementation))(*arrays)
  check(found, expected(case, arrays, side))


@pytest.mark.parametrize('implementation', INTERPRETED)
@each_case
def test_a_stack_under_vmap(case, implementation):
  one, two = (inputs(case._replace(name=name), 'out') for name in 'ab')
  stacked = jax.tree.map(lambda *x: jnp.stack(x), one, two)
  found = jax.jit(jax.vmap(bound(case, 'out', implementation)))(*stacked)
  wanted = [expected(case, arrays, 'out') for arrays in (one, two)]
  check(found, jax.tree.map(lambda *x: np.stack(x), *wanted))


@each_side
@each_case
def test_lowered_for_each_platform_to_its_kernel(case, side):
  arrays = inputs(case, side, jnp.bfloat16)
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
  with use_abstract_mesh(H100):
    for run, given in (
      (bound(case, side, None), arrays),
      (jax.vmap(bound(case, side, None)), stacked),
    ):
      traced = jax.jit(run).trace(*given)
      for platform, call in CALLS.items():
        assert call in traced.lower(lowering_platforms=(platform,)).as_text()


@each_case
def test_sizes_no_tile_fits_are_left_to_xla(case):
  arrays = inputs(case, 'in', sizes=(12, 20, 3))
  run = bound(case, 'in', None)
  check(jax.jit(run)(*arrays), expected(case, arrays, 'in'))
  assert 'pallas_call' not in str(jax.make_jaxpr(run)(*arrays))
  for name in INTERPRETED:
    with pytest.raises(ValueError, match=f'{name}.*not supported.*supported here: xla'):
      bound(case, 'in', name)(*arrays)


@pytest.mark.parametrize('case', [c for c in CASES if c.leaves], ids=lambda c: c.name)
def test_float64_is_left_to_xla(case):
  with jax.enable_x64(True):
    arrays = inputs(case, 'in', jnp.float64)
    run = bound(case, 'in', None)
    assert 'pallas_call' not in str(jax.make_jaxpr(run)(*arrays))


@each_case
def test_names_of_implementations(case):
  arrays = inputs(case, 'in')
  with pytest.raises(
    ValueError, match=r"'triton'.*known: gpu, gpu_interpret, interpret"
  ):
    bound(case, 'in', 'triton')(*arrays)
  for name in ('tpu', 'gpu'):
    with pytest.raises(ValueError, match=rf"'{name}'.*cpu.*here: xla, gpu_interpret"):
      bound(case, 'in', name)(*arrays)
  if case.sided:
    with pytest.raises(ValueError, match="'in' or 'out', got 'left'"):
      bound(case, 'left', 'xla')(*arrays)
