"""SubTrack++ against a recorded trajectory of its official code."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.inputs import inputs, read

import lrjax


def test_equals_the_official_code():
  meta, recorded = read('subtrack')
  start, gradients = inputs(meta['name'])
  tx = lrjax.scale_by_subtrack(
    meta['rank'],
    meta['subspace_update_interval'],
    meta['scale'],
    step_size=meta['st_init_step_size'],
    basis='svd',
    moments_on_refresh='keep',
  )
  update = jax.jit(tx.update)
  w, state = jnp.asarray(start), tx.init({'kernel': start})
  expected = dict(zip(meta['kept'], recorded['params']))
  for t, g in enumerate(gradients):
    u, state = update({'kernel': g}, state)
    w = (w - meta['lr'] * u['kernel']) * (1 - meta['lr'] * meta['weight_decay'])
    if t in expected:
      np.testing.assert_allclose(w, expected[t], atol=1e-6, rtol=0)
  basis = state.slots['kernel'].state.basis
  np.testing.assert_allclose(basis.basis, recorded['basis'], atol=1e-5)
