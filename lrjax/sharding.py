"""Where optimizer state lives on a mesh, derived from where the parameters live."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lrjax.types import MatrixTransform
from lrjax.views import LeafPlan, leaf_path

# Sizes no state has by chance: an axis as long as one of them follows that side.
_D, _K = 1_000_003, 2_000_003


class _Division(NamedTuple):
  """The mesh and the specs of parameters, by path, under which moments are divided."""

  mesh: Mesh
  specs: Mapping[str, PartitionSpec]


_division: contextvars.ContextVar = contextvars.ContextVar('division', default=None)


def divided(
  tx: optax.GradientTransformation, params: Any, specs: Any, mesh: Mesh
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

  >>> mesh = jax.make_mesh((1, 1), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  >>> params = {'kernel': jax.ShapeDtypeStruct((64, 128), jnp.float32)}
  >>> specs = {'kernel': PartitionSpec('fsdp', 'tensor')}
  >>> import lrjax
  >>> tx = divided(lrjax.scale_by_galore(rank=8), params, specs, mesh)
  >>> tuple(state_specs(tx, params, specs, mesh).slots['kernel'].state.inner.mu)
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


def state_specs(
  tx: optax.GradientTransformation, params: Any, specs: Any, mesh: Mesh
) -> Any:
  """Partition specs of `tx.init(params)`, for any optax transformation.

  In a low-rank state each axis follows the side of the matrix it runs along: a basis
  (d, r) is split like the compressed side, moments (r, k) like the other one; stack
  axes stay as they are and rank axes are never split.

  Args:
    tx: the transformation.
    params: arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.
    specs: the tree of `PartitionSpec`s of the params.
    mesh: the mesh whose axes the specs name; its axis types do not matter.

  Returns:
    The state's tree with a `PartitionSpec` for each array.

  Raises:
    ValueError: if a spec names an unknown axis or one that does not divide its
      dimension; the leaf's path, the axis and the sizes are named.

  >>> mesh = jax.make_mesh((1, 1), ('fsdp', 'tensor'))
  >>> params = {'kernel': jax.ShapeDtypeStruct((64, 128), jnp.float32)}
  >>> specs = {'kernel': PartitionSpec('fsdp', 'tensor')}
  >>> import lrjax
  >>> out = state_specs(lrjax.scale_by_galore(rank=8), params, specs, mesh)
  >>> tuple(out.slots['kernel'].state.basis)
  ('fsdp', None)
  """
  # Explicit axes make jax itself carry every placement through `init`.
  explicit = AbstractMesh(
    tuple(mesh.shape.values()),
    tuple(mesh.shape),
    axis_types=(AxisType.Explicit,) * len(mesh.shape),
  )

  def typed(path: Any, x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    check_spec(leaf_path(path), x.shape, spec, mesh)
    sharding = NamedSharding(explicit, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  with jax.sharding.use_abstract_mesh(explicit):
    state = jax.eval_shape(tx.init, jax.tree.map_with_path(typed, params, specs))
  return jax.tree.map(lambda x: _spec(x) or PartitionSpec(), state)


def check_spec(
  path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
  """Raises ValueError where a spec does not fit a shape on a mesh."""
  if len(spec) > len(shape):
    raise ValueError(f'leaf {path!r} of shape {shape}: {spec} names too many axes')
  for size, names in zip(shape, spec):
    parts = 1
    for name in _names(names):
      if name not in mesh.shape:
        raise ValueError(
          f'leaf {path!r}: no mesh axis {name!r}; the mesh has {dict(mesh.shape)}'
        )
      parts *= mesh.shape[name]
    if size % parts:
      raise ValueError(
        f'leaf {path!r} of shape {shape}: dimension {size} is not divisible by'
        f' {parts}, the size of mesh axis {names!r}'
      )


def place_slot(slot: Any, rule: MatrixTransform, plan: LeafPlan, x: Any) -> Any:
  """Places the stacked state of a leaf by role, where the leaf has explicit axes."""
  spec = _spec(x)
  if spec is None:
    return slot
  assert plan.axes is not None
  stack, ins, outs = plan.axes
  full = (*spec, *(None,) * (len(plan.shape) - len(spec)))
  first, second = (ins, outs) if plan.side == 'in' else (outs, ins)
  side = lambda axes: _merged(full, axes)
  by_size = {_D: side(first), _K: side(second)}
  probe = jax.eval_shape(lambda: rule.init(jax.ShapeDtypeStruct((_D, _K), x.dtype)))
  low = _low_specs(slot, rule, plan)

  def place(x: jax.Array, one: Any) -> jax.Array:
    # A moment too small to be stored in 8 bits is large enough in the probe.
    one = getattr(one, 'codes', one)
    roles = [by_size.get(n) for n in one.shape]
    if low is not None and _D not in one.shape:
      roles = [low[1][-1] if n == _K else role for n, role in zip(one.shape, roles)]
    return jax.sharding.reshard(x, PartitionSpec(*(full[a] for a in stack), *roles))

  whole = jax.ShapeDtypeStruct((), jnp.int32)
  return jax.tree.map(place, slot, type(slot)(whole, probe))


def divide_low(x: jax.Array, slot: Any, rule: MatrixTransform, plan: LeafPlan) -> Any:
  """Each device's own columns of P'G (*stack, r, k), within `divided`."""
  low = _low_specs(slot, rule, plan)
  # First whole: a sum of all devices, then a part of it; left alone the partitioner may
  # send gradients instead.
  return x if low is None else _constrained(_constrained(x, low[0]), low[1])


def gather_low(u: jax.Array, slot: Any, rule: MatrixTransform, plan: LeafPlan) -> Any:
  """The columns of all devices, within `divided`."""
  low = _low_specs(slot, rule, plan)
  return u if low is None else _constrained(_constrained(u, low[1]), low[0])


def _constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, NamedSharding(_division.get().mesh, spec))


def _low_specs(
  slot: Any, rule: MatrixTransform, plan: LeafPlan
) -> tuple[PartitionSpec, PartitionSpec] | None:
  """The specs of (*stack, r, k) whole and divided; None where they are not divided."""
  division = _division.get()
  spec = None if division is None else division.specs.get(plan.path)
  is_coded = lambda x: hasattr(x, 'codes')
  coded = any(map(is_coded, jax.tree.leaves(slot, is_leaf=is_coded)))
  # Where only some layers train, a leaf has fewer axes than its parameter.
  if spec is None or rule.steps is None or coded or len(spec) > len(plan.shape):
    return None
  assert plan.axes is not None
  stack, ins, outs = plan.axes
  full = (*spec, *(None,) * (len(plan.shape) - len(spec)))
  compressed, other = (ins, outs) if plan.side == 'in' else (outs, ins)
  d, k = _names(_merged(full, compressed)), _merged(full, other)
  both = (*_names(k), *d)
  size = lambda names: math.prod(division.mesh.shape[n] for n in names)
  if size(d) == 1 or plan.matrix[1] % size(both):
    return None
  front = [full[a] for a in stack]
  return PartitionSpec(*front, None, k), PartitionSpec(*front, None, both)


def _names(entry: Any) -> tuple[str, ...]:
  """The mesh axes that an entry of a spec names."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def place_rows(rows: jax.Array, x: Any, stacked: bool) -> jax.Array:
  """Places `rows` (n, ...) like the rows of `x`, where it has explicit axes."""
  spec = _spec(x)
  if spec is None:
    return rows
  return jax.sharding.reshard(
    rows, PartitionSpec(None, *(spec[1:] if stacked else spec))
  )


def whole(x: jax.Array) -> jax.Array:
  """`x` on every device, where it has explicit axes."""
  return x if _spec(x) is None else jax.sharding.reshard(x, PartitionSpec())


def is_explicit(tree: Any) -> bool:
  """Whether a tree holds arrays typed with explicit mesh axes."""
  return any(_spec(x) is not None for x in jax.tree.leaves(tree))


def outside_explicit(f: Callable, fixed: tuple) -> Callable:
  """`f` with explicit mesh axes handed to the compiler.

  The results of `f` must be trees like `fixed`, and they get its placements.
  """
  if not is_explicit(fixed):
    return f
  place = lambda x: _spec(x) or PartitionSpec()
  return jax.sharding.auto_axes(f, out_sharding=jax.tree.map(place, fixed))


def _merged(spec: tuple, axes: tuple[int, ...]) -> Any:
  """The spec of several axes reshaped into one: only a leading split survives."""
  return spec[axes[0]] if not any(spec[a] for a in axes[1:]) else None


def _spec(x: Any) -> PartitionSpec | None:
  """The spec of an array typed with explicit axes, else None."""
  sharding = getattr(x, 'sharding', None)
  if isinstance(x, jax.core.Tracer):
    sharding = getattr(jax.typeof(x), 'sharding', None)
  if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
    return None
  explicit = AxisType.Explicit in sharding.mesh.axis_types
  return sharding.spec if explicit else None
