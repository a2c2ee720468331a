"""Every optimizer through the shared battery; a new one joins by one line."""

import jax.numpy as jnp
import optax
import pytest

import lrjax
from lrjax import testing

SMALL = dict(rank=4, update_proj_gap=3)
METHODS = {
  'galore': lrjax.scale_by_galore(**SMALL),
  'galore_randomized_staggered': lrjax.scale_by_galore(
    **SMALL, basis='randomized_svd', stagger=True, moments_on_refresh='rotate'
  ),
  'galore_subspace_lion': lrjax.scale_by_galore(
    **SMALL,
    basis='subspace_iteration',
    base_optimizer=optax.scale_by_lion(),
    basis_dtype=jnp.bfloat16,
  ),
  'galore_8bit': lrjax.scale_by_galore_8bit(**SMALL, min_size=0),
  'q_galore': lrjax.scale_by_q_galore(
    4, 2, base_optimizer=lrjax.eight_bit(lrjax.adam(), min_size=0), window=1
  ),
  'galore_decayed': lrjax.galore(1e-2, **SMALL, weight_decay=0.1),
  'fira': lrjax.scale_by_fira(**SMALL),
  'apollo': lrjax.scale_by_apollo(**SMALL),
  'apollo_mini': lrjax.apollo_mini(1e-2, update_proj_gap=3, weight_decay=0.1),
  'ldadam': lrjax.scale_by_ldadam(rank=4),
  'frugal': lrjax.scale_by_frugal(0.25, 3),
  'frugal_svd': lrjax.scale_by_frugal(0.25, 3, projection='svd'),
  'frugal_blocks': lrjax.scale_by_frugal(0.5, 2, projection='blocks', where='stack'),
  'owlore': lrjax.owlore(1e-2, 1, 2, 4, 3, where='stack', weight_decay=0.1),
  'dct_adamw': lrjax.scale_by_dct_adamw(4, error_feedback='full'),
  'dct_adamw_fft_int8': lrjax.scale_by_dct_adamw(
    **SMALL, basis=lambda rank: lrjax.dct(rank, path='fft')
  ),
  # Without factors of the fans, which a transposed matrix is meant to change.
  'trion': lrjax.scale_by_trion(4, scaling='none'),
  'dion2': lrjax.scale_by_dion2(4, scaling='none'),
  'dion': lrjax.scale_by_dion(4, scaling='none', orth='cholesky_qr'),
  'flora': lrjax.scale_by_flora(4, 3),
  'golore': lrjax.scale_by_golore(**SMALL, random_after=1),
  'online_subspace_descent': lrjax.scale_by_online_subspace_descent(
    **SMALL, retract_every=3
  ),
  'subtrack': lrjax.scale_by_subtrack(**SMALL),
}
# Staggering spreads refreshes over the tree at hand and random bases draw per slice, so a
# stack is meant to differ from its slices taken alone.
EXEMPT = {
  ('galore_randomized_staggered', 'stacks'),
  ('apollo', 'stacks'),
  ('apollo_mini', 'stacks'),
  ('frugal', 'stacks'),
  ('flora', 'stacks'),
  ('golore', 'stacks'),
  # A slice of a stack of layers is no stack of layers.
  ('frugal_blocks', 'stacks'),
  ('owlore', 'stacks'),
}


# How many numbers a collective of a steady step may send on the battery's mesh, where each
# device has 1 of 2 parts of d = 12 and of k = 16. A projection P^T G of the stack of two at
# rank 4 takes 2 * 4 * 16 / 2, and is the one thing most methods send.
PROJECTION = 64
SENT = {
  # Rank 1, and 3 of 12 directions.
  'apollo_mini': 16,
  'frugal': 48,
  'frugal_svd': 48,
  # One layer of the stack, whose base is Adam or GaLore.
  'frugal_blocks': 1,
  'owlore': 32,
  # A step of power iteration and the QR of P (d, r), whose rows are all needed at once.
  'ldadam': 96,
  # QR of (k, r).
  'dion': 128,
}


@pytest.mark.parametrize('check', testing.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize('name', METHODS)
def test_conforms(name, check):
  if check is testing.shards_like_one_device:
    check(METHODS[name], most=SENT.get(name, PROJECTION))
  elif (name, check.__name__) not in EXEMPT:
    check(METHODS[name])
