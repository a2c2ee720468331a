"""Subspaces of coordinates: only indices are stored, and no product is computed."""

import jax
import jax.numpy as jnp

from lrjax.checks import positive_int
from lrjax.types import Basis


def columns(rank: int) -> Basis:
  """r random coordinates of the compressed axis, the same for the whole matrix (FRUGAL).

  P is r columns of the identity. Projecting is a gather, lifting a scatter.

  Args:
    rank: number of coordinates; clipped to d.

  Returns:
    A `Basis` whose state is r ascending int32 indices.

  >>> b = columns(2)
  >>> b.up(jnp.array([1, 3]), jnp.array([[5.0], [6.0]]), 4).ravel()
  Array([0., 5., 0., 6.], dtype=float32)
  """
  rank = positive_int('rank', rank)

  def init(d: int, k: int, dtype: jnp.dtype) -> jax.Array:
    return jnp.arange(min(rank, d), dtype=jnp.int32)

  def fit(key: jax.Array, g: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sort(jax.random.permutation(key, len(g))[: len(b)]).astype(jnp.int32)

  def up(b: jax.Array, low: jax.Array, d: int) -> jax.Array:
    full = jnp.zeros((d, *low.shape[1:]), low.dtype)
    return full.at[b].set(low, indices_are_sorted=True, unique_indices=True)

  def matrix(b: jax.Array, d: int) -> jax.Array:
    return jax.nn.one_hot(b, d, axis=0)

  return Basis(init, fit, lambda b, g: jnp.take(g, b, axis=0), up, matrix)


def entries(rank: int) -> Basis:
  """r random entries of each column of the matrix, drawn for every column by itself.

  Where `columns` keeps whole rows of (d, k), this spreads as many entries over all of
  them. It has no single P, so transports that rotate moments do not fit it.

  Args:
    rank: entries kept of each column; clipped to d.

  Returns:
    A `Basis` whose state is int32 indices (r, k), ascending along r.
  """
  rank = positive_int('rank', rank)

  def init(d: int, k: int, dtype: jnp.dtype) -> jax.Array:
    r = min(rank, d)
    return jnp.broadcast_to(jnp.arange(r, dtype=jnp.int32)[:, None], (r, k))

  def fit(key: jax.Array, g: jax.Array, b: jax.Array) -> jax.Array:
    order = jnp.argsort(jax.random.uniform(key, g.shape), axis=0)
    return jnp.sort(order[: len(b)], axis=0).astype(jnp.int32)

  def down(b: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.take_along_axis(g, b, axis=0)

  def up(b: jax.Array, low: jax.Array, d: int) -> jax.Array:
    full = jnp.zeros((d, *low.shape[1:]), low.dtype)
    return jnp.put_along_axis(full, b, low, axis=0, inplace=False)

  return Basis(init, fit, down, up, None)
