"""Dion2: orthonormalised momentum of the heaviest slices (Ahn et al., arXiv 2512.16928)."""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax

from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.optimizers.dion import lion
from lrjax.optimizers.trion import scale_by_trion


@lifted
def scale_by_dion2(
  rank: Any = 0.25,
  momentum: float = 0.95,
  scaling: str | Callable[[int, int], float] = 'dion',
  *,
  orthogonalize: str | Callable[[jax.Array], jax.Array] = 'polar_express',
  rest: optax.GradientTransformation | None = None,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""Orthonormalises those rows or columns of the momentum that are largest.

  .. math::
    B = M + G, \quad I = \mathrm{top}_r \|B_{i,:}\|_1, \quad
    \Delta_I = s\, \mathrm{orth}(B_I), \quad M_I \leftarrow \mu B_I

  with B (d, k): `lrjax.scale_by_trion` with `lrjax.heaviest` for a basis. All other
  slices wait, at full weight, until their turn comes.

  State per matrix: `d k` numbers of momentum and r int32 indices. Choose it over
  `lrjax.dion` where a QR each step is too dear and over `lrjax.trion` where even the
  product with cosines is; what it updates at one step is whole slices.

  Args:
    rank: r: a fraction of the shorter axis (rounded; the official code rounds up), an
      int, or rules `[(pattern, either)]`.
    momentum: mu, kept share of the momentum of the slices that were updated.
    scaling: s: 'dion' ("spectral_norm" of the official code), 'kimi' ("rms_norm"),
      others see `lrjax.scale_by_trion`.
    orthogonalize: of the slices; default five steps of Polar Express (arXiv 2505.16932)
      in float32, where the official code computes in bfloat16.
    rest: for all other leaves; default Lion with 0.9 and 0.95, as in the official code.
    **lift: see `lrjax.on_matrices`. Of square matrices the slices lie along `in` with
      'short'; the official code takes `out`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate; the official one
    is 0.01, with weight decay 0.01.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Ahn et al., `Dion2 <https://arxiv.org/abs/2512.16928>`_, 2025

  >>> import jax.numpy as jnp
  >>> tx = scale_by_dion2(rank=1)
  >>> params = {'kernel': jnp.diag(jnp.array([1.0, 3.0, 2.0]))}
  >>> updates, state = tx.update(params, tx.init(params))
  >>> print(state.slots['kernel'].state.basis)
  [1]
  """
  return scale_by_trion(
    rank,
    momentum,
    scaling,
    basis='heaviest',
    orthogonalize=orthogonalize,
    rest=lion() if rest is None else rest,
    **lift,
  )


dion2 = ready(scale_by_dion2)
