"""The scores by which lrjax.dct chooses, found in a kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.bases.dct import columns, dct
from lrjax.bases.heaviest import largest
from lrjax.kernels import column_scores

D, K, R = 96, 72, 24


@pytest.mark.parametrize('implementation', ['interpret', 'gpu_interpret'])
@pytest.mark.parametrize('norm', ['l1', 'l2'])
def test_the_choice_is_that_of_the_basis(norm, implementation):
  g = jax.random.normal(jax.random.key(0), (D, K))
  basis = dct(R, norm=norm, path='matmul')
  start = basis.init(D, K, g.dtype)
  Q = columns(jnp.arange(D), D, g.dtype)
  run = functools.partial(column_scores, norm=norm, implementation=implementation)
  scores = jax.jit(run)(Q, g)
  np.testing.assert_array_equal(
    largest(scores, start), jax.jit(basis.fit)(None, g, start)
  )
