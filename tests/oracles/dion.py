"""Dion for one matrix in numpy float64, after arXiv 2504.05295."""

import numpy as np


def dion(grads, q, *, mu, eps=1e-8):
  """The updates, unscaled, from gradients (d, k) and the first Q (d, r)."""
  grads, q = np.asarray(grads, np.float64), np.asarray(q, np.float64)
  m, updates = np.zeros_like(grads[0]), []
  for g in grads:
    b = m + g
    p = np.linalg.qr(b.T @ q)[0]
    r = b @ p
    m = b - (1 - mu) * r @ p.T
    q = r / (np.linalg.norm(r, axis=0) + eps)
    updates.append(q @ p.T)
  return np.stack(updates)
