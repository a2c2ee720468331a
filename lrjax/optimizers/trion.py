"""Trion: low-rank orthonormalised momentum in a DCT basis (arXiv 2505.17967, 2025)."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from lrjax import bases, moments
from lrjax.checks import finite, named
from lrjax.low_rank import unit_scale
from lrjax.matrices import on_matrices
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.orthogonalize import FAN_SCALES, ORTHOGONALIZERS
from lrjax.refreshes import every
from lrjax.stacks import all_of
from lrjax.types import Basis, MatrixTransform


class TrionState(NamedTuple):
  """State of one matrix.

  Attributes:
    basis: that of the last update; r indices for `dct`.
    mu: (d, k), momentum with what the basis has missed so far.
  """

  basis: Any
  mu: jax.Array


def orthonormal_momentum(
  basis: Basis, decay: float, orthogonalize: Callable, update_proj_gap: int = 1
) -> MatrixTransform:
  """The rule of `scale_by_trion` for one matrix."""
  refresh = every(update_proj_gap)
  if not basis.orthonormal:
    raise ValueError(
      'Trion keeps what a projection leaves over and needs an orthonormal basis; a random'
      ' sketch is none'
    )

  def init(g: Any) -> TrionState:
    return TrionState(basis.init(*g.shape, g.dtype), jnp.zeros(g.shape, g.dtype))

  def due(s: TrionState, step: jax.Array, phase: jax.Array) -> jax.Array:
    return refresh.due((), step, phase)

  def refit(
    key: jax.Array, g: jax.Array, s: TrionState
  ) -> tuple[TrionState, jax.Array]:
    b = basis.fit(key, unit_scale(s.mu + g), s.basis)
    good = all_of(jnp.isfinite(x) for x in jax.tree.leaves(b))
    return s._replace(basis=b), good

  def update(g: jax.Array, s: TrionState) -> tuple[jax.Array, TrionState]:
    up = lambda low: basis.up(s.basis, low, len(g))
    B = s.mu + g
    low = basis.down(s.basis, B)
    return up(orthogonalize(low)), s._replace(mu=B - (1 - decay) * up(low))

  matrix = basis.matrix
  subspace = None if matrix is None else lambda s, d: matrix(s.basis, d)
  return MatrixTransform(init, update, due, refit, subspace=subspace)


@lifted
def scale_by_trion(
  rank: Any = 128,
  momentum: float = 0.95,
  scaling: str | Callable[[int, int], float] = 'kj',
  *,
  basis: str | Callable[[int], Basis] = 'dct',
  orthogonalize: str | Callable[[jax.Array], jax.Array] = 'newton_schulz',
  update_proj_gap: int = 1,
  rest: optax.GradientTransformation | None = None,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""Orthonormalises the momentum inside a subspace chosen anew at each step.

  .. math::
    B = M + G, \quad b = P^\top B, \quad M \leftarrow B - (1 - \mu) P b, \quad
    \Delta = s P\, \mathrm{NS}(b)

  with P (d, r) the r columns of the DCT that B is most aligned with, NS Newton-Schulz on
  the small b (r, k), and s a factor of the matrix's shape. Momentum decays where the
  update acts; what P misses stays in M whole until its turn comes: the error feedback.

  State per matrix: `d k` numbers of momentum and r int32 indices; Muon keeps `d k`, Adam
  `2 d k`. Choose it for Muon's kind of update where Newton-Schulz on whole matrices is
  too dear: cost `5 (4 k r^2 + 2 r^3)` instead of `5 (4 k d^2 + 2 d^3)`, and no QR, which
  `lrjax.dion` needs. Published: behind Muon, ahead of Dion (C4, 350M to 1.3B).

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    momentum: mu, kept share of the momentum inside the subspace.
    scaling: s, by name: 'kj' max(1, fan_out/fan_in)^0.5, 'kimi' 0.2 max(fans)^0.5,
      'dion' (fan_out/fan_in)^0.5, 'none' 1; or `(fan_in, fan_out) -> float`.
    basis: how P is found: the name of a basis or `rank -> Basis`, an orthonormal one.
    orthogonalize: of b: 'newton_schulz', five quintic steps with Keller Jordan's
      constants in float32, where the official code computes in bfloat16 (`lambda x:
      lrjax.newton_schulz(x, dtype=jnp.bfloat16)`); 'polar_express', 'polar', exact; or a
      function.
    update_proj_gap: steps between choices of P; the published method chooses each step.
    rest: for all other leaves; default Adam as in the official code (0.9, 0.95, 1e-10),
      times 0.015, the ratio of its two learning rates, 3e-4 and 0.02.
    **lift: see `lrjax.on_matrices`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate; the official one
    is 0.02.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    `FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large
    Language Models <https://arxiv.org/abs/2505.17967>`_, 2025

  >>> import jax.numpy as jnp
  >>> tx = scale_by_trion(rank=2)
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> updates, state = tx.update(params, tx.init(params))
  >>> state.slots['kernel'].state.basis.shape  # indices of cosines
  (2,)
  """
  finite('momentum', momentum, below=1.0)
  make = named('basis', basis, bases.NAMES)
  factor = named('orthogonalize', orthogonalize, ORTHOGONALIZERS)
  fan_scale = named('scaling', scaling, FAN_SCALES)
  if rest is None:
    rest = optax.chain(moments.adam(0.9, 0.95, 1e-10), optax.scale(0.015))

  def rule(rank: int) -> MatrixTransform:
    return orthonormal_momentum(make(rank), momentum, factor, update_proj_gap)

  rule(1)  # parts that do not fit are refused here, not at the first step
  return on_matrices(rule, rank=rank, rest=rest, fan_scale=fan_scale, **lift)


trion = ready(scale_by_trion)
