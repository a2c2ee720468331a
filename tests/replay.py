"""Recorded runs of official codes, replayed."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from parity.inputs import NAMES, inputs, read


def decayed_after(meta):
  """(w, u) -> weights that decay after the update."""
  lr, kept = meta['lr'], 1 - meta['lr'] * meta['weight_decay']
  return lambda w, u: (w - lr * u) * kept


def decayed_before(meta):
  """(w, u) -> weights that decay before the update."""
  lr, kept = meta['lr'], 1 - meta['lr'] * meta['weight_decay']
  return lambda w, u: w * kept - lr * u


def follow(tx, start, gradients, move, prepare=None):
  """The weights after each step, and the last state.

  Args:
    tx: the rule.
    start: the tree of first weights.
    gradients: a tree like it of (steps, ...).
    move: (w, u) -> next w.
    prepare: (leaf's name, its first state) -> first state.
  """

  @jax.jit
  def step(w, state, g):
    u, state = tx.update(g, state, w)
    return jax.tree.map(move, w, u), state

  w, state, path = jax.tree.map(jnp.asarray, start), tx.init(start), []
  if prepare is not None:
    slots = {
      n: slot._replace(state=prepare(n, slot.state)) for n, slot in state.slots.items()
    }
    state = state._replace(slots=slots)
  for t in range(len(jax.tree.leaves(gradients)[0])):
    w, state = step(w, state, jax.tree.map(operator.itemgetter(t), gradients))
    path.append(w)
  return jax.tree.map(lambda *w: np.stack(w), *path), state


def replay(
  tx,
  method,
  *,
  names=NAMES,
  key=lambda name: f'{name}/params',
  move=None,
  prepare=None,
):
  """The largest distance in weights from a recorded run, and the last state.

  Args:
    tx: the rule, without learning rate unless `move` adds its updates.
    method: the recording's name.
    names: which shapes.
    key: shape's name -> where the recording keeps its weights.
    move: (w, u) -> next w; None means `decayed_after`.
    prepare: (shape's name, its first state) -> first state.
  """
  meta, recorded = read(method)
  start, gradients = {}, {}
  for n in names:
    own = f'{n}/start' in recorded
    start[n], gradients[n] = (
      (recorded[f'{n}/start'], recorded[f'{n}/gradients']) if own else inputs(n)
    )
  kept = meta.get('kept', range(len(gradients[names[0]])))
  gradients = {n: g[: max(kept) + 1] for n, g in gradients.items()}
  path, state = follow(tx, start, gradients, move or decayed_after(meta), prepare)
  error = {n: np.abs(path[n][list(kept)] - recorded[key(n)]).max() for n in names}
  return max(error.values()), state
