"""Subspaces of coordinates: only indices are stored, and no product is computed."""

import jax
import jax.numpy as jnp

from lrjax.checks import positive_int
from lrjax.types import Basis, Change


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
    order = jnp.argsort(jax.random.bits(key, (len(g),)))
    return jnp.sort(order[: len(b)]).astype(jnp.int32)

  def up(b: jax.Array, low: jax.Array, d: int) -> jax.Array:
    full = jnp.zeros((d, *low.shape[1:]), low.dtype)
    return full.at[b].set(low, indices_are_sorted=True, unique_indices=True)

  def matrix(b: jax.Array, d: int) -> jax.Array:
    return jax.nn.one_hot(b, d, axis=0)

  def change(old: jax.Array, new: jax.Array, d: int) -> Change:
    return carry_over(old[:, None], new[:, None])

  down = lambda b, g: jnp.take(g, b, axis=0)
  return Basis(init, fit, down, up, matrix, change)


def entries(rank: int) -> Basis:
  """r random entries of each column of the matrix, drawn for every column by itself.

  Where `columns` keeps whole rows of (d, k), this spreads as many entries over all of
  them. Moments of entries that stay carry over where a transport rotates.

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
    order = jnp.argsort(jax.random.bits(key, g.shape), axis=0)
    return jnp.sort(order[: len(b)], axis=0).astype(jnp.int32)

  def down(b: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.take_along_axis(g, b, axis=0)

  def up(b: jax.Array, low: jax.Array, d: int) -> jax.Array:
    full = jnp.zeros((d, *low.shape[1:]), low.dtype)
    return jnp.put_along_axis(full, b, low, axis=0, inplace=False)

  return Basis(init, fit, down, up, None, lambda old, new, d: carry_over(old, new))


def carry_over(old: jax.Array, new: jax.Array) -> Change:
  """The change between ascending indices (r, k), or (r, 1) for all columns alike.

  C has a one where an index stays and zeros elsewhere, so that it is its own square.
  """
  at = jax.vmap(jnp.searchsorted, in_axes=1, out_axes=1)(old, new)
  at = jnp.minimum(at, len(old) - 1)
  stays = jnp.take_along_axis(old, at, axis=0) == new

  def carry(x: jax.Array) -> jax.Array:
    full = lambda a: jnp.broadcast_to(a, x.shape)
    return jnp.where(full(stays), jnp.take_along_axis(x, full(at), axis=0), 0)

  return Change(carry, carry)
