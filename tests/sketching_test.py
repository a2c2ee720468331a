"""Bases found by thin products in the backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax
from tests.projected_test import WEIGHTS, model, tower
from tests.samples import matrix

X = jax.random.normal(jax.random.key(0), (5, 8))
make = functools.partial(lrjax.galore, 1e-2, rank=3, update_proj_gap=3)
METHODS = {
  'subspace_iteration': make(basis='subspace_iteration'),
  'two_steps': make(basis=lambda rank: lrjax.subspace_iteration(rank, steps=2)),
  'rotate': make(basis='subspace_iteration', moments_on_refresh='rotate'),
  'bfloat16': make(basis='subspace_iteration', basis_dtype=jnp.bfloat16),
  'galore_8bit': lrjax.galore_8bit(1e-2, 3, 3, basis='subspace_iteration'),
}


@pytest.mark.parametrize('name', METHODS)
def test_bases_and_updates_are_those_of_the_full_gradient(name):
  tx, params = METHODS[name], WEIGHTS
  full = jax.jit(lambda p, s, x: tx.update(jax.grad(tower)(p, x), s, p))
  refresh = jax.jit(lrjax.sketched_refresh(tower, tx))
  steady = lrjax.projected_value_and_grad(tower, tx)
  projected = jax.jit(lambda p, s, x: tx.update(steady(p, s, x)[1], s, p))
  state = tx.init(params)
  for t in range(5):
    x = jax.random.normal(jax.random.key(t), X.shape)
    want, after = full(params, state, x)
    ahead = refresh(params, state, x) if lrjax.wants_gradient(state) else state
    assert not lrjax.wants_gradient(ahead)
    got, same = projected(params, ahead, x)
    assert bool(lrjax.wants_gradient(same)) == bool(lrjax.wants_gradient(after))
    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, got, want)
    assert lrjax.health(same) == {'skipped_steps': 0, 'overdue_refreshes': 0}
    params, state = jax.tree.map(jnp.add, params, want), after


def test_a_randomized_sketch_catches_what_the_fit_catches():
  g = matrix((12, 16), 0)
  tx = lrjax.galore(1e-2, 3, basis='randomized_svd')
  params, loss = (
    {'kernel': jnp.zeros((12, 16))},
    lambda p, x: (g * (x @ p['kernel'])).sum(),
  )
  state = lrjax.sketched_refresh(loss, tx)(params, tx.init(params), jnp.eye(12))
  best = jnp.linalg.svd(g)[1][:3]
  caught = jnp.square(lrjax.projected.slots_of(state)['kernel'].state.basis.T @ g).sum()
  assert caught > 0.99 * jnp.square(best).sum()


def test_a_llama_refreshes_without_the_memory_of_a_gradient():
  params, loss = model(remat=True)
  tx = lrjax.galore(1e-2, 2, basis='subspace_iteration')
  refresh = jax.jit(lrjax.sketched_refresh(loss, tx))
  tokens = jnp.zeros((1, 3), jnp.int32)
  full = jax.jit(lambda p, s, tokens: jax.grad(loss)(p, tokens))

  def forms_a_gradient(f):
    text = f.lower(params, tx.init(params), tokens).compile().as_text()
    return any(' dot(' in x and 'f32[16,24]' in x for x in text.splitlines())

  assert forms_a_gradient(full) and not forms_a_gradient(refresh)


def test_a_zero_or_bad_gradient_keeps_its_basis_and_stays_due():
  tx = lrjax.galore(1e-2, 2, basis='subspace_iteration')
  params = {'a': {'kernel': jnp.ones((6, 8))}, 'b': {'kernel': jnp.ones((6, 8))}}
  loss = lambda p, x: (x @ p['a']['kernel']).sum() + 0 * (x @ p['b']['kernel']).sum()
  state = tx.init(params)
  after = lrjax.sketched_refresh(loss, tx)(params, state, jnp.eye(4, 6))
  slots, before = lrjax.projected.slots_of(after), lrjax.projected.slots_of(state)
  assert [int(s.overdue) for s in slots.values()] == [-1, 0]
  old, new = before['b/kernel'].state.basis, slots['b/kernel'].state.basis
  np.testing.assert_array_equal(new, old)
  assert lrjax.wants_gradient(after)
  bad = lrjax.sketched_refresh(loss, tx)(params, state, jnp.full((4, 6), jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, bad, state)


def test_what_needs_the_gradient_in_full_is_refused():
  for tx in (lrjax.galore(1e-2, 2), lrjax.fira(1e-2, 2, basis='subspace_iteration')):
    with pytest.raises(TypeError, match=r"leaf 'kernel': .* gradient in full"):
      lrjax.sketched_refresh(tower, tx)({'kernel': jnp.ones((6, 8))}, None, X)
