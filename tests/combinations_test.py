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
  'random_orthogonal': lrjax.random_orthogonal,
  'gaussian': lrjax.gaussian,
  'columns': lrjax.columns,
  'entries': lrjax.entries,
  'dct': lrjax.dct,
  'heaviest': lrjax.heaviest,
  'tracked': lambda r: lrjax.switched(lrjax.svd(r), lrjax.grassmann(r), after=1),
  'two_sided': lambda r: lrjax.two_sided(lrjax.svd(r)),
  'bf16': lambda r: lrjax.stored_as(lrjax.svd(r), lrjax.cast(jnp.bfloat16)),
  'int8': lambda r: lrjax.stored_as(lrjax.eigh(r), lrjax.int8()),
  'int4': lambda r: lrjax.stored_as(lrjax.svd(r), lrjax.affine(4)),
}
INNERS = {
  'adam': lrjax.adam,
  'optax_adam': optax.scale_by_adam,
  'eight_bit_adam': lambda: lrjax.eight_bit(lrjax.adam(), min_size=0),
  'lion': optax.scale_by_lion,
  'eight_bit_lion': lambda: lrjax.eight_bit(optax.scale_by_lion(), min_size=0),
  'momentum': lambda: optax.trace(0.9),
  'muon': optax.contrib.scale_by_muon,
  'factored_rms': lrjax.factored_rms,
  'sgd': optax.identity,
}
REFRESHES = {
  'every': lambda: lrjax.every(3),
  'every_step': lambda: lrjax.every(1),
  'staggered': lambda: lrjax.every(3, stagger=True),
  'lazy': lambda: lrjax.lazy(2, window=2),
}
RESIDUALS = {
  'drop': lrjax.drop,
  'error_feedback': lrjax.error_feedback,
  'error_feedback_int8': lambda: lrjax.error_feedback(codec=lrjax.int8()),
  'fira': lrjax.residuals.fira,
  'scale_full': lrjax.scale_full,
  'state_free': lambda: lrjax.state_free('sgd', 0.5),
}
TRANSPORTS = {
  'keep': lrjax.keep,
  'reset': lrjax.reset,
  'rotate': lrjax.rotate_square,
  'rotate_abs': lrjax.rotate_abs,
  'rotate_first': lrjax.rotate_first,
  'projection_aware': lrjax.projection_aware(),
}
ROOMS = (BASES, INNERS, REFRESHES, RESIDUALS, TRANSPORTS)
ADAMS = ('adam', 'optax_adam', 'eight_bit_adam')


def reason(basis, inner, refresh, residual, transport):
  """Why the mathematics forbids a combination: what errors say; '' if it does not."""
  why = {
    'needs an orthonormal basis': basis == 'gaussian'
    and residual.startswith(('error_feedback', 'state_free')),
    'needs an inner state with `count`, `mu` and `nu`': transport == 'projection_aware'
    and inner not in ADAMS,
    'rotating needs an inner state with moments': transport.startswith('rotate')
    and inner in ('factored_rms', 'sgd'),
    'needs a basis with one matrix P': refresh == 'lazy'
    and basis in ('two_sided', 'entries'),
    'a ratio per channel needs a basis': residual in ('fira', 'scale_full')
    and basis == 'two_sided',
  }
  return '|'.join(text for text, holds in why.items() if holds)


def combinations():
  """Rounds in which every part of every room is drawn at least once."""
  rng = np.random.default_rng(0)
  longest = max(map(len, ROOMS))
  for _ in range(12):
    rooms = [list(rng.permutation(list(room))) for room in ROOMS]
    for i in range(longest):
      yield tuple(str(room[i % len(room)]) for room in rooms)


def chosen(allowed, n):
  """The first n, and one for each part that is in none of them."""
  out = allowed[:n]
  for i, room in enumerate(ROOMS):
    for part in room:
      if part not in {c[i] for c in out}:
        out.append(next(c for c in allowed if c[i] == part))
  return out


ALL = list(dict.fromkeys(combinations()))
ALLOWED = chosen([c for c in ALL if not reason(*c)], 40)
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
  rate = 0.05 if parts[1] in ('momentum', 'sgd') else 0.02

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
  g = {'w': jax.ShapeDtypeStruct((6, 9), jnp.float32)}

  def run(g):
    tx = lrjax.on_matrices(lambda rank: make(*parts), rank=2)
    return tx.update(g, tx.init(g))

  with pytest.raises(ValueError, match=reason(*parts)):
    jax.eval_shape(run, g)
