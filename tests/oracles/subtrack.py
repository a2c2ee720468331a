"""SubTrack++ for one matrix in numpy float64, after arXiv 2502.01586.

Besides the paper: gradients of norm one at a refresh, an angle of at most pi / 2.
"""

import numpy as np
from oracles.galore import positive


def subtrack(
  grads, *, rank, gap, scale, eta=0.5, gamma=1.01, b1=0.9, b2=0.999, eps=1e-6
):
  """The updates, without learning rate, from gradients (d, k) with d <= k."""
  updates, last = [], None
  for t, g in enumerate(np.asarray(grads, np.float64)):
    if t == 0:
      p = positive(np.linalg.svd(g)[0][:, :rank])
      m, v = np.zeros((2, rank, g.shape[1]))
    elif t % gap == 0:
      old, p = p, turned(p, g / np.linalg.norm(g), eta)
      m, v = transported(p.T @ old, m, v, 1 - b1**t, 1 - b2**t)
    low = p.T @ g
    m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
    n = m / (np.sqrt(v) + eps)
    ratio = np.linalg.norm(n, axis=0) / (np.linalg.norm(low, axis=0) + 1e-8)
    rest = (g - scale * p @ low) * ratio
    norm = np.linalg.norm(rest)
    limit = 1.0 if last is None else max(norm / (last + 1e-8), gamma) / gamma
    rest, last = rest / limit, norm / limit
    correction = np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
    updates.append(correction * (scale * p @ n + rest))
  return np.stack(updates)


def turned(p, x, eta):
  """P after one step along the geodesic of the leading singular triple."""
  a = p.T @ x
  u, s, vt = np.linalg.svd(-2 * (x - p @ a) @ a.T)
  u, v, theta = u[:, :1], vt[:1].T, min(eta * s[0], np.pi / 2)
  kept = np.eye(p.shape[1]) - v @ v.T
  return (p @ v * np.cos(theta) - u * np.sin(theta)) @ v.T + p @ kept


def transported(c, m, v, c1, c2):
  """Adam's moments in the new basis, as the statistics they estimate."""
  mean = c @ m
  variance = c**2 @ (v / c2 - (m / c1) ** 2)
  return mean, c2 * np.abs(variance + (mean / c1) ** 2)
