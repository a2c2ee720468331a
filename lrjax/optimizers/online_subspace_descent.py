"""Online subspace descent: online PCA beside a low-rank optimizer (Liang et al., 2024)."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from lrjax.bases.orthonormal import svd
from lrjax.branches import rarely
from lrjax.checks import finite, positive_int
from lrjax.low_rank import LowRankState, low_rank
from lrjax.matrices import on_matrices
from lrjax.moments import adam
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.residuals import drop
from lrjax.types import MatrixTransform

UNFITTED, FITTED, MOVING = -1, 0, 1


class OnlineState(NamedTuple):
  """State of one matrix.

  Attributes:
    loop: basis P (d, r) and inner state.
    basis_optimizer: state of what moves P.
    phase: int32, -1 before P is fitted, 0 at the step it is fitted on, 1 afterwards.
  """

  loop: LowRankState
  basis_optimizer: optax.OptState
  phase: jax.Array


@lifted
def scale_by_online_subspace_descent(
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  basis_optimizer: optax.GradientTransformation | None = None,
  penalty: float = 0.0,
  retract_every: int | None = None,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore whose basis takes one optimizer step on its reconstruction loss every step.

  .. math::
    \Delta = \alpha P\, \mathrm{base}(P^\top G), \quad
    P \leftarrow P - \mathrm{opt}\left(\nabla_P \|P P^\top X - X\|_F^2
      + \lambda \|P^\top P - I\|_F^2\right), \quad X = G / \|G\|_F

  P (d, r) starts as the leading singular vectors of the first gradient; there is no
  other SVD. It moves after the update that used it, and the moments in its space are
  left as they are. The official code has no penalty; with it this is the paper's form.
  Without penalty and retraction P slowly ceases to be orthonormal.

  State per matrix: `r d` floats of P and, with Adam for both, `2 r d` for its moments and
  `2 r k` for the inner ones; four counts of 4 bytes. About `4 d k r` flops a step more
  than GaLore between refreshes, and no spikes.

  Choose it over GaLore where a refresh is felt as a pause, and gradients turn slowly.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    update_proj_gap: the inverse of P's learning rate; it has no other meaning here.
    scale: alpha, of projected matrices only.
    base_optimizer: any transformation that looks at gradients alone; default
      `lrjax.adam()`.
    basis_optimizer: moves P, learning rate included; default
      `optax.adamw(1 / update_proj_gap, weight_decay=0.01)` as in the official code, whose
      rate also follows the schedule of the weights, divided by its first value: give
      such a schedule here. It counts from P's first move, at the second step.
    penalty: lambda; 0 in the official code.
    retract_every: make P orthonormal again (QR) every so many steps; None: never.
    **lift: see `lrjax.on_matrices`. Leaves that are not projected go to
      `base_optimizer`, unscaled.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Liang et al., `Memory-Efficient LLM Training with Online Subspace Descent
    <https://arxiv.org/abs/2408.12857>`_, 2024

  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> state = scale_by_online_subspace_descent(rank=2).init(params)
  >>> state.slots['kernel'].state.loop.basis.shape
  (8, 2)
  """
  update_proj_gap = positive_int('update_proj_gap', update_proj_gap)
  finite('penalty', penalty)
  if retract_every is not None:
    positive_int('retract_every', retract_every)
  mover = basis_optimizer or optax.adamw(1 / update_proj_gap, weight_decay=0.01)
  inner = adam() if base_optimizer is None else base_optimizer

  def rule(rank: int) -> MatrixTransform:
    loop = low_rank(svd(rank), inner, residual=drop(scale))
    return _online(loop, mover, penalty, retract_every)

  rule(1)  # parts that do not fit are refused here, not at the first step
  return on_matrices(rule, rank=rank, rest=inner, **lift)


online_subspace_descent = ready(scale_by_online_subspace_descent)


def _online(
  loop: MatrixTransform,
  mover: optax.GradientTransformation,
  penalty: float,
  retract_every: int | None,
) -> MatrixTransform:
  """A loop with P (d, r) as its basis, fitted once and then moved by an optimizer."""
  loop_refresh: Any = loop.refresh

  def init(g: Any) -> OnlineState:
    s = loop.init(g)
    return OnlineState(s, mover.init(s.basis), jnp.asarray(UNFITTED, jnp.int32))

  def due(s: OnlineState, step: jax.Array, phase: jax.Array) -> jax.Array:
    return step % retract_every == 0 if retract_every else step == 0

  def refresh(key: jax.Array, g: jax.Array, s: OnlineState) -> tuple:
    unfitted = s.phase == UNFITTED
    args = (jax.random.key_data(key), g, s.loop)
    fit = lambda key, g, s: loop_refresh(jax.random.wrap_key_data(key), g, s)
    loop_state, good = rarely(unfitted, fit, retract, *args)
    return s._replace(loop=loop_state, phase=jnp.maximum(s.phase, FITTED)), good

  def update(g: jax.Array, s: OnlineState) -> tuple[jax.Array, OnlineState]:
    u, loop_state = loop.update(g, s.loop)
    p = s.loop.basis
    step, moved = mover.update(gradient(p, g, penalty), s.basis_optimizer, p)
    new = (loop_state._replace(basis=optax.apply_updates(p, step)), moved)
    old = (loop_state, s.basis_optimizer)
    pick = lambda n, o: n if n is o else jnp.where(s.phase == MOVING, n, o)
    loop_state, moved = jax.tree.map(pick, new, old)
    phase = jnp.where(s.phase == UNFITTED, s.phase, MOVING)
    return u, OnlineState(loop_state, moved, phase)

  subspace = lambda s, d: s.loop.basis
  return MatrixTransform(init, update, due, refresh, subspace=subspace)


def gradient(
  p: jax.Array,  # (d, r)
  g: jax.Array,  # (d, k)
  penalty: float = 0.0,
) -> jax.Array:
  r"""The gradient by P of :math:`\|P P^\top X - X\|^2 + \lambda \|P^\top P - I\|^2`.

  With X = G / |G| and A = X^T P it is
  :math:`-2 (2 X A - P A^\top A - X A P^\top P) + 4 \lambda P (P^\top P - I)`.
  """
  A = g.T @ p
  # A zero gradient leaves the loss flat instead of undefined.
  norm = jnp.maximum(jnp.linalg.norm(g), jnp.finfo(g.dtype).tiny)
  A = A / norm
  XA, gram = g @ A / norm, p.T @ p
  out = -2 * (2 * XA - p @ (A.T @ A) - XA @ gram)
  return out + 4 * penalty * p @ (gram - jnp.eye(len(gram), dtype=p.dtype))


def retract(key: Any, g: Any, s: LowRankState) -> tuple[LowRankState, jax.Array]:
  """P made orthonormal; a refresh of the loop."""
  q, upper = jnp.linalg.qr(s.basis)
  # Close to the old columns, so that moments go on meaning the same.
  q = jnp.where(jnp.diagonal(upper) < 0, -q, q)
  return s._replace(basis=q), jnp.isfinite(q).all()
