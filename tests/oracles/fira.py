"""Fira for one matrix in numpy float64: Algorithm 1 of arXiv 2410.01623, and its code.

Besides the paper: the side rule of the official code by axis name (both forms), columns
of the basis whose entry of largest magnitude is positive, and the 1e-8 beside norms.
"""

import numpy as np
from oracles.galore import positive


def fira(
  grads,
  *,
  rank,
  gap,
  scale,
  mode,
  per='channel',
  b1=0.9,
  b2=0.999,
  eps=1e-6,
  growth=1.01,
  left=None,
):
  """The updates, without learning rate, that follow from gradients (in, out)."""
  grads = np.asarray(grads, np.float64)
  rows, columns = grads[0].shape
  left = rows <= columns if left is None else left
  updates, last = [], None
  for t, g in enumerate(grads if left else grads.transpose(0, 2, 1)):
    if t % gap == 0:
      p = positive(np.linalg.svd(g)[0][:, :rank])
    low = p.T @ g
    if t == 0:
      m, v = np.zeros_like(low), np.zeros_like(low)
    m = b1 * m + (1 - b1) * low
    v = b2 * v + (1 - b2) * low**2
    c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
    if mode == 'paper':
      n = (m / c1) / (np.sqrt(v / c2) + eps)
      s, last = limit((g - p @ low) * ratio(n, low, per), last, growth)
      u = scale * (p @ n + s)
    else:
      n = m / (np.sqrt(v) + eps)
      s, last = limit((g - scale * p @ low) * ratio(n, low, per), last, growth)
      u = np.sqrt(c2) / c1 * (scale * p @ n + s)
    updates.append(u if left else u.T)
  return np.stack(updates)


def ratio(n, low, per):
  """Norm of the inner update over that of the gradient, by column or of the whole."""
  axis = 0 if per == 'channel' else None
  return np.linalg.norm(n, axis=axis) / (np.linalg.norm(low, axis=axis) + 1e-8)


def limit(s, last, growth):
  """The norm-growth limiter; `last` is None at the first call."""
  norm = np.linalg.norm(s)
  shrink = 1.0 if last is None else max(norm / (last + 1e-8), growth) / growth
  return s / shrink, norm / shrink
