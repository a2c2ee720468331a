"""Every parameterization passes the shared battery."""

import pytest

import lrjax
from lrjax.testing.parameterizations import CHECKS, Case

CASES = {
  'dense': Case(lrjax.dense(), lrjax.dense()),
  'factorized': Case(lrjax.factorized(4, restart_every=3), lrjax.factorized(12)),
  'maestro': Case(lrjax.maestro(6, shrink_every=3), lrjax.maestro()),
  'self_guided': Case(lrjax.self_guided(4, 30), lrjax.self_guided(4, 30, skip=True)),
  'trp': Case(lrjax.trp(3), lrjax.trp(3)),
}


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_battery(case, check):
  check(case)
