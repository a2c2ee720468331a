"""Every parameterization passes the shared battery."""

import pytest

import lrjax
from lrjax.testing.parameterizations import CHECKS, Case

CASES = {
  'dense': Case(lrjax.dense(), lrjax.dense()),
  'cola': Case(lrjax.cola(4)),
  'cola_linear': Case(lrjax.cola(4, act=None), lrjax.cola(12, act=None)),
  'factorized': Case(lrjax.factorized(4, restart_every=3), lrjax.factorized(12)),
  'relora': Case(lrjax.relora(4, 2, alpha=4.0), lrjax.relora(12, 2)),
  'relora_trained_scale': Case(lrjax.relora(4, 5, alpha=None)),
  'switchlora': Case(
    lrjax.switchlora(4, total_steps=100, interval=2, freeze=1),
    lrjax.switchlora(4, total_steps=100),
  ),
  'lost': Case(
    lrjax.lost(4, 0.25, act=None, rescale=True), lrjax.lost(12, 0.1, act=None)
  ),
  'lost_silu': Case(lrjax.lost(4, 0.25)),
  'sltrain': Case(
    lrjax.sltrain(4, 0.2, restart_every=3, in_shards=2, out_shards=2),
    lrjax.sltrain(4, 1.0),
  ),
  'sltrain_silu': Case(lrjax.sltrain(4, 0.2, None, 'silu')),
  'householder': Case(lrjax.householder(4), lrjax.householder(12, train_sigma=True)),
  'sst': Case(lrjax.sst(4, 3, 1), lrjax.sst(4), true_gradient=False),
  'dsformer': Case(
    lrjax.dsformer(4, 2, 6, rounds=2), lrjax.dsformer(4, 4, 4, rounds=2), False
  ),
  'dsformer_factor': Case(
    lrjax.dsformer(4, 2, 6, 'factor', 'in', rounds=2),
    lrjax.dsformer(4, 4, 4, 'factor', rounds=2),
  ),
  'monarch': Case(lrjax.monarch(4), lrjax.monarch(1)),
  'monarch_uneven': Case(lrjax.monarch(5, 3), lrjax.monarch(1)),
  'snnk': Case(lrjax.snnk(16)),
  'snnk_bundled': Case(lrjax.snnk((16, 8), 'sin', normalize=1.0)),
  'maestro': Case(lrjax.maestro(6, shrink_every=3), lrjax.maestro()),
  'self_guided': Case(lrjax.self_guided(4, 30), lrjax.self_guided(4, 30, skip=True)),
  'trp': Case(lrjax.trp(3), lrjax.trp(3)),
}


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_battery(case, check):
  check(case)
