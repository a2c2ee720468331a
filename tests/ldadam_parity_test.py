"""LDAdam against recorded trajectories of its official code."""

import pytest
from parity.inputs import read
from replay import decayed_before, replay

import lrjax


@pytest.mark.parametrize('feedback', [True, False], ids=['feedback', 'plain'])
def test_equals_the_official_code(feedback):
  meta, _ = read('ldadam')
  args = {k: meta[k] for k in ('rank', 'rho', 'b1', 'b2', 'eps')}
  tx = lrjax.scale_by_ldadam(**args, error_feedback=feedback)
  kind = 'feedback' if feedback else 'plain'
  key = lambda name: f'{kind}/{name}/params'
  error, _ = replay(tx, 'ldadam', key=key, move=decayed_before(meta))
  # Updates of size 1 pass through a QR at each step, which feeds rounding to the next.
  assert error < 1.3e-6
