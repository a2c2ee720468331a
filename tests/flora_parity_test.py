"""Flora against recorded trajectories of its two official codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity.inputs import NAMES, inputs, read

import lrjax
from lrjax.optimizers import flora as flora_file


def replayed(drawn):
  """A stand-in for `gaussian` that uses recorded sketches, one a fit, in their order."""
  at = lambda b: drawn[jnp.maximum(b[0].astype(jnp.int32) - 1, 0)]
  return lambda rank: lrjax.gaussian(rank)._replace(
    init=lambda d, k, dtype: jnp.zeros(2, jnp.uint32),
    fit=lambda key, g, b: b + 1,
    down=lambda b, g: at(b).T @ g,
    up=lambda b, low, d: at(b) @ low,
  )


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('form', ['torch', 'flax'])
def test_equals_the_official_codes(form, name, monkeypatch):
  meta, recorded = read('flora')
  start, gradients = inputs(name)
  drawn = jnp.asarray(recorded[f'{form}/{name}/drawn'])
  monkeypatch.setattr(flora_file, 'gaussian', replayed(drawn))
  decay = {'torch': 0.8, 'flax': 0.99}[form]
  tx = lrjax.flora(
    meta['lr'],
    meta['rank'],
    meta['kappa'],
    lrjax.factored_rms(decay_rate=decay, clipping_threshold=None),
    b1=meta['b1'],
    nesterov=form == 'flax',
  )
  update = jax.jit(tx.update)
  params = {'kernel': jnp.asarray(start)}
  state = tx.init(params)
  expected = dict(zip(meta['kept'], recorded[f'{form}/{name}/params']))
  for t, g in enumerate(gradients):
    u, state = update({'kernel': g}, state, params)
    params = optax.apply_updates(params, u)
    if t in expected:
      np.testing.assert_allclose(params['kernel'], expected[t], atol=1e-6, rtol=0)
