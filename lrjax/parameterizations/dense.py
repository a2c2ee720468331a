"""The plain full-rank kernel, as a parameterization."""

import jax
import jax.numpy as jnp

from lrjax.parameterizations.factors import value
from lrjax.probes import product
from lrjax.types import Parameterization, Split


@value
def dense(
  initializer: jax.nn.initializers.Initializer | None = None,
) -> Parameterization:
  """A kernel stored as it is: y = x W.

  `Split.train` is the bare array W, so its path in a model is `.../kernel`.

  Args:
    initializer: `(key, shape, dtype) -> W (in, out)`; None draws N(0, 0.02^2).

  Returns:
    A Parameterization.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> W = dense().init(jax.random.key(0), (4, 3), jnp.float32)
    >>> dense().apply(W, jnp.ones((2, 4))).shape
    (2, 3)
  """
  draw = initializer or jax.nn.initializers.normal(0.02)
  return Parameterization(
    init=lambda key, shape, dtype: Split(draw(key, shape, dtype)),
    from_dense=lambda key, W: (Split(jnp.asarray(W)), jnp.float32(0)),
    apply=lambda split, x: product(x, split.train),
    materialize=lambda split: split.train,
    axes={'': ('in', 'out')},
  )
