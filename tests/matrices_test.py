"""The lift, with a rule that only counts."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import matrix

import lrjax
from lrjax.matrices import Slot, nodes
from lrjax.stacks import LARGEST, bounded, squares, stream
from lrjax.types import MatrixTransform


class Counts(NamedTuple):
  refreshes: jax.Array
  last: jax.Array  # (d, k), the gradient of the last refresh


def counting(period=3, batched=True, calls=None):
  """Counts refreshes that are taken; one fails where the first entry is above 100."""

  def refresh(key, g, s):
    if calls is not None:
      jax.debug.callback(lambda: calls.append(1))
    return Counts(s.refreshes + 1, g), g[0, 0] <= 100

  rule = MatrixTransform(
    init=lambda g: Counts(jnp.zeros([], jnp.int32), jnp.zeros(g.shape, g.dtype)),
    update=lambda g, s: (2 * g, s),
    due=lambda s, step, phase: step % period == 0,
    refresh=refresh,
    batched=batched,
  )
  return lambda rank: rule


def run(tx, grads):
  """The state after each of some gradients of leaf `w`, and the updates."""
  update, state, states, out = jax.jit(tx.update), tx.init({'w': grads[0]}), [], []
  for g in grads:
    u, state = update({'w': g}, state)
    states.append(state)
    out.append(u['w'])
  jax.effects_barrier()
  return states, out


def counts(states):
  return [s.slots['w'].state.refreshes.tolist() for s in states]


def overdue(states):
  return [s.slots['w'].overdue.tolist() for s in states]


@pytest.mark.parametrize('batched', [True, False])
def test_refreshes_follow_the_schedule_of_the_rule(batched):
  g = matrix((2, 4, 6))
  states, out = run(lrjax.on_matrices(counting(batched=batched)), [g] * 5)
  assert counts(states) == [[n, n] for n in (1, 1, 1, 2, 2)]
  assert overdue(states) == [[0, 0]] * 5
  np.testing.assert_allclose(out[0], 2 * g, rtol=1e-6)


@pytest.mark.parametrize('batched', [True, False])
def test_an_unused_expert_waits_and_holds_nobody_up(batched):
  g = matrix((3, 4, 6))
  idle = g.at[1].set(0)
  calls = []
  rule = counting(period=4, batched=batched, calls=calls)
  states, _ = run(lrjax.on_matrices(rule), [idle, idle, idle, g, g])
  # The others are refreshed at steps 0 and 4 only, the idle one when it wakes up.
  assert counts(states) == [[1, 0, 1]] * 3 + [[1, 1, 1], [2, 2, 2]]
  assert overdue(states) == [[0, 1, 0]] * 3 + [[0, 0, 0]] * 2
  # One call for all slices at steps 0, 3 and 4, or one a slice; none between.
  assert len(calls) == (3 if batched else 6)


def test_a_refresh_that_fails_counts_up_and_is_tried_again():
  bad, good = jnp.full((4, 6), 200.0), matrix((4, 6))
  states, out = run(
    lrjax.on_matrices(counting(4)), [good, bad, bad, bad, bad, bad, good]
  )
  assert counts(states) == [1, 1, 1, 1, 1, 1, 2]
  assert overdue(states) == [0, 0, 0, 0, 1, 2, 0]
  np.testing.assert_array_equal(states[5].slots['w'].state.last, good)
  np.testing.assert_array_equal(out[5], 2 * bad)
  assert int(lrjax.health(states[5])['overdue_refreshes']) == 2


@pytest.mark.parametrize('guard', ['tree', 'matrix'])
def test_a_refresh_missed_by_a_bad_gradient_is_made_up_for(guard):
  g = matrix((2, 4, 6))
  states, out = run(
    lrjax.on_matrices(counting(4), guard=guard), [g.at[1, 0, 0].set(jnp.nan), g, g]
  )
  first = [0, 0] if guard == 'tree' else [1, 0]
  assert counts(states) == [first, [1, 1], [1, 1]]
  assert [int(s.count) for s in states] == ([0, 1, 2] if guard == 'tree' else [1, 2, 3])
  assert [int(s.skipped) for s in states] == [1, 1, 1]
  assert not out[0][1].any()
  assert bool(out[0][0].any()) == (guard == 'matrix')


def test_rules_without_refresh_and_without_rank():
  rule = MatrixTransform(lambda g: (), lambda g, s: (-g, s))
  g = {'w': matrix((2, 4, 6)), 'bias': jnp.ones(3)}
  tx = lrjax.on_matrices(lambda rank: rule, rest=optax.scale(3.0))
  u, state = tx.update(g, tx.init(g))
  np.testing.assert_array_equal(u['w'], -g['w'])
  np.testing.assert_array_equal(u['bias'], 3 * g['bias'])
  assert int(state.count) == 1


def test_random_numbers_differ_by_seed_leaf_and_step_and_by_nothing_else():
  draw = MatrixTransform(
    init=lambda g: jnp.zeros([], jnp.float32),
    update=lambda g, s: (g, s),
    due=lambda s, step, phase: step >= 0,
    refresh=lambda key, g, s: (jax.random.uniform(key), jnp.asarray(True)),
  )
  params = {'a': jnp.ones((2, 3, 3)), 'b': jnp.ones((3, 3))}

  def draws(tree, seed):
    tx = lrjax.on_matrices(lambda rank: draw, seed=seed)
    state, update, seen = tx.init(tree), jax.jit(tx.update), []
    for _ in range(2):
      _, state = update(tree, state)
      seen += [float(x) for s in nodes(state, Slot) for x in s.state.ravel()]
    return seen

  zero = draws(params, 0)
  assert len(set(zero + draws(params, 1))) == 12
  assert draws(params, 0) == zero
  assert set(draws({'b': params['b']}, 0)) < set(zero)


STATE = {'w': matrix((6, 8)), 'k': {'bias': jnp.ones(8)}}


@pytest.mark.parametrize(
  ('updates', 'message'),
  [
    ({'w': STATE['w']}, r"`rest`.*'mu/k/bias', \(8,\).*one side only"),
    (STATE | {'v': STATE['w']}, r"only in updates \['v'\], only in init \[\]"),
    (STATE | {'w': jnp.ones((6, 9))}, r"'w' of shape \(6, 9\) does not fit the state"),
    (STATE | {'w': jnp.ones((2, 6, 8))}, r"'w' of shape \(2, 6, 8\) does not fit"),
    (STATE | {'k': {'bias': jnp.ones(9)}}, r"`rest`.*'mu/k/bias', \(8,\).*\(9,\)"),
  ],
  ids=['missing', 'extra', 'shape', 'stacked', 'plain'],
)
def test_updates_unlike_those_of_init_are_refused(updates, message):
  tx = lrjax.scale_by_galore(rank=2)
  state = tx.init(STATE)
  with pytest.raises(ValueError, match=message):
    tx.update(updates, state)
  with pytest.raises(ValueError, match=message):
    jax.jit(tx.update)(updates, state)


@pytest.mark.parametrize(
  'other',
  [
    dict(rank=3),
    dict(rank=2, side='long'),
    dict(rank=2, base_optimizer=optax.scale_by_adam()),
    dict(rank=2, base_optimizer=optax.scale_by_lion()),
    dict(rank=2, basis_dtype=jnp.bfloat16),
  ],
  ids=['rank', 'side', 'same_fields', 'lion', 'dtype'],
)
def test_a_state_of_other_settings_is_refused_with_the_leaf(other):
  tx = lrjax.scale_by_galore(rank=2)
  with pytest.raises(ValueError, match=r"leaf 'w' .*it needs .*6, 2.*the state has"):
    tx.update(STATE, lrjax.scale_by_galore(**other).init(STATE))


def test_a_state_of_another_method_is_refused():
  with pytest.raises(TypeError, match=r'MatricesState.*another method'):
    lrjax.scale_by_galore(rank=2).update(STATE, optax.adam(0.1).init(STATE))
  with pytest.raises(TypeError, match=r'MatricesState.*another method'):
    lrjax.galore(0.1, rank=2).update(STATE, optax.adam(0.1).init(STATE))


def test_bf16_parameters_take_float32_gradients():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), STATE)
  tx = lrjax.scale_by_galore(rank=2)
  u, state = tx.update(STATE, tx.init(half))
  assert u['w'].dtype == jnp.float32
  assert state.slots['w'].state.basis.dtype == jnp.float32


def test_a_first_state_can_be_donated():
  grads = {'w': matrix((6, 8)), 'k': matrix((2, 6, 8)), 'bias': jnp.ones(3)}
  tx = lrjax.galore(0.1, rank=2, basis='eigh')
  update = jax.jit(tx.update, donate_argnums=1)
  _, state = update(grads, tx.init(grads))
  _, state = update(grads, state)
  assert int(state[0].count) == 2


def test_fan_scale_sees_in_and_out_whichever_side_is_compressed():
  params = {'a': {'kernel': jnp.ones((4, 6))}, 'b': {'kernel': jnp.ones((2, 6, 4))}}
  rule = lambda rank: MatrixTransform(lambda g: (), lambda g, s: (g, s))
  tx = lrjax.on_matrices(rule, fan_scale=lambda fan_in, fan_out: fan_out / fan_in)
  u, _ = tx.update(params, tx.init(params))
  np.testing.assert_allclose(u['a']['kernel'], 1.5, rtol=1e-6)
  np.testing.assert_allclose(u['b']['kernel'], 4 / 6, rtol=1e-6)


def test_no_two_paths_share_random_numbers():
  # These two words have one and the same crc32.
  a, b = stream(0, 'plumless'), stream(0, 'buckeroo')
  assert zlib.crc32(b'plumless') == zlib.crc32(b'buckeroo')
  assert not jnp.array_equal(jax.random.key_data(a), jax.random.key_data(b))


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf, 2e15])
def test_one_bad_entry_of_a_large_matrix_is_seen(bad):
  # XLA's maximum on a CPU passes over NaN in arrays of this size.
  g = jnp.ones((2, 128, 96)).at[1, 70, 50].set(bad)
  energy = jax.jit(squares, static_argnums=1)(g, (1, 2))
  np.testing.assert_array_equal(energy < LARGEST**2, [True, False])
  assert not jax.jit(bounded)(g)
