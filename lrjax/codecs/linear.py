"""Codecs by another float type, and by a linear scale for each column."""

from typing import Any

import jax.numpy as jnp

from lrjax.checks import floating
from lrjax.types import Codec


def cast(dtype: Any) -> Codec:
  """Stores in another floating-point type; decodes to float32 or wider.

  Args:
    dtype: what is stored, `jnp.bfloat16` for example.

  Returns:
    A `Codec`.

  Raises:
    TypeError: if `dtype` is not floating point.

  >>> c = cast(jnp.bfloat16)
  >>> c.decode(c.encode(jnp.float32(1.5)))
  Array(1.5, dtype=float32)
  """
  floating('dtype', dtype)
  wide = jnp.promote_types(dtype, jnp.float32)
  return Codec(lambda x: x.astype(dtype), lambda x: x.astype(wide))


def int8(axis: int = 0) -> Codec:
  """Stores 8-bit codes of each column's linear scale, rounded to the nearest.

  .. math:: c = \\mathrm{round}(127 x / s), \\quad s = \\max |x|

  Signed values of one size a column, such as a basis. Not for second moments: small
  entries would become zero and their updates infinite.

  Args:
    axis: the axis the scale is shared along.

  Returns:
    A `Codec` whose stored form is a dict of `codes` (int8, shape of x) and `scale`
    (float32, size 1 along `axis`); the error is at most `s / 254`.

  >>> c = int8()
  >>> print(c.decode(c.encode(jnp.array([[1.0], [-0.5]]))).round(2))
  [[ 1. ]
   [-0.5]]
  """

  def encode(x):
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    codes = jnp.round(127 * x / jnp.where(scale > 0, scale, 1))
    # A failed factorisation must stay visible: integers cannot hold a NaN, scales can.
    return dict(codes=codes.astype(jnp.int8), scale=scale.astype(jnp.float32))

  return Codec(encode, lambda c: c['codes'].astype(jnp.float32) * (c['scale'] / 127))
