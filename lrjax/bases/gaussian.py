"""Random sketches, drawn again from their key wherever they are used."""

from typing import Any

import jax
import jax.numpy as jnp

from lrjax.bases import orthonormal
from lrjax.checks import positive_int
from lrjax.types import Basis


def gaussian(rank: int, *, stored: bool = False) -> Basis:
  r"""A sketch P (d, r) of independent entries N(0, 1/r) that sees no gradient.

  .. math:: E \|P^\top G\|^2 = \|G\|^2, \quad E[P P^\top] = I

  Its columns are not orthonormal, so `up(down(g))` is no projection. A fit draws a new
  key; the numbers follow from seed, leaf path, position in the stack and step, the same
  on every device and after a checkpoint.

  Args:
    rank: r, number of columns. It is not clipped: a sketch may be wider than d.
    stored: keep P (`4 r d` bytes) instead of its key (8 bytes), which saves drawing
      `r d` normal numbers a step.

  Returns:
    A `Basis` whose state is the key's data, uint32[2], or P (d, r).

  >>> b = gaussian(4)
  >>> state = b.fit(jax.random.key(1), None, None)
  >>> state.nbytes, b.down(state, jnp.ones((16, 3))).shape
  (8, (4, 3))
  """
  rank = positive_int('rank', rank)

  def draw(key: jax.Array, d: int, dtype: Any) -> jax.Array:
    return jax.random.normal(key, (d, rank), dtype) * rank**-0.5

  def init(d: int, k: int, dtype: Any) -> jax.Array:
    key = jax.random.key(0)
    return draw(key, d, dtype) if stored else jax.random.key_data(key)

  def fit(key: jax.Array, g: Any, b: jax.Array) -> jax.Array:
    return draw(key, len(g), g.dtype) if stored else jax.random.key_data(key)

  def sketch(b: jax.Array, d: int, dtype: Any) -> jax.Array:
    return b if stored else draw(jax.random.wrap_key_data(b), d, dtype)

  return Basis(
    init,
    fit,
    down=lambda b, g: orthonormal.down(sketch(b, len(g), g.dtype), g),
    up=lambda b, low, d: sketch(b, d, low.dtype) @ low,
    matrix=lambda b, d: sketch(b, d, jnp.float32),
    orthonormal=False,
  )
