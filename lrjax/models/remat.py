"""What the backward pass of a layer keeps, and what it computes again."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from lrjax.models.llama_config import Remat
from lrjax.parameterizations.factors import LOW_RANK

RESIDUAL = 'residual'


def residual(x: jax.Array) -> jax.Array:
  """x, under the name by which `remat='low_rank'` keeps the residual stream."""
  return checkpoint_name(x, RESIDUAL)


def rematerialize(step: Callable, remat: Remat, *, scanned: bool) -> Callable:
  """A function whose backward pass computes it again, as `LlamaConfig.remat` says.

  Args:
    step: any function of arrays.
    remat: False: `step` as it is; True: nothing but its arguments is kept; 'low_rank':
      the products x a of low-rank kernels (`factors.down`) and the residual stream too.
    scanned: whether it is the body of a scan, where XLA cannot merge the recomputation
      with the original anyway.

  Returns:
    A function of the same values and gradients.
  """
  if not remat:
    return step
  names = (LOW_RANK, RESIDUAL) if remat == 'low_rank' else ()
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  return jax.checkpoint(step, prevent_cse=not scanned, policy=policy)
