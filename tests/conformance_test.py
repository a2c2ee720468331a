"""Every optimizer through the shared battery; a new one joins by one line."""

import jax.numpy as jnp
import optax
import pytest

import lrjax
from lrjax import testing

SMALL = dict(rank=4, update_proj_gap=3)
METHODS = {
  'galore': lrjax.scale_by_galore(**SMALL),
  'galore_eigh_rotate': lrjax.scale_by_galore(
    **SMALL, basis='eigh', moments_on_refresh='rotate'
  ),
  'galore_randomized_staggered': lrjax.scale_by_galore(
    **SMALL, basis='randomized_svd', stagger=True
  ),
  'galore_subspace_lion': lrjax.scale_by_galore(
    **SMALL, basis='subspace_iteration', base_optimizer=optax.scale_by_lion()
  ),
  'galore_factored': lrjax.scale_by_galore(
    **SMALL, base_optimizer=lrjax.factored_rms()
  ),
  'galore_bf16_basis': lrjax.scale_by_galore(**SMALL, basis_dtype=jnp.bfloat16),
  'galore_decayed': lrjax.galore(1e-2, **SMALL, weight_decay=0.1),
  'golore': lrjax.scale_by_golore(**SMALL, random_after=1),
  'online_subspace_descent': lrjax.scale_by_online_subspace_descent(
    **SMALL, retract_every=3
  ),
  'subtrack': lrjax.scale_by_subtrack(**SMALL),
}
# Staggering spreads refreshes over the tree at hand and random bases draw per slice, so a
# stack is meant to differ from its slices taken alone.
EXEMPT = {('galore_randomized_staggered', 'stacks'), ('golore', 'stacks')}


@pytest.mark.parametrize('check', testing.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize('name', METHODS)
def test_conforms(name, check):
  if (name, check.__name__) not in EXEMPT:
    check(METHODS[name])
