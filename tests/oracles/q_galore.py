"""Q-GaLore for one matrix in numpy float64, after arXiv 2407.08296 and its code."""

import numpy as np
from oracles.eight_bit import rounded
from oracles.galore import positive


def affine(x, bits, group):
  """(codes, scale, zero) of groups of x, row by row, zero on each grid."""
  flat = x.ravel()
  codes, scales, zeros = [], [], []
  for start in range(0, flat.size, group):
    part = flat[start : start + group]
    low, high = min(part.min(), 0), max(part.max(), 0)
    s = max(high - low, 1e-5) / (2**bits - 1)
    z = -np.round(low / s)
    codes.append(np.clip(np.round(part / s) + z, 0, 2**bits - 1))
    scales.append(s)
    zeros.append(z)
  return np.concatenate(codes).reshape(x.shape), np.array(scales), np.array(zeros)


def values(codes, scales, zeros, group):
  """What the codes stand for."""
  at = np.arange(codes.size) // group
  return (scales[at] * (codes.ravel() - zeros[at])).reshape(codes.shape)


def q_galore(grads, *, rank, gap, scale, bits, group, threshold, window, growth, block):
  """The updates from gradients (d, k), d <= k, and the gap after each."""
  b1, b2, eps = 0.9, 0.999, 1e-8
  p, queue, updates, gaps = None, [], [], []
  for t, g in enumerate(np.asarray(grads, np.float64)):
    if t % gap == 0:
      exact = positive(np.linalg.svd(g)[0][:, :rank])
      new = values(*affine(exact, bits, group), group)
      if p is not None:
        a, b = p[:, 0], new[:, 0]
        cos = abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
        queue = [*queue, cos][-window:]
        if len(queue) == window and np.mean(queue) >= threshold:
          gap = int(gap * growth)
      p = new
    low = p.T @ g
    if t == 0:
      m, v = np.zeros_like(low), np.zeros_like(low)
    m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
    n = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
    m, v = rounded(m, True, block), rounded(v, False, block)
    updates.append(scale * (p @ n))
    gaps.append(gap)
  return np.stack(updates), gaps
