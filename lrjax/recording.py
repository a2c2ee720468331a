"""Notes what transformations do with each leaf while a coverage report is made."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lrjax.views import LeafPlan

_recorder: contextvars.ContextVar = contextvars.ContextVar('recorder', default=None)


class Row(NamedTuple):
  """One leaf of a coverage report.

  Attributes:
    path: the leaf's path.
    shape: its shape.
    side: the compressed side, 'in' or 'out'; '' if not projected.
    rank: the rank; None if not projected or without one.
    stack: number of matrices in the leaf; 0 if not projected.
    state_bytes: bytes of projection state; None if not projected.
    note: why it is not projected; '' if it is.
  """

  path: str
  shape: tuple[int, ...]
  side: str
  rank: int | None
  stack: int
  state_bytes: int | None
  note: str


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays of a tree, abstract or not."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def record(plan: LeafPlan, slot: Any) -> None:
  """Notes what became of a leaf, if a coverage report is being made."""
  seen = _recorder.get()
  if seen is None or (plan.reason and not _worse(seen.get(plan.path))):
    return
  projected = not plan.reason
  seen[plan.path] = Row(
    plan.path,
    plan.shape,
    plan.side or '',
    plan.rank,
    math.prod(plan.stack) if projected else 0,
    tree_bytes(slot) if projected else None,
    plan.reason,
  )


def rows_seen() -> dict[str, Row] | None:
  """The rows noted so far, by path, if a coverage report is being made."""
  return _recorder.get()


def _worse(row: Row | None) -> bool:
  return row is None or bool(row.note)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Row]]:
  seen: dict[str, Row] = {}
  token = _recorder.set(seen)
  try:
    yield seen
  finally:
    _recorder.reset(token)
