"""Every parameterization passes the shared battery."""

import pytest

import lrjax
from lrjax.testing.parameterizations import CHECKS, Case

CASES = {
  'dense': Case(lrjax.dense(), lrjax.dense()),
  'factorized': Case(lrjax.factorized(4, restart_every=3), lrjax.factorized(12)),
  'snnk': Case(lrjax.snnk(16)),
  'snnk_bundled': Case(lrjax.snnk((16, 8), 'sin', normalize=1.0)),
}


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_battery(case, check):
  check(case)
