"""Where optimizer state lives on a mesh, derived from where the parameters live."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lrjax.dividing import low_specs
from lrjax.low_rank import LowRankState
from lrjax.specs import check_spec, merged
from lrjax.types import MatrixTransform
from lrjax.views import LeafPlan, leaf_path

# Sizes no state has by chance: an axis as long as one of them follows that side.
_D, _K = 1_000_003, 2_000_003


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


def place_slot(slot: Any, rule: MatrixTransform, plan: LeafPlan, x: Any) -> Any:
  """Places the stacked state of a leaf by role, where the leaf has explicit axes."""
  spec = _spec(x)
  if spec is None:
    return slot
  assert plan.axes is not None
  stack, ins, outs = plan.axes
  full = (*spec, *(None,) * (len(plan.shape) - len(spec)))
  first, second = (ins, outs) if plan.side == 'in' else (outs, ins)
  side = lambda axes: merged(full, axes)
  by_size = {_D: side(first), _K: side(second)}
  probe = jax.eval_shape(lambda: rule.init(jax.ShapeDtypeStruct((_D, _K), x.dtype)))

  def placed(tree: Any, one: Any, by_size: dict[int, Any]) -> Any:
    def place(x: jax.Array, one: Any) -> jax.Array:
      # A moment too small to be stored in 8 bits is large enough in the probe.
      roles = [by_size.get(n) for n in getattr(one, 'codes', one).shape]
      return jax.sharding.reshard(x, PartitionSpec(*(full[a] for a in stack), *roles))

    return jax.tree.map(place, tree, one)

  def node(x: Any, one: Any) -> Any:
    out = placed(x, one, by_size)
    if not isinstance(x, LowRankState):
      return out
    of_one = lambda a: jax.ShapeDtypeStruct(a.shape[len(stack) :], a.dtype)
    low = low_specs(jax.tree.map(of_one, x.inner), plan)
    if low is None:
      return out
    return out._replace(inner=placed(x.inner, one.inner, {_K: low[1][-1]}))

  whole = jax.ShapeDtypeStruct((), jnp.int32)
  is_loop = lambda x: isinstance(x, LowRankState)
  return jax.tree.map(node, slot, type(slot)(whole, probe), is_leaf=is_loop)


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


def _spec(x: Any) -> PartitionSpec | None:
  """The spec of an array typed with explicit axes, else None."""
  sharding = getattr(x, 'sharding', None)
  if isinstance(x, jax.core.Tracer):
    sharding = getattr(jax.typeof(x), 'sharding', None)
  if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
    return None
  explicit = AxisType.Explicit in sharding.mesh.axis_types
  return sharding.spec if explicit else None
