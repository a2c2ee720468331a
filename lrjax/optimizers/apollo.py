"""APOLLO: SGD-like memory, AdamW-level performance (Zhu et al., 2024)."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from lrjax import bases, residuals, transports
from lrjax.checks import named
from lrjax.low_rank import bias_corrected, low_rank
from lrjax.matrices import on_matrices
from lrjax.moments import adam
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.refreshes import every
from lrjax.residuals.scaled import GRANULARITIES, check_choice
from lrjax.types import Basis


@lifted
def scale_by_apollo(
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  scale_type: str = 'channel',
  scale_front: bool = False,
  growth_limit: float = 1.01,
  floor: float | None = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  basis: str | Callable[[int], Basis] = 'gaussian',
  moments_on_refresh: str | Callable = 'keep',
  stagger: bool = False,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""The raw gradient, each channel scaled as Adam scales it in a random sketch.

  .. math::
    R = P^\top G, \quad U = \mathrm{base}(R), \quad
    s_j = \|U_{:,j}\| / \|R_{:,j}\|, \quad
    \Delta = c_t \sqrt{\alpha} \, L(G \, s)

  with P (d, r) of entries N(0, 1/r), drawn again every `update_proj_gap` steps; L limits
  how fast the norm may grow; U is Adam's direction before its bias is corrected, by
  :math:`c_t = \sqrt{1 - b_2^t} / (1 - b_1^t)` at the end, as in the official code. There
  is no momentum in the direction. The paper writes alpha where the code has its root.

  State per matrix: `2 r k` floats of moments, 8 bytes of key, 4 of the last norm and two
  counts of 4; P itself is never kept (the official code keeps it), for `r d` normal
  numbers drawn a step. An SVD is never computed.

  Choose it where memory binds most and gradients are large batches' means: GaLore's
  moments without its basis, at the price of a direction as noisy as the gradient.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    update_proj_gap: steps between draws of P.
    scale: alpha, which enters by its root; d / r makes up for what sketching takes off
      the ratio.
    base_optimizer: any transformation that looks at gradients alone, whose ratio is then
      taken as it is; default Adam with late bias correction.
    scale_type: one ratio for each 'channel', or one for the whole 'tensor'.
    scale_front: multiply by the root ahead of the limit, not after.
    growth_limit: the norm may grow by this factor a step; `math.inf`: by any (the
      official `disable_nl`).
    floor: norms not above it do not set the limit; None: every norm does, as in the
      official code, where a zero gradient then holds updates down for a thousand steps.
    b1: decay of Adam's first moment, with `base_optimizer=None` as the next two.
    b2: decay of its second moment.
    eps: added to the root of the second moment.
    basis: 'gaussian'; `lambda r: lrjax.gaussian(r, stored=True)` keeps P instead of
      drawing it at each step; 'svd' and 'eigh' are the paper's "APOLLO w. SVD".
    moments_on_refresh: see `lrjax.scale_by_galore`.
    stagger: redraw the matrices one after the other over the gap instead of together.
    **lift: see `lrjax.on_matrices`. Leaves that are not projected go to Adam or to
      `base_optimizer`, unscaled.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024

  >>> import jax.numpy as jnp
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> tx = scale_by_apollo(rank=2)
  >>> updates, state = tx.update(params, tx.init(params))
  >>> state.slots['kernel'].state.basis.nbytes
  8
  """
  make = named('basis', basis, bases.NAMES)
  transport = named('moments_on_refresh', moments_on_refresh, transports.NAMES)
  check_choice('scale_type', scale_type, GRANULARITIES)
  residual = residuals.scale_full(
    scale, per=scale_type, growth_limit=growth_limit, front=scale_front, floor=floor
  )
  refresh = every(update_proj_gap, stagger=stagger)
  inner = base_optimizer or adam(b1, b2, eps, bias_correction='none')
  rest = base_optimizer or adam(b1, b2, eps, bias_correction='step')

  def rule(rank: int):
    parts = dict(refresh=refresh, residual=residual, transport=transport)
    tx = low_rank(make(rank), inner, **parts)
    return tx if base_optimizer else bias_corrected(tx, b1, b2)

  rule(1)  # parts that do not fit are refused here, not at the first step
  return on_matrices(rule, rank=rank, rest=rest, **lift)


@lifted
def scale_by_apollo_mini(
  update_proj_gap: int = 200,
  scale: float = 128.0,
  *,
  scale_front: bool = False,
  growth_limit: float = 1.01,
  floor: float | None = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  stagger: bool = False,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""APOLLO-Mini: the raw gradient times one number, from a sketch of rank one.

  `scale_by_apollo` with `rank=1` and `scale_type='tensor'`. State per matrix: `2 k` floats
  of moments and 20 bytes, next to nothing: SGD's memory.

  Args:
    update_proj_gap: steps between draws of the sketch.
    scale: alpha, which enters by its root; 128 in the paper.
    scale_front: see `scale_by_apollo`, as for all below; set in the paper's runs of 60M
      and 130M parameters.
    growth_limit: see there.
    floor: see there.
    b1: see there.
    b2: see there.
    eps: see there.
    stagger: see there.
    **lift: see `lrjax.on_matrices`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: see `scale_by_apollo`.

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024

  >>> import jax.numpy as jnp
  >>> params = {'kernel': jnp.ones((8, 16))}
  >>> tx = scale_by_apollo_mini()
  >>> updates, state = tx.update(params, tx.init(params))
  >>> state.slots['kernel'].state.inner.mu.shape
  (1, 16)
  """
  return scale_by_apollo(
    1,
    update_proj_gap,
    scale,
    scale_type='tensor',
    scale_front=scale_front,
    growth_limit=growth_limit,
    floor=floor,
    b1=b1,
    b2=b2,
    eps=eps,
    stagger=stagger,
    **lift,
  )


apollo = ready(scale_by_apollo)
apollo_mini = ready(scale_by_apollo_mini)
