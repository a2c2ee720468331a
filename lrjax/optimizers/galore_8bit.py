"""8-bit GaLore: GaLore with block-wise 8-bit moments (Zhao et al., 2024)."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from lrjax.eight_bit import eight_bit
from lrjax.moments import adam
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.optimizers.galore import scale_by_galore
from lrjax.types import Basis


@lifted
def scale_by_galore_8bit(
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  block: int = 256,
  min_size: int = 4096,
  basis: str | Callable[[int], Basis] = 'eigh',
  basis_dtype: Any = None,
  moments_on_refresh: str | Callable = 'keep',
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore whose moments, of all leaves, are stored in 8 bits.

  .. math::
    R_t = P^\top G_t, \quad U_t = \mathrm{base}_8(R_t), \quad \Delta_t = \alpha P U_t

  State per matrix (d, k): `4 r d` bytes of basis (`2 r d` with `basis_dtype=bfloat16`) and
  `2 (r k + 4 ceil(r k / block))` of moments, where GaLore keeps `8 r k`. Moments of fewer
  than `min_size` numbers, and those of biases and norms, stay float32.

  Choose it instead of GaLore where memory binds still; it costs two passes over the
  moments a step. The paper trains 7B with it, at the perplexity of 8-bit Adam.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    update_proj_gap: steps between refreshes of P.
    scale: alpha, of projected matrices only.
    base_optimizer: what is stored in 8 bits, see `lrjax.eight_bit`; default
      `lrjax.adam()`.
    block: numbers that share a scale, a power of two.
    min_size: moments with fewer numbers stay as they are.
    basis: see `lrjax.scale_by_galore`.
    basis_dtype: see there.
    moments_on_refresh: see there; moments are decoded, carried over, and encoded.
    **lift: see `lrjax.on_matrices`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: see `lrjax.scale_by_galore` and `lrjax.eight_bit`.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024

  >>> import jax.numpy as jnp
  >>> tx = scale_by_galore_8bit(rank=8, min_size=0)
  >>> state = tx.init({'kernel': jnp.ones((16, 64))})
  >>> state.slots['kernel'].state.inner.mu.codes.shape
  (8, 64)
  """
  inner = adam() if base_optimizer is None else base_optimizer
  return scale_by_galore(
    rank,
    update_proj_gap,
    scale,
    eight_bit(inner, block=block, min_size=min_size),
    basis=basis,
    basis_dtype=basis_dtype,
    moments_on_refresh=moments_on_refresh,
    **lift,
  )


galore_8bit = ready(scale_by_galore_8bit)
