"""Dion against recorded trajectories of both plain versions of the official code."""

import jax.numpy as jnp
import pytest
from parity.inputs import read
from replay import decayed_before, replay

import lrjax


@pytest.mark.parametrize('orth', ['qr', 'cholesky_qr'])
# `dion_simple` has Q on torch's second axis always, the reference on the shorter one.
@pytest.mark.parametrize(('case', 'side'), [('simple', 'in'), ('reference', 'short')])
def test_equals_the_official_code(case, side, orth):
  meta, recorded = read('dion')
  tx = lrjax.scale_by_dion(meta['rank'], meta['mu'], orth=orth, side=side)
  same_start = lambda name, s: s._replace(Q=jnp.asarray(recorded[f'{name}/{case}/Q']))
  key, move = lambda name: f'{name}/{case}', decayed_before(meta)
  error, _ = replay(tx, 'dion', key=key, move=move, prepare=same_start)
  assert error <= 1e-6
