"""GaLore against recorded trajectories of galore-torch, and against optax.contrib."""

import jax
import numpy as np
import optax
import pytest
from parity.inputs import read
from replay import replay

import lrjax


def test_equals_galore_torch():
  meta, _ = read('galore_torch')
  # The code of that package corrects the bias of the step, has eps 1e-6, and decays
  # the weights after the update instead of before.
  inner = lrjax.adam(eps=1e-6, bias_correction='step')
  tx = lrjax.scale_by_galore(
    meta['rank'], meta['update_proj_gap'], meta['scale'], inner
  )
  error, _ = replay(tx, 'galore_torch')
  assert error <= 1e-6


def run(tx, grads):
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  out = []
  for g in grads:
    u, state = update(g, state)
    out.append(u)
  return out


@pytest.mark.parametrize('shape', [(24, 12), (16, 16)])
def test_long_side_equals_optax(shape):
  rng = np.random.default_rng(0)
  grads = [{'w': rng.standard_normal(shape, np.float32)} for _ in range(8)]
  ours = lrjax.scale_by_galore(
    4,
    3,
    1.0,
    optax.scale_by_adam(),
    side='long',
    basis=lambda r: lrjax.svd(r, signs=False),
  )
  theirs = optax.contrib.scale_by_galore(4, 3, 1.0)
  for a, b in zip(run(ours, grads), run(theirs, grads)):
    np.testing.assert_allclose(a['w'], b['w'], atol=1e-5)


def test_long_side_of_a_wide_matrix_equals_optax_until_its_first_refresh():
  rng = np.random.default_rng(1)
  grads = [{'w': rng.standard_normal((12, 24), np.float32)} for _ in range(4)]
  ours = lrjax.scale_by_galore(4, 4, 1.0, optax.scale_by_adam(), side='long')
  theirs = optax.contrib.scale_by_galore(4, 4, 1.0)
  for a, b in zip(run(ours, grads), run(theirs, grads)):
    np.testing.assert_allclose(a['w'], b['w'], atol=1e-5)


def test_optax_dimension_numbers_are_accepted():
  rng = np.random.default_rng(2)
  spec = optax.contrib.GaLoreDimensionNumbers(0, (1, 2))
  grads = [{'q': rng.standard_normal((24, 4, 3), np.float32)} for _ in range(3)]
  args = dict(rank=2, update_proj_gap=3, scale=1.0)
  ours = lrjax.scale_by_galore(
    **args, side='long', weight_dimension_numbers={'q': spec}
  )
  theirs = optax.contrib.scale_by_galore(**args, weight_dimension_numbers={'q': spec})
  for a, b in zip(run(ours, grads), run(theirs, grads)):
    np.testing.assert_allclose(a['q'], b['q'], atol=1e-5)
