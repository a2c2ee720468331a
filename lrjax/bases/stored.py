"""A basis kept in another form than it is used in."""

import jax

from lrjax.types import Basis, Codec


def stored_as(basis: Basis, codec: Codec) -> Basis:
  """`basis` with every array of its state stored by `codec`.

  Args:
    basis: any basis.
    codec: see `lrjax.codecs`.

  Returns:
    A `Basis` that decodes before each use and encodes after each fit.

  >>> import jax.numpy as jnp, lrjax
  >>> b = stored_as(lrjax.svd(2), lrjax.cast(jnp.bfloat16))
  >>> b.init(4, 6, jnp.float32).dtype
  dtype(bfloat16)
  """
  decode, encode = codec.decode, codec.encode
  matrix = basis.matrix
  return Basis(
    init=lambda d, k, dtype: encode(basis.init(d, k, dtype)),
    fit=lambda key, g, b: encode(basis.fit(key, g, decode(b))),
    down=lambda b, g: basis.down(decode(b), g),
    up=lambda b, low, d: basis.up(decode(b), low, d),
    matrix=None if matrix is None else _matrix_of(basis, codec),
  )


def _matrix_of(basis: Basis, codec: Codec):
  def matrix(b, d: int) -> jax.Array:
    assert basis.matrix is not None
    return basis.matrix(codec.decode(b), d)

  return matrix
