"""The parameter tree of Llama: where each leaf lives on a mesh, and both layouts."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from lrjax.parameterizations.dense import dense
from lrjax.types import Parameterization, PyTree
from lrjax.views import VECTORS

_DENSE = dense()

# Mesh axes of a kernel's (in, out): what a layer splits by `tensor` the next one sums.
_KERNELS = dict.fromkeys(('q', 'k', 'v', 'gate', 'up'), ('fsdp', 'tensor'))
_KERNELS |= dict.fromkeys(('o', 'down', 'glu'), ('tensor', 'fsdp'))


def param_specs(params: PyTree, kernel: Parameterization = _DENSE) -> PyTree:
  """Where each parameter of a Llama lives on a mesh with axes `fsdp` and `tensor`.

  The embedding is (vocabulary: tensor, hidden: fsdp); the head and q, k, v, gate, up
  are (in: fsdp, out: tensor); o, down and the glu of S4D are (in: tensor, out: fsdp).
  State spaces are split by feature: tensor. Norms are whole,
  and so is the leading axis of stacked layers. The arrays of a parameterization follow
  its `axes`.

  Args:
    params: either plain tree of `lrjax.modules.nnx.split(model)`, params or rest;
      abstract leaves will do.
    kernel: the parameterization the model was built with.

  Returns:
    The same tree of PartitionSpecs, one entry per axis.

  Raises:
    ValueError: for a leaf that is not Llama's, or that `kernel.axes` does not describe.

  Examples:
    >>> leaf = jax.ShapeDtypeStruct((2, 8, 8), 'float32')
    >>> param_specs({'layers': {'attn': {'q': {'kernel': leaf}}}})
    {'layers': {'attn': {'q': {'kernel': P(None, 'fsdp', 'tensor')}}}}
  """

  def spec(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    # The first layer of a cross-layer model is dense.
    axes = _mesh_axes(name, (_DENSE if name.startswith('first/') else kernel).axes)
    whole = (None,) * (len(leaf.shape) - len(axes))
    return PartitionSpec(*whole, *axes)

  return jax.tree_util.tree_map_with_path(spec, params)


def _mesh_axes(name, kernel_axes):
  """The mesh axes of a leaf's last axes, by its path."""
  # first, layers and layers/0 all have the leaf attn/q/kernel.
  match re.sub(r'^(first|layers(/\d+)?)/', '', name).split('/'):
    case ['embed', 'embedding']:
      return 'tensor', 'fsdp'
    case ['lm_head', 'kernel']:
      return 'fsdp', 'tensor'
    case ['attn_norm' | 'mlp_norm' | 'norm', 'scale'] | ['cross', _]:
      return ()
    case ['attn', 'ssm', 'log_dt' | 'skip']:
      return ('tensor',)
    case ['attn', 'ssm', array] if array in VECTORS:
      return 'tensor', None
    case ['attn' | 'mlp', role, 'kernel' | 'fixed', *leaf] if role in _KERNELS:
      place = dict(zip(('in', 'out'), _KERNELS[role]))
      axes = kernel_axes.get('/'.join(leaf))
      if axes is not None:
        return tuple(place.get(axis) for axis in axes)
      raise ValueError(
        f'{name}: the parameterization describes axes of {sorted(kernel_axes)} only; '
        'pass the `kernel` the model was built with'
      )
  raise ValueError(f'{name} is not a parameter of Llama')


def shard_batch(x: jax.Array) -> jax.Array:
  """Splits axis 0 over `data` and `fsdp`, those of them that the mesh in context has.

  Without it XLA keeps activations where the parameters are, and every device of `fsdp`
  computes the whole batch.

  Args:
    x: (B, ...); XLA pads where the devices along those axes do not divide B.

  Returns:
    x, placed; unchanged where no mesh is set or the axes are not of type Auto.
  """
  mesh = jax.sharding.get_abstract_mesh()
  auto = dict(zip(mesh.axis_names, mesh.axis_types))
  axes = tuple(a for a in ('data', 'fsdp') if auto.get(a) == AxisType.Auto)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def stack_layers(params: PyTree) -> PyTree:
  """`layers/<i>/...` to `layers/...` with a leading axis, as under `scan_layers`.

  Args:
    params: plain tree of a model without scan.

  Returns:
    The plain tree of the same model with scan.
  """
  layers = [params['layers'][i] for i in range(len(params['layers']))]
  return params | {'layers': jax.tree.map(lambda *a: jnp.stack(a), *layers)}


def unstack_layers(params: PyTree) -> PyTree:
  """The inverse of `stack_layers`."""
  layers = params['layers']
  count = jax.tree.leaves(layers)[0].shape[0]
  row = lambda i: jax.tree.map(lambda a: a[i], layers)
  return params | {'layers': {i: row(i) for i in range(count)}}
