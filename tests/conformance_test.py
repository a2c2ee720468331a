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


@pytest.mark.parametrize('check', testing.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize('name', METHODS)
def test_conforms(name, check):
  if (name, check.__name__) not in EXEMPT:
    check(METHODS[name])
