"""Regularizers on factorized kernels, as gradients added before the optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrjax.bases.orthonormal import mm
from lrjax.checks import finite
from lrjax.types import PyTree


def add_penalty(
  penalty: Callable[[Mapping[str, jax.Array]], jax.Array],
  weight: float,
  names: tuple[str, ...] = ('a', 'b'),
) -> optax.GradientTransformation:
  r"""Adds :math:`\lambda \nabla` penalty to the gradients of kernels with given arrays.

  Put it first in a chain: the optimizer then treats it as a part of the loss.

  Args:
    penalty: `{name: array} -> scalar`; arrays may have leading axes, a stack of kernels
      over which it sums.
    weight: :math:`\lambda`.
    names: which arrays a kernel must have; every dict in the params that has them all is
      penalised, with those arrays alone.

  Returns:
    A transformation without state; its `update` needs `params`.

  Raises:
    ValueError: at `init` if no kernel has such arrays, or without `params`.

  Examples:
    >>> tx = add_penalty(frobenius, 0.1)
    >>> params = {'q': {'kernel': {'a': jnp.ones((3, 2)), 'b': jnp.eye(2)}}}
    >>> zeros = jax.tree.map(jnp.zeros_like, params)
    >>> u, _ = tx.update(zeros, tx.init(params), params)
    >>> u['q']['kernel']['a'][0]
    Array([0.1, 0.1], dtype=float32)
  """
  finite('weight', weight)

  def init(params: PyTree) -> optax.EmptyState:
    if not _with(names, params):
      raise ValueError(f'no kernel has the arrays {names}; leave the penalty out')
    return optax.EmptyState()

  def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple:
    if params is None:
      raise ValueError('a penalty on the weights needs `params` in `update`')

    def total(params: PyTree) -> jax.Array:
      return sum(map(penalty, _with(names, params)), jnp.float32(0))

    extra = jax.grad(total)(params)
    add = lambda g, x: g + (weight * x).astype(g.dtype)
    return jax.tree.map(add, updates, extra), state

  return optax.GradientTransformation(init, update)


def frobenius(kernel: Mapping[str, jax.Array]) -> jax.Array:
  r""":math:`\frac12 \|ab\|_F^2 = \frac12 \langle a^\top a, b b^\top \rangle`.

  Two Gram matrices (r, r); ab is never formed.
  """
  a, b = (kernel[n].astype(jnp.float32) for n in 'ab')
  return 0.5 * jnp.sum(mm(a.mT, a) * mm(b, b.mT))


def frobenius_decay(weight: float) -> optax.GradientTransformation:
  r"""Weight decay for factorized kernels, :math:`\frac\lambda2 \|ab\|_F^2`.

  It adds :math:`\lambda a (b b^\top)` and :math:`\lambda (a^\top a) b` to the
  gradients. Decay on each factor penalises the nuclear norm of ab instead, and punishes
  rank.

  Args:
    weight: :math:`\lambda`, the weight decay of the dense model.

  Returns:
    A transformation to put first in a chain; see `add_penalty`.

  References:
    Khodak et al., "Initialization and Regularization of Factorized Neural Layers", 2021,
    arXiv 2105.01029.

  Examples:
    >>> tx = optax.chain(frobenius_decay(1e-4), optax.adam(1e-3))
  """
  return add_penalty(frobenius, weight)


def _with(names: tuple[str, ...], tree: Any) -> list[dict[str, jax.Array]]:
  """The arrays of every dict that has all of these names."""
  if not isinstance(tree, Mapping):
    children = tree if isinstance(tree, (list, tuple)) else ()
  elif all(hasattr(tree.get(name), 'shape') for name in names):
    return [{name: tree[name] for name in names}]
  else:
    children = tree.values()
  return [found for child in children for found in _with(names, child)]
