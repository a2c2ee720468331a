"""Notes what transformations do with each leaf, for those who ask before a step."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from lrjax.dividing import own_columns
from lrjax.types import MatrixTransform
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


class Seen(NamedTuple):
  """What is noted.

  Attributes:
    rows: by path, what a coverage report tells.
    rules: by path, the plan of each projected leaf and what is done to its matrices.
    own: by path, where P'G of such a leaf is to be, within `lrjax.divided`.
  """

  rows: dict[str, Row]
  rules: dict[str, tuple[LeafPlan, MatrixTransform]]
  own: dict[str, NamedSharding]


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays of a tree, abstract or not."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def record(plan: LeafPlan, slot: Any, rule: MatrixTransform | None) -> None:
  """Notes what became of a leaf, if somebody asks."""
  seen: Seen | None = _recorder.get()
  if seen is None or (plan.reason and not _worse(seen.rows.get(plan.path))):
    return
  projected = not plan.reason
  if rule is not None:
    seen.rules[plan.path] = plan, rule
    if (own := own_columns(rule, plan)) is not None:
      seen.own[plan.path] = own
  seen.rows[plan.path] = Row(
    plan.path,
    plan.shape,
    plan.side or '',
    plan.rank,
    math.prod(plan.stack) if projected else 0,
    tree_bytes(slot) if projected else None,
    plan.reason,
  )


def rows_seen() -> dict[str, Row] | None:
  """The rows noted so far, by path, if somebody asks."""
  seen = _recorder.get()
  return None if seen is None else seen.rows


def noted(tx: Any, params: Any) -> tuple[Seen, Any]:
  """What `tx` does with each leaf, and its abstract state."""
  with _recording() as seen:
    # A new function each time: jax keeps traces by function, and a kept one records
    # nothing.
    state = jax.eval_shape(lambda p: tx.init(p), params)
  return seen, state


def _worse(row: Row | None) -> bool:
  return row is None or bool(row.note)


@contextlib.contextmanager
def _recording() -> Iterator[Seen]:
  seen = Seen({}, {}, {})
  token = _recorder.set(seen)
  try:
    yield seen
  finally:
    _recorder.reset(token)
