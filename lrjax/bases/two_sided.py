"""Compression of both sides of a matrix."""

from typing import Any, NamedTuple

import jax

from lrjax.types import Basis


class TwoSided(NamedTuple):
  """State: the bases of the compressed side and of the other one."""

  left: Any
  right: Any


def two_sided(basis: Basis) -> Basis:
  r"""Projects from both sides, :math:`R = U^\top G V` (r, r); `full` of the GaLore code.

  Args:
    basis: finds U from G and V from its transpose.

  Returns:
    A `Basis` with no single P: transports that rotate moments do not fit it.

  Raises:
    ValueError: if `basis` is two-sided itself.

  >>> import jax.numpy as jnp, lrjax
  >>> b = two_sided(lrjax.svd(2))
  >>> g = jnp.ones((3, 5))
  >>> b.down(b.init(3, 5, g.dtype), g).shape
  (2, 2)
  """
  matrix = basis.matrix
  if matrix is None:
    raise ValueError('two_sided needs a basis with one matrix P, such as lrjax.svd')

  def init(d: int, k: int, dtype: Any) -> TwoSided:
    return TwoSided(basis.init(d, k, dtype), basis.init(k, d, dtype))

  def fit(key: jax.Array, g: jax.Array, b: TwoSided) -> TwoSided:
    left, right = jax.random.split(key)
    return TwoSided(basis.fit(left, g, b.left), basis.fit(right, g.T, b.right))

  def down(b: TwoSided, g: jax.Array) -> jax.Array:
    return basis.down(b.right, basis.down(b.left, g).T).T

  def up(b: TwoSided, low: jax.Array, d: int) -> jax.Array:
    k = len(matrix(b.right, 0))
    return basis.up(b.right, basis.up(b.left, low, d).T, k).T

  return Basis(init, fit, down, up, None)
