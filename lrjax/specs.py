"""What partition specs say of shapes."""

from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec


def check_spec(
  path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
  """Raises ValueError where a spec does not fit a shape on a mesh."""
  if len(spec) > len(shape):
    raise ValueError(f'leaf {path!r} of shape {shape}: {spec} names too many axes')
  for size, entry in zip(shape, spec):
    parts = 1
    for name in names(entry):
      if name not in mesh.shape:
        raise ValueError(
          f'leaf {path!r}: no mesh axis {name!r}; the mesh has {dict(mesh.shape)}'
        )
      parts *= mesh.shape[name]
    if size % parts:
      raise ValueError(
        f'leaf {path!r} of shape {shape}: dimension {size} is not divisible by'
        f' {parts}, the size of mesh axis {entry!r}'
      )


def names(entry: Any) -> tuple[str, ...]:
  """The mesh axes that an entry of a spec names."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def merged(spec: tuple, axes: tuple[int, ...]) -> Any:
  """The spec of several axes reshaped into one: only a leading split survives."""
  return spec[axes[0]] if not any(spec[a] for a in axes[1:]) else None
