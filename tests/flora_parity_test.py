"""Flora against recorded trajectories of its two official codes."""

import jax.numpy as jnp
import pytest
from parity.inputs import NAMES, read
from replay import replay

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
  key = lambda name: f'{form}/{name}/params'
  error, _ = replay(tx, 'flora', names=[name], key=key, move=jnp.add)
  assert error <= 1e-6
