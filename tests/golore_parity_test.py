"""GoLore against recorded trajectories of its official code."""

import jax.numpy as jnp
import numpy as np
import pytest
from parity.inputs import NAMES, read
from replay import replay

import lrjax
from lrjax.optimizers import golore as golore_file


def replayed(drawn):
  """A stand-in for `random_orthogonal` that gives recorded bases in their order."""

  def fit(key, g, p):
    last = (
      jnp.abs(drawn - p[None]).max(axis=(1, 2)) == 0
    )  # none of them before the first
    return drawn[jnp.where(last.any(), jnp.argmax(last) + 1, 0)]

  return lambda rank: lrjax.random_orthogonal(rank)._replace(fit=fit)


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_official_code(name, monkeypatch):
  meta, recorded = read('golore')
  drawn = jnp.asarray(recorded[f'{name}/drawn'])
  monkeypatch.setattr(golore_file, 'random_orthogonal', replayed(drawn))
  tx = lrjax.scale_by_golore(
    meta['rank'],
    meta['update_proj_gap'],
    meta['scale'],
    lrjax.adam(eps=1e-6, bias_correction='step'),
    random_after=meta['rand_epoch'],
    basis='svd',
  )
  error, state = replay(tx, 'golore', names=[name])
  assert error <= 1e-6
  basis = state.slots[name].state.basis
  assert int(basis.fits) == 5
  np.testing.assert_array_equal(basis.basis, drawn[-1])
