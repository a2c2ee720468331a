"""Online subspace descent against recorded trajectories of its official code."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity.inputs import NAMES, read
from replay import replay

import lrjax


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_official_code(name):
  meta, recorded = read('online_subspace_descent')
  # P's rate follows that of the weights, divided by its first; P moves from step 1 on.
  rate = lambda count: meta['fall'] ** (count + 1) / meta['update_proj_gap']
  tx = lrjax.scale_by_online_subspace_descent(
    meta['rank'],
    scale=meta['scale'],
    base_optimizer=lrjax.adam(eps=1e-6, bias_correction='step'),
    basis_optimizer=optax.adamw(rate, weight_decay=0.01),
  )
  falling = optax.scale_by_learning_rate(lambda t: meta['lr'] * meta['fall'] ** t)
  tx = optax.chain(tx, falling)
  error, (state, _) = replay(tx, 'online_subspace_descent', names=[name], move=jnp.add)
  assert error <= 1e-6
  basis = state.slots[name].state.loop.basis
  np.testing.assert_allclose(basis, recorded[f'{name}/basis'], atol=1e-4, rtol=0)
