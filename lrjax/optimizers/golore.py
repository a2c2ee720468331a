"""GoLore: subspace optimization with convergence guarantees (He et al., 2024)."""

import math
from collections.abc import Callable
from typing import Any, Unpack

import optax

from lrjax import bases
from lrjax.bases import random_orthogonal, switched
from lrjax.checks import finite, named
from lrjax.low_rank import low_rank
from lrjax.matrices import on_matrices
from lrjax.moments import adam
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.refreshes import every
from lrjax.residuals import drop
from lrjax.transports import rotate_first
from lrjax.types import Basis, MatrixTransform


@lifted
def scale_by_golore(
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  random_after: float,
  basis: str | Callable[[int], Basis] = 'eigh',
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore at first, random subspaces towards the end.

  .. math::
    R_t = P^\top G_t, \quad U_t = \mathrm{base}(R_t), \quad \Delta_t = \alpha P U_t

  P (d, r) holds the leading singular vectors of the gradient until step `random_after`,
  and is drawn uniformly from all orthonormal matrices afterwards: near a minimum the
  singular vectors of a small batch's gradient follow its noise, and GaLore need not
  converge. At a refresh the first moment is rotated, :math:`M \leftarrow P_{new}^\top
  P_{old} M`, and the second is kept.

  State per matrix: `r d + 2 r k` floats and three counts of 4 bytes; GaLore's and one
  count.

  Choose it over GaLore for long runs, for small batches, and where late refreshes must be
  cheap.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    update_proj_gap: steps between refreshes of P.
    scale: alpha, of projected matrices only.
    base_optimizer: any transformation that looks at gradients alone and has a first
      moment; default `lrjax.adam()`.
    random_after: refreshes from this step on are random; 0.8 of all steps in the
      official scripts, 0 for random ones throughout.
    basis: how P is found until then, see `lrjax.scale_by_galore`.
    **lift: see `lrjax.on_matrices`. Leaves that are not projected go to
      `base_optimizer`, unscaled.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    He et al., `Subspace Optimization for Large Language Models with Convergence
    Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024

  >>> import jax.numpy as jnp
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> state = scale_by_golore(rank=2, random_after=800).init(params)
  >>> state.slots['kernel'].state.basis.basis.shape
  (8, 2)
  """
  make = named('basis', basis, bases.NAMES)
  refresh = every(update_proj_gap)
  # Counted in fits: those at steps 0, gap, 2 gap, ... below `random_after`.
  fits = math.ceil(finite('random_after', random_after) / update_proj_gap)
  inner = adam() if base_optimizer is None else base_optimizer
  residual = drop(scale)

  def rule(rank: int) -> MatrixTransform:
    b = switched(make(rank), random_orthogonal(rank), after=fits)
    return low_rank(
      b, inner, refresh=refresh, residual=residual, transport=rotate_first
    )

  rule(1)  # parts that do not fit are refused here, not at the first step
  return on_matrices(rule, rank=rank, rest=inner, **lift)


golore = ready(scale_by_golore)
