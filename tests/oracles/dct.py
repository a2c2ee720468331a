"""DCT-AdamW and Trion for one matrix in numpy float64, after arXiv 2505.17967."""

import numpy as np


def dct2(d):
  """The orthogonal matrix (d, d) whose columns are the DCT-II vectors."""
  i, j = np.arange(d)[:, None], np.arange(d)[None, :]
  q = np.sqrt(2 / d) * np.cos(np.pi * (2 * i + 1) * j / (2 * d))
  q[:, 0] *= np.sqrt(0.5)
  return q


def select(q, a, rank, ell=1):
  """Indices of the columns of q that a (d, k) is most aligned with, rising."""
  score = np.linalg.norm(q.T @ a, ord=ell, axis=1)
  return np.sort(np.argsort(-score, kind='stable')[:rank])


def dct_adamw(grads, *, rank, gap, ell=1, feedback=True, b1=0.9, b2=0.999, eps=1e-8):
  """The updates, without learning rate, that follow from gradients (d, k)."""
  grads = np.asarray(grads, np.float64)
  q = dct2(grads.shape[1])
  e, updates = np.zeros_like(grads[0]), []
  m, v = np.zeros((2, *grads[0].shape))  # a row for each column of q, chosen or not
  index = np.arange(rank)
  for t, g in enumerate(grads):
    a = g + e
    if t % gap == 0:
      new = select(q, a, rank, ell)
      lost = np.setdiff1d(index, new)
      m[lost], v[lost], index = 0, 0, new
    p = q[:, index]
    low = p.T @ a
    if feedback:
      e = a - p @ low
    m[index] = b1 * m[index] + (1 - b1) * low
    v[index] = b2 * v[index] + (1 - b2) * low**2
    c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
    updates.append(p @ ((m[index] / c1) / (np.sqrt(v[index] / c2) + eps)))
  return np.stack(updates)


def trion(grads, *, rank, mu, coefficients):
  """The updates, unscaled, that follow from gradients (d, k)."""
  grads = np.asarray(grads, np.float64)
  q = dct2(grads.shape[1])
  m, updates = np.zeros_like(grads[0]), []
  for g in grads:
    b = m + g
    p = q[:, select(q, b, rank)]
    low = p.T @ b
    m = b - (1 - mu) * p @ low
    updates.append(p @ newton_schulz(low, coefficients))
  return np.stack(updates)


def newton_schulz(x, coefficients):
  """U f(S) V^T, where f is the composition of the odd quintics."""
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  s = s / np.linalg.norm(s)
  for a, b, c in coefficients:
    s = a * s + b * s**3 + c * s**5
  return (u * s) @ vt
