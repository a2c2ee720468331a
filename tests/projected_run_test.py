"""Runs of the experiments runner whose gradients are projected as they arise."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import errors, program
from experiments.config import Kernel, Optimizer
from tests import runner
from tests.loop_test import losses, run


def optimizer(name='galore', **options):
  return Optimizer(
    name, 1e-2, clip=0.0, options=options or runner.GALORE, projected_backward=True
  )


@pytest.mark.slow
@pytest.mark.parametrize('weights', ['float', 'int8'])
def test_it_trains_like_full_gradients(weights, tmp_path):
  options = runner.GALORE | {'basis': 'subspace_iteration'}
  projected = replace(optimizer(**options), weights=weights)
  full = replace(projected, projected_backward=False)
  _, ours = run(runner.tiny(name='ours', optimizer=projected), tmp_path)
  _, theirs = run(runner.tiny(name='theirs', optimizer=full), tmp_path)
  # Weights in 8 bits step to the next code where a sum in another order tips the scale.
  tolerance = 1e-5 if weights == 'float' else 1e-3
  np.testing.assert_allclose(losses(ours), losses(theirs), rtol=tolerance)
  norms = lambda lines: [x['grad_norm'] for x in lines if x['split'] == 'train']
  lower = [a < b * (1 - 1e-5) for a, b in zip(norms(ours), norms(theirs))]
  assert lower == [t % 5 != 0 for t in range(12)], 'in full at refreshes alone'
  if weights == 'float':
    sketched = replace(projected, sketched_refresh=True)
    _, ours = run(runner.tiny(name='sketched', optimizer=sketched), tmp_path)
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-5)


def test_low_rank_kernels_take_probes_too():
  kernel = Kernel('factorized', {'rank': 8})
  assert program.build(runner.tiny(optimizer=optimizer(), kernel=kernel)).projected_step


def test_what_cannot_be_projected_is_refused():
  with pytest.raises(
    ValueError, match=r'projected_backward needs clip=0, got clip=1.0'
  ):
    Optimizer('galore', 1e-2, projected_backward=True)
  with pytest.raises(ValueError, match='goes with projected_backward=True'):
    Optimizer('galore', 1e-2, sketched_refresh=True)
  exact = replace(optimizer(), sketched_refresh=True)
  with pytest.raises(errors.ConfigError, match=r'sketched_refresh: leaf .* in full'):
    program.build(runner.tiny(optimizer=exact))
  fira = optimizer('fira', rank=4)
  with pytest.raises(
    errors.ConfigError, match='fira with these options needs all gradients'
  ):
    program.build(runner.tiny(optimizer=fira))
  kernel = Kernel('monarch', {'nblocks': 4})
  with pytest.raises(errors.ConfigError, match='kernel monarch does more with its'):
    program.build(runner.tiny(optimizer=optimizer(rank=2), kernel=kernel))
