"""Dion: distributed orthonormalized updates (Ahn et al., 2025, arXiv 2504.05295)."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from lrjax.bases.orthonormal import signed_cosines
from lrjax.bases.qr import cholesky_qr, householder_qr
from lrjax.checks import finite, named
from lrjax.matrices import on_matrices
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.orthogonalize import FAN_SCALES
from lrjax.types import MatrixTransform

EPS = 1e-8


class DionState(NamedTuple):
  """State of one matrix.

  Attributes:
    mu: (d, k), momentum with what the factors have missed so far.
    Q: (d, r), right factor of the last update, columns of unit length.
  """

  mu: jax.Array
  Q: jax.Array


ORTHS = dict(qr=householder_qr, cholesky_qr=cholesky_qr)


def lion() -> optax.GradientTransformation:
  """What the official code does to all other leaves."""
  return optax.scale_by_lion(0.9, 0.95)


def orthonormal_power_step(rank: int, decay: float, orth: Callable) -> MatrixTransform:
  """The rule of `scale_by_dion` for one matrix."""

  def init(g: Any) -> DionState:
    d, k = g.shape
    Q = signed_cosines(d, min(rank, d, k), g.dtype)
    return DionState(jnp.zeros(g.shape, g.dtype), Q)

  def update(g: jax.Array, s: DionState) -> tuple[jax.Array, DionState]:
    B = s.mu + g
    P = orth(B.T @ s.Q)  # (k, r)
    R = B @ P  # (d, r)
    Q = R / (jnp.linalg.norm(R, axis=0, keepdims=True) + EPS)
    # Of a zero B nothing can be learned, neither a direction nor a new Q.
    some = jnp.any(B != 0)
    P, Q = jnp.where(some, P, 0), jnp.where(some, Q, s.Q)
    return Q @ P.T, DionState(B - (1 - decay) * R @ P.T, Q)

  return MatrixTransform(init, update, subspace=lambda s, d: householder_qr(s.Q))


@lifted
def scale_by_dion(
  rank: Any = 128,
  momentum: float = 0.95,
  scaling: str | Callable[[int, int], float] = 'dion',
  *,
  orth: str | Callable[[jax.Array], jax.Array] = 'qr',
  rest: optax.GradientTransformation | None = None,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""Orthonormalises the momentum in a subspace tracked by one power step a time.

  .. math::
    B = M + G, \quad P = \mathrm{orth}(B^\top Q), \quad R = B P, \quad
    M \leftarrow B - (1 - \mu) R P^\top, \quad
    Q \leftarrow R / (\|R_{:,j}\| + \epsilon), \quad \Delta = s Q P^\top

  with B (d, k), P (k, r), Q (d, r): one step of subspace iteration, warm-started by the
  last Q. Momentum decays where the update acts; what the factors miss stays in M whole:
  the error feedback.

  State per matrix: `d k` numbers of momentum and `d r` of Q; Muon keeps `d k`.
  Choose it for Muon's kind of update where whole matrices are too large to
  orthonormalise, and where a subspace that follows the gradient is worth a QR of (k, r)
  each step; `lrjax.trion` has none and did better in its authors' comparison. The authors
  of Dion call it legacy by now.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    momentum: mu, kept share of the momentum inside the subspace.
    scaling: s, by name: 'dion' (fan_out/fan_in)^0.5, 'kj' max(1, fan_out/fan_in)^0.5,
      'kimi' 0.2 max(fans)^0.5, 'none' 1; or `(fan_in, fan_out) -> float`.
    orth: 'qr' (Householder), 'cholesky_qr' (two rounds of products, for accelerators;
      falls back on the other where columns depend on each other), or a function
      (n, r) -> (n, r).
    rest: for all other leaves; default Lion with 0.9 and 0.95, as in the official code,
      which advises to give the output layer a learning rate sqrt(width) times smaller.
    **lift: see `lrjax.on_matrices`. With 'short', Q belongs to the shorter axis, as in
      the official code; its plain version `dion_simple` has it on `in` always.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate; the official one
    is 0.01, with weight decay 0.01.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Ahn et al., `Dion: Distributed Orthonormalized Updates
    <https://arxiv.org/abs/2504.05295>`_, 2025

  >>> import jax.numpy as jnp
  >>> tx = scale_by_dion(rank=2)
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> updates, state = tx.update(params, tx.init(params))
  >>> state.slots['kernel'].state.Q.shape
  (8, 2)
  """
  finite('momentum', momentum, below=1.0)
  fan_scale = named('scaling', scaling, FAN_SCALES)
  factor = named('orth', orth, ORTHS)
  rest = lion() if rest is None else rest
  rule = lambda rank: orthonormal_power_step(rank, momentum, factor)
  return on_matrices(rule, rank=rank, rest=rest, fan_scale=fan_scale, **lift)


dion = ready(scale_by_dion)
