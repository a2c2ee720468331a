"""A conditional that stays one under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lrjax.branches import rarely


def f(pred, x):
  return rarely(pred, lambda x: jnp.linalg.qr(x)[0], lambda x: 2 * x, x)


@pytest.mark.parametrize('stack', [(), (3,), (2, 3)])
def test_equals_the_choice_for_each_entry(stack):
  x = jnp.asarray(np.random.default_rng(0).standard_normal((*stack, 4, 2)), jnp.float32)
  run = f
  for _ in stack:
    run = jax.vmap(run)
  for n in (0, 1):
    pred = jnp.zeros(stack, bool).reshape(-1).at[0].set(bool(n)).reshape(stack)
    want = jnp.where(pred[..., None, None], jnp.linalg.qr(x)[0], 2 * x)
    np.testing.assert_array_equal(jax.jit(run)(pred, x), want)


@pytest.mark.parametrize('depth', [1, 2])
def test_the_costly_side_stands_inside_a_conditional(depth):
  run, stack = f, (2, 3)[:depth]
  for _ in stack:
    run = jax.vmap(run)
  jaxpr = jax.make_jaxpr(run)(jnp.zeros(stack, bool), jnp.ones((*stack, 4, 2)))
  found = set(unconditional(jaxpr.jaxpr))
  assert 'cond' in found
  assert not {'qr', 'householder_product', 'geqrf'} & found


def unconditional(jaxpr):
  """Names of the primitives that run whatever the predicate."""
  for e in jaxpr.eqns:
    yield e.primitive.name
    if e.primitive.name != 'cond':
      for inner in jaxprs_in_params(e.params):
        yield from unconditional(inner)


def test_values_shared_by_the_stack_are_allowed():
  run = lambda pred, x, y: rarely(pred, lambda x, y: x @ y, lambda x, y: y, x, y)
  x, y = jnp.stack([jnp.eye(2), 3 * jnp.eye(2)]), jnp.ones((2, 2))
  out = jax.vmap(run, in_axes=(0, 0, None))(jnp.array([False, True]), x, y)
  np.testing.assert_array_equal(out, jnp.stack([y, 3 * y]))
