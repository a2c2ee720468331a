"""Fira against recorded trajectories of its official code."""

from parity.inputs import read
from replay import replay

import lrjax


def test_equals_the_official_code():
  meta, _ = read('fira')
  tx = lrjax.scale_by_fira(meta['rank'], meta['update_proj_gap'], meta['alpha'])
  error, _ = replay(tx, 'fira')
  # Weights are of size 0.5 and 25 steps of 0.01 are summed; float32's 6e-8 for each.
  assert error < 1.3e-6
