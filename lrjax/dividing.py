"""Low-rank moments divided over the devices that share a matrix."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lrjax.specs import check_spec, merged, names
from lrjax.types import MatrixTransform
from lrjax.views import LeafPlan, leaf_path


class _Division(NamedTuple):
  """The mesh and the specs of parameters, by path, under which moments are divided."""

  mesh: Mesh | AbstractMesh
  specs: Mapping[str, PartitionSpec]


_division: contextvars.ContextVar = contextvars.ContextVar('division', default=None)


def divided(
  tx: optax.GradientTransformation, params: Any, specs: Any, mesh: Mesh | AbstractMesh
) -> optax.GradientTransformationExtraArgs:
  r"""An optimizer whose low-rank moments are divided over all devices of a matrix.

  .. math:: R = P^\top G\ \text{summed}, \quad U_i = \mathrm{inner}(R_i), \quad
    U = (U_1, \ldots, U_n)\ \text{gathered}

  A mesh axis that splits the compressed side (fsdp, often) splits P, but no axis of the
  moments (r, k): every device along it holds them whole. Here each holds, and computes,
  the columns i that are its own, and gathers the others' updates (r, k) once a step. The
  numbers are the same to the bit. Use it where such an axis is longer than a few devices.

  Moments stay whole where k does not divide, where they are kept in 8 bits, and for
  methods that need more than :math:`P^\top G` (Fira, FRUGAL, APOLLO, LDAdam, ...).

  Args:
    tx: the transformation.
    params: the tree it is used on; arrays or `jax.ShapeDtypeStruct`s.
    specs: the tree of `PartitionSpec`s of the params.
    mesh: with axes of type Auto.

  Returns:
    The transformation, to be used in the place of `tx`, for `lrjax.state_specs` too.

  Raises:
    ValueError: if a spec does not fit, or a mesh axis is not Auto.

  >>> import lrjax
  >>> mesh = jax.sharding.AbstractMesh(
  ...   (4, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2
  ... )
  >>> params = {'kernel': jax.ShapeDtypeStruct((64, 128), 'float32')}
  >>> specs = {'kernel': PartitionSpec('fsdp', 'tensor')}
  >>> tx = divided(lrjax.scale_by_galore(rank=8), params, specs, mesh)
  >>> tuple(lrjax.state_specs(tx, params, specs, mesh).slots['kernel'].state.inner.mu)
  (None, ('tensor', 'fsdp'))
  """
  if {*mesh.axis_types} != {AxisType.Auto}:
    raise ValueError(
      f'moments are divided over axes of type Auto; the mesh has {mesh.axis_types}'
    )
  by_path = {}
  for (path, x), spec in zip(
    jax.tree.leaves_with_path(params), jax.tree.structure(params).flatten_up_to(specs)
  ):
    check_spec(leaf_path(path), x.shape, spec, mesh)
    by_path[leaf_path(path)] = spec
  tx = optax.with_extra_args_support(tx)

  @contextlib.contextmanager
  def dividing() -> Iterator[None]:
    token = _division.set(_Division(mesh, by_path))
    try:
      yield
    finally:
      _division.reset(token)

  def init(params: Any) -> Any:
    with dividing():
      return tx.init(params)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple:
    with dividing():
      return tx.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)


def divide_low(x: jax.Array, slot: Any, rule: MatrixTransform, plan: LeafPlan) -> Any:
  """Each device's own columns of P'G (*stack, r, k), within `divided`."""
  low = low_specs(slot, rule, plan)
  # First whole: a sum of all devices, then a part of it; left to itself the partitioner
  # made arrays whole on the way.
  return x if low is None else _constrained(_constrained(x, low[0]), low[1])


def gather_low(u: jax.Array, slot: Any, rule: MatrixTransform, plan: LeafPlan) -> Any:
  """The columns of all devices, within `divided`."""
  low = low_specs(slot, rule, plan)
  return u if low is None else _constrained(_constrained(u, low[1]), low[0])


def _constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, NamedSharding(_division.get().mesh, spec))


def low_specs(
  slot: Any, rule: MatrixTransform, plan: LeafPlan
) -> tuple[PartitionSpec, PartitionSpec] | None:
  """The specs of (*stack, r, k) whole and divided; None where they are not divided."""
  division = _division.get()
  spec = None if division is None else division.specs.get(plan.path)
  is_coded = lambda x: hasattr(x, 'codes')
  coded = any(map(is_coded, jax.tree.leaves(slot, is_leaf=is_coded)))
  # Where only some layers train, a leaf has fewer axes than its parameter.
  if (
    spec is None
    or rule.steps is None
    or not rule.steps.thin
    or coded
    or len(spec) > len(plan.shape)
  ):
    return None
  assert plan.axes is not None
  stack, ins, outs = plan.axes
  full = (*spec, *(None,) * (len(plan.shape) - len(spec)))
  compressed, other = (ins, outs) if plan.side == 'in' else (outs, ins)
  d, k = names(merged(full, compressed)), merged(full, other)
  both = (*names(k), *d)
  size = lambda axes: math.prod(division.mesh.shape[a] for a in axes)
  if size(d) == 1 or plan.matrix[1] % size(both):
    return None
  front = [full[a] for a in stack]
  return PartitionSpec(*front, None, k), PartitionSpec(*front, None, both)
