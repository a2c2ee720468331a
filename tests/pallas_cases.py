"""Operations of lrjax.kernels with inputs and oracles: one row each for pallas_test."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lrjax import kernels

# Sizes that no tile divides, of which every axis still fills more than half a tile.
D, K, R = 160, 208, 24


class Case(NamedTuple):
  """One way to call an operation.

  Attributes:
    name: shown by pytest.
    run: `(*arrays, side, implementation) -> tree`.
    make: `(rng, d, k, r, side) -> arrays`, float32 or what never changes type.
    oracle: `(*arrays, side) -> tree`, numpy in float64 on what `run` was given.
    leaves: which of the arrays are leaves, also tried in bfloat16.
    operation: its name in the table of tiles.
  """

  name: str
  run: Callable
  make: Callable
  oracle: Callable
  leaves: tuple[int, ...]
  operation: str


def normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def leaf(rng, d, k, side):
  return normal(rng, *((d, k) if side == 'in' else (k, d)))


def basis(rng, d, r):
  return np.linalg.qr(normal(rng, d, r))[0]


def canonical(g, side):
  """A leaf as the matrix (d, k); its own inverse."""
  return g if side == 'in' else g.T


CASES = [
  Case(
    'project',
    run=kernels.project,
    make=lambda rng, d, k, r, side: (basis(rng, d, r), leaf(rng, d, k, side)),
    oracle=lambda p, g, side: p.T @ canonical(g, side),
    leaves=(1,),
    operation='project',
  ),
]
