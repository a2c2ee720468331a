"""Finds the moments of a parameter in any optimizer's state, and starts them anew.

A leaf of the state belongs to a parameter if the parameter's path is a part of its own:
`0/mu/layers/attn/q/kernel/a` in optax, `slots/layers/attn/q/kernel/a/state/inner/mu` in
lrjax. It is a moment if a field on the way to it is one of `lrjax.roles`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrjax.roles import FACTORED, NON_NEGATIVE, SIGNED
from lrjax.types import PyTree
from lrjax.views import leaf_path

# Counts of single vectors are moments too: they say how far these have come.
_MOMENTS = SIGNED | NON_NEGATIVE | FACTORED | {'vector_count'}
_COUNTS = frozenset({'count', 'steps'})


class Touched(NamedTuple):
  """Moments that an event changed.

  Attributes:
    entries: how many numbers there are in the touched moments.
    zeros: how many of them are 0 afterwards.
  """

  entries: jax.Array
  zeros: jax.Array


def reset_moments(
  state: PyTree,
  start: PyTree,
  masks: Mapping[str, Any],
  change: Callable | None = None,
) -> tuple[PyTree, Touched]:
  """Changes the moments of some parameters, or of some entries of them.

  Args:
    state: of any optax transformation.
    start: what it was at first, `tx.init(params)`.
    masks: path of a parameter -> True, or a bool array that broadcasts against it.
    change: `(path of the moment, moment, start) -> moment`; None: `start`.

  Returns:
    `(state, Touched)`.

  Raises:
    ValueError: where a mask is given and a moment is not of the parameter's shape, as
      with projected or quantized moments.

  Examples:
    >>> import optax
    >>> params = {'w': jnp.ones((2, 2)), 'v': jnp.ones(2)}
    >>> tx = optax.adam(0.1)
    >>> _, state = tx.update(params, tx.init(params))
    >>> rows = jnp.array([[True], [False]])
    >>> state, touched = reset_moments(state, tx.init(params), {'w': rows})
    >>> (state[0].mu['w'] == 0).tolist(), int(touched.zeros)
    ([[True, True], [False, False]], 4)
  """
  change = change or (lambda path, x, start: start)
  counts = []

  def visit(path: Any, x: jax.Array, start: jax.Array) -> jax.Array:
    name = leaf_path(path)
    owner = next((p for p in masks if f'/{p}/' in f'/{name}/'), None)
    if owner is None or not _is_moment(name, owner):
      return x
    mask = _broadcast(masks[owner], x, name)
    new = jnp.where(mask, change(name, x, start).astype(x.dtype), x)
    counts.append(_count(mask, new))
    return new

  new = jax.tree.map_with_path(visit, state, start)
  return new, total(counts)


def restart_all(state: PyTree, start: PyTree) -> tuple[PyTree, Touched]:
  """Every moment, and every count of a state that has moments, starts anew.

  Counts of schedules go on.

  Examples:
    >>> import optax
    >>> tx = optax.adam(optax.linear_schedule(1.0, 0.0, 10))
    >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> state, _ = restart_all(state, tx.init(jnp.ones(2)))
    >>> int(state[0].count), int(state[1].count), float(state[0].mu.sum())
    (0, 1, 0.0)
  """
  names = [leaf_path(path) for path, _ in jax.tree.leaves_with_path(state)]
  split = [name.split('/') for name in names]
  # The states that hold moments, as the paths of their fields begin.
  owners = {'/'.join(p[:i]) for p in split for i, n in enumerate(p) if n in _MOMENTS}
  counts = []

  def visit(path: Any, x: jax.Array, start: jax.Array) -> jax.Array:
    name = leaf_path(path)
    parts = name.split('/')
    if not set(parts) & _MOMENTS:
      owned = parts[-1] in _COUNTS and '/'.join(parts[:-1]) in owners
      return start if owned else x
    counts.append(_count(jnp.ones(start.shape, bool), start))
    return start

  new = jax.tree.map_with_path(visit, state, start)
  return new, total(counts)


def _count(mask: jax.Array, new: jax.Array) -> Touched:
  number = lambda flags: jnp.sum(flags, dtype=jnp.int32).astype(jnp.float32)
  return Touched(number(mask), number(mask & (new == 0)))


def total(counts: list[Touched]) -> Touched:
  """The sums of several reports."""
  # In float32, because all moments of a large model are more than an int32 can count.
  return Touched(*(sum(x, jnp.float32(0)) for x in zip(*counts or [(0, 0)])))


def _is_moment(name: str, owner: str) -> bool:
  """Whether a field of a moment is on the way, beside the parameter's own path."""
  before, _, after = f'/{name}/'.partition(f'/{owner}/')
  fields = {*before.split('/'), *after.split('/')}
  return bool(fields & _MOMENTS)


def _broadcast(mask: Any, x: jax.Array, name: str) -> jax.Array:
  """The mask in the shape of x."""
  mask = jnp.asarray(mask)
  if mask.ndim == 0:
    return jnp.broadcast_to(mask, x.shape)
  # A moment may have one number where the parameter has an axis, as counts do.
  fits = mask.ndim == x.ndim and all(m in (1, n) for m, n in zip(mask.shape, x.shape))
  if not fits:
    raise ValueError(
      f'{name}: single rows or columns of it are to start anew, but its shape {x.shape}'
      f' is not that of the parameter (mask {mask.shape}); use an optimizer that does'
      ' not project or pack this leaf'
    )
  return jnp.broadcast_to(mask, x.shape)
