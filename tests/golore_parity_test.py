"""GoLore against recorded trajectories of its official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.inputs import NAMES, inputs, read

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
  start, gradients = inputs(name)
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
  update = jax.jit(tx.update)
  w, state = jnp.asarray(start), tx.init({'kernel': start})
  expected = dict(zip(meta['kept'], recorded[f'{name}/params']))
  for t, g in enumerate(gradients):
    u, state = update({'kernel': g}, state)
    w = (w - meta['lr'] * u['kernel']) * (1 - meta['lr'] * meta['weight_decay'])
    if t in expected:
      np.testing.assert_allclose(w, expected[t], atol=1e-6, rtol=0)
  basis = state.slots['kernel'].state.basis
  assert int(basis.fits) == 5
  np.testing.assert_array_equal(basis.basis, drawn[-1])
