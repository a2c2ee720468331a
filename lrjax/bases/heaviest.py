"""The coordinates whose slices of a gradient are largest."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lrjax.bases.columns import columns
from lrjax.checks import named
from lrjax.types import Basis

NORMS = dict(l1=jnp.abs, l2=jnp.square)


def heaviest(rank: int, *, norm: Literal['l1', 'l2'] = 'l1') -> Basis:
  """The r coordinates of the compressed axis along which a gradient is largest (Dion2).

  As `lrjax.columns`, chosen by norm instead of by chance; of all sets of r coordinates
  'l2' loses least of the gradient. A refit reads the gradient once.

  Args:
    rank: number of coordinates; clipped to d.
    norm: of the slices, 'l1' or 'l2'; at a tie the lower index wins.

  Returns:
    A `Basis` whose state is r ascending int32 indices.

  Raises:
    ValueError: for an unknown norm.

  >>> b = heaviest(2)
  >>> print(b.fit(None, jnp.array([[1.0], [-3.0], [2.0]]), b.init(3, 1, jnp.float32)))
  [1 2]
  """
  size = named('norm', norm, NORMS)
  fit = lambda key, g, b: largest(size(g).sum(axis=1), b)
  return columns(rank)._replace(fit=fit)


def largest(score: jax.Array, like: Any) -> jax.Array:
  """Indices of the largest entries, ascending, as many as `like` has."""
  return jnp.sort(jax.lax.top_k(score, len(like))[1]).astype(jnp.int32)
