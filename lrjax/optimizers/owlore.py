"""OwLore: outlier-weighed layerwise sampled low-rank projection (Li et al., 2024)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrjax import moments
from lrjax.checks import finite, named
from lrjax.layers import find_layers
from lrjax.optimizers.assembly import assemble
from lrjax.optimizers.galore import scale_by_galore
from lrjax.sampling import only_active, sampled_layers
from lrjax.views import Where, hidden_kernels


def outlier_ratio(
  W: jax.Array,  # (..., in, out)
  x_norm: jax.Array | None = None,  # (..., in)
  M: float = 13.0,
) -> jax.Array:
  r"""The fraction of weights far above their mean: how outlying a matrix is.

  .. math::
    A_{ij} = \|X_i\|_2 |W_{ij}|, \quad D = \mathrm{mean}(A > M\, \mathrm{mean}(A))

  Args:
    W: a kernel or a stack of them.
    x_norm: norms of the input features over calibration data; default all equal.
    M: multiple of the mean above which an entry is an outlier.

  Returns:
    D in [0, 1] with the stack axes of W.

  >>> float(outlier_ratio(jnp.ones((64, 4)).at[0].set(1e3)))
  0.015625
  """
  a = jnp.abs(W.astype(jnp.float32))
  a = a if x_norm is None else a * x_norm[..., None]
  axes = (-2, -1)
  outliers = a > M * a.mean(axes, keepdims=True)
  return outliers.mean(axes, dtype=jnp.float32)


def outlier_scores(
  params: Any,
  x_norms: Mapping[str, jax.Array] | None = None,
  M: float = 13.0,
  where: Where | None = None,
) -> jax.Array:
  """The outlier ratio of each layer: the mean over its kernels.

  Args:
    params: parameters with layers, see `lrjax.layers.find_layers`.
    x_norms: path of a kernel, without the number of its layer -> norms of its input
      features (L, in); default all equal.
    M: see `outlier_ratio`.
    where: which leaves belong to layers.

  Returns:
    float32 (L,).

  Raises:
    ValueError: if layers have no kernels.
  """
  layers, leaves = find_layers(params, where), jax.tree.leaves(params)
  found = []
  for g in layers.groups:
    first = leaves[g.leaves[0]]
    if not hidden_kernels(g.path, first) or first.ndim - g.stacked < 2:
      continue
    norms = None if x_norms is None else x_norms[g.path]
    if g.stacked:
      ratio = outlier_ratio(first, norms, M)
    else:
      by_layer = [None] * layers.count if norms is None else norms
      ratios = [outlier_ratio(leaves[i], x, M) for i, x in zip(g.leaves, by_layer)]
      ratio = jnp.stack(ratios)
    found.append(ratio.reshape(layers.count, -1).mean(1))
  if not found:
    raise ValueError('no kernel belongs to a layer; choose the layers with `where`')
  return sum(found[1:], found[0]) / len(found)


def _outliers(params: Any, M: float, where: Where | None) -> jax.Array:
  return outlier_scores(params, M=M, where=where)


def _reverse(params: Any, M: float, where: Where | None) -> jax.Array:
  p = outlier_scores(params, M=M, where=where)
  return p.max() - p


def _increase(params: Any, M: float, where: Where | None) -> jax.Array:
  return jnp.arange(1.0, find_layers(params, where).count + 1)


def _decrease(params: Any, M: float, where: Where | None) -> jax.Array:
  return _increase(params, M, where)[::-1]


MODES = dict(
  outliers=_outliers, reverse=_reverse, increase=_increase, decrease=_decrease
)


def scale_by_owlore(
  n_active: int | float = 5,
  period: int = 50,
  rank: Any = 256,
  update_proj_gap: int = 100,
  scale: float = 1.0,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  probabilities: Any = 'outliers',
  outlier_threshold: float = 13.0,
  compact: bool = True,
  where: Where | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore on a few layers at a time, drawn by how many outliers their weights have.

  .. math:: p_l = D_l / \textstyle\sum_k D_k, \quad D_l = \mathrm{outlier\_ratio}(W_l)

  Every `period` steps `n_active` layers are drawn without replacement with
  probabilities p; they train, all others have zero updates. Leaves outside the layers
  (embeddings, head, last norm) train at every step with the base optimizer.

  State: for a kernel (L, in, out), a and b its smaller and larger axis, `n (r a + 2 r b)`
  numbers with GaLore and Adam, `2 n a b` with `rank=None`, `2 n` per entry of other leaves
  of a layer, and what the base optimizer keeps of all leaves outside the layers. The
  official code never lets go of a state: it grows to L in place of n, as here with
  `compact=False`.

  Choose it to fine-tune where GaLore's own memory is still too much. `rank=None` is the
  full-rank form, OWS; with 'uniform' it is LISA.

  Args:
    n_active: gamma, layers that train at a time: an int or a fraction of them.
    period: K, steps between draws.
    rank: r of GaLore, see `lrjax.scale_by_galore`; None: none.
    update_proj_gap: T of GaLore, steps between refreshes, counted over all draws; a
      layer that is newly active gets its basis at once.
    scale: alpha of GaLore.
    base_optimizer: default `lrjax.adam()`.
    probabilities: 'outliers' (of the weights at `init`), 'uniform', 'decrease' (L, ...,
      1), 'increase', 'reverse' (`max(p) - p`); L numbers, from `outlier_scores` with
      calibration data for example; or a function from parameters to L numbers.
      Where no layer has outliers, as at random initialisation, all are alike.
    outlier_threshold: M, an outlier is above M times the mean.
    compact: False keeps a state for each layer and goes on with it, see
      `lrjax.sampled_layers`.
    where: which leaves belong to layers, see `lrjax.layers.find_layers`.
    seed: of draws and bases.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate, whose state is a
    `SampledState`.

  Raises:
    ValueError, TypeError: see `lrjax.sampled_layers` and `lrjax.scale_by_galore`.

  References:
    Li et al., `OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for
    Memory-Efficient LLM Fine-tuning <https://arxiv.org/abs/2405.18380>`_, 2024

  >>> tx = scale_by_owlore(n_active=2, rank=4)
  >>> params = {'layers': {'kernel': jnp.ones((6, 8, 16))}}
  >>> tx.init(params).layers.slots['layers/kernel'].state.inner.mu.shape
  (2, 4, 16)
  """
  finite('outlier_threshold', outlier_threshold)
  base = moments.adam() if base_optimizer is None else base_optimizer
  inner = base
  if rank is not None:
    inner = scale_by_galore(rank, update_proj_gap, scale, base, seed=seed)
  return sampled_layers(
    inner,
    n_active,
    period,
    probabilities=_probabilities(probabilities, outlier_threshold, where),
    compact=compact,
    where=where,
    rest=base,
    seed=seed,
  )


def owlore(
  learning_rate: optax.ScalarOrSchedule,
  n_active: int | float = 5,
  period: int = 50,
  rank: Any = 256,
  update_proj_gap: int = 100,
  scale: float = 1.0,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  probabilities: Any = 'outliers',
  outlier_threshold: float = 13.0,
  compact: bool = True,
  where: Where | None = None,
  seed: int = 0,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """OwLore, ready to use: `scale_by_owlore`, decoupled weight decay, learning rate.

  Args:
    learning_rate: a number or a schedule; 3e-4 in the paper.
    n_active: see `scale_by_owlore`, as for all names it shares.
    period: see there.
    rank: see there.
    update_proj_gap: see there.
    scale: see there.
    base_optimizer: see there.
    probabilities: see there.
    outlier_threshold: see there.
    compact: see there.
    where: see there.
    seed: see there.
    weight_decay: strength of decoupled decay, times the learning rate; layers that are
      not active do not decay.
    mask: which leaves decay: a tree of bools or a function from params to one.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError, TypeError: see `scale_by_owlore`.
  """
  finite('weight_decay', weight_decay)
  rule = scale_by_owlore(
    n_active,
    period,
    rank,
    update_proj_gap,
    scale,
    base_optimizer,
    probabilities=probabilities,
    outlier_threshold=outlier_threshold,
    compact=compact,
    where=where,
    seed=seed,
  )
  if isinstance(weight_decay, (int, float)) and weight_decay == 0:
    return assemble(rule, learning_rate)
  decay = optax.add_decayed_weights(weight_decay, mask)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple:
    u, state = rule.update(updates, state, params, **extra)
    seen: Any = only_active(state, params, where)
    return decay.update(u, decay.init(params), seen)[0], state

  decayed = optax.GradientTransformationExtraArgs(rule.init, update)
  return assemble(decayed, learning_rate)


def _probabilities(given: Any, M: float, where: Where | None) -> Any:
  """What `sampled_layers` takes, from the name of a mode."""
  if not isinstance(given, str):
    return given
  if given == 'uniform':
    return None
  mode: Callable = named('probabilities', given, {**MODES, 'uniform': _increase})
  return functools.partial(mode, M=M, where=where)
