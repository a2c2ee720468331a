"""Energy that bases catch, on gradients whose answer is known."""

import jax.numpy as jnp
from samples import matrix

from experiments import energy


def test_shares_are_relative_to_the_best_of_equal_rank():
  g = jnp.stack([matrix((12, 20), seed, 0.8) for seed in range(2)])
  found = energy.shares([{(12, 20): g}, {(12, 20): 2 * g}], 0.25)
  assert {x.shape for x in found.values()} == {(2,)}
  assert min(found['eigh']) > 1 - 1e-5
  assert max(max(x) for x in found.values()) < 1 + 1e-5
  # A second fit to the same subspace goes on where the first one stopped.
  warm, cold = found['subspace_iteration'], found['subspace_iteration, cold']
  assert min(warm - cold) > 0
  assert min(cold) > max(found['random_orthogonal'])


def test_each_basis_is_timed_as_often_as_asked():
  took = energy.seconds((6, 8), 2, rounds=2)
  assert {len(x) for x in took.values()} == {2}
  assert next(iter(took)) == 'jnp.linalg.svd'


def test_a_bad_flag_is_told():
  assert energy.main(['--take', '3']) == 2
