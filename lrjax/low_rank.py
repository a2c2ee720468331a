"""The low-rank loop: five replaceable parts make a method for one matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax import residuals, transports
from lrjax.dividing import by_columns
from lrjax.moments import held, late_correction
from lrjax.refreshes import every
from lrjax.stacks import all_of, formed, select, squares
from lrjax.types import (
  Basis,
  Change,
  MatrixTransform,
  Parts,
  Refresh,
  Residual,
  Steps,
)

# An (r, k) array on which parts are tried for fit before there is any data.
PROBE = jax.ShapeDtypeStruct((2, 3), jnp.float32)


class LowRankState(NamedTuple):
  """State of one matrix.

  Attributes:
    basis: the subspace, in the form the basis keeps it; P (d, r) for most.
    inner: state of the inner transformation on (r, k).
    residual: state of the residual.
    refresh: state of the refresh policy.
  """

  basis: Any
  inner: optax.OptState
  residual: Any
  refresh: Any


def low_rank(
  basis: Basis,
  inner: optax.GradientTransformation,
  *,
  refresh: Refresh | None = None,
  residual: Residual | None = None,
  transport: Callable = transports.keep,
) -> MatrixTransform:
  r"""A one-matrix method from a basis, an inner optimizer and three more parts.

  .. math::
    R = P^\top G, \quad U = \mathrm{inner}(R), \quad \Delta = \mathrm{residual}(P U)

  When `refresh` is due, P is fitted to the gradient at hand first and `transport`
  carries the inner state over.

  Args:
    basis: how P is found and stored.
    inner: a transformation of (r, k) arrays that looks at gradients alone.
    refresh: when P is found again; default `every(200)`.
    residual: what becomes of what P misses; default `drop(1.0)`.
    transport: `(change, inner_state) -> inner_state`, see `lrjax.transports`.

  Returns:
    A `MatrixTransform`, to be lifted by `on_matrices`.

  Raises:
    ValueError: if the inner needs parameters, or a part does not fit another.

  >>> import lrjax
  >>> low_rank(lrjax.svd(4), optax.add_decayed_weights(0.1))
  Traceback (most recent call last):
  ...
  ValueError: the inner optimizer needs parameters, which a low-rank space has not...
  """
  refresh = every(200) if refresh is None else refresh
  residual = residuals.drop(1.0) if residual is None else residual
  check_gradient_only(inner)
  check_fits(basis, inner, refresh, residual, transport)
  inner = optax.with_extra_args_support(inner)
  matrix = basis.matrix

  def init(g: Any) -> LowRankState:
    d, k = g.shape
    b = basis.init(d, k, g.dtype)
    check_shapes(basis, b, g)
    return LowRankState(b, start(b, g), residual.init(g), refresh.init())

  def start(b: Any, g: Any) -> Any:
    low = jax.eval_shape(basis.down, b, g)
    return inner.init(jnp.zeros(low.shape, low.dtype))

  def due(s: LowRankState, step: jax.Array, phase: jax.Array) -> jax.Array:
    return refresh.due(s.refresh, step, phase)

  def refit(
    key: jax.Array, g: jax.Array, s: LowRankState
  ) -> tuple[LowRankState, jax.Array]:
    g = residual.before(g, s.residual)
    return settle(basis.fit(key, unit_scale(g), s.basis), s, g)

  def settle(b: Any, s: LowRankState, g: Any) -> tuple[LowRankState, jax.Array]:
    d = g.shape[0]
    good = all_of(jnp.isfinite(x) for x in jax.tree.leaves(b))
    old, new = (matrix(x, d) if matrix else None for x in (s.basis, b))
    change = NO_CHANGE
    if basis.change is not None:
      change = basis.change(s.basis, b, d)
    elif old is not None and new is not None:
      change = dense_change(old, new)
    change = change._replace(start=lambda: start(b, g))
    return s._replace(
      basis=b,
      inner=transport(change, s.inner),
      refresh=refresh.after(s.refresh, old, new),
    ), good

  def update(g: jax.Array, s: LowRankState, ok: Any = True) -> tuple:
    if steps is not None:
      total = lambda c: squares(c * g)
      parts, s = steps.move(steps.down(g, s), total, s, ok)
      return formed(parts, g, lambda x: steps.up(x, s, len(g))), s
    g = residual.before(g, s.residual)
    low = basis.down(s.basis, g)
    low, u, inner_state = optimized(low, s, ok)
    up = lambda low: basis.up(s.basis, low, len(g))
    out, residual_state = residual.after(g, low, u, up, s.residual)
    residual_state = select(jnp.asarray(ok), residual_state, s.residual)
    return out, s._replace(inner=inner_state, residual=residual_state)

  def optimized(low: jax.Array, s: LowRankState, ok: Any) -> tuple:
    each = lambda low: held(inner, low, s.inner, ok)
    return by_columns(each, low, s.inner) if basis.per_column else (low, *each(low))

  def move(low: jax.Array, total: Any, s: LowRankState, ok: Any) -> tuple:
    low, u, inner_state = optimized(low, s, ok)
    if thin:
      parts, residual_state = Parts(residual.scale * u), s.residual
    else:
      assert residual.parts is not None
      parts, residual_state = residual.parts(total, low, u, s.residual)
      residual_state = select(jnp.asarray(ok), residual_state, s.residual)
    parts = jax.tree.map(lambda x: jnp.where(ok, x, 0), parts)
    return parts, s._replace(inner=inner_state, residual=residual_state)

  steps = None
  thin = residual.scale is not None and matrix is not None
  if thin or (residual.parts is not None and (basis.orthonormal or residual.any_basis)):
    steps = Steps(
      down=lambda g, s: basis.down(s.basis, g),
      move=move,
      up=lambda x, s, d: basis.up(s.basis, x, d),
      thin=thin,
    )

  sketch = None
  if thin and basis.sketch is not None:
    fit = basis.sketch

    def finish(y: jax.Array, s: LowRankState, d: int, k: int) -> tuple:
      like = jax.ShapeDtypeStruct((d, k), y.dtype)
      return settle(fit.finish(unit_scale(y), s.basis), s, like)

    sketch = fit._replace(
      start=lambda key, s, d, k: fit.start(key, s.basis, d, k),
      between=lambda y: fit.between(unit_scale(y)),
      finish=finish,
    )

  return MatrixTransform(
    init,
    update,
    due,
    refit,
    batched=refresh.batched,
    subspace=None if matrix is None else lambda s, d: matrix(s.basis, d),
    holds=True,
    steps=steps,
    sketch=sketch,
  )


def bias_corrected(tx: MatrixTransform, b1: float, b2: float) -> MatrixTransform:
  r"""Multiplies the update by :math:`\sqrt{1 - b_2^t} / (1 - b_1^t)`, t updates taken.

  For residuals that compare uncorrected moments with gradients, as the code of Fira and
  APOLLO does: the inner is `lrjax.adam(b1, b2, bias_correction='none')`.

  Args:
    tx: made by `low_rank`, with an inner state that has a `count`.
    b1: decay of the first moment.
    b2: decay of the second moment.

  Returns:
    A `MatrixTransform` with the same state.
  """

  def factor(s: Any) -> jax.Array:
    # No update may have been taken, where the first gradient is not fit for one.
    return late_correction(jnp.maximum(s.inner.count, 1), b1, b2)

  def update(g: jax.Array, s: LowRankState, ok: Any = True) -> tuple:
    u, s = tx.update(g, s, ok)
    return u * factor(s), s

  if (steps := tx.steps) is None:
    return tx._replace(update=update)

  def move(low: jax.Array, total: Any, s: LowRankState, ok: Any) -> tuple:
    (x, c, y), s = steps.move(low, total, s, ok)
    times = lambda a: None if a is None else a * factor(s)
    return Parts(times(x), times(c), y), s

  return tx._replace(update=update, steps=steps._replace(move=move))


def dense_change(old: jax.Array, new: jax.Array) -> Change:
  """The change between two bases P (d, r)."""
  C = new.T @ old
  return Change(lambda x: C @ x, lambda x: jnp.square(C) @ x)


def check_gradient_only(inner: optax.GradientTransformation) -> None:
  """Raises ValueError if `inner` needs parameters to update."""
  if not hasattr(inner, 'init') or not hasattr(inner, 'update'):
    raise TypeError(
      f'the inner optimizer must be an optax.GradientTransformation, got {inner!r}'
    )

  def run(g: jax.Array) -> Any:
    return inner.update(g, inner.init(g), None)

  try:
    jax.eval_shape(run, PROBE)
  except Exception as e:
    if not (isinstance(e, ValueError) and 'params' in str(e)):
      raise
    raise ValueError(
      'the inner optimizer needs parameters, which a low-rank space has not: apply'
      ' weight decay and trust ratios outside, after the projection (`weight_decay=` of'
      ' the optimizer, or optax.chain)'
    ) from e


def check_fits(
  basis: Basis,
  inner: optax.GradientTransformation,
  refresh: Refresh,
  residual: Residual,
  transport: Callable,
) -> None:
  """Raises ValueError if one part needs what another has not."""
  if residual.projects and not basis.orthonormal:
    raise ValueError(
      'this residual keeps what a projection leaves over and needs an orthonormal basis;'
      ' a random sketch is none, and the rest would grow without bound'
    )
  if residual.per_column and not basis.per_column:
    raise ValueError(
      'a ratio per channel needs a basis that keeps columns apart, which a two-sided one'
      " does not; use per='tensor' with this basis"
    )
  eye = jnp.eye(PROBE.shape[0])
  change = NO_CHANGE
  if basis.matrix is not None or basis.change is not None:
    change = dense_change(eye, eye)

  def move(low: jax.Array) -> Any:
    return transport(change._replace(start=lambda: inner.init(low)), inner.init(low))

  jax.eval_shape(move, PROBE)
  p = None if basis.matrix is None else eye
  jax.eval_shape(lambda: refresh.after(refresh.init(), p, p))


def check_shapes(basis: Basis, b: Any, g: Any) -> None:
  """Raises ValueError if a basis does not lead from a matrix (d, k) back to one."""
  low = jax.eval_shape(basis.down, b, g)
  back = jax.eval_shape(lambda b, low: basis.up(b, low, g.shape[0]), b, low)
  if back.shape != g.shape:
    raise ValueError(
      f'the basis does not fit the compressed side: it takes a matrix {g.shape}, that'
      f' side first, to {low.shape} and back to {back.shape}'
    )


def unit_scale(g: jax.Array) -> jax.Array:
  """`g` times the power of two that brings its largest entry near one."""
  return jnp.ldexp(g, -jnp.frexp(jnp.max(jnp.abs(g)))[1])


def _no_matrix(x: jax.Array) -> jax.Array:
  raise ValueError(
    'this transport rotates the inner state and needs a basis with one matrix P; use'
    ' transport=keep or reset with this basis'
  )


NO_CHANGE = Change(_no_matrix, _no_matrix)
