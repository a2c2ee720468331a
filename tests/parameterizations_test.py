"""Every parameterization passes the shared battery."""

import pytest

import lrjax
from lrjax.testing.parameterizations import CHECKS, Case

CASES = {
  'dense': Case(lrjax.dense(), lrjax.dense()),
  'cola': Case(lrjax.cola(4)),
  'cola_linear': Case(lrjax.cola(4, act=None), lrjax.cola(12, act=None)),
  'factorized': Case(lrjax.factorized(4, restart_every=3), lrjax.factorized(12)),
}


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_battery(case, check):
  check(case)
