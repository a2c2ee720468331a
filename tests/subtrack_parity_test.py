"""SubTrack++ against a recorded trajectory of its official code."""

import numpy as np
from parity.inputs import read
from replay import replay

import lrjax


def test_equals_the_official_code():
  meta, recorded = read('subtrack')
  name = meta['name']
  tx = lrjax.scale_by_subtrack(
    meta['rank'],
    meta['subspace_update_interval'],
    meta['scale'],
    step_size=meta['st_init_step_size'],
    basis='svd',
    moments_on_refresh='keep',
  )
  error, state = replay(tx, 'subtrack', names=[name], key=lambda name: 'params')
  assert error <= 1e-6
  basis = state.slots[name].state.basis
  np.testing.assert_allclose(basis.basis, recorded['basis'], atol=1e-5)
