"""Optimizers and parameterizations meet freely: each of these with several of those."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from parameterizations_test import CASES

import lrjax
from lrjax.testing.parameterizations import Case

STEPS = 7
OPTIMIZERS = {
  'galore': lambda: lrjax.galore(1e-2, rank=2, update_proj_gap=3, scale=1.0),
  'fira': lambda: lrjax.fira(1e-2, rank=2, update_proj_gap=3),
  'frugal': lambda: lrjax.frugal(1e-2, density=0.25, update_proj_gap=3),
  'apollo': lambda: lrjax.apollo(1e-2, rank=2, update_proj_gap=3),
  'dct_adamw': lambda: lrjax.dct_adamw(1e-2, rank=2),
  'galore_8bit': lambda: lrjax.galore_8bit(1e-2, rank=2, update_proj_gap=3),
  'trion': lambda: lrjax.trion(1e-2, rank=2),
  'dion2': lambda: lrjax.dion2(1e-2),
  'muon': lambda: optax.contrib.muon(1e-2),
}
PAIRS = [
  (kernel, optimizer)
  for i, kernel in enumerate(CASES)
  for j, optimizer in enumerate(OPTIMIZERS)
  if (i + j) % 3 == 0
]


@functools.cache
def start(case: Case) -> tuple[dict, dict]:
  """Params and fixed arrays of a kernel and a bias."""
  init = jax.jit(case.kernel.init, static_argnums=(1, 2))
  split = init(jax.random.key(3), (12, 16), jnp.float32)
  train = dict(split.train) if isinstance(split.train, dict) else split.train
  fixed = {'q': {'fixed': dict(split.fixed)}} if split.fixed else {}
  return {'q': {'kernel': train, 'bias': jnp.zeros(16)}}, fixed


def train(case: Case, tx: optax.GradientTransformation) -> list[float]:
  """Losses of a regression with one kernel, all of its events run when due."""
  p, plan = case.kernel, {'q': case.kernel}
  x = jax.random.normal(jax.random.key(1), (32, 12))
  y = x @ jax.random.normal(jax.random.key(2), (12, 16)) / 4
  params, fixed = start(case)

  def loss(params, fixed):
    split = lrjax.weights.split_at('q', params, fixed)
    return jnp.mean((p.apply(split, x) + params['q']['bias'][None] - y) ** 2)

  @jax.jit
  def step(weights, k):
    weights, _ = lrjax.run_events(plan, lrjax.step_events(plan), weights, k, tx=tx)
    value, grads = jax.value_and_grad(loss)(weights.params, weights.fixed)
    u, state = tx.update(grads, weights.opt_state, weights.params)
    params = optax.apply_updates(weights.params, u)
    return lrjax.Weights(params, weights.fixed, state), value

  @functools.partial(jax.jit, static_argnums=0)
  def rare(names, weights, k):
    return lrjax.run_events(plan, names, weights, k, tx=tx)[0]

  weights, losses = lrjax.Weights(params, fixed, jax.jit(tx.init)(params)), []
  for k in range(STEPS):
    if names := lrjax.due_events(plan, k):
      weights = rare(names, weights, k)
    weights, value = step(weights, k)
    losses.append(float(value))
  return losses


def test_there_are_at_least_thirty_pairs_and_all_take_part():
  assert len(PAIRS) >= 30
  assert {kernel for kernel, _ in PAIRS} == {*CASES}
  assert {optimizer for _, optimizer in PAIRS} == {*OPTIMIZERS}


@pytest.mark.parametrize('kernel, optimizer', PAIRS)
def test_a_pair_trains(kernel, optimizer):
  events = CASES[kernel].kernel.events
  if optimizer != 'muon' and any(e.name == 'switch' for e in events):
    # Moments of single vectors start anew, and a projected matrix has none; Muon's has.
    with pytest.raises(ValueError, match='use an optimizer that does not project'):
      train(CASES[kernel], OPTIMIZERS[optimizer]())
    return
  losses = train(CASES[kernel], OPTIMIZERS[optimizer]())
  assert losses[-1] < losses[0], losses
