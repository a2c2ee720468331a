"""Flax NNX shells: a dense layer whose kernel is any parameterization."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lrjax.parameterizations.dense import dense
from lrjax.types import Parameterization, PyTree, Split

_DENSE = dense()


class Fixed(nnx.Variable):
  """An array of a kernel that nobody differentiates: an index, a frozen basis."""


class Dense(nnx.Module):
  """y = apply(kernel, x) + bias, with the kernel stored as its parameterization says.

  A bare-array train part is one `nnx.Param` at `kernel`; a dict is one `nnx.Param` per
  entry at `kernel/<name>`. Fixed arrays are `Fixed` variables at `fixed/<name>`.

  Args:
    in_features: size of the last axis of the input.
    out_features: size of the last axis of the output.
    kernel: how the weight is drawn, stored and applied.
    use_bias: add a bias, zero at the start.
    dtype: what inputs and floating arrays are cast to; None computes as they come.
    param_dtype: dtype of the stored arrays.
    rngs: its `params` stream draws the kernel.

  Examples:
    >>> from flax import nnx
    >>> Dense(4, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 4))).shape
    (2, 3)
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    kernel: Parameterization = _DENSE,
    use_bias: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    split = kernel.init(rngs.params(), (in_features, out_features), param_dtype)
    if isinstance(split.train, Mapping):
      self.kernel = nnx.Dict({k: nnx.Param(v) for k, v in split.train.items()})
    else:
      self.kernel = nnx.Param(split.train)
    self.fixed = nnx.Dict({k: Fixed(v) for k, v in split.fixed.items()})
    self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None
    self.dtype = dtype
    self.parameterization = kernel

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., in) to (..., out)."""
    cast = lambda a: in_dtype(a, self.dtype)
    y = self.parameterization.apply(jax.tree.map(cast, self.arrays()), cast(x))
    if self.bias is None:
      return y
    return y + jnp.broadcast_to(cast(self.bias[...]), y.shape)

  def arrays(self) -> Split:
    """The kernel's arrays in their stored dtype."""
    values = lambda variables: {k: v[...] for k, v in variables.items()}
    dict_kernel = isinstance(self.kernel, nnx.Dict)
    train = values(self.kernel) if dict_kernel else self.kernel[...]
    return Split(train, values(self.fixed))


def in_dtype(a: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
  """`a` in `dtype`, if one is given and `a` is floating; indices stay integers."""
  floating = jnp.issubdtype(a.dtype, jnp.floating)
  return a.astype(dtype) if dtype is not None and floating else a


def split(model: nnx.Module) -> tuple[Any, PyTree, PyTree]:
  """Splits a model into its static part and two plain trees of arrays.

  `nnx.merge(graphdef, params, rest)` is the model again. The trees are nested dicts
  whose paths are the model's (`layers/attn/q/kernel`), ready for `jax.grad`, optax and
  checkpoints; `nnx.split` gives the same with `nnx.State` and a trailing `/value`.

  Args:
    model: any NNX module; one made by `nnx.eval_shape` gives ShapeDtypeStructs.

  Returns:
    `(graphdef, params, rest)`: `params` holds every `nnx.Param`, `rest` all other
    variables, such as `Fixed` ones.

  Examples:
    >>> from flax import nnx
    >>> graphdef, params, rest = split(Dense(4, 3, rngs=nnx.Rngs(0)))
    >>> loss = lambda params: nnx.merge(graphdef, params, rest)(jnp.ones(4)).sum()
    >>> jax.tree.map(jnp.shape, jax.grad(loss)(params))
    {'kernel': (4, 3)}
  """
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def kernels(model: nnx.Module) -> dict[str, Parameterization]:
  """The plan of a model: path of each `Dense` in it -> its parameterization.

  Args:
    model: any NNX module; one made by `nnx.eval_shape` will do.

  Returns:
    What `lrjax.run_events`, `lrjax.export` and `lrjax.convert` ask for.

  Examples:
    >>> from flax import nnx
    >>> list(kernels(nnx.Sequential(Dense(4, 3, rngs=nnx.Rngs(0)))))
    ['layers/0']
  """
  return {
    '/'.join(map(str, path)): module.parameterization
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Dense)
  }
