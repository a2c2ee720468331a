"""DCT-AdamW against recorded trajectories of the official code."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax

VECTORS = pathlib.Path(__file__).parent / 'parity' / 'dct_adamw.npz'
SHAPES = ('tall', 'wide', 'square')
# Its `matmul` mode has the transpose of the DCT-II for a basis, its `makhoul` mode not.
BASES = {
  'every_step': dict(form='dct3'),
  'feedback': dict(form='dct3', path='fft'),
  'gap': dict(form='dct3', norm='l2'),
  'fft': dict(path='fft'),
  'fft_gap_feedback': dict(path='matmul'),
}


def official_schedule(period):
  """At its first step and at every one, counted from one, that `period` divides."""
  due = lambda s, step, phase: (step == 0) | ((step + 1) % period == 0)
  return lrjax.every(period)._replace(due=due)


@pytest.mark.parametrize('case', BASES)
def test_equals_the_official_code(case):
  with np.load(VECTORS, allow_pickle=False) as f:
    meta = json.loads(str(f['meta']))
    starts = {n: jnp.asarray(f[f'{n}/start']) for n in SHAPES}
    grads = {n: f[f'{n}/gradients'] for n in SHAPES}
    expected = {n: f[f'{n}/{case}'] for n in SHAPES}
  args = meta['cases'][case]
  basis = functools.partial(lrjax.dct, **BASES[case])
  if args['update_proj_gap'] == 1:
    feedback = 'full' if args.get('use_ef') else 'none'
    tx = lrjax.scale_by_dct_adamw(meta['rank'], error_feedback=feedback, basis=basis)
  else:
    rule = lambda rank: lrjax.low_rank(
      basis(rank),
      lrjax.adam(),
      refresh=official_schedule(args['update_proj_gap']),
      residual=lrjax.error_feedback() if args.get('use_ef') else lrjax.drop(),
      transport=lrjax.rotate_abs,
    )
    tx = lrjax.on_matrices(rule, rank=meta['rank'])

  @jax.jit
  def step(w, state, g):
    u, state = tx.update(g, state)
    decay = 1 - meta['lr'] * meta['weight_decay']
    return jax.tree.map(lambda w, u: w * decay - meta['lr'] * u, w, u), state

  w, state = starts, tx.init(starts)
  for t in range(len(grads['tall'])):
    w, state = step(w, state, {n: g[t] for n, g in grads.items()})
    for n in SHAPES:
      np.testing.assert_allclose(w[n], expected[n][t], atol=2e-6, rtol=0)
