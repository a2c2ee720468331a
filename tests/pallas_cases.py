"""Operations of lrjax.kernels with inputs and oracles: one row each for pallas_test."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lrjax
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
    sided: whether it knows two sides of a leaf.
  """

  name: str
  run: Callable
  make: Callable
  oracle: Callable
  leaves: tuple[int, ...]
  sided: bool = True


def normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def leaf(rng, d, k, side):
  return normal(rng, *((d, k) if side == 'in' else (k, d)))


def basis(rng, d, r):
  return np.linalg.qr(normal(rng, d, r))[0]


def canonical(g, side):
  """A leaf as the matrix (d, k); its own inverse."""
  return g if side == 'in' else g.T


def stored(codec):
  """`project` from a basis that a codec stores."""

  def make(rng, d, k, r, side):
    p = codec.encode(jnp.asarray(basis(rng, d, r)))
    return p, leaf(rng, d, k, side)

  return dict(
    make=make,
    oracle=lambda p, g, side: _decoded(codec, p).T @ canonical(g, side),
    leaves=(1,),
  )


def _decoded(codec, p):
  # The codecs have oracles of their own, in codecs_test.
  narrow = lambda x: x.astype(np.float32) if x.dtype == np.float64 else x
  return np.asarray(codec.decode(jax.tree.map(narrow, p)), np.float64)


CASES = [
  Case(
    'project',
    run=kernels.project,
    make=lambda rng, d, k, r, side: (basis(rng, d, r), leaf(rng, d, k, side)),
    oracle=lambda p, g, side: p.T @ canonical(g, side),
    leaves=(1,),
  ),
  Case(
    'project int8',
    run=kernels.project,
    **stored(lrjax.int8()),
  ),
  Case(
    'project int8 of groups',
    run=functools.partial(kernels.project, bits=8, group=4 * R),
    **stored(lrjax.affine(8, 4 * R)),
  ),
  Case(
    'project int4',
    run=functools.partial(kernels.project, bits=4, group=4 * R),
    **stored(lrjax.affine(4, 4 * R)),
  ),
]
