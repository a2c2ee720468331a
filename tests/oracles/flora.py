"""Flora for one matrix in numpy float64, after arXiv 2402.03293 and its torch code."""

import numpy as np


def flora(grads, sketches, *, b1=0.9, decay_rate=0.8, threshold=1.0, nesterov=False):
  """The updates, without learning rate, from gradients (d, k) and a P (d, r) for each."""
  updates = []
  m, old = np.zeros((sketches[0].shape[1], grads[0].shape[1])), sketches[0]
  row, column = np.zeros(grads[0].shape[0]), np.zeros(grads[0].shape[1])
  for t, (g, p) in enumerate(zip(np.asarray(grads, np.float64), sketches)):
    b2 = 1 - (t + 1.0) ** -decay_rate
    row = b2 * row + (1 - b2) * np.mean(g**2 + 1e-30, axis=1)
    column = b2 * column + (1 - b2) * np.mean(g**2 + 1e-30, axis=0)
    u = g / np.sqrt(np.outer(row / row.mean(), column))
    dense = old @ m
    turned = m if np.array_equal(p, old) else p.T @ dense
    m, old = b1 * turned + (1 - b1) * p.T @ u, p
    out = b1 * (p @ m if nesterov else dense) + (1 - b1) * u
    updates.append(out / max(1.0, np.sqrt(np.mean(out**2)) / threshold))
  return np.stack(updates)
