"""FRUGAL for one matrix in numpy float64, after Algorithms 1 and 2 of arXiv 2411.07837.

The splitter is given: `p_of(t, g)` returns P (d, r) at a refresh.
"""

import numpy as np

FREE = {'sign': np.sign, 'sgd': lambda g: g, 'no': np.zeros_like}


def frugal(
  grads, p_of, *, gap, scale=1.0, inactive='sign', inactive_scale=1.0, reset=True,
  b1=0.9, b2=0.999, eps=1e-8,
):  # fmt: skip
  """The updates, without learning rate, that follow from gradients (d, k)."""
  updates = []
  for t, g in enumerate(np.asarray(grads, np.float64)):
    if t % gap == 0:
      p = p_of(t, g)
      if t == 0 or reset:
        m, v, k = 0.0, 0.0, 0
    low, k = p.T @ g, k + 1
    m = b1 * m + (1 - b1) * low
    v = b2 * v + (1 - b2) * low**2
    u = (m / (1 - b1**k)) / (np.sqrt(v / (1 - b2**k)) + eps)
    free = FREE[inactive](g - p @ low)
    updates.append(scale * (p @ u + inactive_scale * free))
  return np.stack(updates)
