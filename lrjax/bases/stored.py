"""A basis kept in another form than it is used in."""

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
  matrix, change = basis.matrix, basis.change
  return Basis(
    init=lambda d, k, dtype: encode(basis.init(d, k, dtype)),
    fit=lambda key, g, b: encode(basis.fit(key, g, decode(b))),
    down=lambda b, g: basis.down(decode(b), g),
    up=lambda b, low, d: basis.up(decode(b), low, d),
    matrix=None if matrix is None else lambda b, d: matrix(decode(b), d),
    change=None if change is None else lambda a, b, d: change(decode(a), decode(b), d),
    orthonormal=basis.orthonormal,
  )
