"""Every parameterization passes the shared battery."""

import pytest

import lrjax
from lrjax.testing.parameterizations import CHECKS, Case

CASES = {
  'dense': Case(lrjax.dense(), lrjax.dense()),
  'factorized': Case(lrjax.factorized(4, restart_every=3), lrjax.factorized(12)),
  'dsformer': Case(
    lrjax.dsformer(4, 2, 6, rounds=2), lrjax.dsformer(4, 4, 4, rounds=2), False
  ),
  'dsformer_factor': Case(
    lrjax.dsformer(4, 2, 6, 'factor', 'in', rounds=2),
    lrjax.dsformer(4, 4, 4, 'factor', rounds=2),
  ),
  'monarch': Case(lrjax.monarch(4), lrjax.monarch(1)),
  'monarch_uneven': Case(lrjax.monarch(5, 3), lrjax.monarch(1)),
}


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_battery(case, check):
  check(case)
