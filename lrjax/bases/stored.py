"""A basis kept in another form than it is used in."""

from typing import Any

import jax
import jax.numpy as jnp

from lrjax.types import Basis, Codec


def stored_as(basis: Basis, codec: Codec) -> Basis:
  """`basis` with every array of its state stored by `codec`.

  Args:
    basis: any basis that keeps floats; keys and indices are small and exact as they are.
    codec: see `lrjax.codecs`.

  Returns:
    A `Basis` that decodes before each use and encodes after each fit. Its `init` raises
    TypeError for other states.

  >>> import jax.numpy as jnp, lrjax
  >>> b = stored_as(lrjax.svd(2), lrjax.cast(jnp.bfloat16))
  >>> b.init(4, 6, jnp.float32).dtype
  dtype(bfloat16)
  """
  decode, encode = codec.decode, codec.encode
  matrix, change, sketch = basis.matrix, basis.change, basis.sketch
  if sketch is not None:
    start, finish = sketch.start, sketch.finish
    sketch = sketch._replace(
      start=lambda key, b, d, k: start(key, decode(b), d, k),
      finish=lambda y, b: encode(finish(y, decode(b))),
    )

  def init(d: int, k: int, dtype: Any) -> Any:
    b = basis.init(d, k, dtype)
    for x in jax.tree.leaves(b):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
          f'a codec would spoil the {x.dtype} numbers (keys, indices) this basis keeps;'
          f' use it as it is, or a basis that keeps P'
        )
    return encode(b)

  return Basis(
    init=init,
    fit=lambda key, g, b: encode(basis.fit(key, g, decode(b))),
    down=lambda b, g: basis.down(decode(b), g),
    up=lambda b, low, d: basis.up(decode(b), low, d),
    matrix=None if matrix is None else lambda b, d: matrix(decode(b), d),
    change=None if change is None else lambda a, b, d: change(decode(a), decode(b), d),
    orthonormal=basis.orthonormal,
    per_column=basis.per_column,
    sketch=sketch,
  )
