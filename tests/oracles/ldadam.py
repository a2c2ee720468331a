"""LDAdam for one matrix in numpy float64, after Algorithm 1 of arXiv 2410.16103.

Besides the paper: the side rule of the official code, under which square matrices (in, out)
are compressed along `out`.
"""

import numpy as np


def ldadam(
  grads, *, rank, feedback=True, rho=0.908, b1=0.908, b2=0.99, eps=1e-8, left=None
):  # fmt: skip
  """The updates, without learning rate, of gradients (in, out), and the last error."""
  grads = np.asarray(grads, np.float64)
  rows, columns = grads[0].shape
  left = rows < columns if left is None else left
  grads = grads if left else grads.transpose(0, 2, 1)
  d, k = grads[0].shape
  m, v, error = np.zeros((rank, k)), np.zeros((rank, k)), np.zeros((d, k))
  old, updates = np.zeros((d, rank)), []
  for t, g in enumerate(grads):
    a = g + error
    if t == 0:
      p = np.linalg.svd(a)[0][:, :rank]
    else:
      b = rho * old @ (m / (1 - b1**t)) + (1 - rho) * a
      p = np.linalg.qr(b @ (b.T @ old))[0]
    low, c = p.T @ a, p.T @ old
    moved = c @ m
    if feedback:
      error = (a - p @ low) + b1 / (1 - b1) * (old @ m - p @ moved)
    if t:
      c1, c2 = 1 - b1**t, 1 - b2**t
      spread = c**2 @ (v / c2 - (m / c1) ** 2)
      v = c2 * np.abs(spread + (moved / c1) ** 2)
    m = b1 * moved + (1 - b1) * low
    v = b2 * v + (1 - b2) * low**2
    n = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
    updates.append(p @ n if left else (p @ n).T)
    old = p
  return np.stack(updates), error
