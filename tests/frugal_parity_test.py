"""FRUGAL against recorded trajectories of its official code."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity.inputs import read
from replay import decayed_before, follow

import lrjax

SHAPES = ['tall', 'wide']


def recorded(*names):
  meta, arrays = read('frugal')
  return meta, *(arrays[name] for name in names)


def follows(tx, meta, start, grads, expected):
  """Runs `tx` on one leaf with the official decoupled decay and compares the weights."""
  tree = lambda x: {'layers': {'kernel': x}}
  path, state = follow(tx, tree(start), tree(grads), decayed_before(meta))
  worst = np.abs(path['layers']['kernel'][meta['kept']] - expected).max()
  # Measured: 2.0e-6 for svd, whose small projections Adam blows up; 1.1e-6 for the rest.
  assert worst <= 2.1e-6
  return state


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(
  ('run', 'options'),
  [
    ('svd', {}),
    (
      'svd_kept',
      dict(inactive='sgd', inactive_scale=0.1, scale=0.5, moments_on_refresh='keep'),
    ),
    ('svd_lion', dict(base_optimizer=optax.scale_by_lion(0.9, 0.99))),
  ],
)
def test_equals_the_official_svd(run, options, shape):
  names = f'{run}/{shape}/start', f'{shape}/gradients', f'{run}/{shape}/params'
  meta, *vectors = recorded(*names)
  tx = lrjax.scale_by_frugal(
    meta['density'], meta['update_gap'], projection='svd', **options
  )
  follows(tx, meta, *vectors)


class Fed(NamedTuple):
  refreshes: jax.Array
  basis: jax.Array


def fed(basis, table):
  """`basis` with recorded states in place of its own draws."""
  table = jnp.asarray(table, jnp.int32)
  return lrjax.Basis(
    init=lambda d, k, dtype: Fed(jnp.zeros([], jnp.int32), jnp.zeros_like(table[0])),
    fit=lambda key, g, b: Fed(b.refreshes + 1, table[b.refreshes]),
    down=lambda b, g: basis.down(b.basis, g),
    up=lambda b, low, d: basis.up(b.basis, low, d),
  )


@pytest.mark.parametrize('shape', SHAPES)
def test_equals_the_official_columns(shape):
  meta, start, grads, params, indices = recorded(
    f'columns/{shape}/start',
    f'{shape}/gradients',
    f'columns/{shape}/params',
    f'columns/{shape}/indices',
  )
  # Rounded down where an SVD's rank is rounded to the nearest.
  assert indices.shape[1] == int(start.shape[0] * meta['density'])
  tx = lrjax.scale_by_frugal(
    meta['density'],
    meta['update_gap'],
    projection=lambda r: fed(lrjax.columns(r), np.sort(indices)),
    inactive_scale=0.5,
    side='in',
  )
  follows(tx, meta, start, grads, params)


def test_equals_the_official_blocks():
  names = 'blocks/start', 'blocks/gradients', 'blocks/params'
  meta, *vectors = recorded(*names)
  tx = lrjax.scale_by_frugal(
    meta['density'],
    meta['update_gap'],
    0.5,
    projection='blocks',
    order='descending',
  )
  state = follows(tx, meta, *vectors)
  assert state.active.tolist() == [1, 2]  # the third of {5, 6}, {3, 4}, {1, 2}
