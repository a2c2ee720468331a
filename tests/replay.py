"""Recorded runs of official codes, replayed."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.inputs import NAMES, inputs, read


def replay(
  tx, method, *, steps=25, decay_first=False, key=lambda name: name, prepare=None
):
  """The largest distance in weights from a recorded run, by shape.

  Args:
    tx: the rule, without learning rate.
    method: the recording's name.
    steps: how many.
    decay_first: whether its weights decay before the update; after it if not.
    key: shape's name -> where the recording keeps it.
    prepare: `state -> state`, ahead of the first step.
  """
  meta, recorded = read(method)
  starts, gradients = zip(*map(inputs, NAMES))
  lr, decay = meta['lr'], 1 - meta['lr'] * meta['weight_decay']

  @jax.jit
  def step(w, state, g):
    u, state = tx.update(g, state)
    if decay_first:
      return jax.tree.map(lambda w, u: w * decay - lr * u, w, u), state
    return jax.tree.map(lambda w, u: (w - lr * u) * decay, w, u), state

  w = dict(zip(NAMES, map(jnp.asarray, starts)))
  state = tx.init(w) if prepare is None else prepare(tx.init(w))
  path = []
  for t in range(steps):
    w, state = step(w, state, {n: g[t] for n, g in zip(NAMES, gradients)})
    path.append(w)
  kept = [path[t] for t in meta['kept']]
  want = {n: recorded[f'{key(n)}/params'] for n in NAMES}
  return {n: np.abs(np.stack([w[n] for w in kept]) - want[n]).max() for n in NAMES}
