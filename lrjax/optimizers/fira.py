"""Fira: full-rank training of LLMs under low-rank constraint (Chen et al., 2024)."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from lrjax import bases, residuals, transports
from lrjax.bases import stored_as
from lrjax.checks import floating, named
from lrjax.codecs import cast
from lrjax.low_rank import bias_corrected, low_rank
from lrjax.matrices import on_matrices
from lrjax.moments import adam
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.refreshes import every
from lrjax.types import Basis


@lifted
def scale_by_fira(
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  mode: str = 'official',
  per: str = 'channel',
  growth_limit: float = 1.01,
  floor: float | None = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  basis: str | Callable[[int], Basis] = 'eigh',
  basis_dtype: Any = None,
  moments_on_refresh: str | Callable = 'keep',
  stagger: bool = False,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore, plus the gradient outside its subspace at the scale Adam gave the inside.

  .. math::
    R = P^\top G, \quad U = \mathrm{base}(R), \quad
    \phi_j = \|U_{:,j}\| / \|R_{:,j}\|, \quad S = L((G - a P R) \, \phi)

  with P (d, r) as in `lrjax.scale_by_galore` and L a limit on how fast the norm of S may
  grow. Code and paper differ, for alpha below one, in what alpha multiplies:

  - 'official': a = alpha and :math:`\Delta = c_t (\alpha P U + S)`. U is Adam's direction
    before its bias is corrected, by :math:`c_t = \sqrt{1 - b_2^t} / (1 - b_1^t)` at the
    end. The published numbers come from this form.
  - 'paper': a = 1 and :math:`\Delta = \alpha (P U + S)`, with corrected moments in U.

  State per matrix: `r d + 2 r k + 1` floats and two counts of 4 bytes; GaLore's and one.

  Choose it over GaLore where the rank must be small: it loses little then, for three more
  readings of the gradient a step: to judge it, for the norm, for the update. With an
  orthonormal basis, as all but `gaussian` are, S is not formed, see
  `lrjax.residuals.fira`, and a step has GaLore's `4 d k r` flops.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    update_proj_gap: steps between refreshes of P.
    scale: alpha; 0.25 in the paper below 1B parameters, 0.0625 from there.
    base_optimizer: any transformation that looks at gradients alone, whose ratio is then
      taken as it is; default Adam in the form that `mode` says.
    mode: 'official' or 'paper'.
    per: the ratio of each column ('channel'), or of the whole matrix ('tensor').
    growth_limit: the norm of S may grow by this factor a step; `math.inf`: by any.
    floor: norms of S not above it do not set the limit. With None a single zero gradient
      does and, as in the official code, holds S near zero for a thousand steps.
    b1: decay of Adam's first moment, with `base_optimizer=None` as the next two.
    b2: decay of its second moment.
    eps: added to the root of the second moment.
    basis: how P is found, see `lrjax.scale_by_galore`.
    basis_dtype: what P is stored in; default float32.
    moments_on_refresh: see `lrjax.scale_by_galore`.
    stagger: refresh the matrices one after the other over the gap instead of together.
    **lift: see `lrjax.on_matrices`. Leaves that are not projected go to Adam or to
      `base_optimizer`, unscaled.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024

  >>> import jax.numpy as jnp
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> tx = scale_by_fira(rank=2)
  >>> updates, state = tx.update(params, tx.init(params))
  >>> state.slots['kernel'].state.residual.shape
  ()
  """
  make = named('basis', basis, bases.NAMES)
  floating('basis_dtype', basis_dtype)
  transport = named('moments_on_refresh', moments_on_refresh, transports.NAMES)
  residual = residuals.fira(
    scale, mode, per=per, growth_limit=growth_limit, floor=floor
  )
  refresh = every(update_proj_gap, stagger=stagger)
  late = mode == 'official' and base_optimizer is None
  form = lambda kind: adam(b1, b2, eps, bias_correction=kind)
  inner = base_optimizer or form('none' if late else 'moments')
  rest = base_optimizer or form('step' if late else 'moments')

  def rule(rank: int):
    b = make(rank) if basis_dtype is None else stored_as(make(rank), cast(basis_dtype))
    tx = low_rank(b, inner, refresh=refresh, residual=residual, transport=transport)
    return bias_corrected(tx, b1, b2) if late else tx

  rule(1)  # parts that do not fit are refused here, not at the first step
  return on_matrices(rule, rank=rank, rest=rest, **lift)


fira = ready(scale_by_fira)
