"""Flax linen shells: a dense layer whose kernel is any parameterization, and probes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lrjax.modules.nnx import Precision, applied, in_dtype
from lrjax.parameterizations.dense import dense
from lrjax.probes import Probed
from lrjax.types import Parameterization, Split

_DENSE = dense()


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
  kernel: Parameterization = _DENSE
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


@contextlib.contextmanager
def reads_probes() -> Iterator[None]:
  """Lets `nn.Dense` layers of any linen model take `lrjax.Probed` kernels.

  Within it `model.apply({'params': params}, ...)` works on the parameters that
  `lrjax.projected_value_and_grad` gives to a loss; layers whose kernels are arrays are left
  alone. Subclasses of `nn.Dense` and layers with a `dot_general` or dtypes of their own
  cannot take probes; keep them out by the `where` of the optimizer.

  Raises:
    ValueError: for such a layer, naming it.

  Examples:
    >>> import lrjax
    >>> model, x = nn.Dense(16), jnp.ones((3, 8))
    >>> params = model.init(jax.random.key(0), x)['params']
    >>> def loss(params):
    ...   with reads_probes():
    ...     return model.apply({'params': params}, x).sum()
    >>> tx = lrjax.galore(1e-2, rank=2)
    >>> _, grads = lrjax.projected_value_and_grad(loss, tx)(params, tx.init(params))
    >>> grads['kernel'].low.shape
    (2, 16)
  """

  def intercept(f: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    layer = context.module
    held = lambda name: nn.unbox(layer.get_variable('params', name))
    kernel = None
    if context.method_name == '__call__' and layer.has_variable('params', 'kernel'):
      kernel = held('kernel')
    if not isinstance(kernel, Probed) or type(layer) is Dense:
      return f(*args, **kwargs)
    path = '/'.join(layer.path)
    if type(layer) is not nn.Dense:
      raise ValueError(
        f'{path}: a {type(layer).__name__} cannot take a probed kernel; leave it out by'
        ' `where` of the optimizer'
      )
    plain_dense(layer, path)
    x = jnp.asarray(args[0] if args else kwargs['inputs'])
    dtype = layer.dtype or jnp.result_type(x, kernel.kernel)
    y = applied(_DENSE, Split(kernel), x, dtype, layer.precision)
    if not layer.use_bias:
      return y
    return y + jnp.broadcast_to(in_dtype(held('bias'), dtype), y.shape)

  with nn.intercept_methods(intercept):
    yield


def plain_dense(layer: nn.Dense, path: str) -> None:
  """Raises ValueError for an `nn.Dense` that multiplies or promotes in its own way."""
  for name in ('dot_general', 'dot_general_cls', 'promote_dtype'):
    if getattr(layer, name) is not getattr(nn.Dense, name):
      raise ValueError(
        f'{path}: its own `{name}` would not be used by a parameterized kernel; leave the'
        f' layer by a rule ({path!r}, None) ahead of the others'
      )
