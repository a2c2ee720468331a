"""Flax linen shell: a dense layer whose kernel is any parameterization."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lrjax.modules.nnx import in_dtype
from lrjax.parameterizations.dense import dense
from lrjax.types import Parameterization, Split


class Dense(nn.Module):
  """y = apply(kernel, x), with the kernel stored as its parameterization says.

  The train part is the leaf (or dict) `kernel` of the collection `params`, the fixed
  part the dict `fixed` of the collection `fixed`. Under `nn.scan` or `nn.vmap` both
  collections must be listed in `variable_axes`.

  Attributes:
    features: size of the last axis of the output.
    kernel: how the weight is drawn, stored and applied.
    dtype: what inputs and floating arrays are cast to; None computes as they come.
    param_dtype: dtype of the stored arrays.

  Examples:
    >>> variables = Dense(3).init(jax.random.key(0), jnp.ones((2, 4)))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'kernel': (4, 3)}}
  """

  features: int
  kernel: Parameterization = dense()
  dtype: jax.typing.DTypeLike | None = None
  param_dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., in) to (..., out)."""
    shape = (x.shape[-1], self.features)
    draw = lambda key: self.kernel.init(key, shape, self.param_dtype)
    # One key for both parts, which may depend on each other.
    initializing = self.is_initializing()
    key = self.make_rng('params') if initializing else jax.random.key(0)
    train = self.param('kernel', lambda _: draw(key).train)
    fixed = {}
    if jax.eval_shape(draw, key).fixed:
      fixed = self.variable('fixed', 'fixed', lambda: draw(key).fixed).value
    cast = lambda a: in_dtype(a, self.dtype)
    return self.kernel.apply(jax.tree.map(cast, Split(train, fixed)), cast(x))
