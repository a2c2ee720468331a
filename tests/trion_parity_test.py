"""Trion against recorded trajectories of the official code."""

import functools

import jax.numpy as jnp
import pytest
from parity.inputs import read
from replay import replay

import lrjax

# Its product with the DCT is from the other side for wide weights: the DCT-III basis for
# torch's tall ones, the DCT-II for wide ones. By FFT it is the DCT-II for all.
GROUPS = [
  ('kj', ('wide', 'square'), 'dct3'),
  ('kj', ('tall',), 'dct2'),
  ('dion_fft', ('tall', 'wide', 'square'), 'dct2'),
  ('kimi_fft', ('tall', 'wide', 'square'), 'dct2'),
]


@pytest.mark.parametrize(('case', 'names', 'form'), GROUPS)
def test_equals_the_official_code(case, names, form):
  meta, _ = read('trion')
  tx = lrjax.trion(
    meta['lr'],
    meta['rank'],
    meta['momentum'],
    meta['cases'][case]['scaling_type'],
    basis=functools.partial(lrjax.dct, form=form),
    weight_decay=meta['weight_decay'],
  )
  key = lambda name: f'{name}/{case}'
  error, _ = replay(tx, 'trion', names=names, key=key, move=jnp.add)
  assert error <= 1e-6
