"""Signatures of ready-made optimizers, and how they reach the lift."""

import inspect
from typing import Unpack

import jax.numpy as jnp
import optax
import pytest

import lrjax
from lrjax.optimizers.assembly import Lift, lifted, ready


@lifted
def scale_by_plain(rank: int = 4, *, factor: float = 2.0, **lift: Unpack[Lift]):
  """Projects and scales."""
  rule = lambda rank: lrjax.low_rank(lrjax.svd(rank), optax.scale(factor))
  return lrjax.on_matrices(rule, rank=rank, rest=optax.scale(factor), **lift)


plain = ready(scale_by_plain)
GRADS = {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}


def test_the_keywords_of_the_lift_are_spelled_out():
  names = list(inspect.signature(scale_by_plain).parameters)
  lift = list(Lift.__annotations__)
  assert names == ['rank', 'factor', *lift]
  defaults = inspect.signature(lrjax.on_matrices).parameters
  for name in lift:
    assert inspect.signature(plain).parameters[name] == defaults[name]
  names = ['learning_rate', *names, 'weight_decay', 'mask']
  assert list(inspect.signature(plain).parameters) == names
  assert plain.__name__ == 'plain'
  assert plain.__doc__.startswith('Projects and scales.')


def test_unknown_keywords_are_refused_by_name():
  with pytest.raises(TypeError, match='ranks'):
    scale_by_plain(ranks=3)
  with pytest.raises(TypeError, match='decay'):
    plain(1e-2, decay=0.1)


def test_it_is_the_rule_then_decay_then_the_learning_rate():
  tx = plain(0.1, rank=2, factor=3.0, side='long', weight_decay=0.5)
  params = {'kernel': jnp.full((3, 4), 2.0), 'bias': jnp.zeros(4)}
  u, state = tx.update(GRADS, tx.init(params), params)
  assert jnp.allclose(u['kernel'], -0.1 * (3.0 + 0.5 * 2.0), atol=1e-6)
  assert jnp.allclose(u['bias'], -0.3)
  assert state[0].slots['kernel'].state.basis.shape == (4, 2)


def test_hyperparameters_can_be_injected():
  tx = optax.inject_hyperparams(plain, static_args='rank')(
    learning_rate=0.1, rank=2, weight_decay=0.0
  )
  state = tx.init(GRADS)
  state.hyperparams['learning_rate'] = jnp.float32(0.5)
  u, _ = tx.update(GRADS, state, GRADS)
  assert jnp.allclose(u['kernel'], -1.0, atol=1e-6)
