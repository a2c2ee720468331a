"""Fixed supports: which entries of a kernel are stored, drawn once and never moved.

A support is one sorted int32 array of flat, row-major indices. With `shards = (p, q)` the
kernel is cut into p x q equal blocks, as a mesh that splits `in` in p and `out` in q cuts
it: every block then has the same number of entries, its indices count from its own first
entry, and the blocks follow one another row by row. So each device finds what belongs to
its block without asking another.
"""

import math

import jax
import jax.numpy as jnp

from lrjax.checks import finite

Shards = tuple[int, int]
# Nothing is drawn twice, nothing lies outside, all is in order: no checks are compiled.
KNOWN = dict(indices_are_sorted=True, unique_indices=True, mode='promise_in_bounds')


def check_fraction(name: str, share: float) -> float:
  """The share, or ValueError outside (0, 1]."""
  if not 0 < finite(name, share) <= 1:
    raise ValueError(f'`{name}` must be above 0 and at most 1, got {share}')
  return share


def block_size(density: float, shape: tuple[int, ...], shards: Shards) -> int:
  """How many entries of each block a support has: int(density * size of the block).

  Raises:
    ValueError: if the shards do not divide the shape, if nothing is left of a block, or
      if an int32 cannot count its entries.
  """
  if any(n % p for n, p in zip(shape, shards)):
    raise ValueError(
      f'shards must divide the kernel, got shards {shards} for a kernel of shape'
      f' {tuple(shape)}'
    )
  block = math.prod(shape) // math.prod(shards)
  if block >= 2**31:
    raise ValueError(
      f'a kernel of shape {tuple(shape)} in {shards} shards has {block} entries in a'
      f' block; int32 indices need fewer than {2**31}: take more shards'
    )
  size = int(density * block)
  if size < 1:
    raise ValueError(
      f'density must leave at least one entry of each block, 1/{block} for a kernel of'
      f' shape {tuple(shape)} in {shards} shards, got {density}'
    )
  return size


def uniform(
  key: jax.Array, shape: tuple[int, ...], density: float, shards: Shards = (1, 1)
) -> jax.Array:
  """A support of which every block's entries are equally likely.

  With one block it is uniform on the whole kernel; more blocks make it the stratified
  version of that law.

  >>> print(uniform(jax.random.key(0), (4, 6), 0.25))
  [ 0  1 10 14 15 21]
  """
  return largest(jax.random.uniform(key, shape), density, shards)


def largest(scores: jax.Array, density: float, shards: Shards = (1, 1)) -> jax.Array:
  """The support of the largest scores (in, out) of each block, the first at a tie.

  >>> print(largest(jnp.array([[3.0, 0.0], [1.0, 2.0]]), 0.5))
  [0 3]
  """
  size = block_size(density, scores.shape, shards)
  index = jax.lax.top_k(_blocks(scores, shards), size)[1]
  return jnp.sort(index, axis=-1).reshape(-1)


def scatter(
  W: jax.Array, values: jax.Array, index: jax.Array, shards: Shards = (1, 1)
) -> jax.Array:
  """W (in, out) with `values` (nnz,) added at the support.

  >>> print(scatter(jnp.zeros((2, 2)), jnp.array([5.0, 7.0]), jnp.array([0, 3])))
  [[5. 0.]
   [0. 7.]]
  """
  add = jax.vmap(jax.vmap(lambda w, v, i: w.at[i].add(v, **KNOWN)))
  deal = lambda x: x.reshape(*shards, -1)
  new = add(_blocks(W, shards), deal(values), deal(index))
  (p, q), (m, n) = shards, W.shape
  return new.reshape(p, q, m // p, n // q).swapaxes(1, 2).reshape(m, n)


def gather(W: jax.Array, index: jax.Array, shards: Shards = (1, 1)) -> jax.Array:
  """The entries (nnz,) of W (in, out) at the support.

  >>> print(gather(jnp.array([[5.0, 6.0], [7.0, 8.0]]), jnp.array([0, 3])))
  [5. 8.]
  """
  take = jax.vmap(jax.vmap(lambda w, i: w.at[i].get(**KNOWN)))
  return take(_blocks(W, shards), index.reshape(*shards, -1)).reshape(-1)


def _blocks(W: jax.Array, shards: Shards) -> jax.Array:
  """(in, out) as (p, q, entries of a block)."""
  # Not (p q, entries): a mesh may split both axes, and each of them in larger parts.
  (p, q), (m, n) = shards, W.shape
  return W.reshape(p, m // p, q, n // q).swapaxes(1, 2).reshape(p, q, -1)
