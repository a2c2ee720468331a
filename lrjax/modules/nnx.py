"""Flax NNX shells: a dense layer whose kernel is any parameterization."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lrjax.parameterizations.dense import dense
from lrjax.probes import Probed
from lrjax.types import Parameterization, PyTree, Split

Precision = jax.lax.PrecisionLike

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
    precision: of its matrix products, as in `nnx.Linear`.
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
    precision: Precision = None,
    rngs: nnx.Rngs,
  ):
    self.in_features, self.out_features = in_features, out_features
    self.dtype, self.precision = dtype, precision
    self.hold(kernel, kernel.init(rngs.params(), self.shape, param_dtype))
    self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None

  @property
  def shape(self) -> tuple[int, int]:
    """(in, out) of one kernel, whatever stack the layer holds."""
    return self.in_features, self.out_features

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., in) to (..., out)."""
    arrays, axes = self.arrays(), self.parameterization.axes
    for name, a in arrays.fixed.items():
      if a.ndim != len(axes.get(name, a.shape)):
        raise ValueError(
          f'the fixed array {name!r} has shape {a.shape} in a layer of one kernel: its'
          ' stack was not split. Where nnx.vmap or nnx.scan names an axis for nnx.Param,'
          ' lrjax.modules.nnx.Fixed needs the same: StateAxes({(nnx.Param, Fixed): 0})'
        )
    y = applied(self.parameterization, arrays, x, self.dtype, self.precision)
    if self.bias is None:
      return y
    return y + jnp.broadcast_to(in_dtype(self.bias[...], self.dtype), y.shape)

  def hold(self, kernel: Parameterization, split: Split) -> None:
    """Takes the arrays of a kernel, one or a stack, as the layer's own."""
    variables = lambda make, arrays: nnx.Dict({k: make(v) for k, v in arrays.items()})
    dict_kernel = isinstance(split.train, Mapping)
    self.kernel: Any = (
      variables(nnx.Param, split.train) if dict_kernel else nnx.Param(split.train)
    )
    self.fixed = variables(Fixed, split.fixed)
    self.parameterization = kernel

  def arrays(self) -> Split:
    """The kernel's arrays in their stored dtype."""
    values = lambda variables: {k: v.get_value() for k, v in variables.items()}
    dict_kernel = isinstance(self.kernel, nnx.Dict)
    train = values(self.kernel) if dict_kernel else self.kernel.get_value()
    return Split(train, values(self.fixed))


def in_dtype(a: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
  """`a` in `dtype`, if one is given and `a` is floating; indices stay integers."""
  floating = jnp.issubdtype(a.dtype, jnp.floating)
  return a.astype(dtype) if dtype is not None and floating else a


def applied(
  kernel: Parameterization,
  arrays: Split,
  x: jax.Array,
  dtype: jax.typing.DTypeLike | None,
  precision: Precision,
) -> jax.Array:
  """The kernel applied to x, both cast to `dtype`, with products of a precision."""
  cast = lambda a: in_dtype(a, dtype)
  with _at(precision):
    arrays = jax.tree.map(cast, arrays, is_leaf=lambda a: isinstance(a, Probed))
    return kernel.apply(arrays, cast(x))


def _at(precision: Precision) -> contextlib.AbstractContextManager:
  """Where matrix products have a precision; None leaves what the caller has set."""
  if precision is None:
    return contextlib.nullcontext()
  pair = precision if isinstance(precision, tuple) else (precision, precision)
  first, second = (
    p.name.lower() if isinstance(p, jax.lax.Precision) else p for p in pair
  )
  if first != second:
    raise ValueError(f'both operands must have one precision, got {precision}')
  return jax.default_matmul_precision(first)


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
