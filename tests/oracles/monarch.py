"""Monarch in float64 numpy: the blocks written out as one large matrix."""

import numpy as np


def dense(w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
  """The (in, out) matrix of blocks w1 (k, q, p) and w2 (l, s, r), padding included."""
  k, q, p = w1.shape
  l, s, r = w2.shape
  first = block_diagonal(w1) @ np.eye(k * p)  # (k q, in)
  middle = first.reshape(r, l, -1).swapaxes(0, 1).reshape(k * q, -1)
  last = block_diagonal(w2) @ middle  # rows (l, s)
  return last.reshape(l, s, -1).swapaxes(0, 1).reshape(s * l, -1).T


def blocks(
  a: np.ndarray, b: np.ndarray, k: int, l: int
) -> tuple[np.ndarray, np.ndarray]:
  """Stored a (in, q), b (r, out) as w1 (k, q, p), w2 (l, s, r), padded by zeros."""
  q, r = a.shape[1], b.shape[0]
  p, s = -(-a.shape[0] // k), -(-b.shape[1] // l)
  a = np.pad(a, [(0, k * p - a.shape[0]), (0, 0)])
  b = np.pad(b, [(0, 0), (0, s * l - b.shape[1])])
  return a.reshape(k, p, q).swapaxes(1, 2), b.reshape(r, s, l).transpose(2, 1, 0)


def stored(
  w1: np.ndarray, w2: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """The inverse of `blocks`, for a kernel (in, out)."""
  k, q, p = w1.shape
  l, s, r = w2.shape
  a = w1.swapaxes(1, 2).reshape(k * p, q)[: shape[0]]
  b = w2.transpose(2, 1, 0).reshape(r, s * l)[:, : shape[1]]
  return a, b


def error(W: np.ndarray, k: int, l: int, q: int) -> float:
  """What the best approximation loses, relative to ||W||: the tails of all parts."""
  p = -(-W.shape[0] // k)
  lost = 0.0
  for block in range(k):
    for other in range(l):
      rank = sum((block * q + i) % l == other for i in range(q))
      part = W[block * p : (block + 1) * p, other::l]
      if part.size:
        lost += np.sum(np.linalg.svd(part, compute_uv=False)[rank:] ** 2)
  return float(np.sqrt(lost) / np.linalg.norm(W))


def block_diagonal(w: np.ndarray) -> np.ndarray:
  k, m, n = w.shape
  out = np.zeros((k * m, k * n))
  for i, block in enumerate(w):
    out[i * m : (i + 1) * m, i * n : (i + 1) * n] = block
  return out
