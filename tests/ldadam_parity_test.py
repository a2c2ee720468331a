"""LDAdam against recorded trajectories of its official code."""

import pytest
from parity.inputs import read
from replay import replay

import lrjax


@pytest.mark.parametrize('feedback', [True, False], ids=['feedback', 'plain'])
def test_equals_the_official_code(feedback):
  meta, _ = read('ldadam')
  args = {k: meta[k] for k in ('rank', 'rho', 'b1', 'b2', 'eps')}
  tx = lrjax.scale_by_ldadam(**args, error_feedback=feedback)
  kind = 'feedback' if feedback else 'plain'
  error = replay(
    tx, 'ldadam', steps=12, decay_first=True, key=lambda name: f'{kind}/{name}'
  )
  # Updates of size 1 pass through a QR at each step, which feeds rounding to the next.
  assert max(error.values()) < 1.3e-6, error
