"""Online subspace descent for one matrix in numpy float64, after arXiv 2408.12857.

P moves by Adam with decoupled decay, as in the official code; the penalty is the paper's.
"""

import numpy as np
from oracles.galore import positive


def online_subspace_descent(
  grads, *, rank, rate, scale, penalty=0.0, decay=0.01, b1=0.9, b2=0.999, eps=1e-8
):
  """The updates, without learning rate, and the last P, from gradients (d, k), d <= k."""
  adam, mover = Adam(b1, b2, eps), Adam(b1, b2, eps)
  updates = []
  for t, g in enumerate(np.asarray(grads, np.float64)):
    if t == 0:
      p = positive(np.linalg.svd(g)[0][:, :rank])
    updates.append(scale * p @ adam(p.T @ g))
    if t > 0:
      slope = reconstruction_slope(p, g / np.linalg.norm(g))
      slope += 4 * penalty * p @ (p.T @ p - np.eye(rank))
      p = p - rate * (mover(slope) + decay * p)
  return np.stack(updates), p


def reconstruction_slope(p, x):
  """The gradient by P of |P P'X - X|^2, with S = X X' formed."""
  s = x @ x.T
  return -2 * (2 * s @ p - p @ (p.T @ s @ p) - s @ p @ (p.T @ p))


class Adam:
  """Adam's direction, moments inside."""

  def __init__(self, b1, b2, eps):
    self.b1, self.b2, self.eps = b1, b2, eps
    self.t, self.m, self.v = 0, 0.0, 0.0

  def __call__(self, g):
    self.t += 1
    self.m = self.b1 * self.m + (1 - self.b1) * g
    self.v = self.b2 * self.v + (1 - self.b2) * g**2
    m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
    return m / (np.sqrt(v) + self.eps)
