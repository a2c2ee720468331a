"""Columns of the discrete cosine transform, chosen by how much of a gradient they hold.

After "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large
Language Models" (first "SVD-Free Low-Rank Adaptive Gradient Optimization ..."), 2025,
arXiv 2505.17967.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.bases.columns import carry_over
from lrjax.bases.heaviest import NORMS, largest
from lrjax.bases.orthonormal import down, mm, up
from lrjax.checks import named, positive_int
from lrjax.types import Basis

Form = Literal['dct2', 'dct3']
# From here on the FFT is faster on a CPU: two cores took 0.7 to 0.9 of the time of the
# product at d = 768 to 1024, 0.25 at 2048 to 4096, and 1.2 at 512.
FFT_FROM = 1024
# (2 i + 1) j of the largest angle must fit 32 bits.
LARGEST = 46_340


def dct(
  rank: int,
  *,
  norm: Literal['l1', 'l2'] = 'l1',
  form: Form = 'dct2',
  path: Literal['matmul', 'fft'] | None = None,
) -> Basis:
  r"""The r columns of a fixed orthogonal Q (d, d) that a gradient is most aligned with.

  .. math::
    S = Q^\top G, \quad I = \mathrm{top}_r \|S_{j,:}\|, \quad P = Q_{:,I}, \quad
    Q_{ij} = \sqrt{2/d} \cos\frac{\pi (2i + 1) j}{2d} \ (j > 0),\ Q_{i0} = 1/\sqrt d

  No factorisation, and no basis in memory: the state is r int32 indices, in rising order,
  and columns of Q are computed where they are needed. With the l2 norm the choice is the
  best one: it minimises :math:`\|G - P P^\top G\|_F` over all sets of r columns. A refit
  takes `2 d^2 k` flops by matrix product and about `5 d k log2(d)` by FFT.

  Args:
    rank: number of columns; clipped to min(rank, d, k).
    norm: of the rows of S, 'l1' (the paper's and its code's default) or 'l2'. At a tie
      the lower index wins.
    form: 'dct2', or 'dct3' with the transpose of Q, another orthogonal basis, which the
      official code has in its 'matmul' mode.
    path: how S is computed: 'matmul', 'fft' (Makhoul's algorithm), or None: the FFT on
      a CPU from d = 1024 on, where it was measured to be faster, else the product (its
      authors saw no gain from the FFT on an H100 up to d = 2048).

  Returns:
    A `Basis` whose state is int32 (r,).

  Raises:
    ValueError: for unknown names; when used, for d above 46340.

  >>> import jax.numpy as jnp
  >>> b = dct(2)
  >>> g = jnp.ones((4, 3)) + jnp.array([3.0, 1.0, -1.0, -3.0])[:, None]
  >>> print(b.fit(None, g, b.init(4, 3, g.dtype)))
  [0 1]
  """
  rank = positive_int('rank', rank)
  size = named('norm', norm, NORMS)
  named('form', form, TRANSFORMS)
  if path is not None:
    named('path', path, dict(matmul=None, fft=None))

  def init(d: int, k: int, dtype: Any) -> jax.Array:
    return jnp.arange(min(rank, d, k), dtype=jnp.int32)

  def aligned(g: jax.Array) -> jax.Array:
    if (d := len(g)) > LARGEST:
      raise ValueError(f'the DCT basis serves sides up to {LARGEST}, got d = {d}')
    if path == 'fft' or (path is None and prefers_fft(d)):
      return TRANSFORMS[form](g)
    every = jnp.arange(d, dtype=jnp.int32)
    return mm(columns(every, d, g.dtype, form).T, g)

  fit = lambda key, g, b: largest(size(aligned(g)).sum(axis=1), b)
  P = lambda b, d, dtype: columns(b, d, dtype, form)
  return Basis(
    init=init,
    fit=fit,
    down=lambda b, g: down(P(b, len(g), g.dtype), g),
    up=lambda b, low, d: up(P(b, d, low.dtype), low, d),
    matrix=lambda b, d: P(b, d, jnp.float32),
    change=lambda old, new, d: carry_over(old[:, None], new[:, None]),
  )


def columns(index: jax.Array, d: int, dtype: Any, form: Form = 'dct2') -> jax.Array:
  """The columns (d, r) of Q that `index` (r,) names, exact to the last bits."""
  i, j = jnp.arange(d, dtype=jnp.uint32)[:, None], index.astype(jnp.uint32)[None, :]
  a, b = (i, j) if form == 'dct2' else (j, i)
  # cos(pi n / 2d) for n = (2a + 1) b, brought into the first half turn as an integer:
  # in floating point the angle would have lost its digits by then.
  n = (2 * a + 1) * b % (4 * d)
  n = jnp.minimum(n, 4 * d - n)
  c = jnp.cos(n.astype(dtype) * (np.pi / (2 * d)))
  return c * jnp.where(b == 0, np.sqrt(1 / d), np.sqrt(2 / d)).astype(dtype)


def makhoul(g: jax.Array) -> jax.Array:
  """DCT-II along the first axis, orthonormal, by one real FFT of the same length.

  Makhoul, `A fast cosine transform in one and two dimensions`, 1980. Takes 0.6 of the
  time of `jax.scipy.fft.dct`, which has a complex FFT.
  """
  d = len(g)
  v = jnp.concatenate([g[::2], g[1::2][::-1]])
  z = jnp.fft.rfft(v, axis=0) * _twiddle(d, g.dtype)
  # The upper half of a real signal's spectrum is the mirror of the lower one.
  return jnp.concatenate([z.real, -z.imag[1 : (d + 1) // 2][::-1]])


def idct(g: jax.Array) -> jax.Array:
  """DCT-III along the first axis, orthonormal: the inverse of `makhoul`."""
  return jax.scipy.fft.idct(g, axis=0, norm='ortho')


TRANSFORMS = dict(dct2=makhoul, dct3=idct)


def prefers_fft(d: int) -> bool:
  """Whether S is faster by FFT here."""
  return jax.default_backend() == 'cpu' and d >= FFT_FROM


def _twiddle(d: int, dtype: Any) -> jax.Array:
  """Factors (d // 2 + 1, 1) that turn the FFT of the reordered signal into the DCT."""
  k = np.arange(d // 2 + 1)
  w = np.exp(-0.5j * np.pi * k / d) * np.sqrt(np.where(k == 0, 1, 2) / d)
  return jnp.asarray(w[:, None], jnp.promote_types(dtype, jnp.complex64))
