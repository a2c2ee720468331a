"""Dion against recorded trajectories of both plain versions of the official code."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax

VECTORS = pathlib.Path(__file__).parent / 'parity' / 'dion.npz'
SHAPES = ('tall', 'wide', 'square')


@pytest.mark.parametrize('orth', ['qr', 'cholesky_qr'])
# `dion_simple` has Q on torch's second axis always, the reference on the shorter one.
@pytest.mark.parametrize(('case', 'side'), [('simple', 'in'), ('reference', 'short')])
def test_equals_the_official_code(case, side, orth):
  with np.load(VECTORS, allow_pickle=False) as f:
    meta = json.loads(str(f['meta']))
    starts = {n: jnp.asarray(f[f'{n}/start']) for n in SHAPES}
    grads = {n: f[f'{n}/gradients'] for n in SHAPES}
    expected = {n: f[f'{n}/{case}'] for n in SHAPES}
    drawn = {n: jnp.asarray(f[f'{n}/{case}/Q']) for n in SHAPES}
  tx = lrjax.scale_by_dion(meta['rank'], meta['mu'], orth=orth, side=side)

  @jax.jit
  def step(w, state, g):
    u, state = tx.update(g, state)
    decay = 1 - meta['lr'] * meta['weight_decay']
    return jax.tree.map(lambda w, u: w * decay - meta['lr'] * u, w, u), state

  w, state = starts, tx.init(starts)
  same_start = lambda slot, q: slot._replace(state=slot.state._replace(Q=q))
  state = state._replace(
    slots={n: same_start(s, drawn[n]) for n, s in state.slots.items()}
  )
  for t in range(len(grads['tall'])):
    w, state = step(w, state, {n: g[t] for n, g in grads.items()})
    for n in SHAPES:
      np.testing.assert_allclose(w[n], expected[n][t], atol=1e-6, rtol=0)
