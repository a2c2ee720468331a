"""APOLLO against recorded trajectories of apollo-torch, with the sketches it drew."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from parity.inputs import read
from replay import replay

import lrjax

META, RECORDED = read('apollo')


class Drawn(NamedTuple):
  sketches: jax.Array  # (refreshes, d, r)
  at: jax.Array


def drawn(rank):
  """Sketches given ahead of time, one after the other."""
  return lrjax.Basis(
    lambda d, k, dtype: Drawn(jnp.zeros((3, d, rank), dtype), jnp.int32(-1)),
    lambda key, g, b: b._replace(at=b.at + 1),
    lambda b, g: b.sketches[b.at].T @ g,
    lambda b, low, d: b.sketches[b.at] @ low,
    orthonormal=False,
  )


@pytest.mark.parametrize('variant', META['variants'])
def test_equals_apollo_torch(variant):
  args = META['variants'][variant]
  tx = lrjax.scale_by_apollo(
    args['rank'],
    META['update_proj_gap'],
    args['scale'],
    scale_type=args['scale_type'],
    scale_front=args['front'],
    basis=drawn,
  )

  def prepare(name, s):
    sketches = jnp.asarray(RECORDED[f'{variant}/{name}/sketches'])
    return s._replace(basis=s.basis._replace(sketches=sketches))

  key = lambda name: f'{variant}/{name}/params'
  error, _ = replay(tx, 'apollo', key=key, prepare=prepare)
  # Weights reach 1.3, where float32 is 1.2e-7 coarse, and 25 steps are summed.
  assert error < 1.5e-6
