"""Inner optimizers of our own: what optax has in no form that fits a low-rank space."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrjax.checks import closest, finite, floating

BiasCorrection = Literal['moments', 'step', 'none']


class Holding(optax.GradientTransformationExtraArgs):
  """A transformation whose `update` takes `move`, bool[], besides.

  Where it is false nothing moves: the state comes back as it was, the updates mean
  nothing. A select between the old state and a new one would do the same, but XLA then
  copies the one and computes the other twice.
  """


def held(tx: optax.GradientTransformation, g: Any, s: Any, ok: Any) -> tuple[Any, Any]:
  """`tx.update(g, s)`, with the state as it was where `ok`, bool[], is false."""
  if ok is True:
    return tx.update(g, s, None)
  g = jax.tree.map(lambda x: jnp.where(ok, x, 0), g)
  if isinstance(tx, Holding):
    return tx.update(g, s, None, move=ok)
  u, new = tx.update(g, s, None)
  return u, jax.tree.map(lambda n, o: n if n is o else jnp.where(ok, n, o), new, s)


class AdamState(NamedTuple):
  """Count of updates, first and second moments with the tree of the gradients."""

  count: jax.Array
  mu: Any
  nu: Any


def adam(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  bias_correction: BiasCorrection = 'moments',
  mu_dtype: Any = None,
  nu_dtype: Any = None,
) -> Holding:
  r"""Adam with a dtype for each moment and a choice of where the bias is corrected.

  .. math::
    M \leftarrow b_1 M + (1 - b_1) G, \quad V \leftarrow b_2 V + (1 - b_2) G^2

  and the update is, with :math:`c_i = 1 - b_i^t` for update number t,

  - 'moments': :math:`(M / c_1) / (\sqrt{V / c_2} + \epsilon)`, the paper's and optax's;
  - 'step': :math:`\sqrt{c_2} / c_1 \cdot M / (\sqrt V + \epsilon)`, that of galore-torch
    and old Hugging Face code, whose eps is in effect larger at first;
  - 'none': :math:`M / (\sqrt V + \epsilon)`.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    bias_correction: see above.
    mu_dtype: stored dtype of M; default float32 (float64 for float64 gradients).
    nu_dtype: stored dtype of V, likewise. The arithmetic is never below float32.

  Returns:
    An `optax.GradientTransformationExtraArgs` with an `AdamState`; `update` takes
    `move`, see `lrjax.moments.Holding`.

  Raises:
    ValueError: for an unknown `bias_correction`, decays outside [0, 1), a negative eps.
    TypeError: for dtypes that are not floating point.
  """
  if bias_correction not in (known := ('moments', 'step', 'none')):
    raise ValueError(
      f'unknown `bias_correction` {bias_correction!r};'
      f' {closest(str(bias_correction), known)}'
    )
  finite('b1', b1, below=1.0)
  finite('b2', b2, below=1.0)
  finite('eps', eps)
  floating('mu_dtype', mu_dtype)
  floating('nu_dtype', nu_dtype)
  wide = lambda x: jnp.promote_types(x.dtype, jnp.float32)

  def init(params: Any) -> AdamState:
    zeros = lambda dtype: jax.tree.map(
      lambda x: jnp.zeros_like(x, dtype=dtype or wide(x)), params
    )
    return AdamState(jnp.zeros([], jnp.int32), zeros(mu_dtype), zeros(nu_dtype))

  def update(
    updates: Any, state: Any, params: Any = None, *, move: Any = True, **extra: Any
  ) -> tuple[Any, AdamState]:
    g, s = updates, state
    count = jnp.asarray(optax.safe_increment(s.count))
    if move is True:
      old, new = (lambda b: b), (lambda b: 1 - b)
    else:
      # 1 m - 0 x is m to the bit, also where m is -0.
      count = jnp.where(move, count, s.count)
      old = lambda b: jnp.where(move, b, 1.0)
      new = lambda b: jnp.where(move, 1 - b, -0.0)
    blend = lambda b, m, x: old(b) * m.astype(wide(x)) + new(b) * x.astype(wide(x))
    mu = jax.tree.map(lambda x, m: blend(b1, m, x), g, s.mu)
    nu = jax.tree.map(lambda x, v: blend(b2, v, jnp.square(x.astype(wide(x)))), g, s.nu)
    c1, c2 = 1 - b1**count, 1 - b2**count

    def direction(x: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
      if bias_correction == 'moments':
        u = (m / c1) / (jnp.sqrt(v / c2) + eps)
      else:
        u = m / (jnp.sqrt(v) + eps)
      if bias_correction == 'step':
        u = u * late_correction(count, b1, b2)
      return u.astype(x.dtype)

    store = lambda new, old: jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)
    out = jax.tree.map(direction, g, mu, nu)
    return out, AdamState(count, store(mu, s.mu), store(nu, s.nu))

  return Holding(init, update)


def late_correction(count: jax.Array, b1: Any, b2: Any) -> jax.Array:
  r""":math:`\sqrt{1 - b_2^t} / (1 - b_1^t)` after t = `count` >= 1 updates.

  >>> print(f'{late_correction(jnp.int32(1), 0.9, 0.999):.7f}')
  0.3162278
  """

  def complement(b: Any) -> jax.Array:
    # Written as 1 - b**t, float32 keeps four digits of 1 - 0.999.
    if isinstance(b, jax.Array):
      return -jnp.expm1(count * jnp.log(b))
    return -jnp.expm1(count * (math.log(b) if b else -math.inf))

  return jnp.sqrt(complement(b2)) / complement(b1)


def factored_rms(
  *, clipping_threshold: float | None = 1.0, **kwargs: Any
) -> optax.GradientTransformation:
  """Adafactor's factored second moment with its clip of the update's RMS.

  `optax.scale_by_factored_rms` reads parameters only for their shape; here the
  gradients stand in, so that it works where there are no parameters.

  Args:
    clipping_threshold: the largest RMS of an update; None: any.
    **kwargs: those of `optax.scale_by_factored_rms`; `min_dim_size_to_factor` is 128
      there and 2 here, since low-rank gradients are thin.

  Returns:
    An `optax.GradientTransformation`.
  """
  kwargs = {'min_dim_size_to_factor': 2, **kwargs}
  inner = optax.scale_by_factored_rms(**kwargs)
  if clipping_threshold is not None:
    inner = optax.chain(inner, optax.clip_by_block_rms(clipping_threshold))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return inner.update(updates, state, updates)

  return optax.GradientTransformation(inner.init, update)
