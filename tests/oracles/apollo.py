"""APOLLO for one matrix in numpy float64, after its official code and Algorithm 1 of
arXiv 2412.05270, with the sketches given."""

import numpy as np
from oracles.fira import limit, ratio


def apollo(
  grads, sketches, *, gap, scale, per, front=False, b1=0.9, b2=0.999, eps=1e-6,
  growth=1.01,
):  # fmt: skip
  """The updates, without learning rate, of gradients (d, k) and sketches (d, r)."""
  updates, last = [], None
  for t, g in enumerate(np.asarray(grads, np.float64)):
    low = np.asarray(sketches[t // gap], np.float64).T @ g
    if t == 0:
      m, v = np.zeros_like(low), np.zeros_like(low)
    m = b1 * m + (1 - b1) * low
    v = b2 * v + (1 - b2) * low**2
    s = g * ratio(m / (np.sqrt(v) + eps), low, per)
    s = s * np.sqrt(scale) if front else s
    s, last = limit(s, last, growth)
    s = s if front else s * np.sqrt(scale)
    updates.append(np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1)) * s)
  return np.stack(updates)
