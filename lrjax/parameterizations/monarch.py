"""Monarch matrices: two block-diagonal matrices with a stride permutation between them.

Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
2022, arXiv 2204.00595; orthogonal start: Wei et al., "Building on Efficient Foundations:
Effectively Training LLMs with Structured Feedforward Layers", 2024, arXiv 2406.16450.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.bases.qr import HIGHEST
from lrjax.checks import named, positive_int
from lrjax.orthogonalize import polar
from lrjax.parameterizations import factors
from lrjax.parameterizations.factors import value
from lrjax.types import Parameterization, Split

Init = Literal['kaiming', 'ortho', 'project']


@value
def monarch(
  nblocks: int = 4, nblocks_out: int | None = None, init: Init = 'kaiming'
) -> Parameterization:
  r"""W = A P B, with A of k diagonal blocks, B of l, and P a stride permutation.

  .. math::
    h_{\kappa i} = \sum_j x_{\kappa j} A_{\kappa j i}, \qquad
    y_{\sigma \lambda} = \sum_\rho h_{\rho \lambda} B_{\lambda \rho \sigma}

  h is written as (k, q) and read as (r, l): the permutation is a reshape. Input block
  :math:`\kappa` is p = ceil(in / k) neighbours, output block :math:`\lambda` every l-th
  feature. Where k = l the middle k q is the shorter side rounded up to a multiple of k, in
  general up to one of lcm(k, l). Sides that k or l does not divide act as if zeros were
  added to x and the surplus were cut from y.

  Stored are `w1` (in, q), the blocks of A one below the other, and `w2` (r, out), whose
  columns :math:`\lambda, \lambda + l, \ldots` are block :math:`\lambda`: the shapes of
  low-rank factors of rank q, wired so that W can have full rank. What multiplies added
  zeros is not stored. Optimizers see these two matrices, not the single blocks.

  Each part of W between an input and an output block is a matrix (p, ceil(out / l)) of
  rank q / l, rounded down or up, so `from_dense` is a truncated SVD of each, the best
  approximation there is.
  Reverse sparsification, to end a training densely, is `lrjax.export`.

  Start:

  - `kaiming`: uniform on :math:`\pm` p^-1/2 and :math:`\pm` r^-1/2, so that entries of W
    have the deviation in^-1/2 / 3, as in the official code;
  - `ortho`: blocks with orthonormal rows or columns;
  - `project`: the best approximation of :math:`W_0 \sim N(0, 0.02^2)`.

  Memory: q in + r out weights, min(in, out) (in + out) / k for k = l, and as many of each
  moment; least at k = sqrt(n), 2 n^1.5. Multiplications as many a token. It keeps
  min(in, out) activations a token more than a dense kernel.

  Choose it where batches are large and a full-rank map is wanted of few parameters. In
  language models low-rank factors of equal size were better and faster (StructuredFFN,
  1.3B: perplexity 12.86 against 12.98 at 63 % of the parameters).

  Args:
    nblocks: k, how many parts the input is cut into; 1 is low rank with q = min(in, out).
    nblocks_out: l, the same for the output; None: k.
    init: how the blocks are drawn.

  Returns:
    A Parameterization.

  Raises:
    ValueError: for an unknown `init`, or at `init` for more blocks than features.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> split = monarch(4).init(jax.random.key(0), (16, 24), jnp.float32)
    >>> jax.tree.map(jnp.shape, split.train)
    {'w1': (16, 4), 'w2': (4, 24)}
    >>> int(jnp.linalg.matrix_rank(monarch(4).materialize(split)))
    16
  """
  k = positive_int('nblocks', nblocks)
  l = k if nblocks_out is None else positive_int('nblocks_out', nblocks_out)
  draw = named('init', init, _INITS)

  def start(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    _check(k, l, shape)
    a, b = draw(key, shape, k, l)
    return Split({'w1': a.astype(dtype), 'w2': b.astype(dtype)})

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    _check(k, l, W.shape)
    a, b = project(W, k, l)
    split = Split({'w1': a.astype(W.dtype), 'w2': b.astype(W.dtype)})
    return split, factors.relative_error(W, _dense(a, b, k, l))

  return Parameterization(
    init=start,
    from_dense=from_dense,
    apply=lambda s, x: _multiply(x, s.train['w1'], s.train['w2'], k, l),
    materialize=lambda s: _dense(s.train['w1'], s.train['w2'], k, l),
    # Not `a` and `b`: penalties on low-rank factors would think that W = ab.
    axes={'w1': ('in', None), 'w2': (None, 'out')},
  )


def project(W: jax.Array, k: int, l: int) -> tuple[jax.Array, jax.Array]:
  """The w1 (in, q) and w2 (r, out) nearest to W (in, out) in the Frobenius norm."""
  p, q, r, s = _sizes(W.shape, k, l)
  parts = _pad(W.astype(jnp.float32), k * p, s * l).reshape(k, p, s, l)
  U, S, Vt = jnp.linalg.svd(parts.transpose(0, 3, 1, 2), full_matrices=False)
  root = jnp.sqrt(S)
  # Middle feature f joins input block f // q with output block f % l, and is component
  # (f % q) // l of the part between them.
  f = np.arange(k * q)
  block, other, component = f // q, f % l, f % q // l
  A = (U * root[..., None, :])[block, other, :, component].reshape(k, q, p)
  B = (root[..., None] * Vt)[block, other, component].reshape(r, l, s)
  return _stored(A.swapaxes(1, 2), B.swapaxes(1, 2), W.shape)


def _multiply(x, a, b, k, l, precision=None):
  """x (..., in) to (..., out)."""
  fan_in, q = a.shape
  r, fan_out = b.shape
  p, s = -(-fan_in // k), -(-fan_out // l)
  A = _pad(a, k * p, q).reshape(k, p, q)
  B = _pad(b, r, s * l).reshape(r, s, l)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, k * p - fan_in)])
  x = x.reshape(*x.shape[:-1], k, p)
  # Not `factors.down`: h is as wide as the shorter side, nothing is saved by keeping it.
  h = jnp.einsum('...kp,kpq->...kq', x, A, precision=precision)
  h = h.reshape(*h.shape[:-2], r, l)
  y = jnp.einsum('...rl,rsl->...sl', h, B, precision=precision)
  return y.reshape(*y.shape[:-2], s * l)[..., :fan_out]


def _dense(a, b, k, l):
  """W (in, out) at full float32 precision, in the dtype of a."""
  w1, w2 = a.astype(jnp.float32), b.astype(jnp.float32)
  return _multiply(jnp.eye(len(a)), w1, w2, k, l, HIGHEST).astype(a.dtype)


def _sizes(shape, k, l):
  """p, q, r, s: A is k blocks (p, q), B is l blocks (r, s), k q = l r."""
  middle = math.lcm(k, l) * -(-min(shape) // math.lcm(k, l))
  return -(-shape[0] // k), middle // k, middle // l, -(-shape[1] // l)


def _stored(A, B, shape):
  """Blocks A (k, p, q), B (r, s, l) as a (in, q), b (r, out)."""
  a, b = A.reshape(-1, A.shape[2]), B.reshape(len(B), -1)
  return a[: shape[0]], b[:, : shape[1]]


def _pad(W, rows, columns):
  return jnp.pad(W, [(0, rows - W.shape[0]), (0, columns - W.shape[1])])


def _check(k, l, shape):
  for name, blocks, side, n in (
    ('nblocks', k, 'in', shape[0]),
    ('nblocks_out', l, 'out', shape[1]),
  ):
    if blocks > n:
      raise ValueError(
        f'{name} must be at most {side} = {n} for a kernel of shape {tuple(shape)}, got'
        f' {blocks}'
      )


def _kaiming(key, shape, k, l):
  p, q, r, _ = _sizes(shape, k, l)
  ka, kb = jax.random.split(key)
  a = factors.kaiming(ka, (shape[0], q), p)
  return a, factors.kaiming(kb, (r, shape[1]), r)


def _ortho(key, shape, k, l):
  p, q, r, s = _sizes(shape, k, l)
  ka, kb = jax.random.split(key)
  A = jax.vmap(polar)(jax.random.normal(ka, (k, p, q)))
  B = jax.vmap(polar)(jax.random.normal(kb, (l, r, s)))
  return _stored(A, B.transpose(1, 2, 0), shape)


_INITS = {
  'kaiming': _kaiming,
  'ortho': _ortho,
  'project': lambda key, shape, k, l: project(factors.dense_init(key, shape), k, l),
}
