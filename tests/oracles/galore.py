"""GaLore for one matrix in numpy float64, after Algorithm 2 of arXiv 2403.03507.

Besides the paper: the side rule of the official code by axis name, and columns of the
basis whose entry of largest magnitude is positive.
"""

import numpy as np


def galore(grads, *, rank, gap, scale, side='short', b1=0.9, b2=0.999, eps=1e-8):
  """The updates, without learning rate, that follow from gradients (in, out)."""
  rows, columns = grads[0].shape
  left = {
    'short': rows <= columns,
    'long': rows >= columns,
    'in': True,
    'out': False,
  }[side]
  updates = []
  for t, g in enumerate(np.asarray(grads, np.float64)):
    if t % gap == 0:
      u, _, vt = np.linalg.svd(g)
      p = positive(u[:, :rank] if left else vt[:rank].T)
    low = p.T @ g if left else g @ p
    if t == 0:
      m, v = np.zeros_like(low), np.zeros_like(low)
    m = b1 * m + (1 - b1) * low
    v = b2 * v + (1 - b2) * low**2
    n = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
    updates.append(scale * (p @ n if left else n @ p.T))
  return np.stack(updates)


def positive(p):
  """Columns flipped so that their entry of largest magnitude is positive."""
  at = np.abs(p).argmax(axis=0)
  return p * np.where(p[at, np.arange(p.shape[1])] < 0, -1.0, 1.0)
