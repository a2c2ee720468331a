"""How a run's weights move between two steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from experiments import program
from experiments.config import Mesh, Optimizer
from tests import runner

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 17), np.int32)
PLAIN = Optimizer('galore', 1e-2, clip=0.0, weight_decay=0.1, options=runner.GALORE)


def trained(optimizer, steps=2, dtype='float32'):
  """The weights before and after some steps."""
  e = runner.tiny(optimizer=optimizer)
  built = program.build(replace(e, model=replace(e.model, param_dtype=dtype)))
  state = built.init()
  before = jax.device_get(state['params'])
  for _ in range(steps):
    state, _ = built.step(state, TOKENS)
  flat = lambda tree: traverse_util.flatten_dict(jax.device_get(tree), sep='/')
  return flat(before), flat(state['params'])


def test_a_step_is_update_and_apply_updates():
  built = program.build(runner.tiny(optimizer=PLAIN))
  state = built.init()

  def by_updates(state):
    grads = built.gradients(state['params'], state['fixed'], TOKENS)
    updates, _ = built.tx.update(grads, state['opt'], state['params'])
    return optax.apply_updates(state['params'], updates)

  # Warm-up starts at a rate of 0.
  state, _ = built.step(state, TOKENS)
  want = jax.jit(by_updates)(state)
  got = built.step(state, TOKENS)[0]['params']
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, got, want)


def test_kernels_and_a_slower_rate_of_matrices_go_together():
  slow = replace(PLAIN, options=runner.GALORE | {'matrix_scale': 0.5})
  before, plain = trained(PLAIN)
  _, slower = trained(slow)
  _, with_kernels = trained(replace(slow, kernels=True))
  for name, x in slower.items():
    # On a CPU the kernels are XLA's definition.
    np.testing.assert_array_equal(with_kernels[name], x, err_msg=name)
    factor = 0.5 if '/kernel' in name and 'head' not in name else 1.0
    moved = factor * (plain[name] - before[name])
    np.testing.assert_allclose(x - before[name], moved, atol=1e-6, err_msg=name)


def test_small_updates_count_with_stochastic_rounding():
  tiny = replace(PLAIN, learning_rate=1e-4, weight_decay=0.0)
  lost = lambda optimizer: trained(optimizer, 3, 'bfloat16')
  still = lambda pair, name: np.mean(pair[0][name] == pair[1][name])
  nearest, stochastic = lost(tiny), lost(replace(tiny, stochastic_rounding=True))
  name = next(n for n in nearest[0] if 'gate' in n)
  assert nearest[0][name].dtype == jnp.bfloat16
  assert still(nearest, name) > still(stochastic, name) + 0.05


def test_what_does_not_go_together_is_refused():
  with pytest.raises(ValueError, match=r"kernels is for weights='float', got .*int8"):
    replace(PLAIN, weights='int8', kernels=True)
  with pytest.raises(ValueError, match='kernels is for one device'):
    runner.tiny(optimizer=replace(PLAIN, kernels=True), mesh=Mesh(fsdp=2))
