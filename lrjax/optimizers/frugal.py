"""FRUGAL: full-rank updates by gradient splitting (Zmushko et al., 2024)."""

import re
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from lrjax import bases, moments, transports
from lrjax.checks import finite, named, positive_int
from lrjax.layers import LAYERS
from lrjax.low_rank import low_rank
from lrjax.matrices import on_matrices
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.refreshes import every
from lrjax.residuals import STATE_FREE, state_free
from lrjax.sampling import sampled_layers
from lrjax.types import Basis, MatrixTransform
from lrjax.views import hidden_kernels

PROJECTIONS = dict(
  svd=bases.svd,
  random=bases.random_orthogonal,
  columns=bases.columns,
  randk=bases.entries,
)


@lifted
def scale_by_frugal(
  density: float = 0.25,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  projection: str | Callable[[int], Basis] = 'columns',
  inactive: str | Callable[[jax.Array], jax.Array] = 'sign',
  inactive_scale: float = 1.0,
  moments_on_refresh: str | Callable = 'reset',
  order: str | Callable[[jax.Array], jax.Array] = 'random',
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""Adam on a part of each matrix, signSGD on all the rest, so that the step is full rank.

  .. math::
    R_t = P^\top G_t, \quad U_t = \mathrm{base}(R_t), \quad
    \Delta_t = s_p \left(P U_t + s_i\, f(G_t - P R_t)\right)

  with P (d, r) found again every `update_proj_gap` steps, r a share rho of d. At a
  refresh moments and their count start from zero. Leaves that are not projected go to
  the base optimizer as they are.

  State per matrix with Adam: 'svd', 'random' `r d + 2 r k` numbers; 'columns' `2 r k`
  and r integers; 'randk' `2 r k` and `r k` integers; 'blocks' `2 d k` for the share rho
  of the layers of a stack, nothing for the others. Density 0 keeps no state at all.

  Choose it over GaLore where ranks are low: no direction is left without an update. With
  'columns' (a gather) and 'blocks' neither products nor factorisations are computed.

  Args:
    density: rho, the share of each matrix that has state; 0: none, 1: plain `base`. Of
      d, rounded as in the official code: halves to even for 'svd', 'random' and
      functions, down for 'columns' and 'randk'.
    update_proj_gap: steps between refreshes.
    scale: s_p, learning rate of matrices relative to that of all other leaves.
    base_optimizer: the state-full half: any transformation that looks at gradients
      alone, such as `optax.scale_by_lion()` or `optax.trace(0.9)`, whose state starts
      from zeros; default `lrjax.adam()`.
    projection: 'svd' of the gradient; 'random' directions; 'columns', random
      coordinates of the compressed side (`side='in'` is the official choice); 'randk',
      random entries, equally many of each column (the official code draws them over the
      whole matrix); 'blocks', the paper's main form: whole layers of a stack, as
      `lrjax.sampled_layers` finds them, matrices outside stacks go to the base (the
      official code counts all matrices of a model as one list, here each layer's are
      active together); or `rank -> Basis`.
    inactive: f: 'sign', 'sgd' (the part as it is), 'no' (nothing), or a function.
    inactive_scale: s_i, learning rate of that part; 1 in pre-training, 0.1 in
      fine-tuning.
    moments_on_refresh: 'reset', 'keep', 'rotate', ..., see `lrjax.scale_by_galore`;
      'blocks' always reset.
    order: which blocks come next, see `lrjax.sampled_layers`; 'descending' in all
      official scripts.
    **lift: see `lrjax.on_matrices`; `where` chooses among leaves of layers for 'blocks',
      which have no side, guard, diagnostics or dimension numbers.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate. Its state is a
    `MatricesState`, for 'blocks' a `SampledState`.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Zmushko et al., `FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for
    Scalable Training <https://arxiv.org/abs/2411.07837>`_, 2024

  >>> import jax.numpy as jnp
  >>> params = {'kernel': jnp.ones((8, 16))}
  >>> tx = scale_by_frugal(density=0.25)
  >>> updates, state = tx.update(params, tx.init(params))
  >>> print(state.slots['kernel'].state.inner.mu.shape, updates['kernel'].min().round(3))
  (2, 16) 1.0
  """
  if isinstance(density, jax.Array):
    raise TypeError(
      f'`density` fixes shapes and must be a Python float, not an array, got {density};'
      f' under optax.inject_hyperparams name it in static_args'
    )
  if finite('density', density) > 1:
    raise ValueError(f'`density` must lie between 0 and 1, got {density}')
  inner = moments.adam() if base_optimizer is None else base_optimizer
  residual = state_free(inactive, inactive_scale, scale)
  if projection == 'blocks' and density > 0:
    _check_blocks(moments_on_refresh, lift)
    free = named('inactive', inactive, STATE_FREE)
    return sampled_layers(
      optax.chain(inner, optax.scale(scale)),
      float(density),
      positive_int('update_proj_gap', update_proj_gap),
      order=order,
      inactive=lambda g: scale * (inactive_scale * free(g)),
      where=lift.get('where') or _layer_kernels,
      rest=inner,
      seed=lift.get('seed', 0),
    )
  table = {**PROJECTIONS, 'blocks': bases.columns}
  make = named('projection', projection, table)
  transport = named('moments_on_refresh', moments_on_refresh, transports.NAMES)
  refresh = every(update_proj_gap)

  def rule(rank: int) -> MatrixTransform:
    if rank == 0:
      free = lambda g: residual.after(g, g, g, jnp.zeros_like, ())[0]
      return MatrixTransform(lambda g: (), lambda g, s: (free(g), s))
    return low_rank(
      make(rank), inner, refresh=refresh, residual=residual, transport=transport
    )

  rule(1)  # parts that do not fit are refused here, not at the first step
  floor = projection in ('columns', 'randk')
  share = lambda d: int(d * density) if floor else round(d * density)
  return on_matrices(rule, rank=share, rest=inner, **lift)


frugal = ready(scale_by_frugal)


def _layer_kernels(path: str, x: Any) -> bool:
  return hidden_kernels(path, x) and bool(re.search(LAYERS, path))


def _check_blocks(moments_on_refresh: str | Callable, lift: Lift) -> None:
  """Raises ValueError for arguments that blocks have no use for."""
  if moments_on_refresh != 'reset':
    raise ValueError(
      f'projection `blocks` drops the moments of blocks that come to rest; allowed:'
      f" moments_on_refresh='reset', got {moments_on_refresh!r}"
    )
  unused = dict(side='short', weight_dimension_numbers=None, guard='tree')
  for name, default in {**unused, 'diagnostics': None}.items():
    if lift.get(name, default) != default:
      raise ValueError(f'projection `blocks` takes whole matrices and has no `{name}`')
