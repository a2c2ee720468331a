"""Schedules with restarts, against the published values and closed forms."""

import numpy as np
import optax
import pytest

import lrjax


def test_restarts_rise_to_the_schedule_at_the_end_of_the_rise():
  base = optax.linear_schedule(1.0, 0.0, 100)
  rate = lrjax.with_restarts(base, every=20, warmup=5, start=0.1)
  assert rate(0) == base(0) and rate(19) == base(19)
  np.testing.assert_allclose(rate(20), 0.1 * base(25))
  np.testing.assert_allclose(rate(22), (0.1 + 0.9 * 2 / 5) * base(25), rtol=1e-6)
  assert rate(25) == base(25) and rate(39) == base(39)


def test_the_jagged_cosine_of_relora():
  """N = 20000, F = 500, R = 100, C = 5000, f = 0.1; values of the official schedule."""
  cosine = lambda k: 0.1 + 0.9 * optax.cosine_decay_schedule(1.0, 19500)(k)
  rise = optax.linear_schedule(0.0, 1.0, 500)
  rate = lrjax.with_restarts(optax.join_schedules([rise, cosine], [500]), 5000, 100)
  table = {0: 0, 250: 0.5, 500: 1, 4999: 0.886878, 5000: 0, 5001: 0.00882}
  table |= {5050: 0.440989, 5100: 0.881979, 9999: 0.568192, 10050: 0.280437}
  table |= {10100: 0.560874, 15100: 0.233086, 19999: 0.1}
  for k, value in table.items():
    np.testing.assert_allclose(rate(k), value, atol=2e-6)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'every': 0}, 'every'),
    ({'warmup': 20}, 'less than every=20, got 20'),
    ({'start': 1.5}, 'at most 1'),
  ],
)
def test_bad_arguments(change, message):
  arguments = {'every': 20, 'warmup': 5} | change
  with pytest.raises(ValueError, match=message):
    lrjax.with_restarts(optax.constant_schedule(1.0), **arguments)
