"""The layers of a model, whether their leaves are stacked on an axis or numbered."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrjax.checks import pattern
from lrjax.views import Where, check_leaf, leaf_path

# The group matches the number of a layer that is not stacked: layers/3/, block_3/.
LAYERS = r'(?:^|/)(?:layers?|blocks?|h)(?:[/_](\d+))?(?=/|$)'


class Group(NamedTuple):
  """One kind of leaf of all layers.

  Attributes:
    path: its path, without the number of the layer.
    leaves: positions among the leaves of the tree: one, or one a layer.
    stacked: whether it is one leaf with the layers on its leading axis.
  """

  path: str
  leaves: tuple[int, ...]
  stacked: bool


class Layers(NamedTuple):
  """How the leaves of a tree belong to layers.

  Attributes:
    groups: the kinds of leaves that layers have.
    count: number of layers; 0 if there is none.
    rest: path -> position of the leaves outside.
  """

  groups: tuple[Group, ...]
  count: int
  rest: dict[str, int]

  def rows(self, leaves: Sequence[Any], at: jax.Array) -> dict[str, jax.Array]:
    """Some layers' rows (n, ...) of each group, by path."""
    return {g.path: stack(leaves, g)[at] for g in self.groups}

  def outside(self, leaves: Sequence[Any]) -> dict[str, Any]:
    """The leaves outside the layers, by path."""
    return {path: leaves[i] for path, i in self.rest.items()}


def find_layers(tree: Any, where: Where | None = None) -> Layers:
  """Finds the layers of a tree.

  Args:
    tree: parameters or gradients, abstract or not.
    where: which leaves belong to layers: a pattern searched in the path, or
      `(path, leaf) -> bool`; default `LAYERS`. Where the pattern has a group and it
      matches a number, the leaf is that of one layer; else its leading axis counts them.

  Returns:
    The `Layers`.

  Raises:
    ValueError: if leaves differ in the number of layers, or numbered ones in shape.

  >>> row = {'kernel': jnp.ones((8, 8))}
  >>> find_layers({'layers': [row, row], 'head': row}).groups
  (Group(path='layers/kernel', leaves=(1, 2), stacked=False),)
  """
  choose, numbers = _chooser(where)
  found: dict[str, dict[int | None, tuple[int, Any]]] = {}
  rest = {}
  for i, (keys, x) in enumerate(jax.tree.leaves_with_path(tree)):
    path = leaf_path(keys)
    check_leaf(path, x)
    kind, number = _numbered(path, numbers)
    if not choose(path, x) or (number is None and not x.shape):
      rest[path] = i
    else:
      found.setdefault(kind, {})[number] = (i, x)
  groups = [_group(path, members) for path, members in found.items()]
  return Layers(tuple(groups), _count(found), rest)


def stack(leaves: Sequence[jax.Array], group: Group) -> jax.Array:
  """The leaves of a group as (L, ...)."""
  here = [leaves[i] for i in group.leaves]
  return here[0] if group.stacked else jnp.stack(here)


def unstack(x: jax.Array, group: Group) -> list[jax.Array]:
  """The inverse of `stack`: an array for each of `group.leaves`."""
  return [x] if group.stacked else list(x)


def _chooser(where: Where | None) -> tuple[Callable[[str, Any], bool], re.Pattern]:
  """`(path, leaf) -> bool`, and the pattern whose group is the number of a layer."""
  default = re.compile(LAYERS)
  if where is None:
    return lambda path, x: bool(default.search(path)), default
  if isinstance(where, str):
    found = pattern('where', where)
    numbered = found if found.groups else default
    return lambda path, x: bool(found.search(path)), numbered
  if not callable(where):
    raise TypeError(f'`where` must be a pattern or (path, leaf) -> bool, got {where!r}')
  return where, default


def _numbered(path: str, numbers: re.Pattern) -> tuple[str, int | None]:
  """A path without the number of its layer, and that number."""
  match = numbers.search(path)
  if not match or not numbers.groups or match.group(1) is None:
    return path, None
  # Without the separator, so that both layouts of a model have the same paths.
  start, end = match.span(1)
  return (path[:start].rstrip('/_') + path[end:]).lstrip('/'), int(match.group(1))


def _group(path: str, members: dict) -> Group:
  shapes = {x.shape for _, x in members.values()}
  if None in members and len(members) > 1:
    raise ValueError(f'{path!r} is both one stacked leaf and a leaf of single layers')
  if len(shapes) > 1:
    raise ValueError(
      f'leaves {path!r} of the layers {sorted(members)} differ in shape: {shapes};'
      f' leave them out with `where`'
    )
  return Group(path, tuple(members[n][0] for n in sorted(members)), None in members)


def _count(found: dict[str, dict]) -> int:
  """The number of layers that all groups have."""
  counts = {}
  for path, members in found.items():
    which = tuple(sorted(members)) if None not in members else members[None][1].shape[0]
    counts.setdefault(which, path)
  if len(counts) > 1:
    told = '; '.join(f'{path!r} has {which}' for which, path in counts.items())
    raise ValueError(
      f'leaves differ in their layers: {told}. Choose leaves of one stack with `where`,'
      f' and give another stack its own transformation with optax.partition'
    )
  which = next(iter(counts), 0)
  return which if isinstance(which, int) else len(which)
