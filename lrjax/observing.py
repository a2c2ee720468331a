"""Measures what the subspace of a one-matrix transform does, while it runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrjax import refreshes
from lrjax.branches import rarely
from lrjax.types import MatrixTransform


class Diagnostics(NamedTuple):
  """How well a subspace serves the gradients of a matrix; arrays lead with stack axes.

  Attributes:
    captured_energy: float32, :math:`\\|P P^\\top G\\|_F^2 / \\|G\\|_F^2` in [0, 1].
    overlap: float32, :math:`\\|P_{old}^\\top P_{new}\\|_F^2 / r` in [0, 1] when the
      subspace last changed; 0 before that.
    residual_norm: float32, :math:`\\|G - P P^\\top G\\|_F`.
    effective_rank: float32, the exponential of the entropy of G's normalised singular
      values (Roy and Vetterli, 2007), from 1 to min(d, k).
    refreshes: int32, how often the subspace was found again.
  """

  captured_energy: jax.Array
  overlap: jax.Array
  residual_norm: jax.Array
  effective_rank: jax.Array
  refreshes: jax.Array


class ObservedState(NamedTuple):
  """State of an observed transform.

  Attributes:
    state: its own.
    count: int32, updates seen.
    diagnostics: the newest measurements.
  """

  state: Any
  count: jax.Array
  diagnostics: Diagnostics


def observed(tx: MatrixTransform, period: int) -> MatrixTransform:
  """`tx`, measured at its first update and every `period` updates after.

  Args:
    tx: a transform; one without `subspace` gets its effective rank measured alone, and
      0 for energy, overlap and residual.
    period: updates between measurements; a measurement costs a QR of P and the
      eigenvalues of the smaller Gram matrix.

  Returns:
    A `MatrixTransform` that gives the same updates, with an `ObservedState`.
  """

  def init(g: Any) -> ObservedState:
    zero = lambda dtype: jnp.zeros([], dtype)
    a, b, c, d = (zero(jnp.float32) for _ in range(4))
    values = Diagnostics(a, b, c, d, zero(jnp.int32))
    return ObservedState(tx.init(g), zero(jnp.int32), values)

  def update(g: jax.Array, s: ObservedState) -> tuple[jax.Array, ObservedState]:
    u, new = tx.update(g, s.state)
    values = rarely(
      s.count % period == 0,
      lambda g, new, old, values: measure(tx, g, new, old, values),
      lambda g, new, old, values: values,
      *(g, new, s.state, s.diagnostics),
    )
    return u, ObservedState(new, s.count + 1, values)

  def refresh(
    key: jax.Array, g: jax.Array, s: ObservedState
  ) -> tuple[ObservedState, jax.Array]:
    assert tx.refresh is not None
    new, good = tx.refresh(key, g, s.state)
    values = s.diagnostics
    values = values._replace(refreshes=values.refreshes + 1)
    if tx.subspace is not None:
      old, now = (tx.subspace(x, len(g)) for x in (s.state, new))
      first = values.refreshes == 1
      values = values._replace(overlap=jnp.where(first, 0.0, overlap(old, now)))
    return ObservedState(new, s.count, values), good

  due = None
  if tx.due is not None:
    inner_due = tx.due
    due = lambda s, step, phase: inner_due(s.state, step, phase)
  return tx._replace(
    init=init,
    update=update,
    due=due,
    refresh=None if tx.refresh is None else refresh,
    subspace=None,
    holds=False,
    steps=None,
  )


def measure(
  tx: MatrixTransform, g: jax.Array, new: Any, old: Any, values: Diagnostics
) -> Diagnostics:
  """The measurements of one matrix after an update that led from `old` to `new`."""
  rank = effective_rank(g)
  if tx.subspace is None:
    return values._replace(effective_rank=rank)
  p, before = tx.subspace(new, len(g)), tx.subspace(old, len(g))
  whole = jnp.sum(jnp.square(g))
  caught = jnp.minimum(jnp.sum(jnp.square(orth(p).T @ g)), whole)
  # Some methods move their subspace in the update itself, not by a refresh.
  moved = jnp.any(p != before) & jnp.any(before != 0)
  single = lambda x: x.astype(jnp.float32)
  return values._replace(
    captured_energy=single(caught / jnp.where(whole > 0, whole, 1)),
    overlap=jnp.where(moved, single(overlap(before, p)), values.overlap),
    residual_norm=single(jnp.sqrt(whole - caught)),
    effective_rank=rank,
  )


def effective_rank(g: jax.Array) -> jax.Array:
  """exp of the entropy of the normalised singular values of g; 0 for a zero matrix.

  >>> print(f'{effective_rank(jnp.eye(3, 5)):.2f}')
  3.00
  """
  g = g.T if g.shape[0] > g.shape[1] else g
  g = g / jnp.maximum(jnp.max(jnp.abs(g)), jnp.finfo(g.dtype).tiny)
  s = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(g @ g.T), 0))
  share = s / jnp.maximum(jnp.sum(s), jnp.finfo(g.dtype).tiny)
  entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(share), 0))
  return jnp.where(jnp.any(s > 0), jnp.exp(entropy), 0).astype(jnp.float32)


def overlap(p: jax.Array, q: jax.Array) -> jax.Array:
  """Share in [0, 1] of the span of q (d, r) that lies in the span of p (d, r)."""
  return refreshes.overlap(orth(p), orth(q)).astype(jnp.float32)


def orth(p: jax.Array) -> jax.Array:
  """An orthonormal basis of the span of p (d, r)."""
  return jnp.linalg.qr(p)[0]
