"""Online subspace descent against recorded trajectories of its official code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity.inputs import NAMES, inputs, read

import lrjax


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_official_code(name):
  meta, recorded = read('online_subspace_descent')
  start, gradients = inputs(name)
  # P's rate follows that of the weights, divided by its first; P moves from step 1 on.
  rate = lambda count: meta['fall'] ** (count + 1) / meta['update_proj_gap']
  tx = lrjax.scale_by_online_subspace_descent(
    meta['rank'],
    scale=meta['scale'],
    base_optimizer=lrjax.adam(eps=1e-6, bias_correction='step'),
    basis_optimizer=optax.adamw(rate, weight_decay=0.01),
  )
  update = jax.jit(tx.update)
  w, state = jnp.asarray(start), tx.init({'kernel': start})
  expected = dict(zip(meta['kept'], recorded[f'{name}/params']))
  for t, g in enumerate(gradients):
    u, state = update({'kernel': g}, state)
    w = w - meta['lr'] * meta['fall'] ** t * u['kernel']
    if t in expected:
      np.testing.assert_allclose(w, expected[t], atol=1e-6, rtol=0)
  basis = state.slots['kernel'].state.loop.basis
  np.testing.assert_allclose(basis, recorded[f'{name}/basis'], atol=1e-4, rtol=0)
