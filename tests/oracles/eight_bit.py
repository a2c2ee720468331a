"""8-bit Adam, alone and inside GaLore, in numpy float64, after arXiv 2110.02861."""

import itertools

import numpy as np
from oracles.galore import positive


def dynamic_map(signed):
  """The 256 values: midpoints of 2^i (or twice as many) parts of [0.1, 1], scaled."""
  values = [0.0, 1.0]
  for i in range(7):
    edges = np.linspace(0.1, 1, 2 ** (i + (0 if signed else 1)) + 1)
    for a, b in itertools.pairwise(edges):
      values.append((a + b) / 2 * 10.0 ** (i - 6))
      if signed:
        values.append(-values[-1])
  return np.array(sorted(values))


def rounded(x, signed, block):
  """x (r, k) after a trip through 8 bits, blocks along the columns of x."""
  table, out = dynamic_map(signed), np.empty(x.size)
  flat = x.T.ravel()
  for start in range(0, x.size, block):
    part = flat[start : start + block]
    scale = np.abs(part).max()
    unit = part / scale if scale else part
    codes = np.abs(unit[:, None] - table).argmin(axis=1)
    if not signed:
      codes = np.where(part > 0, np.maximum(codes, 1), codes)
    out[start : start + block] = table[codes] * scale
  return out.reshape(x.T.shape).T


def galore_8bit(
  grads, *, rank, gap, scale, block, b1=0.9, b2=0.999, eps=1e-8, basis=lambda p: p
):
  """The updates that follow from gradients (d, k), d <= k; `basis` is how P is stored."""
  updates = []
  for t, g in enumerate(np.asarray(grads, np.float64)):
    if t % gap == 0:
      p = basis(positive(np.linalg.svd(g)[0][:, :rank]))
    low = p.T @ g
    if t == 0:
      m, v = np.zeros_like(low), np.zeros_like(low)
    m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
    n = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
    updates.append(scale * (p @ n))
    m, v = rounded(m, True, block), rounded(v, False, block)
  return np.stack(updates)
