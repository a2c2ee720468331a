"""Kernels that change their shapes between two updates: compacted, stripped, factorized."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrjax.types import PyTree, Split
from lrjax.views import leaf_path
from lrjax.weights import Weights, put_at, split_at


def resize(
  paths: Iterable[str],
  change: Callable[[Split], Split],
  weights: Weights,
  *,
  tx: optax.GradientTransformation | None = None,
) -> Weights:
  """Changes the arrays of kernels, on the host; what is jitted compiles once more.

  The optimizer keeps what still fits: a moment is cut to its leading entries as its
  parameter is (columns that `change` drops must be the last ones), and so is all that
  keeps its shape. Of a parameter with projected or packed moments that do not fit, and of
  a new one, the state starts anew.

  Args:
    paths: of the kernels, for example a plan.
    change: `Split -> Split`, for a whole stack; such as `lrjax.compact`,
      `lrjax.strip_guide`, or `lambda split: to_factors(split.train, rule)`.
    weights: the trees.
    tx: the optimizer; needed with an opt_state.

  Returns:
    The changed `Weights`.

  Raises:
    KeyError: for a path without a kernel.
    ValueError: for an opt_state without `tx`.

  Examples:
    >>> import lrjax
    >>> W = lrjax.self_guided(2, 9).init(jax.random.key(0), (4, 3), jnp.float32)
    >>> weights = Weights({'q': {'kernel': W.train}}, {'q': {'fixed': W.fixed}})
    >>> weights = resize(['q'], lrjax.strip_guide, weights)
    >>> [*weights.params['q']['kernel']], weights.fixed
    (['a', 'b'], {})
  """
  params, fixed, state = weights
  for path in paths:
    new = change(split_at(path, params, fixed))
    params = put_at(params, f'{path}/kernel', new.train)
    fixed = put_at(fixed, f'{path}/fixed', dict(new.fixed))
  fixed = _without_empty(fixed)
  if state is None:
    return Weights(params, fixed)
  if tx is None:
    raise ValueError('`tx` is needed to change the shapes of its state')
  return Weights(params, fixed, _carry(state, tx.init(params), weights.params, params))


def _carry(state: PyTree, start: PyTree, old: PyTree, new: PyTree) -> PyTree:
  """The state in the shapes of `start`."""
  shapes = lambda tree: {
    leaf_path(p): x.shape for p, x in jax.tree.leaves_with_path(tree)
  }
  was, now = shapes(old), shapes(new)
  before = {leaf_path(p): x for p, x in jax.tree.leaves_with_path(state)}

  def owner(name: str) -> str | None:
    owners = (p for p in now if f'/{p}/' in f'/{name}/')
    return max(owners, key=len, default=None)

  def fits(name: str, x: jax.Array) -> bool:
    if name not in before:
      return False
    p = owner(name)
    return before[name].shape == x.shape or (
      p in was and before[name].shape == was[p] and x.shape == now[p]
    )

  leaves = [(leaf_path(p), x) for p, x in jax.tree.leaves_with_path(start)]
  # All of a parameter's state or none: moments mean nothing in another basis.
  anew = {owner(name) for name, x in leaves if not fits(name, x)} - {None}

  def visit(path: Any, x: jax.Array) -> jax.Array:
    name = leaf_path(path)
    if owner(name) in anew or name not in before:
      # A basis that starts over is found at the next step, not at the end of the period.
      return jnp.ones_like(x) if name.endswith('/overdue') else x
    if anew and f'/{name}'.endswith('/wants_gradient'):
      return jnp.ones_like(x)
    return before[name][tuple(slice(n) for n in x.shape)]

  return jax.tree.map_with_path(visit, start)


def _without_empty(tree: PyTree) -> PyTree:
  """The tree without dicts that hold nothing, as a model without them is split."""
  if not isinstance(tree, dict):
    return tree
  nodes = {name: _without_empty(node) for name, node in tree.items()}
  return {name: node for name, node in nodes.items() if jax.tree.leaves(node)}
