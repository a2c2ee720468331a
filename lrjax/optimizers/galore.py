"""GaLore: memory-efficient training by gradient low-rank projection (Zhao et al., 2024)."""

from collections.abc import Callable
from typing import Any

import optax

from lrjax import bases, moments, residuals, transports
from lrjax.bases import stored_as
from lrjax.checks import floating, named
from lrjax.codecs import cast
from lrjax.low_rank import low_rank
from lrjax.matrices import on_matrices
from lrjax.optimizers.assembly import assemble
from lrjax.refreshes import every
from lrjax.types import Basis
from lrjax.views import Where


def scale_by_galore(
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  base_optimizer: optax.GradientTransformation | None = None,
  weight_dimension_numbers: Any = None,
  *,
  basis: str | Callable[[int], Basis] = 'eigh',
  basis_dtype: Any = None,
  moments_on_refresh: str | Callable = 'keep',
  stagger: bool = False,
  side: str = 'short',
  where: Where | None = None,
  seed: int = 0,
  guard: str = 'tree',
  diagnostics: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Runs an optimizer on rank-r projections of the gradients of matrices.

  .. math::
    R_t = P^\top G_t, \quad U_t = \mathrm{base}(R_t), \quad \Delta_t = \alpha P U_t

  with P (d, r) the leading singular vectors of the gradient at the last refresh; d is
  the smaller axis unless `side` says otherwise. All other leaves (embeddings, heads,
  norms, biases, matrices not larger than the rank) go to the base optimizer as they are
  and are not scaled. State per matrix: `r d` numbers of basis and, with Adam, `2 r k` of
  moments, where Adam keeps `2 d k`.

  Choose it where optimizer memory binds and gradients are formed anyway; it loses little
  at r = d/4. The learning rate of a projected matrix is in effect `scale` times smaller.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`.
    update_proj_gap: steps between refreshes of P.
    scale: alpha, of projected matrices only. `optax.contrib.galore` has 1.0 here, the
      paper 0.25.
    base_optimizer: any transformation that looks at gradients alone; default
      `lrjax.adam()`. Weight decay belongs outside.
    weight_dimension_numbers: the matrix axes of each leaf, see `lrjax.on_matrices`.
    basis: how P is found: 'eigh' (of the Gram matrix), 'svd' (the paper's: the same
      subspace, slower, also where singular values are tiny), 'randomized_svd' (GaLore 2,
      arXiv 2504.20437), 'subspace_iteration' (cheapest), or `rank -> Basis`. The last
      two gather no gradient that is split over a mesh, and are right for sides above
      2048.
    basis_dtype: what P is stored in; default float32.
    moments_on_refresh: 'keep' (paper), 'reset', 'rotate' (mu by C, nu by C*C),
      'rotate_abs', 'rotate_first' (mu alone), or a function, see `lrjax.transports`.
    stagger: refresh the matrices one after the other over the gap instead of together.
    side: which axis is compressed, see `lrjax.on_matrices` as for those below.
    where: which leaves are projected.
    seed: of random numbers.
    guard: what a bad gradient holds back.
    diagnostics: measure the subspaces every so many steps.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024

  >>> import jax.numpy as jnp
  >>> tx = optax.chain(scale_by_galore(rank=2), optax.scale_by_learning_rate(1e-2))
  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> updates, state = tx.update(params, tx.init(params))
  >>> state[0].slots['kernel'].state.inner.mu.shape
  (2, 16)
  """
  make = named('basis', basis, bases.NAMES)
  floating('basis_dtype', basis_dtype)
  transport = named('moments_on_refresh', moments_on_refresh, transports.NAMES)
  inner = moments.adam() if base_optimizer is None else base_optimizer
  refresh = every(update_proj_gap, stagger=stagger)
  residual = residuals.drop(scale)

  def rule(rank: int):
    b = make(rank) if basis_dtype is None else stored_as(make(rank), cast(basis_dtype))
    return low_rank(b, inner, refresh=refresh, residual=residual, transport=transport)

  rule(1)  # parts that do not fit are refused here, not at the first step
  return on_matrices(
    rule,
    rank=rank,
    side=side,
    where=where,
    weight_dimension_numbers=weight_dimension_numbers,
    rest=inner,
    seed=seed,
    guard=guard,
    diagnostics=diagnostics,
  )


def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  base_optimizer: optax.GradientTransformation | None = None,
  weight_decay: float = 0.0,
  mask: Any = None,
  weight_dimension_numbers: Any = None,
  *,
  basis: str | Callable[[int], Basis] = 'eigh',
  basis_dtype: Any = None,
  moments_on_refresh: str | Callable = 'keep',
  stagger: bool = False,
  side: str = 'short',
  where: Where | None = None,
  seed: int = 0,
  guard: str = 'tree',
  diagnostics: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """GaLore, ready to use: `scale_by_galore`, decoupled weight decay, learning rate.

  Arguments stand in the order of `optax.contrib.galore`.

  Under `optax.inject_hyperparams` these belong in `static_args`: `rank`,
  `update_proj_gap`, and every function that is not a schedule.

  Args:
    learning_rate: a number or a schedule; 0.01 in the paper (0.005 at 7B).
    rank: see `scale_by_galore`, as for all names it shares.
    update_proj_gap: see there.
    scale: see there.
    base_optimizer: see there.
    weight_decay: strength of decoupled decay, in full space, times the learning rate.
    mask: which leaves decay: a tree of bools or a function from params to one.
    weight_dimension_numbers: see there.
    basis: see there.
    basis_dtype: see there.
    moments_on_refresh: see there.
    stagger: see there.
    side: see there.
    where: see there.
    seed: see there.
    guard: see there.
    diagnostics: see there.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError, TypeError: see `scale_by_galore`.

  >>> import jax.numpy as jnp
  >>> params = {'kernel': jnp.ones((8, 16))}
  >>> tx = galore(1e-2, rank=1, weight_decay=0.1)
  >>> updates, state = tx.update(params, tx.init(params), params)
  >>> print(f"{updates['kernel'][0, 0]:.5f}")
  -0.00188
  """
  rule = scale_by_galore(
    rank,
    update_proj_gap,
    scale,
    base_optimizer,
    weight_dimension_numbers,
    basis=basis,
    basis_dtype=basis_dtype,
    moments_on_refresh=moments_on_refresh,
    stagger=stagger,
    side=side,
    where=where,
    seed=seed,
    guard=guard,
    diagnostics=diagnostics,
  )
  return assemble(rule, learning_rate, weight_decay, mask)
