"""Q-GaLore: quantized GaLore with INT4 projection and lazy refresh (Zhang et al., 2024)."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from lrjax import bases, residuals, transports
from lrjax.bases import stored_as
from lrjax.checks import named
from lrjax.codecs import affine
from lrjax.eight_bit import eight_bit
from lrjax.low_rank import low_rank
from lrjax.matrices import on_matrices
from lrjax.moments import adam
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.refreshes import lazy
from lrjax.types import Basis


@lifted
def scale_by_q_galore(
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  bits: int = 4,
  group: int = 256,
  threshold: float = 0.4,
  window: int = 5,
  growth: float = 2,
  measure: str | Callable = 'first_vector',
  basis: str | Callable[[int], Basis] = 'eigh',
  moments_on_refresh: str | Callable = 'keep',
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore with a basis in 4 bits, moments in 8, and a refresh that tires.

  .. math::
    R_t = \hat P^\top G_t, \quad U_t = \mathrm{base}(R_t), \quad
    \Delta_t = \alpha \hat P U_t, \quad \hat P = \mathrm{decode}_4(P)

  A matrix whose leading direction stays where it is gets its P refitted at gaps that
  double: `update_proj_gap`, twice that, and so on, see `lrjax.lazy`. P-hat projects both
  ways, on refresh steps too, and is not made orthonormal again. The third saving of the
  paper, INT8 weights that are updated by stochastic rounding, is not an optimizer's:
  see `lrjax.int8_weights`.

  State per matrix (d, k): `d ceil(r / 2) + 8 ceil(r d / group)` bytes of basis (codes two
  a byte; scale and zero of each group in float32), `2 (r k + 4 ceil(r k / 256))` of
  moments, and `8 + 4 window` of refresh policy. GaLore keeps `4 r d + 8 r k`.

  Choose it where GaLore's state or its refreshes cost too much; at 350M the paper loses
  0.8 of 19 perplexity against GaLore.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    update_proj_gap: the first number of steps between refreshes of P.
    scale: alpha, of projected matrices only.
    base_optimizer: any transformation that looks at gradients alone; default
      `lrjax.eight_bit(lrjax.adam())`.
    bits: of the basis, 4 or 8.
    group: numbers of the basis that share scale and zero.
    threshold: mean similarity of subspaces from which on the gap grows, see `lrjax.lazy`.
    window: number of similarities in the mean.
    growth: factor of the gap.
    measure: of similarity. The default is the magnitude of the cosine between leading
      directions, since signs mean nothing; the paper's code has it signed:
      'signed_first_vector'. The bases compared are the stored ones.
    basis: how P is found, see `lrjax.scale_by_galore`.
    moments_on_refresh: see `lrjax.scale_by_galore`.
    **lift: see `lrjax.on_matrices`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
    Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024

  >>> import jax.numpy as jnp
  >>> tx = scale_by_q_galore(rank=8)
  >>> state = tx.init({'kernel': jnp.ones((16, 64))})
  >>> slot = state.slots['kernel'].state
  >>> slot.basis['codes'].shape, slot.basis['codes'].dtype, int(slot.refresh.gap)
  ((16, 4), dtype('uint8'), 200)
  """
  make = named('basis', basis, bases.NAMES)
  transport = named('moments_on_refresh', moments_on_refresh, transports.NAMES)
  inner = eight_bit(adam()) if base_optimizer is None else base_optimizer
  codec = affine(bits, group)
  refresh = lazy(
    update_proj_gap, threshold=threshold, window=window, growth=growth, measure=measure
  )
  residual = residuals.drop(scale)

  def rule(rank: int):
    basis = stored_as(make(rank), codec)
    return low_rank(
      basis, inner, refresh=refresh, residual=residual, transport=transport
    )

  rule(1)  # parts that do not fit are refused here, not at the first step
  return on_matrices(rule, rank=rank, rest=inner, **lift)


q_galore = ready(scale_by_q_galore)
