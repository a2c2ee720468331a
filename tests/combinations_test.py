"""Parts mix freely: combinations drawn from all of them descend, or say why not.

Every part of every room is in at least one combination, and pairs of rooms are drawn by
a fixed seed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import matrix

import lrjax

STEPS = 12
BASES = {
  'svd': lrjax.svd,
  'eigh': lrjax.eigh,
  'randomized_svd': lrjax.randomized_svd,
  'subspace_iteration': lrjax.subspace_iteration,
  'two_sided': lambda r: lrjax.two_sided(lrjax.svd(r)),
  'bf16': lambda r: lrjax.stored_as(lrjax.svd(r), lrjax.cast(jnp.bfloat16)),
  'int8': lambda r: lrjax.stored_as(lrjax.eigh(r), lrjax.int8()),
}
INNERS = {
  'adam': lrjax.adam,
  'optax_adam': optax.scale_by_adam,
  'lion': optax.scale_by_lion,
  'momentum': lambda: optax.trace(0.9),
  'factored_rms': lrjax.factored_rms,
  'sgd': optax.identity,
}
REFRESHES = {
  'every': lambda: lrjax.every(3),
  'every_step': lambda: lrjax.every(1),
  'staggered': lambda: lrjax.every(3, stagger=True),
}
RESIDUALS = {
  'drop': lrjax.drop,
  'error_feedback': lrjax.error_feedback,
}
TRANSPORTS = {
  'keep': lrjax.keep,
  'reset': lrjax.reset,
  'rotate': lrjax.rotate_square,
  'rotate_abs': lrjax.rotate_abs,
  'projection_aware': lrjax.projection_aware(),
}
ROOMS = (BASES, INNERS, REFRESHES, RESIDUALS, TRANSPORTS)


def reason(basis, inner, refresh, residual, transport):
  """Why the mathematics forbids a combination: what the error says; '' if it does not."""
  if transport == 'projection_aware' and inner not in ('adam', 'optax_adam'):
    return 'needs an inner state with `count`, `mu` and `nu`'
  if transport in ('rotate', 'rotate_abs') and inner in ('factored_rms', 'sgd'):
    return 'rotating needs an inner state with moments'
  return ''


def combinations():
  """Each part with others in turn, then as many again at random."""
  rng = np.random.default_rng(0)
  longest = max(map(len, ROOMS))
  turns = [[list(room) for room in ROOMS] for _ in range(10)]
  for rooms in turns:
    for room in rooms:
      rng.shuffle(room)
    for i in range(longest):
      yield tuple(str(room[i % len(room)]) for room in rooms)


ALL = list(dict.fromkeys(combinations()))
ALLOWED = [c for c in ALL if not reason(*c)][:48]
FORBIDDEN = [c for c in ALL if reason(*c)]


def make(basis, inner, refresh, residual, transport):
  return lrjax.low_rank(
    BASES[basis](2),
    INNERS[inner](),
    refresh=REFRESHES[refresh](),
    residual=RESIDUALS[residual](),
    transport=TRANSPORTS[transport],
  )


def test_every_part_is_in_a_combination():
  assert len(ALLOWED) >= 40
  for i, room in enumerate(ROOMS):
    assert {c[i] for c in ALLOWED} == set(room)


@pytest.mark.parametrize('parts', ALLOWED, ids='-'.join)
def test_descends(parts):
  target = {'kernel': matrix((6, 9)), 'stack': matrix((2, 8, 5), 1)}
  tx = lrjax.on_matrices(functools.cache(lambda rank: make(*parts)), rank=2)
  rate = 0.02 if parts[1] in ('adam', 'optax_adam', 'lion', 'factored_rms') else 0.05

  @jax.jit
  def train(params):
    def step(carry, _):
      params, state = carry
      grads = jax.tree.map(jnp.subtract, params, target)
      u, state = tx.update(grads, state)
      params = jax.tree.map(lambda p, u: p - rate * u, params, u)
      return (params, state), optax.tree.norm(grads)

    carry, norms = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    return norms, carry[1]

  norms, state = train(jax.tree.map(jnp.zeros_like, target))
  assert bool(jnp.isfinite(norms).all())
  assert norms[-1] < 0.97 * norms[0], norms
  assert int(lrjax.health(state)['overdue_refreshes']) == 0


@pytest.mark.parametrize('parts', FORBIDDEN, ids='-'.join)
def test_what_cannot_work_says_why(parts):
  with pytest.raises(ValueError, match=reason(*parts)):
    make(*parts)
