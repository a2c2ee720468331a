"""Stochastic rounding to bfloat16 with the same random bits on every platform.

The bits of an entry are a hash of its position in the array and of two words drawn from
a key, so that no array of them exists, and blocks of any size see the same ones.
"""

from typing import Any

import jax
import jax.numpy as jnp


def words(key: jax.Array) -> jax.Array:
  """A row of two words (uint32) that stand for a key."""
  return jax.random.bits(key, (1, 2), jnp.uint32)


def random_bits(at: jax.Array, words: Any) -> jax.Array:
  """32 bits for each position `at` (uint32), by two rounds of a mixing function.

  The function is a permutation of 32-bit words in which each bit of the input changes
  each bit of the output about half of the time (C. Wellons, 'Prospecting for hash
  functions', 2018).

  >>> print(random_bits(jnp.arange(3, dtype='uint32'), jnp.zeros((1, 2), 'uint32')))
  [         0 ... ...]
  """
  return _mix(_mix(at ^ words[0, 0]) + words[0, 1])


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def positions(rows: jax.Array, cols: jax.Array, columns: int) -> jax.Array:
  """Positions (uint32) of entries of an array of `columns`; may wrap around.

  >>> print(positions(jnp.array([[1], [2]]), jnp.array([[3, 4]]), 10))
  [[13 14]
   [23 24]]
  """
  return (rows * columns + cols).astype(jnp.uint32)


def stochastic_bf16(x: jax.Array, bits: jax.Array) -> jax.Array:
  """Float32 to bfloat16, up with the probability of the fraction; 16 of the bits count.

  >>> x = jnp.full(4, 1 + 2**-9)
  >>> print(stochastic_bf16(x, jnp.array([0, 1, 2, 3], jnp.uint32) << 30))
  [1 1 1 1.00781]
  """
  raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)
  cut = jax.lax.bitcast_convert_type(raw & jnp.uint32(0xFFFF0000), jnp.float32)
  # What is not finite must not be carried over into other values.
  return jnp.where(jnp.abs(x) < jnp.inf, cut, x).astype(jnp.bfloat16)
