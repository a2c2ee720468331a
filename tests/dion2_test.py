"""Dion2 against recorded trajectories of the official code, and its basis."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.inputs import read
from replay import replay
from samples import matrix

import lrjax


# Of a square matrix the official code takes torch's rows, our `out`.
@pytest.mark.parametrize(
  ('names', 'side'), [(('tall', 'wide'), 'short'), (('square',), 'out')]
)
@pytest.mark.parametrize(('case', 'scaling'), [('spectral', 'dion'), ('rms', 'kimi')])
def test_equals_the_official_code(names, side, case, scaling):
  meta, _ = read('dion2')
  tx = lrjax.dion2(
    meta['lr'],
    meta['fraction'],
    meta['ef_decay'],
    scaling,
    side=side,
    weight_decay=meta['weight_decay'],
  )
  key = lambda name: f'{name}/{case}'
  error, _ = replay(tx, 'dion2', names=names, key=key, move=jnp.add)
  assert error <= 1e-6


def test_the_choice_by_l2_loses_least():
  g = np.asarray(matrix((7, 5)))
  kept = {i: np.sum(g[list(i)] ** 2) for i in itertools.combinations(range(7), 3)}
  b = lrjax.heaviest(3, norm='l2')
  got = b.fit(None, jnp.asarray(g), b.init(7, 5, jnp.float32))
  assert tuple(got.tolist()) == max(kept, key=kept.__getitem__)
  with pytest.raises(ValueError, match=r"`norm` 'l0'.*l1, l2"):
    lrjax.heaviest(3, norm='l0')


def test_only_what_was_updated_decays():
  g = {'w': matrix((8, 12))}
  tx = lrjax.scale_by_dion2(2)
  u, state = jax.jit(tx.update)(g, tx.init(g))
  chosen = np.zeros(8, bool)
  chosen[np.asarray(state.slots['w'].state.basis)] = True
  np.testing.assert_array_equal(jnp.any(u['w'] != 0, axis=1), chosen)
  want = np.where(chosen[:, None], 0.95, 1) * g['w']
  np.testing.assert_allclose(state.slots['w'].state.mu, want, atol=1e-6)


def test_state_bytes():
  params = {'w': jax.ShapeDtypeStruct((11008, 4096), jnp.bfloat16)}
  counts = (
    4 + 4 + 1 + 4 + 4
  )  # steps, skipped, a flag, overdue, Lion's of the other leaves
  want = 4 * 4096 * 11008 + 4 * 1024 + counts
  assert lrjax.coverage(lrjax.scale_by_dion2(), params).state_bytes == want
