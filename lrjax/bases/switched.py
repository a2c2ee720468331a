"""One basis at first, another one later."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrjax.branches import rarely
from lrjax.types import Basis


class Switched(NamedTuple):
  """State: a basis in the form both kinds keep it, and how often it was fitted."""

  basis: Any
  fits: jax.Array


def switched(first: Basis, then: Basis, *, after: int) -> Basis:
  """Fits by `first` for a number of times, by `then` from there on.

  Under vmap only the fit that is needed runs, so that a costly one is paid no longer
  than it is asked for.

  Args:
    first: how the subspace is found at first.
    then: how it is found afterwards; its state must be of the same kind.
    after: number of fits by `first`; 0: none.

  Returns:
    A `Basis` whose state is a `Switched`.

  Raises:
    ValueError: if `after` is negative; at `init` if the two keep different states.

  >>> import lrjax
  >>> b = switched(lrjax.svd(2), lrjax.random_orthogonal(2), after=1)
  >>> s = b.init(5, 7, jnp.float32)
  >>> s = b.fit(jax.random.key(0), jnp.ones((5, 7)), s)
  >>> s.basis.shape, int(s.fits)
  ((5, 2), 1)
  """
  if after < 0:
    raise ValueError(f'`after` must be at least 0, got {after}')

  def init(d: int, k: int, dtype: Any) -> Switched:
    types = lambda basis: jax.eval_shape(functools.partial(basis.init, d, k, dtype))
    if types(first) != types(then):
      raise ValueError(
        f'a switched basis needs two whose states are alike, got {types(first)} and'
        f' {types(then)}'
      )
    return Switched(first.init(d, k, dtype), jnp.zeros([], jnp.int32))

  def fit(key: jax.Array, g: jax.Array, s: Switched) -> Switched:
    by = lambda basis: lambda key, g, b: basis.fit(jax.random.wrap_key_data(key), g, b)
    args = (jax.random.key_data(key), g, s.basis)
    b = rarely(s.fits < after, by(first), by(then), *args)
    return Switched(b, s.fits + 1)

  matrix = first.matrix
  return Basis(
    init,
    fit,
    down=lambda s, g: first.down(s.basis, g),
    up=lambda s, low, d: first.up(s.basis, low, d),
    matrix=None if matrix is None else lambda s, d: matrix(s.basis, d),
    orthonormal=first.orthonormal and then.orthonormal,
    per_column=first.per_column and then.per_column,
  )
