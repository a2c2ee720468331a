"""Every parameterization passes the shared battery."""

import pytest

import lrjax
from lrjax.testing.parameterizations import CHECKS, Case

CASES = {
  'dense': Case(lrjax.dense(), lrjax.dense()),
  'factorized': Case(lrjax.factorized(4, restart_every=3), lrjax.factorized(12)),
  'householder': Case(lrjax.householder(4), lrjax.householder(12, train_sigma=True)),
  'sst': Case(lrjax.sst(4, 3, 1), lrjax.sst(4), true_gradient=False),
}


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_battery(case, check):
  check(case)
