"""Low-rank moments divided over the devices that share a matrix."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lrjax.codecs.dynamic import Dynamic8, block_of
from lrjax.specs import check_spec, merged, names
from lrjax.types import MatrixTransform
from lrjax.views import LeafPlan, leaf_path


class _Division(NamedTuple):
  """The mesh and the specs of parameters, by path, under which moments are divided."""

  mesh: Mesh | AbstractMesh
  specs: Mapping[str, PartitionSpec]


_division: contextvars.ContextVar = contextvars.ContextVar('division', default=None)
_leaf: contextvars.ContextVar = contextvars.ContextVar('leaf', default=None)


def divided(
  tx: optax.GradientTransformation, params: Any, specs: Any, mesh: Mesh | AbstractMesh
) -> optax.GradientTransformationExtraArgs:
  r"""An optimizer whose low-rank moments are divided over all devices of a matrix.

  .. math:: R = P^\top G\ \text{summed}, \quad U_i = \mathrm{inner}(R_i), \quad
    U = (U_1, \ldots, U_n)\ \text{gathered}

  A mesh axis that splits the compressed side (fsdp, often) splits P, but no axis of the
  moments (r, k): every device along it holds them whole. Here each holds, and computes,
  the columns i that are its own, and gathers the others' updates (r, k) once a step. So
  does every method made by `lrjax.low_rank`, whatever else it keeps or reads (Fira,
  FRUGAL, APOLLO, error feedback). Use it where such an axis is longer than a few devices.
  `lrjax.projected_value_and_grad(loss, tx)` with the result for `tx` hands out R as these
  columns.

  The numbers are the same; to the bit where the compiler computes them in the same
  order, as in the tests of GaLore, Fira, FRUGAL and APOLLO. A refresh that rotates
  moments multiplies fewer columns at a time, and may round otherwise in the last bit.

  Moments stay whole where k does not divide, where a block of 8-bit ones would lie on
  several devices (r k / devices must divide by the block), with bases that mix columns
  (`lrjax.two_sided`), and for rules of their own: LDAdam, Dion, Dion2 and Trion keep an
  array (d, k) anyway, which is split along both sides as it is; Flora's momentum.

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


@contextlib.contextmanager
def at_leaf(plan: LeafPlan, own: bool) -> Iterator[None]:
  """Tells `by_columns` of which leaf the matrix is, and whether low is placed already."""
  token = _leaf.set((plan, own))
  try:
    yield
  finally:
    _leaf.reset(token)


def by_columns(f: Callable, low: jax.Array, inner: Any) -> tuple:
  """(low, u, state) of `f(low) -> (u, state)`, the step of an inner optimizer.

  Within `divided` each device takes the step for columns of its own; `u` (r, k) comes back
  on all of them, and so does `low` but where it came as these columns.

  Args:
    f: the step.
    low: (r, k), column j of column j of the matrix.
    inner: state of the inner optimizer.
  """
  plan, placed = _leaf.get() or (None, False)
  specs = None if plan is None else low_specs(inner, plan)
  if specs is None:
    return low, *f(low)
  # A stack is mapped over, and the constraints leave its axes as they are.
  whole, own = (PartitionSpec(*spec[-2:]) for spec in specs)
  if not placed:
    # First whole: a sum of all devices, then a part of it; left to itself the partitioner
    # made arrays whole on the way.
    low = _constrained(low, whole)
  u, inner = f(_constrained(low, own))
  return low, _constrained(_constrained(u, own), whole), inner


def low_specs(inner: Any, plan: LeafPlan) -> tuple[PartitionSpec, PartitionSpec] | None:
  """The specs of (*stack, r, k) whole and divided; None where they are not divided.

  Args:
    inner: state of the inner optimizer of one matrix; it may be abstract.
    plan: of its leaf.
  """
  division = _division.get()
  spec = None if division is None else division.specs.get(plan.path)
  # Where only some layers train, a leaf has fewer axes than its parameter.
  if spec is None or len(spec) > len(plan.shape):
    return None
  assert plan.axes is not None
  stack, ins, outs = plan.axes
  full = (*spec, *(None,) * (len(plan.shape) - len(spec)))
  compressed, other = (ins, outs) if plan.side == 'in' else (outs, ins)
  d, k = names(merged(full, compressed)), merged(full, other)
  both = (*names(k), *d)
  size = lambda axes: math.prod(division.mesh.shape[a] for a in axes)
  if size(d) == 1 or plan.matrix[1] % size(both) or _cuts_blocks(inner, size(both)):
    return None
  front = [full[a] for a in stack]
  return PartitionSpec(*front, None, k), PartitionSpec(*front, None, both)


def own_columns(rule: MatrixTransform, plan: LeafPlan) -> NamedSharding | None:
  """Each device's own columns of P'G (*stack, r, k), within `divided`; None: all."""
  if _division.get() is None:
    return None
  one = jax.eval_shape(rule.init, jax.ShapeDtypeStruct(plan.matrix, jnp.float32))
  specs = low_specs(getattr(one, 'inner', None), plan)
  return None if specs is None else NamedSharding(_division.get().mesh, specs[1])


def _cuts_blocks(inner: Any, parts: int) -> bool:
  """Whether a block of 8-bit moments would lie on several devices."""
  is_stored = lambda x: isinstance(x, Dynamic8)
  stored = filter(is_stored, jax.tree.leaves(inner, is_leaf=is_stored))
  return any(x.codes.size % (parts * block_of(x)) for x in stored)


def _constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, NamedSharding(_division.get().mesh, spec))
