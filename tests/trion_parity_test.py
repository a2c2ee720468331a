"""Trion against recorded trajectories of the official code."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax

VECTORS = pathlib.Path(__file__).parent / 'parity' / 'trion.npz'
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
  with np.load(VECTORS, allow_pickle=False) as f:
    meta = json.loads(str(f['meta']))
    starts = {n: jnp.asarray(f[f'{n}/start']) for n in names}
    grads = {n: f[f'{n}/gradients'] for n in names}
    expected = {n: f[f'{n}/{case}'] for n in names}
  tx = lrjax.trion(
    meta['lr'],
    meta['rank'],
    meta['momentum'],
    meta['cases'][case]['scaling_type'],
    basis=functools.partial(lrjax.dct, form=form),
    weight_decay=meta['weight_decay'],
  )

  @jax.jit
  def step(w, state, g):
    u, state = tx.update(g, state, w)
    return jax.tree.map(jnp.add, w, u), state

  w, state = starts, tx.init(starts)
  for t in range(len(grads[names[0]])):
    w, state = step(w, state, {n: g[t] for n, g in grads.items()})
    for n in names:
      np.testing.assert_allclose(w[n], expected[n][t], atol=1e-6, rtol=0)
