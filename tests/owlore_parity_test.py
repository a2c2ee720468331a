"""OwLore against galore-torch with frozen layers."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.inputs import read

import lrjax


def test_kept_states_equal_galore_torch_with_frozen_layers():
  meta, arrays = read('owlore')
  names = 'start', 'gradients', 'params', 'active'
  start, grads, expected, active = (arrays[name] for name in names)
  # That package corrects the bias of the step, has eps 1e-6, and decays the weights
  # after the update instead of before.
  inner = lrjax.scale_by_galore(
    meta['rank'],
    meta['update_proj_gap'],
    meta['scale'],
    lrjax.adam(eps=1e-6, bias_correction='step'),
  )
  table = jnp.asarray(active)
  tx = lrjax.sampled_layers(
    inner,
    active.shape[1],
    meta['period'],
    order=lambda round: table[round],
    compact=False,
  )

  @jax.jit
  def step(w, state, g):
    u, state = tx.update({'layers': {'kernel': g}}, state)
    moved = w - meta['lr'] * u['layers']['kernel']
    on = jnp.zeros(len(w), bool).at[state.active].set(True)[:, None, None]
    return jnp.where(on, moved * (1 - meta['lr'] * meta['weight_decay']), w), state

  w, state = jnp.asarray(start), tx.init({'layers': {'kernel': start}})
  worst = 0.0
  for g, want in zip(grads, expected):
    w, state = step(w, state, g)
    worst = max(worst, float(np.abs(w - want).max()))
  # Measured: 3e-7.
  assert worst <= 1e-6
