r"""Random features of inputs and of weights, whose products estimate functions of both.

With G (l, in) of standard normal rows g, stored as G' (in, l):

  relu       max(G z, c) / sqrt(l) on both sides, an arc-cosine kernel;
  exp        E[e^{g.x - |x|^2/2} e^{g.w - |w|^2/2}] = e^{x.w};
  cos, sin   E[e^{i g.x + |x|^2/2} e^{g.w - |w|^2/2}] = e^{i x.w}, real or imaginary part.

The last two are the universal features of arXiv 2310.13225 with xi = 1 / 2 pi, which is
enough for all frequencies of a real wave, as that of -xi is its conjugate.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lrjax.bases.orthonormal import mm
from lrjax.checks import closest
from lrjax.parameterizations import factors

Kind = Literal['relu', 'cos', 'sin', 'exp']
_KINDS = ('cos', 'exp', 'relu', 'sin')


class Features(NamedTuple):
  """Which features; as in `lrjax.snnk`."""

  kind: str = 'relu'
  normalize: float | None = None
  threshold: float = 0.0
  M: float = 0.0

  @property
  def need_length(self) -> bool:
    """Whether features of z depend on |z|, beside G z."""
    return self.kind != 'relu' or self.normalize is not None

  def factor(self, width: int) -> float:
    """What vectors of this width are multiplied with."""
    return 1.0 if self.kind == 'relu' or self.normalize else width**-0.25


class Scaled(NamedTuple):
  """The array `numbers` times e^`log`, or `numbers` alone.

  Features in two parts, so that low precision can hold the numbers.
  """

  numbers: jax.Array
  log: jax.Array | None


def checked(o: Features) -> Features:
  """`o`, or ValueError for what is out of range or has no meaning."""
  if o.kind not in _KINDS:
    raise ValueError(f'unknown `kind` {o.kind!r}; {closest(str(o.kind), _KINDS)}')
  if o.normalize is not None and not 0 < o.normalize < math.inf:
    raise ValueError(f'`normalize` must be positive and finite, got {o.normalize}')
  if not math.isfinite(o.threshold):
    raise ValueError(f'`threshold` must be finite, got {o.threshold}')
  if not -0.25 < o.M < math.inf:
    raise ValueError(f'`M` must be above -1/4 and finite, got {o.M}')
  name, useless = ('M', o.M) if o.kind == 'relu' else ('threshold', o.threshold)
  if useless:
    raise ValueError(f'`{name}` has no meaning for features of kind {o.kind!r}')
  return o


def gaussian(key: jax.Array, width: int, count: int, orthogonal: bool) -> jax.Array:
  """G' (width, count); with orthogonal blocks of `width` columns if asked for."""
  k1, k2 = jax.random.split(key)
  G = jax.random.normal(k1, (width, count))
  if not orthogonal:
    return G
  blocks = jax.random.normal(k2, (-(-count // width), width, min(width, count)))
  Q, upper = jnp.linalg.qr(blocks)
  # Householder's signs follow the entries: without a positive diagonal y is biased.
  positive = jnp.diagonal(upper, axis1=-2, axis2=-1) >= 0
  Q = jnp.where(positive[:, None], Q, -Q)
  columns = jnp.moveaxis(Q, 0, 1).reshape(width, -1)[:, :count]
  return columns * jnp.linalg.norm(G, axis=0, keepdims=True)


def square(x: jax.Array) -> jax.Array:
  """|x|^2 over the last axis, which stays, in float32."""
  return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)


def of_inputs(
  o: Features, p: jax.Array, length2: jax.Array | None, factor: float = 1.0
) -> Scaled:
  """Features (..., l), or (..., 2 l) for waves, from p = G x (..., l).

  Args:
    o: which.
    p: G x.
    length2: |x|^2 (..., 1) if `o.need_length`.
    factor: what both are still to be multiplied with, see `Features.factor`.
  """
  p, length2 = _stretched(o, p, length2, factor)
  root = math.sqrt(p.shape[-1])
  if o.kind == 'relu':
    return Scaled(jnp.maximum(p, o.threshold) / root, None)
  p = math.sqrt(1 + 4 * o.M) * p
  if o.kind != 'exp':
    return Scaled(jnp.concatenate([jnp.cos(p), jnp.sin(p)], -1) / root, length2 / 2)
  top = jax.lax.stop_gradient(p.max(axis=-1, keepdims=True))
  return Scaled(jnp.exp(p - top) / root, top - length2 / 2)


def of_weights(o: Features, W: jax.Array, G: jax.Array) -> jax.Array:
  """Features of the columns of W (in, out), as a readout (l or 2 l, out)."""
  width, count = G.shape
  p, length2 = _stretched(o, mm(W.T, G), square(W.T), o.factor(width))
  if o.kind == 'relu':
    return jnp.maximum(p, o.threshold).T / math.sqrt(count)
  # Of both sides, as the features of inputs have none.
  constant = 0.5 * width * math.log1p(4 * o.M) - 2 * o.M * square(G.T).T
  psi = jnp.exp(math.sqrt(1 + 4 * o.M) * p - length2 / 2 + constant)
  psi, zero = psi.T / math.sqrt(count), jnp.zeros((count, W.shape[1]))
  parts = {'cos': [psi, zero], 'sin': [zero, psi], 'exp': [psi]}
  return jnp.concatenate(parts[o.kind])


def times(phi: Scaled, matrix: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Features times a matrix, in `dtype`."""
  y = factors.down(phi.numbers.astype(dtype), matrix)
  if phi.log is None:
    return y
  return (y.astype(jnp.float32) * jnp.exp(phi.log)).astype(dtype)


def _stretched(
  o: Features, p: jax.Array, length2: Any, factor: float
) -> tuple[jax.Array, Any]:
  """G z and |z|^2 for z = x times `factor`, or x at the length `normalize`."""
  p = p.astype(jnp.float32)
  if o.normalize is not None:
    # A vector of zeros has no direction, and its gradient must not be infinite.
    some = length2 > 1e-24
    inverse = jax.lax.rsqrt(jnp.where(some, length2, 1))
    p = jnp.where(some, o.normalize * inverse, 0) * p
    return p, jnp.full_like(length2, o.normalize**2)
  return factor * p, None if length2 is None else factor**2 * length2
