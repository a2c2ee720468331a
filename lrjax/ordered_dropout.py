"""Widths of Maestro's kernels over a whole model: all in full, or one at a time below.

Horvath et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
2023, arXiv 2308.14929.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.stacks import stream
from lrjax.types import PyTree
from lrjax.weights import Plan, put_at, split_at


def full_width(fixed: PyTree) -> PyTree:
  """Fixed arrays with which Maestro kernels apply all the columns they keep.

  Args:
    fixed: the fixed arrays of a model, or of one kernel.

  Returns:
    The same tree, with `sampled` as `width`.

  >>> full_width({'q': {'fixed': {'width': 3, 'sampled': 1}}})
  {'q': {'fixed': {'width': 3, 'sampled': 3}}}
  """
  if not isinstance(fixed, Mapping):
    return fixed
  if has_widths(fixed):
    return {**fixed, 'sampled': fixed['width']}
  return {name: full_width(node) for name, node in fixed.items()}


def sample_widths(
  plan: Plan, params: PyTree, fixed: PyTree, k: int | jax.Array, seed: int = 0
) -> PyTree:
  """The paper's sampler: one kernel at one width at a time, the others in full.

  All pairs (kernel, width) come once in every cycle, in an order of its own; a stack
  counts as several kernels. Call it in the compiled step, with `chance=0`. A change of
  widths begins another cycle, anywhere in it.

  Args:
    plan: path -> parameterization; those that are not Maestro's are passed over.
    params: trained arrays, for their shapes.
    fixed: fixed arrays.
    k: updates completed.
    seed: of the order.

  Returns:
    `fixed` with other `sampled`.

  Raises:
    ValueError: if no kernel of the plan is Maestro's.
  """
  splits = {path: split_at(path, params, fixed) for path in plan}
  splits = {path: s for path, s in splits.items() if has_widths(s.fixed)}
  if not splits:
    raise ValueError(f'no kernel has a width to sample; kernels: {[*plan]}')
  widths = [s.fixed['width'] for s in splits.values()]
  most = [
    np.full(w.size, s.train['a'].shape[-1]) for w, s in zip(widths, splits.values())
  ]
  flat = jnp.concatenate([w.reshape(-1) for w in widths])
  drawn = one_of_all(stream(seed, 'sample_widths'), k, flat, np.concatenate(most))
  ends = np.cumsum([w.size for w in widths])[:-1]
  for path, w, new in zip(splits, widths, jnp.split(drawn, ends)):
    fixed = put_at(fixed, f'{path}/fixed/sampled', new.reshape(w.shape))
  return fixed


def one_of_all(
  key: jax.Array, k: int | jax.Array, widths: jax.Array, most: np.ndarray
) -> jax.Array:
  """Widths (n,) of step k: one of them drawn, the others full.

  Args:
    key: of the orders of all cycles.
    k: the step.
    widths: int32 (n,), those that are kept.
    most: (n,), what they can be at most.

  Returns:
    int32 (n,).
  """
  kernel = np.repeat(np.arange(most.size), most)
  width = np.concatenate([np.arange(1, m + 1) for m in most])
  pairs = jnp.maximum(jnp.sum(widths), 1)
  draws = jax.random.uniform(jax.random.fold_in(key, k // pairs), kernel.shape)
  order = jnp.argsort(jnp.where(width <= widths[kernel], draws, 2.0))
  at = order[k % pairs]
  i, w = jnp.asarray(kernel)[at], jnp.asarray(width, jnp.int32)[at]
  return jnp.where(jnp.arange(most.size) == i, jnp.minimum(w, widths), widths)


def has_widths(fixed: Mapping) -> bool:
  """Whether these are the fixed arrays of a Maestro kernel."""
  return 'width' in fixed and 'sampled' in fixed
