"""Flora: low-rank adapters are secretly gradient compressors (Hao et al., 2024)."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from lrjax.bases import gaussian
from lrjax.checks import finite
from lrjax.low_rank import check_gradient_only
from lrjax.matrices import on_matrices
from lrjax.moments import factored_rms
from lrjax.optimizers.assembly import Lift, lifted, ready
from lrjax.refreshes import every
from lrjax.types import Basis, MatrixTransform


class FloraState(NamedTuple):
  """State of one matrix.

  Attributes:
    base: state of the base optimizer on (d, k).
    momentum: M (r, k), in the space of `sketch`.
    sketch: the key P (d, r) is drawn from, uint32[2].
    next_sketch: the key of the P that the momentum is compressed by next; another one
      than `sketch` only while it changes.
  """

  base: optax.OptState
  momentum: jax.Array
  sketch: jax.Array
  next_sketch: jax.Array


@lifted
def scale_by_flora(
  rank: Any = 128,
  update_proj_gap: int = 1000,
  base_optimizer: optax.GradientTransformation | None = None,
  *,
  b1: float = 0.9,
  nesterov: bool = False,
  clipping_threshold: float | None = 1.0,
  multiply_by_parameter_scale: bool = True,
  **lift: Unpack[Lift],
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum of normalised gradients, kept as a random sketch.

  .. math::
    u = \mathrm{base}(G), \quad
    \Delta = b_1 P M + (1 - b_1) u, \quad
    M \leftarrow b_1 M + (1 - b_1) P^\top u

  P (d, r) has independent entries N(0, 1/r) and is drawn from its key whenever it is
  used. Every `update_proj_gap` steps it is drawn anew, and the momentum moves along,
  :math:`M \leftarrow P_{new}^\top (b_1 P_{old} M + (1 - b_1) u)`. The update's RMS is
  clipped and multiplied by that of the parameter. P P' is the identity only on average:
  the smaller r, the noisier the momentum, but no direction is lost for long.

  State per matrix: `r k` floats, two keys of 8 bytes, and the factored second moment of
  `d + k + 1` floats; two counts of 4 bytes.

  Choose it where optimizer state must all but vanish, and Adafactor would do.

  Args:
    rank: r: an int, a fraction of the smaller axis, or rules `[(pattern, either)]`; 4 in
      the official code.
    update_proj_gap: steps between new sketches, kappa of the paper.
    base_optimizer: what normalises the gradient (d, k) ahead of the momentum; default
      Adafactor's `lrjax.factored_rms(decay_rate=0.8, clipping_threshold=None)`.
    b1: decay of the momentum.
    nesterov: use M as updated by this step's u, sketched, in the update. The form of the
      official Flax code; the default is that of the torch code, which becomes plain
      momentum where P is orthogonal.
    clipping_threshold: the largest RMS of a matrix's update; None: any.
    multiply_by_parameter_scale: multiply the update of a leaf by the RMS of its
      parameters, at least 1e-3, which `update` then needs.
    **lift: see `lrjax.on_matrices`. Leaves that are not projected get the same with dense
      momentum. The official code leaves out matrices by shape (a side below 128, sides
      that differ more than four times) where this goes by names, see `where`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, without learning rate.

  Raises:
    ValueError, TypeError: for values outside these; see `lrjax.on_matrices`.

  References:
    Hao et al., `Flora: Low-Rank Adapters Are Secretly Gradient Compressors
    <https://arxiv.org/abs/2402.03293>`_, 2024

  >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
  >>> matrices, scale = scale_by_flora(rank=2).init(params)
  >>> matrices.slots['kernel'].state.momentum.shape
  (2, 16)
  """
  finite('b1', b1, below=1.0)
  base = base_optimizer
  if base is None:
    base = factored_rms(decay_rate=0.8, clipping_threshold=None)
  check_gradient_only(base)
  clip = optax.identity()
  if clipping_threshold is not None:
    clip = optax.clip_by_block_rms(finite('clipping_threshold', clipping_threshold))
  refresh = every(update_proj_gap)

  def rule(rank: int) -> MatrixTransform:
    tx = _compressed_momentum(gaussian(rank), base, clip, b1, nesterov)
    return tx._replace(due=lambda s, step, phase: refresh.due((), step, phase))

  rest = optax.chain(base, dense_momentum(b1, nesterov), clip)
  tx = on_matrices(rule, rank=rank, rest=rest, **lift)
  scale = optax.scale_by_param_block_rms()
  return optax.chain(tx, scale) if multiply_by_parameter_scale else tx


flora = ready(scale_by_flora)


def dense_momentum(b1: float, nesterov: bool) -> optax.GradientTransformation:
  """The same momentum without compression."""
  ema = optax.ema(b1, debias=False)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    m, state = ema.update(updates, state)
    if nesterov:
      m = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * u, m, updates)
    return m, state

  return optax.GradientTransformation(ema.init, update)


def _compressed_momentum(
  basis: Basis,
  base: optax.GradientTransformation,
  clip: optax.GradientTransformation,
  b1: float,
  nesterov: bool,
) -> MatrixTransform:
  """Momentum kept as P' M of a dense one, with P regenerated."""

  def init(g: Any) -> FloraState:
    zeros = jnp.zeros(g.shape, g.dtype)
    sketch = basis.init(*g.shape, g.dtype)
    low = jax.eval_shape(basis.down, sketch, g)
    low = jnp.zeros(low.shape, low.dtype)
    return FloraState(base.init(zeros), low, sketch, jnp.copy(sketch))

  def refresh(key: jax.Array, g: jax.Array, s: FloraState) -> tuple:
    return s._replace(next_sketch=basis.fit(key, g, s.sketch)), jnp.asarray(True)

  def update(g: jax.Array, s: FloraState) -> tuple[jax.Array, FloraState]:
    normalised: Any = base.update(g, s.base)
    u, base_state = normalised
    mixed = b1 * basis.up(s.sketch, s.momentum, len(g)) + (1 - b1) * u
    # Old sketch: P'(b1 P M + ...) is not b1 M + ..., since P'P is not the identity.
    steady = b1 * s.momentum + (1 - b1) * basis.down(s.next_sketch, u)
    turned = basis.down(s.next_sketch, mixed)
    low = jnp.where((s.sketch != s.next_sketch).any(), turned, steady)
    if nesterov:
      mixed = b1 * basis.up(s.next_sketch, low, len(g)) + (1 - b1) * u
    out: Any = clip.update(mixed, optax.EmptyState())[0]
    return out, FloraState(base_state, low, s.next_sketch, s.next_sketch)

  return MatrixTransform(init, update, refresh=refresh)
