"""Compression of both sides of a matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrjax.types import Basis, Change


class TwoSided(NamedTuple):
  """State: the bases of the compressed side and of the other one."""

  left: Any
  right: Any


def two_sided(basis: Basis) -> Basis:
  r"""Projects from both sides, :math:`R = U^\top G V` (r, r); `full` of the GaLore code.

  Args:
    basis: finds U from G and V from its transpose.

  Returns:
    A `Basis` with no single P: policies that measure overlap do not fit it.

  Raises:
    ValueError: if `basis` does not keep one matrix P (d, r).

  >>> import jax.numpy as jnp, lrjax
  >>> b = two_sided(lrjax.svd(2))
  >>> g = jnp.ones((3, 5))
  >>> b.down(b.init(3, 5, g.dtype), g).shape
  (2, 2)
  """
  matrix = basis.matrix
  if matrix is None or basis.change is not None:
    raise ValueError('two_sided needs a basis that keeps a matrix P, such as lrjax.svd')

  right = lambda b: matrix(b.right, 0)

  def init(d: int, k: int, dtype: Any) -> TwoSided:
    return TwoSided(basis.init(d, k, dtype), basis.init(k, d, dtype))

  def fit(key: jax.Array, g: jax.Array, b: TwoSided) -> TwoSided:
    left, right = jax.random.split(key)
    return TwoSided(basis.fit(left, g, b.left), basis.fit(right, g.T, b.right))

  def down(b: TwoSided, g: jax.Array) -> jax.Array:
    return basis.down(b.right, basis.down(b.left, g).T).T

  def up(b: TwoSided, low: jax.Array, d: int) -> jax.Array:
    return basis.up(b.right, basis.up(b.left, low, d).T, len(right(b))).T

  def change(old: TwoSided, new: TwoSided, d: int) -> Change:
    C, D = matrix(new.left, d).T @ matrix(old.left, d), right(new).T @ right(old)
    return Change(lambda x: C @ x @ D.T, lambda x: jnp.square(C) @ x @ jnp.square(D).T)

  return Basis(
    init,
    fit,
    down,
    up,
    change=change,
    orthonormal=basis.orthonormal,
    per_column=False,
  )
