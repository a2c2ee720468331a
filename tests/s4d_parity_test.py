"""S4D against recorded outputs of its official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity.inputs import read

import lrjax
from lrjax.modules.nnx import split
from lrjax.modules.s4d import S4D

_, RECORDED = read('s4d')
PARAMS = {k[4:]: jnp.asarray(v) for k, v in RECORDED.items() if k.startswith('ssm/')}


def test_kernel_equals_the_official_one():
  K = lrjax.s4d_kernel(PARAMS, len(RECORDED['kernel']))
  np.testing.assert_allclose(K, RECORDED['kernel'], atol=1e-6)


def test_block_equals_the_official_one():
  H, N = PARAMS['c_real'].shape
  graphdef, params, rest = split(S4D(H, state=2 * N, rngs=nnx.Rngs(0)))
  taken = {'ssm': PARAMS, 'glu': {'kernel': jnp.asarray(RECORDED['glu'])}}
  assert jax.tree.map(jnp.shape, taken) == jax.tree.map(jnp.shape, params)
  y = nnx.merge(graphdef, taken, rest)(jnp.asarray(RECORDED['u']))
  np.testing.assert_allclose(y, RECORDED['y'], atol=2e-6)


@pytest.mark.parametrize('init', ['lin', 'inv', 'legs', 'real'])
def test_start_is_the_official_one(init):
  """The official function keeps the other half of each pair, conjugate to ours."""
  p = lrjax.s4d_init(jax.random.key(0), 1, 8, init)
  A = -jnp.exp(p['log_a_real'][0]) - 1j * p['a_imag'][0]
  B = p['b_real'][0] - 1j * p['b_imag'][0]
  want_A, want_B = RECORDED[f'init/{init}']
  # The signs of eigenvectors are LAPACK's.
  want_B = np.where(want_B.imag > 0, -want_B, want_B)
  np.testing.assert_allclose(A, want_A, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(B, want_B, rtol=2e-6, atol=2e-6)
