"""Flax linen shell: a dense layer whose kernel is any parameterization."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lrjax.modules.nnx import Precision, applied
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
    precision: of its matrix products, as in `nn.Dense`.

  Examples:
    >>> variables = Dense(3).init(jax.random.key(0), jnp.ones((2, 4)))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'kernel': (4, 3)}}
  """

  features: int
  kernel: Parameterization = dense()
  dtype: jax.typing.DTypeLike | None = None
  param_dtype: jax.typing.DTypeLike = jnp.float32
  precision: Precision = None

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
      self._check_fixed()
      fixed = self.variable('fixed', 'fixed', lambda: draw(key).fixed).value
    return applied(self.kernel, Split(train, fixed), x, self.dtype, self.precision)

  def _check_fixed(self) -> None:
    reached = self.is_mutable_collection('fixed') or self.has_variable('fixed', 'fixed')
    if not reached:
      raise ValueError(
        f"{'/'.join(self.path)}: the collection 'fixed' does not reach this layer, whose"
        " kernel has fixed arrays. Give it to apply beside 'params', and list it wherever"
        " collections are listed: variable_axes={'params': 0, 'fixed': 0} of nn.scan and"
        " nn.vmap, variables=['params', 'fixed'] of nn.remat"
      )
