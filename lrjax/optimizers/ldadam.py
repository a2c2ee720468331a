"""LDAdam: adaptive optimization from low-dimensional gradient statistics (2024)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax import bases
from lrjax.bases.orthonormal import down, up
from lrjax.bases.power import power_step
from lrjax.checks import finite, floating, named
from lrjax.low_rank import dense_change, unit_scale
from lrjax.matrices import on_matrices
from lrjax.moments import AdamState, adam
from lrjax.optimizers.assembly import lifted, ready
from lrjax.transports import projection_aware
from lrjax.types import Basis, MatrixTransform


class LDAdamState(NamedTuple):
  """State of one matrix.

  Attributes:
    basis: P (d, r).
    inner: Adam's moments (r, k) and count.
    error: what the last steps did not use of their gradients (d, k); () without error
      feedback.
  """

  basis: jax.Array
  inner: AdamState
  error: Any


def ldadam_rule(
  start: Basis,
  *,
  rho: float = 0.908,
  b1: float = 0.908,
  b2: float = 0.99,
  eps: float = 1e-8,
  error_feedback: bool = True,
  error_dtype: Any = None,
) -> MatrixTransform:
  """LDAdam for one matrix; see `scale_by_ldadam`."""
  if start.matrix is None or not start.orthonormal:
    raise ValueError(
      '`basis` must give one orthonormal P to start from, such as lrjax.svd'
    )
  matrix = start.matrix
  direction: Any = adam(b1, b2, eps)
  transport = projection_aware(b1, b2)

  def init(g: Any) -> LDAdamState:
    d, k = g.shape
    P = matrix(start.init(d, k, g.dtype), d)
    low = jnp.zeros((P.shape[1], k), g.dtype)
    error = jnp.zeros((d, k), error_dtype or g.dtype) if error_feedback else ()
    return LDAdamState(P, direction.init(low), error)

  def with_error(g: jax.Array, s: LDAdamState) -> jax.Array:
    return g + s.error.astype(g.dtype) if error_feedback else g

  def due(s: LDAdamState, step: jax.Array, phase: jax.Array) -> jax.Array:
    return step == 0

  def refresh(
    key: jax.Array, g: jax.Array, s: LDAdamState
  ) -> tuple[LDAdamState, jax.Array]:
    a = with_error(g, s)
    b = start.fit(key, unit_scale(a), start.init(*a.shape, a.dtype))
    P = matrix(b, len(a))
    return s._replace(basis=P), jnp.isfinite(P).all()

  def update(g: jax.Array, s: LDAdamState) -> tuple[jax.Array, LDAdamState]:
    a, t = with_error(g, s), s.inner.count
    momentum = up(s.basis, s.inner.mu, len(g))
    mean = momentum / (1 - b1 ** jnp.maximum(t, 1))
    guide = rho * mean + (1 - rho) * a
    # At the first step P is the one just fitted.
    P = jnp.where(t == 0, s.basis, power_step(unit_scale(guide), s.basis))
    moved = transport(dense_change(s.basis, P), s.inner)
    low = down(P, a)
    u, inner = direction.update(low, moved)
    error = s.error
    if error_feedback:
      unused = a - up(P, low, len(g))
      unused += b1 / (1 - b1) * (momentum - up(P, moved.mu, len(g)))
      error = unused.astype(s.error.dtype)
    return up(P, u, len(g)), s._replace(basis=P, inner=inner, error=error)

  return MatrixTransform(init, update, due, refresh, subspace=lambda s, d: s.basis)


@lifted
def scale_by_ldadam(
  rank: Any = 16,
  *,
  rho: float = 0.908,
  b1: float = 0.908,
  b2: float = 0.99,
  eps: float = 1e-8,
  error_feedback: bool = True,
  error_dtype: Any = None,
  basis: str | Callable[[int], Basis] = 'eigh',
  side: str = 'short_out',
  **lift: Any,  # as `Lift`, but for `side`
) -> optax.GradientTransformationExtraArgs:
  r"""Adam in a subspace that follows gradient and momentum at every step.

  With A = G + E, the moments M, V (r, k) of t updates, hats for corrected bias:

  .. math::
    B &= \rho P \hat M + (1 - \rho) A, \quad
    P' = \mathrm{qr}(B B^\top P), \quad C = P'^\top P \\
    E &\leftarrow (A - P' P'^\top A) + \tfrac{b_1}{1 - b_1} (P M - P' C M) \\
    V &\leftarrow c_2 |(C * C)(\hat V - \hat M^2) + (C \hat M)^2|, \quad
    M \leftarrow C M \\
    \Delta &= P' \, \mathrm{adam}(P'^\top A)

  P starts from the singular vectors of the first gradient; where B is zero it stays.

  State per matrix: `r d + 2 r k` floats and two counts of 4 bytes; error feedback adds
  the whole `d k`, so that Adam's `2 d k` is at most halved. The official code keeps E in
  the gradients' own memory, which costs nothing there but breaks clipping, averaging
  and whatever else expects gradients in it.

  Choose it for small ranks and for fine-tuning, where following the subspace matters most,
  if `d k` floats are to be had; a step costs about `16 d k r` flops and a QR of (d, r).

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    rho: weight of the momentum in B; b1 in the paper.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the corrected second moment.
    error_feedback: add what a step could not use to the next gradient.
    error_dtype: what E is stored in; default float32.
    basis: how the first P is found, see `lrjax.scale_by_galore`.
    side: as in `lrjax.on_matrices`; by default square matrices are compressed along
      `out`, as by the official code, unlike GaLore.
    **lift: see `lrjax.on_matrices`. Leaves that are not projected go to Adam.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient
    Statistics <https://arxiv.org/abs/2410.16103>`_, 2024

  >>> import jax.numpy as jnp
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> tx = scale_by_ldadam(rank=2)
  >>> updates, state = tx.update(params, tx.init(params))
  >>> state.slots['kernel'].state.error.shape
  (8, 16)
  """
  finite('rho', rho, below=1.0)
  floating('error_dtype', error_dtype)
  make = named('basis', basis, bases.NAMES)

  def rule(rank: int) -> MatrixTransform:
    return ldadam_rule(
      make(rank),
      rho=rho,
      b1=b1,
      b2=b2,
      eps=eps,
      error_feedback=error_feedback,
      error_dtype=error_dtype,
    )

  rule(1)  # a basis that does not fit is refused here, not at the first step
  return on_matrices(rule, rank=rank, rest=adam(b1, b2, eps), side=side, **lift)


ldadam = ready(scale_by_ldadam)
