"""Layers between points of hyperbolic space, around any kernel.

Chen et al., "Fully Hyperbolic Neural Networks", 2022, arXiv 2105.14686 (HyboNet), in
which Sparse Spectral Training (arXiv 2405.15481) has its hyperbolic results. Points are
on the hyperboloid of curvature -1, :math:`-t^2 + |s|^2 = -1` with t > 0; an array
(..., n + 1) holds t first, then s. A linear layer is a plain one followed by `lift`, so
that its kernel may be `lrjax.sst`, or any other, in either flax shell:

  y = lrjax.hyperbolic.lift(Dense(n, m, kernel=lrjax.sst(64), rngs=rngs)(x), log_scale)
"""

import jax
import jax.numpy as jnp

from lrjax.bases.orthonormal import mm

# HyboNet's least distance of t from 1, and least |s|^2 that tells a direction.
_MARGIN, _NO_DIRECTION = 0.1, 1e-8


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
  r"""Minkowski's inner product, :math:`-t_x t_y + s_x \cdot s_y`, in float32.

  Args:
    x: (..., n + 1).
    y: (..., n + 1).

  Returns:
    (...); -1 of a point with itself.

  Examples:
    >>> x = from_space(jnp.array([3.0, 4.0]))
    >>> print(f'{inner(x, x):.4f}')
    -1.0000
  """
  product = x.astype(jnp.float32) * y.astype(jnp.float32)
  return jnp.sum(product[..., 1:], axis=-1) - product[..., 0]


def from_space(s: jax.Array) -> jax.Array:
  r"""The point (..., n + 1) above s (..., n): :math:`t = \sqrt{1 + |s|^2}`.

  Examples:
    >>> print(from_space(jnp.array([3.0, 4.0])))
    [5.0990195 3.        4.       ]
  """
  square = jnp.sum(jnp.square(s.astype(jnp.float32)), axis=-1, keepdims=True)
  return jnp.concatenate([jnp.sqrt(1 + square).astype(s.dtype), s], axis=-1)


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
  r"""Length of the geodesic, :math:`\mathrm{arcosh}(-\langle x, y \rangle)`, in float32.

  Computed as :math:`2\,\mathrm{arsinh}(|x - y| / 2)` with Minkowski's norm of x - y, which
  keeps its digits between near points and has the gradient 0 between equal ones.

  Args:
    x: points (..., n + 1).
    y: points (..., n + 1).

  Returns:
    (...), at least 0.

  Examples:
    >>> x = from_space(jnp.array([jnp.sinh(2.0), 0.0]))
    >>> print(f'{distance(x, from_space(jnp.zeros(2))):.4f}')
    2.0000
  """
  apart = x.astype(jnp.float32) - y.astype(jnp.float32)
  square = inner(apart, apart)
  known = square > 0
  return jnp.where(known, 2 * jnp.arcsinh(jnp.sqrt(jnp.where(known, square, 1)) / 2), 0)


def lift(z: jax.Array, log_scale: jax.Array | float) -> jax.Array:
  r"""HyboNet's way from the output of a linear layer to a point.

  .. math::
    t = \sigma(z_0)\, e^c + 1.1, \quad s = \sqrt{t^2 - 1}\; z_{1:} / |z_{1:}|

  A bias, or the point a residual connection adds, goes into z. Activations come before
  the linear layer. The result is always on the hyperboloid: where z tells no direction,
  it comes near the origin, at which the official code divides by zero.

  Args:
    z: (..., n + 1), heads split off.
    log_scale: c, a trained scalar; HyboNet starts at 2.3, that is t in (1.1, 11.1).

  Returns:
    Points (..., n + 1) in the dtype of z, computed in float32.

  Examples:
    >>> x = lift(jnp.array([0.0, 3.0, 4.0]), 2.3)
    >>> print(f'{x[0]:.3f} {x[1]:.3f} {x[2]:.3f}, {inner(x, x):.3f}')
    6.087 3.603 4.804, -1.000
  """
  wide = z.astype(jnp.float32)
  c = jnp.asarray(log_scale, jnp.float32)
  t = jax.nn.sigmoid(wide[..., :1]) * jnp.exp(c) + (1 + _MARGIN)
  square = jnp.sum(jnp.square(wide[..., 1:]), axis=-1, keepdims=True)
  scale = jnp.sqrt((t * t - 1) / jnp.maximum(square, _NO_DIRECTION))
  return from_space(wide[..., 1:] * scale).astype(z.dtype)


def centroid(x: jax.Array, weights: jax.Array) -> jax.Array:
  r"""Weighted means :math:`m = w x` brought back to the hyperboloid, :math:`m / |m|`.

  They have the least weighted sum of squared Lorentzian distances,
  :math:`-2 - 2 \langle x, m \rangle`.

  Args:
    x: points (..., k, n + 1).
    weights: (..., q, k), at least 0, not all of a row 0.

  Returns:
    Points (..., q, n + 1) in the dtype of x.

  Examples:
    >>> x = from_space(jnp.array([[3.0, 4.0], [-3.0, -4.0]]))
    >>> print(centroid(x, jnp.ones((1, 2))))
    [[1. 0. 0.]]
  """
  mean = weights.astype(jnp.float32) @ x.astype(jnp.float32)
  return (mean * jax.lax.rsqrt(-inner(mean, mean))[..., None]).astype(x.dtype)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  scale: jax.Array | float,
  mask: jax.Array | None = None,
) -> jax.Array:
  r"""Centroids of v by the softmax of negative squared Lorentzian distances.

  .. math:: w = \mathrm{softmax}((2 + 2 \langle q, k \rangle) / \mathrm{scale})

  HyboNet's bias inside the softmax is left out: it changes nothing.

  Args:
    q: points (..., Q, n + 1).
    k: points (..., K, n + 1).
    v: points (..., K, m + 1).
    scale: a trained scalar; HyboNet starts at the root of the model's width.
    mask: bool (..., Q, K), True where a query may look; None: everywhere. Each query
      must see a key.

  Returns:
    Points (..., Q, m + 1) in the dtype of v.

  Examples:
    >>> x = from_space(jnp.ones((5, 3)))
    >>> attention(x, x, x, 2.0).shape
    (5, 4)
  """
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  q = q.at[..., 0].multiply(-1)
  # At full precision: time and space nearly cancel.
  scores = (2 + 2 * mm(q, jnp.swapaxes(k, -1, -2))) / scale
  if mask is not None:
    scores = jnp.where(mask, scores, -jnp.inf)
  return centroid(v, jax.nn.softmax(scores, axis=-1))
