"""When a subspace is found again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrjax.checks import finite, named, positive_int
from lrjax.types import Refresh


def every(period: int, *, stagger: bool = False) -> Refresh:
  """Refits at step 0 and then every `period` steps.

  Args:
    period: steps between refreshes, at least 1.
    stagger: spread the matrices of a tree evenly over the period, so that no single
      step after the first pays for all of them; those that are due are refreshed one
      after the other. Only those are read and written, one at a time. Where the stack
      itself is split over a mesh, the gradient of the one that is due is summed over
      the devices, and all of them fit it; a stack whose matrices are split is not moved.

  Returns:
    A `Refresh` without state.

  >>> [bool(every(3).due((), jnp.int32(t), 0.0)) for t in range(5)]
  [True, False, False, True, False]
  """
  period = positive_int('update_proj_gap', period)

  def due(s: tuple, step: jax.Array, phase: jax.Array) -> jax.Array:
    if not stagger:
      return step % period == 0
    shift = jnp.floor(phase * period).astype(jnp.int32)
    return (step == 0) | ((step >= shift) & ((step - shift) % period == 0))

  def after(s: tuple, old: Any, new: Any) -> tuple:
    return s

  return Refresh(lambda: (), due, after, batched=not stagger)


class LazyState(NamedTuple):
  """State of `lazy`, for each matrix.

  Attributes:
    gap: int32, steps between refreshes now.
    queue: float32 (window,), the newest similarities, newest last; those not measured
      yet are zero.
    refreshes: int32, how often the subspace was found.
  """

  gap: jax.Array
  queue: jax.Array
  refreshes: jax.Array


def lazy(
  period: int,
  *,
  threshold: float = 0.4,
  window: int = 5,
  growth: float = 2,
  measure: str | Callable = 'first_vector',
) -> Refresh:
  r"""Refits less and less often where the subspace has come to rest (Q-GaLore).

  Each matrix has its own gap, at first `period`, and is refitted at the steps t with
  t mod gap = 0. Every refit after the first measures how similar the new subspace is to
  the old one; once `window` similarities are there and the mean of the newest `window`
  reaches `threshold`, the gap grows to `int(gap * growth)`. They are not forgotten then:
  a matrix at rest doubles its gap at every further refit.

  Those that are due are refitted one after the other.

  Args:
    period: the first gap, in steps.
    threshold: the mean similarity from which on the gap grows.
    window: number of similarities that count.
    growth: factor of the gap, at least 1.
    measure: `(P_old (d, r), P_new (d, r)) -> float32[]`, or one of

      - 'first_vector': :math:`|\cos|` of the angle between the first columns, the
        leading directions for bases that order them;
      - 'signed_first_vector': without the absolute value, as the code of Q-GaLore has
        it: a vector that only flips its sign, which has no meaning, then counts as a
        change;
      - 'overlap': :math:`\|P_{old}^\top P_{new}\|_F^2 / r`, which no rotation within
        the subspaces changes. Unrelated subspaces have r / d of it: choose a `threshold`
        well above that.

  Returns:
    A `Refresh` whose state is a `LazyState`.

  Raises:
    ValueError: for numbers out of range, and at the construction of a method whose
      basis has no single P.

  >>> state = lazy(200).init()
  >>> [bool(lazy(200).due(state, jnp.int32(t), 0.0)) for t in (0, 100, 200)]
  [True, False, True]
  """
  period = positive_int('update_proj_gap', period)
  window = positive_int('window', window)
  finite('threshold', threshold)
  if finite('growth', growth) < 1:
    raise ValueError(f'`growth` must be at least 1, got {growth}')
  similarity = named('measure', measure, MEASURES)

  def init() -> LazyState:
    # Two zeros: one buffer cannot be donated twice.
    return LazyState(
      jnp.int32(period), jnp.zeros(window, jnp.float32), jnp.zeros([], jnp.int32)
    )

  def due(s: LazyState, step: jax.Array, phase: jax.Array) -> jax.Array:
    return step % s.gap == 0

  def after(s: LazyState, old: Any, new: Any) -> LazyState:
    if old is None:
      raise ValueError(
        'lazy compares subspaces and needs a basis with one matrix P; use every(period)'
        ' with this basis'
      )
    measured = jnp.append(s.queue[1:], similarity(old, new).astype(jnp.float32))
    # Before the first refit there was nothing to compare with.
    queue = jnp.where(s.refreshes > 0, measured, s.queue)
    rests = (s.refreshes >= window) & (queue.mean() >= threshold)
    grown = jnp.floor(s.gap * jnp.float32(growth)).astype(jnp.int32)
    return LazyState(jnp.where(rests, grown, s.gap), queue, s.refreshes + 1)

  return Refresh(init, due, after, batched=False)


def signed_first_vector(old: jax.Array, new: jax.Array) -> jax.Array:
  """The cosine of the angle between the first columns of two bases (d, r)."""
  a, b = old[:, 0], new[:, 0]
  norms = jnp.linalg.norm(a) * jnp.linalg.norm(b)
  return jnp.dot(a, b) / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)


def first_vector(old: jax.Array, new: jax.Array) -> jax.Array:
  """Its magnitude."""
  return jnp.abs(signed_first_vector(old, new))


def overlap(old: jax.Array, new: jax.Array) -> jax.Array:
  """The share of one subspace that lies in the other, for orthonormal bases (d, r)."""
  return jnp.sum(jnp.square(old.T @ new)) / new.shape[1]


MEASURES: dict[str, Callable] = dict(
  first_vector=first_vector, signed_first_vector=signed_first_vector, overlap=overlap
)
