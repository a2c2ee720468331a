"""What an optimizer does with each leaf, what its state costs, and how it fares."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax.matrices import MatricesState, Slot, nodes
from lrjax.observing import Diagnostics, ObservedState
from lrjax.recording import Row, noted, tree_bytes
from lrjax.sampling import COUNTED
from lrjax.views import leaf_path


class Coverage(NamedTuple):
  """What `coverage` returns; `str()` of it is a table.

  Attributes:
    rows: one per leaf.
    param_bytes: bytes of all parameters.
    state_bytes: bytes of the whole optimizer state.
    adam_bytes: bytes of two moments of the parameters' shape and dtype.
  """

  rows: tuple[Row, ...]
  param_bytes: int
  state_bytes: int
  adam_bytes: int

  def __str__(self) -> str:
    cells: list[tuple[str, ...]] = [
      ('leaf', 'shape', 'side', 'rank', 'matrices', 'state bytes', 'note')
    ]
    blank = lambda x: '' if x in (None, 0) else str(x)
    for r in self.rows:
      numbers = map(blank, (r.rank, r.stack, r.state_bytes))
      cells.append((r.path, str(r.shape), r.side, *numbers, r.note))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
      '  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells
    ]
    share = 100 * self.state_bytes / max(self.adam_bytes, 1)
    total = (
      f'parameters {self.param_bytes:,} bytes, optimizer state {self.state_bytes:,}'
      f' bytes, {share:.1f} % of Adam ({self.adam_bytes:,})'
    )
    return '\n'.join([*lines, total])


def coverage(tx: optax.GradientTransformation, params: Any) -> Coverage:
  """Tells what a transformation does with each leaf, without allocating anything.

  Args:
    tx: any optax transformation; lrjax ones inside a chain, partition or wrapper are
      found.
    params: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    A `Coverage`: rows (path, shape, side, rank, matrices, bytes), and the totals.

  >>> import jax.numpy as jnp, lrjax
  >>> params = {'q': {'kernel': jax.ShapeDtypeStruct((512, 512), jnp.float32)},
  ...           'norm': {'scale': jax.ShapeDtypeStruct((512,), jnp.float32)}}
  >>> print(coverage(lrjax.galore(1e-2, rank=128), params))
  leaf        shape       side  rank  matrices  state bytes  note
  norm/scale  (512,)                                         not chosen
  q/kernel    (512, 512)  in    128   1         786440
  parameters 1,050,624 bytes, optimizer state 790,549 bytes, 37.6 % of Adam (2,101,248)
  """
  seen, state = noted(tx, params)
  rows = []
  for path, x in jax.tree.leaves_with_path(params):
    name = leaf_path(path)
    default = Row(name, tuple(x.shape), '', None, 0, None, 'not seen by lrjax')
    rows.append(seen.rows.get(name, default))
  total = tree_bytes(params)
  return Coverage(tuple(rows), total, tree_bytes(state), 2 * total)


def health(state: Any) -> dict[str, jax.Array]:
  """What lrjax transformations had to leave out, read from an optimizer state.

  Args:
    state: the state of any optax transformation that holds lrjax ones.

  Returns:
    `skipped_steps`, steps not taken because a gradient was not finite or above 1e15;
    `overdue_refreshes`, the largest number of refreshes that failed in a row on one
    matrix; 1 also where one waits for a gradient that is not zero. int32[] each, usable
    under jit; zeros if there is no lrjax state.

  >>> import jax.numpy as jnp, lrjax
  >>> tx = lrjax.galore(1e-2, rank=1)
  >>> grads = {'kernel': jnp.full((2, 2), jnp.nan)}
  >>> _, state = tx.update(grads, tx.init(grads))
  >>> {k: int(v) for k, v in health(state).items()}
  {'skipped_steps': 1, 'overdue_refreshes': 0}
  """
  zero = jnp.zeros([], jnp.int32)
  slots = nodes(state, Slot)
  return dict(
    skipped_steps=sum((s.skipped for s in nodes(state, COUNTED)), zero),
    overdue_refreshes=jnp.max(jnp.array([zero, *(s.overdue.max() for s in slots)])),
  )


def diagnostics(state: Any) -> dict[str, Diagnostics]:
  """What transformations made with `diagnostics=n` measured last.

  Args:
    state: the state of any optax transformation that holds lrjax ones.

  Returns:
    Leaf path -> `Diagnostics`, each array with the leaf's stack axes: captured energy,
    overlap of the last two subspaces, residual norm, effective rank of the gradient,
    number of refreshes. Empty if nothing is measured; usable under jit.

  >>> import jax.numpy as jnp, lrjax, optax
  >>> rule = lambda rank: lrjax.low_rank(lrjax.svd(rank), optax.identity())
  >>> tx = lrjax.on_matrices(rule, rank=1, diagnostics=1)
  >>> grads = {'kernel': jnp.diag(jnp.array([3.0, 4.0]))}
  >>> _, state = tx.update(grads, tx.init(grads))
  >>> print(f"{diagnostics(state)['kernel'].captured_energy:.2f}")
  0.64
  """
  return {
    path: slot.state.diagnostics
    for m in nodes(state, MatricesState)
    for path, slot in m.slots.items()
    if isinstance(slot, Slot) and isinstance(slot.state, ObservedState)
  }
