"""SubTrack++: gradient subspace tracking for LLM training (Rajabi et al., 2025)."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from lrjax import bases, transports
from lrjax.bases import grassmann, switched
from lrjax.checks import named
from lrjax.low_rank import bias_corrected, low_rank
from lrjax.matrices import on_matrices
from lrjax.moments import adam
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.refreshes import every
from lrjax.residuals import drop, fira
from lrjax.types import Basis, MatrixTransform


@lifted
def scale_by_subtrack(
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  step_size: float = 0.5,
  recovery: bool = True,
  growth_limit: float = 1.01,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  basis: str | Callable[[int], Basis] = 'eigh',
  moments_on_refresh: str | Callable | None = None,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore whose subspace is tracked, with aware moments and recovery of the rest.

  .. math::
    R = P^\top G, \quad U = \mathrm{Adam}(R), \quad
    \Delta = \alpha P U + L\left((G - \alpha P R) \, \|U_{:,j}\| / \|R_{:,j}\|\right)

  P (d, r) starts as the leading singular vectors of the first gradient. At each refresh
  it turns along a geodesic by one direction, towards what it misses of the gradient at
  hand (`lrjax.grassmann`), and Adam's moments are carried over as the statistics they
  estimate (`lrjax.projection_aware`), ahead of the update. The rest of the gradient joins
  at the scale Adam gave to the inside, its growth limited by L: Fira's official form,
  see `lrjax.residuals.fira`.

  State per matrix: `r d + 2 r k + 1` floats and three counts of 4 bytes; Fira's and one
  count.

  Choose it over Fira where refreshes must cost little more than a step.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    update_proj_gap: steps between moves of P.
    scale: alpha.
    step_size: how far P turns, see `lrjax.grassmann`. On gradients of norm one; the
      official code has raw ones there and turns by any angle.
    recovery: add what the subspace misses; False leaves it out.
    growth_limit: the norm of that part may grow by this factor a step; `math.inf`: by any.
    b1: decay of Adam's first moment.
    b2: decay of its second moment.
    eps: added to the root of the second moment.
    basis: how P is found first, see `lrjax.scale_by_galore`.
    moments_on_refresh: see `lrjax.scale_by_galore`; default
      `lrjax.projection_aware(b1, b2)`.
    **lift: see `lrjax.on_matrices`. Leaves that are not projected go to Adam, unscaled.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Rajabi et al., `SubTrack++: Gradient Subspace Tracking for Scalable LLM Training
    <https://arxiv.org/abs/2502.01586>`_, 2025

  >>> import jax.numpy as jnp
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> state = scale_by_subtrack(rank=2).init(params)
  >>> state.slots['kernel'].state.basis.basis.shape
  (8, 2)
  """
  make = named('basis', basis, bases.NAMES)
  transport = transports.projection_aware(b1, b2)
  if moments_on_refresh is not None:
    transport = named('moments_on_refresh', moments_on_refresh, transports.NAMES)
  residual = fira(scale, growth_limit=growth_limit) if recovery else drop(scale)
  refresh = every(update_proj_gap)
  # The ratio and the limit see the moments before their bias is corrected.
  inner = adam(b1, b2, eps, bias_correction='none')
  rest = adam(b1, b2, eps, bias_correction='step')

  def rule(rank: int) -> MatrixTransform:
    tracked = grassmann(rank, step_size=step_size)
    b = switched(make(rank), tracked, after=1)
    tx = low_rank(b, inner, refresh=refresh, residual=residual, transport=transport)
    return bias_corrected(tx, b1, b2)

  rule(1)  # parts that do not fit are refused here, not at the first step
  return on_matrices(rule, rank=rank, rest=rest, **lift)


subtrack = ready(scale_by_subtrack)
