"""GoLore for one matrix in numpy float64, after Algorithm 1 of arXiv 2410.11289."""

import numpy as np
from oracles.galore import positive


def golore(grads, *, rank, gap, scale, random_after, drawn, b1=0.9, b2=0.999, eps=1e-8):
  """The updates, without learning rate, from gradients (d, k) with d <= k.

  `drawn` are the random bases in order.
  """
  updates, drawn, p = [], list(drawn), None
  for t, g in enumerate(np.asarray(grads, np.float64)):
    if t % gap == 0:
      old = p
      late = t >= random_after
      p = drawn.pop(0) if late else positive(np.linalg.svd(g)[0][:, :rank])
      if t == 0:
        m, v = np.zeros((2, rank, g.shape[1]))
      else:
        m = p.T @ (old @ m)
    low = p.T @ g
    m = b1 * m + (1 - b1) * low
    v = b2 * v + (1 - b2) * low**2
    n = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
    updates.append(scale * p @ n)
  return np.stack(updates)
