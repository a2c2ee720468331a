"""Sampled layers: what is drawn, what has state, what moves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import matrix

import lrjax
from lrjax.draws import drawer
from lrjax.layers import find_layers
from lrjax.testing import trajectory

shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)


def tree(layers=5, seed=0):
  """A stacked model."""
  return {
    'embed': {'embedding': matrix((7, 4), seed)},
    'layers': {'q': {'kernel': matrix((layers, 4, 6), seed + 1)},
               'norm': {'scale': matrix((layers, 4), seed + 2)}},
  }  # fmt: skip


def numbered(tree):
  """The same model with a list of layers."""
  n = len(tree['layers']['norm']['scale'])
  layer = lambda i: jax.tree.map(lambda x: x[i], tree['layers'])
  return {**tree, 'layers': [layer(i) for i in range(n)]}


def actives(tx, grads, state=None):
  """The active layers of each step."""
  state, update, out = state or tx.init(grads[0]), jax.jit(tx.update), []
  for g in grads:
    _, state = update(g, state)
    out.append(tuple(state.active.tolist()))
  return out, state


def frequencies(p, n, draws):
  scores = jnp.log(jnp.asarray(p, jnp.float32))
  draw = drawer('random', 0)
  one = lambda round: jnp.zeros(len(p)).at[draw(round, len(p), n, scores)].set(1)
  return jax.jit(jax.vmap(one))(jnp.arange(draws)).mean(0)


def test_draws_are_sequential_without_replacement():
  p, n = (0.5, 0.3, 0.2), 2
  want = np.zeros(3)
  for a, b in itertools.permutations(range(3), n):
    want[[a, b]] += p[a] * p[b] / (1 - p[a])
  np.testing.assert_allclose(want, (0.8393, 0.6750, 0.4857), atol=1e-4)
  # Standard error: 0.5 / sqrt(1e5) = 0.0016.
  np.testing.assert_allclose(frequencies(p, n, 100_000), want, atol=0.006)


def test_equal_probabilities_include_all_layers_alike():
  np.testing.assert_allclose(frequencies([1.0] * 5, 2, 20_000), 0.4, atol=0.015)


@pytest.mark.parametrize(
  ('order', 'total', 'n', 'want'),
  [
    ('descending', 7, 2, [{6, 5}, {4, 3}, {2, 1}, {0, 6}, {5, 4}]),
    ('ascending', 7, 2, [{0, 1}, {2, 3}, {4, 5}, {6, 0}, {1, 2}]),
    ('mirror', 8, 4, [{0, 1, 6, 7}, {2, 3, 4, 5}, {0, 1, 6, 7}]),
    ('mirror', 7, 2, [{0, 6}, {1, 5}, {2, 4}, {0, 6}]),
    ('descending', 3, 3, [{0, 1, 2}] * 2),
  ],
)
def test_orders_go_round(order, total, n, want):
  draw = drawer(order, 0)
  got = [draw(jnp.int32(i), total, n, 0.0).tolist() for i in range(len(want))]
  assert [set(x) for x in got] == want
  assert all(x == sorted(x) for x in got)


def test_defect_a_resumed_run_goes_on_with_the_same_layers():
  """The official draws come from a global generator that no checkpoint holds."""
  grads = [tree(seed=i) for i in range(9)]
  tx = lrjax.sampled_layers(lrjax.adam(), 2, 3)
  whole, _ = actives(tx, grads)
  # Drawn at steps 0, 3, 6 and at no other.
  assert [whole[i] == whole[i - 1] for i in (1, 2, 4, 5, 7, 8)] == [True] * 6
  assert len(set(whole)) > 1
  first, state = actives(tx, grads[:4])
  again = lrjax.sampled_layers(lrjax.adam(), 2, 3)
  rest, _ = actives(again, grads[4:], jax.tree.map(jnp.array, state))
  assert first + rest == whole
  assert actives(lrjax.sampled_layers(lrjax.adam(), 2, 3, seed=1), grads)[0] != whole


def test_inactive_layers_do_not_move_and_active_ones_start_over():
  grads = [tree(seed=i) for i in range(4)]
  tx = lrjax.sampled_layers(lrjax.adam(), 2, 2, order='ascending')
  out, state = trajectory(tx, grads[0], grads)
  plain, _ = trajectory(lrjax.adam(), grads[0], grads)
  rows = [g['layers']['q']['kernel'][:2] for g in grads[:2]]
  want, _ = trajectory(lrjax.adam(), rows[0], rows)
  np.testing.assert_allclose(out[1]['layers']['q']['kernel'][:2], want[1], atol=1e-6)
  for t, on in ((0, [0, 1]), (1, [0, 1]), (2, [2, 3]), (3, [2, 3])):
    off = [i for i in range(5) if i not in on]
    for x in jax.tree.leaves(out[t]['layers']):
      assert x[np.array(on)].any() and not x[np.array(off)].any()
    # Outside the layers the state is always alive.
    np.testing.assert_allclose(
      out[t]['embed']['embedding'], plain[t]['embed']['embedding'], atol=1e-6
    )
  first = jnp.sign(grads[2]['layers']['q']['kernel'][2:4])
  np.testing.assert_allclose(out[2]['layers']['q']['kernel'][2:4], first, atol=1e-3)
  assert state.layers.mu['layers/q/kernel'].shape == (2, 4, 6)
  assert int(state.layers.count) == 2


@pytest.mark.parametrize('compact', [True, False])
def test_numbered_layers_are_as_stacked_ones(compact):
  grads = [tree(seed=i) for i in range(4)]
  inner = lrjax.scale_by_galore(2, 2) if compact else lrjax.adam()
  tx = lrjax.sampled_layers(inner, 2, 2, rest=lrjax.adam(), compact=compact)
  want, state = trajectory(tx, grads[0], grads)
  split = [numbered(g) for g in grads]
  out, same = trajectory(tx, split[0], split)
  assert jax.tree.structure(same) == jax.tree.structure(state)
  for a, b in zip(out, want):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(numbered(b))):
      np.testing.assert_allclose(x, y, atol=1e-5)


def test_kept_states_rest_while_their_layer_does():
  grads = [tree(seed=i) for i in range(6)]
  order = lambda round: jnp.array([[0, 1], [2, 3], [0, 3]])[round]
  tx = lrjax.sampled_layers(lrjax.adam(), 2, 2, order=order, compact=False)
  out, state = trajectory(tx, grads[0], grads)
  assert state.layers.count.tolist() == [4, 2, 2, 4, 0]
  seen = [grads[t]['layers']['q']['kernel'][0] for t in (0, 1, 4, 5)]
  want, _ = trajectory(lrjax.adam(), seen[0], seen)
  np.testing.assert_allclose(out[5]['layers']['q']['kernel'][0], want[3], atol=1e-5)


def test_all_layers_active_is_the_inner_optimizer():
  grads = [tree(seed=i) for i in range(3)]
  tx = lrjax.sampled_layers(lrjax.adam(), 1.0, 9)
  out, _ = trajectory(tx, grads[0], grads)
  want, _ = trajectory(lrjax.adam(), grads[0], grads)
  for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_inner_optimizer_sees_the_parameters_of_its_rows():
  params, zero = tree(), jax.tree.map(jnp.zeros_like, tree())
  tx = lrjax.sampled_layers(optax.add_decayed_weights(0.5), 2, 9, order='ascending')
  (u,), _ = trajectory(tx, params, [zero])
  want = 0.5 * params['layers']['q']['kernel']
  np.testing.assert_allclose(u['layers']['q']['kernel'], want.at[2:].set(0), rtol=1e-6)


def test_bases_are_drawn_anew_each_time():
  """Slots that start over do not repeat the random numbers of the last time."""
  grads = [tree(seed=i) for i in range(3)]
  inner = lrjax.scale_by_galore(2, 50, basis='random_orthogonal')
  tx = lrjax.sampled_layers(inner, 2, 1, order='ascending')
  state, bases = tx.init(grads[0]), []
  for g in grads:
    _, state = jax.jit(tx.update)(g, state)
    bases.append(state.layers.slots['layers/q/kernel'].state.basis)
    assert int(lrjax.health(state)['overdue_refreshes']) == 0
  flat = np.concatenate(bases)
  assert len(np.unique(flat.round(4), axis=0)) == 6, 'a sketch came twice'


def test_a_bad_gradient_anywhere_is_counted_once():
  good, bad = tree(), tree()
  bad['layers']['q']['kernel'] = bad['layers']['q']['kernel'].at[4, 0, 0].set(jnp.nan)
  tx = lrjax.sampled_layers(lrjax.scale_by_frugal(0.0), 2, 2, order='ascending')
  out, state = trajectory(tx, good, [good, bad, good])
  assert not any(x.any() for x in jax.tree.leaves(out[1]))
  health = {k: int(v) for k, v in lrjax.health(state).items()}
  assert health == dict(skipped_steps=1, overdue_refreshes=0)
  assert int(state.count) == 2


def test_rows_of_a_report_tell_the_truth():
  params = jax.tree.map(lambda x: shape(*x.shape), tree())
  tx = lrjax.sampled_layers(lrjax.scale_by_galore(2), 2, 9, rest=lrjax.adam())
  rows = {r.path: r for r in lrjax.coverage(tx, params).rows}
  q = rows['layers/q/kernel']
  assert (q.shape, q.side, q.rank, q.stack) == ((5, 4, 6), 'in', 2, 2)
  assert q.state_bytes == 2 * 4 * (2 * 4 + 2 * 2 * 6 + 2)
  assert q.note == '2 of 5 layers active'
  assert rows['layers/norm/scale'].state_bytes == 2 * 4 * 2 * 4
  assert rows['embed/embedding'].note == 'always active'
  split = {r.path: r for r in lrjax.coverage(tx, numbered(tree())).rows}
  first, second = (split[f'layers/{i}/q/kernel'] for i in range(2))
  assert (first.shape, first.state_bytes) == ((4, 6), q.state_bytes)
  assert second.state_bytes == 0
  assert second.note.endswith('state counted at layers/0/q/kernel')


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (dict(n_active=6), '6 layers active; allowed: 1 to 5'),
    (dict(n_active=0), '`n_active` must be at least 1'),
    (dict(n_active=1.5), r'must lie in \(0, 1\], got 1.5'),
    (dict(n_active=0.05), '0.05 makes 0 layers active; allowed: 1 to 5'),
    (dict(period=0), '`period` must be at least 1'),
    (dict(order='mirror', n_active=3), 'as many layers from each end, got 3'),
    (
      dict(order=lambda round: jnp.arange(3)),
      r'must return 2 layers, got shape \(3,\)',
    ),
    (dict(order='rnd'), "unknown `order` 'rnd'.*random"),
    (dict(probabilities=[1, 1, 1, -1, 1]), 'at least 0 a layer'),
    (dict(probabilities=[1, 1, float('nan')]), 'one finite number'),
    (dict(probabilities=[1, 0, 0, 0, 0]), 'above 0 for 1 layers; at least.* 2'),
    (dict(probabilities=[1, 1, 1]), 'has 3 entries for 5 layers'),
    (dict(probabilities=lambda p: jnp.ones(4)), r'shape \(4,\) for 5 layers'),
    (dict(probabilities=lambda p: -jnp.ones(5)), 'returned negative'),
    (dict(probabilities=[1] * 5, order='ascending'), 'need `order` random'),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_bad_arguments_are_refused(bad, message):
  with pytest.raises(ValueError, match=message):
    tx = lrjax.sampled_layers(lrjax.adam(), **{'n_active': 2, 'period': 2, **bad})
    jax.eval_shape(tx.update, tree(), tx.init(tree()))


def test_a_tree_without_layers_is_told():
  tx = lrjax.sampled_layers(lrjax.adam(), 2, 2)
  with pytest.warns(UserWarning, match=r'no leaf belongs to a layer.*Leaves: w'):
    tx.init({'w': jnp.ones((4, 6))})


def test_layers_are_found_in_trees_of_many_makes():
  x = jnp.ones((4, 6))
  made = {
    'layers_0': {'w': x}, 'layers_1': {'w': x}, 'layers_10': {'w': x}, 'head': {'w': x},
  }  # fmt: skip
  found = find_layers(made)
  assert found.count == 3 and found.rest == {'head/w': 0}
  assert found.groups == (('layers/w', (1, 2, 3), False),)
  deep = {'transformer': {'h': {str(i): {'c': x} for i in (2, 10, 1)}}}
  assert find_layers(deep).groups == (('transformer/h/c', (0, 2, 1), False),)
  named = find_layers({'unit3': {'w': x}, 'unit4': {'w': x}}, r'unit(\d+)/')
  assert (named.count, named.groups[0].path) == (2, 'unit/w')
  odd = {'layers': [{'w': x}, {'w': x.T}]}
  with pytest.raises(ValueError, match='differ in shape'):
    find_layers(odd)
  with pytest.raises(ValueError, match=r'differ in their layers.*optax.partition'):
    find_layers({'layers': {'a': x, 'b': x.T}})
