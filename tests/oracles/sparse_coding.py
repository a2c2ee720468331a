"""Matching pursuit and its cheap form in float64 numpy, row by row."""

import numpy as np


def omp(K: np.ndarray, D: np.ndarray, nnz: int) -> np.ndarray:
  """C (n, m): one more atom at a time, by its correlation with what is left."""
  C = np.zeros((len(K), len(D)))
  for row, k in enumerate(K):
    chosen, left = [], k
    for _ in range(nnz):
      score = np.abs(D @ left) / np.linalg.norm(D, axis=1)
      score[chosen] = -1
      chosen.append(int(np.argmax(score)))
      C[row] = least_squares(k, D, chosen)
      left = k - C[row] @ D
  return C


def one_shot(K: np.ndarray, D: np.ndarray, nnz: int) -> np.ndarray:
  """C (n, m): the largest terms of the fit by all atoms, refitted."""
  whole = K @ np.linalg.pinv(D)
  size = np.abs(whole) * np.linalg.norm(D, axis=1)
  order = np.argsort(-size, axis=1)[:, :nnz]
  return np.stack([least_squares(k, D, list(i)) for k, i in zip(K, order)])


def least_squares(k: np.ndarray, D: np.ndarray, chosen: list[int]) -> np.ndarray:
  c = np.zeros(len(D))
  c[chosen] = np.linalg.lstsq(D[chosen].T, k)[0]
  return c
