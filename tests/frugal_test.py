"""FRUGAL against its transcription, its limits, and the defects of its official code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import frugal as oracle
from oracles.galore import positive
from samples import gradients, matrix

import lrjax
from lrjax.testing import trajectory

SHAPES = {'tall': (12, 8), 'wide': (8, 12)}
SPLITTERS = ['svd', 'random', 'columns', 'randk', 'blocks']
shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)


@pytest.mark.parametrize('inactive', ['sign', 'sgd', 'no'])
def test_equals_the_transcription(inactive):
  grads = gradients(SHAPES, 9)
  options = dict(scale=0.5, inactive=inactive, inactive_scale=0.1)
  tx = lrjax.scale_by_frugal(0.25, 4, projection='svd', **options)
  out, _ = trajectory(tx, grads[0], grads)
  leading = lambda t, g: positive(np.linalg.svd(g)[0][:, :2])
  for name in SHAPES:
    turn = np.transpose if name == 'tall' else lambda x: x
    want = oracle.frugal([turn(g[name]) for g in grads], leading, gap=4, **options)
    got = np.stack([turn(u[name]) for u in out])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('projection', SPLITTERS)
def test_the_two_parts_make_up_the_gradient(projection):
  g = {'layers': {'kernel': matrix((4, 6, 8))}}
  tx = lrjax.scale_by_frugal(
    0.5, 2, base_optimizer=optax.identity(), projection=projection, inactive='sgd'
  )
  for u in trajectory(tx, g, [g] * 3)[0]:
    np.testing.assert_allclose(u['layers']['kernel'], g['layers']['kernel'], atol=1e-6)


@pytest.mark.parametrize('projection', ['columns', 'randk', 'blocks'])
def test_coordinates_are_disjoint(projection):
  """Entries with state get the base alone, the others the sign alone, bit for bit."""
  g = {'layers': {'kernel': matrix((4, 6, 8))}}
  tx = lrjax.scale_by_frugal(
    0.5, 9, base_optimizer=optax.scale(100.0), projection=projection
  )
  u = trajectory(tx, g, [g])[0][0]['layers']['kernel']
  x = g['layers']['kernel']
  with_state = np.asarray(u == 100 * x)
  assert with_state.mean() == 0.5
  np.testing.assert_array_equal(np.where(with_state, np.sign(x), u), np.sign(x))


def test_the_sign_of_the_rest_is_not_orthogonal_to_the_subspace():
  g = {'w': matrix((6, 8))}
  tx = lrjax.scale_by_frugal(
    0.34, 9, base_optimizer=optax.identity(), projection='svd', inactive='sign'
  )
  (u,), state = trajectory(tx, g, [g])
  p = state.slots['w'].state.basis
  rest = g['w'] - p @ (p.T @ g['w'])
  np.testing.assert_allclose(p.T @ rest, 0, atol=1e-5)
  assert float(jnp.abs(p.T @ jnp.sign(rest)).max()) > 0.1
  np.testing.assert_allclose(u['w'], p @ (p.T @ g['w']) + jnp.sign(rest), atol=1e-5)


@pytest.mark.parametrize('projection', ['columns', 'blocks'])
def test_a_refresh_starts_adam_over(projection):
  """The first Adam step is the sign; so is the free part: the whole update at t = T."""
  grads = [{'layers': {'kernel': matrix((4, 6, 8), seed)}} for seed in range(4)]
  tx = lrjax.scale_by_frugal(0.5, 3, projection=projection)
  out, _ = trajectory(tx, grads[0], grads)
  distance = lambda t: float(
    jnp.abs(out[t]['layers']['kernel'] - jnp.sign(grads[t]['layers']['kernel'])).max()
  )
  # eps is 1e-8 beside entries of 1e-4 at least.
  assert distance(0) < 1e-3
  assert distance(3) < 1e-3
  assert distance(2) > 0.1


def test_all_blocks_active_is_adam_with_restarts():
  grads = [{'layers': {'kernel': matrix((3, 4, 6), seed)}} for seed in range(5)]
  tx = lrjax.scale_by_frugal(1.0, 3, projection='blocks')
  out, _ = trajectory(tx, grads[0], grads)
  adam = optax.scale_by_adam()
  want = (
    trajectory(adam, grads[0], grads[:3])[0] + trajectory(adam, grads[0], grads[3:])[0]
  )
  for a, b in zip(out, want):
    np.testing.assert_allclose(a['layers']['kernel'], b['layers']['kernel'], atol=1e-5)


def test_density_one_is_the_base_optimizer():
  grads = gradients(SHAPES, 4)
  out, _ = trajectory(lrjax.scale_by_frugal(1.0, 2), grads[0], grads)
  want, _ = trajectory(optax.scale_by_adam(), grads[0], grads)
  for a, b in zip(out, want):
    np.testing.assert_allclose(a['tall'], b['tall'], atol=1e-5)


@pytest.mark.parametrize('projection', SPLITTERS)
def test_density_zero_is_sign_sgd_without_state(projection):
  g = {'layers': {'kernel': matrix((4, 6, 8))}}
  tx = lrjax.scale_by_frugal(0.0, 3, 0.3, projection=projection, inactive_scale=0.5)
  (u,), state = trajectory(tx, g, [g])
  np.testing.assert_allclose(
    u['layers']['kernel'], 0.15 * jnp.sign(g['layers']['kernel']), rtol=1e-6
  )
  slot = state.slots['layers/kernel']
  assert slot.state == () and slot.overdue.tolist() == [0] * 4


def test_without_the_free_part_it_is_galore():
  grads = gradients(SHAPES, 6)
  ours = lrjax.scale_by_frugal(
    0.25, 3, 0.25, projection='svd', inactive='no', moments_on_refresh='keep'
  )
  theirs = lrjax.scale_by_galore(0.25, 3, 0.25, basis='svd')
  pairs = zip(
    trajectory(ours, grads[0], grads)[0], trajectory(theirs, grads[0], grads)[0]
  )
  for a, b in pairs:
    np.testing.assert_allclose(a['wide'], b['wide'], atol=1e-6)


def test_defect_ranks_round_to_even_for_subspaces_and_down_for_coordinates():
  """`round` in one class of the official code, `int` in another; each where it was."""
  sizes = {'a': (10, 20), 'b': (14, 20), 'c': (6, 20)}
  params = {name: shape(*s) for name, s in sizes.items()}
  rank = lambda projection: {
    r.path: r.rank
    for r in lrjax.coverage(
      lrjax.scale_by_frugal(0.25, projection=projection), params
    ).rows
  }
  assert rank('svd') == {'a': 2, 'b': 4, 'c': 2}  # 2.5, 3.5 and 1.5
  assert rank('columns') == {'a': 2, 'b': 3, 'c': 1}
  for layers, active in ((7, 2), (10, 2), (6, 2), (14, 4)):
    tree = {'layers': {'kernel': shape(layers, 4, 6)}}
    tx = lrjax.scale_by_frugal(0.25, projection='blocks')
    assert tx.init(tree).active.shape == (active,)


@pytest.mark.parametrize('projection', ['svd', 'columns', 'blocks'])
def test_defect_momentum_does_not_start_from_the_parameters(projection):
  """The official SGD clones weights into its buffer: a zero gradient moves them."""
  params = {'layers': {'kernel': matrix((4, 6, 8))}, 'norm': jnp.ones(3)}
  zero = jax.tree.map(jnp.zeros_like, params)
  tx = lrjax.frugal(0.1, 0.5, 2, base_optimizer=optax.trace(0.9), projection=projection)
  for u in trajectory(tx, params, [zero] * 3)[0]:
    assert not any(x.any() for x in jax.tree.leaves(u))


def test_defect_a_first_parameter_without_gradient_leaves_the_others_their_refresh():
  """The official code asks the first parameter of a group when to refresh all."""
  grads = [{'a': jnp.zeros((6, 8)), 'b': matrix((6, 8), seed)} for seed in range(4)]
  tx = lrjax.scale_by_frugal(0.34, 3, projection='svd')
  alone = lrjax.scale_by_frugal(0.34, 3, projection='svd')
  out, _ = trajectory(tx, grads[0], grads)
  only = [{'b': g['b']} for g in grads]
  for u, want in zip(out, trajectory(alone, only[0], only)[0]):
    np.testing.assert_allclose(u['b'], want['b'], atol=1e-6)


def test_hyperparameters_can_be_injected():
  params = {'w': matrix((8, 12)), 'bias': jnp.ones(3)}
  rate, s_i = optax.linear_schedule(0.1, 0.0, 4), optax.linear_schedule(1.0, 0.0, 8)
  make = optax.inject_hyperparams(
    lrjax.frugal, static_args=('density', 'update_proj_gap')
  )
  tx = make(rate, 0.25, 9, inactive_scale=s_i)
  out, state = trajectory(tx, params, [params] * 3)
  free = jnp.abs(out[2]['w']) < 0.04  # Adam's part has size 0.05 = rate(2)
  got = jnp.where(free, out[2]['w'], -0.05 * 0.75 * jnp.sign(params['w']))
  np.testing.assert_allclose(got, -0.05 * 0.75 * jnp.sign(params['w']), rtol=1e-5)
  assert {'learning_rate', 'inactive_scale', 'scale'} <= set(state.hyperparams)


# r of d, then what one matrix keeps beside the moments and two counters of 4 bytes.
BYTES = {
  'svd': (lambda d: round(d / 4), lambda d, k, r: 4 * r * d),
  'random': (lambda d: round(d / 4), lambda d, k, r: 4 * r * d),
  'columns': (lambda d: d // 4, lambda d, k, r: 4 * r),
  'randk': (lambda d: d // 4, lambda d, k, r: 4 * r * k),
}


@pytest.mark.parametrize('projection', SPLITTERS)
@pytest.mark.parametrize(('layers', 'd', 'k'), [(6, 10, 16), (8, 512, 1376)])
def test_state_bytes_are_those_of_the_formula(projection, layers, d, k):
  params = {'layers': {'kernel': shape(layers, d, k)}, 'norm': shape(d)}
  tx = lrjax.scale_by_frugal(0.25, projection=projection)
  report = lrjax.coverage(tx, params)
  row = next(r for r in report.rows if r.path == 'layers/kernel')
  rest = 4 + 2 * 4 * d  # count and moments of the norm
  if projection == 'blocks':
    n = round(0.25 * layers)
    assert row.state_bytes == 2 * 4 * n * d * k
    # Beside them: steps taken and skipped, the active layers, the count of their Adam.
    assert report.state_bytes == row.state_bytes + rest + 4 * (2 + n + 1)
    assert row.note == f'{n} of {layers} layers active'
    return
  size, more = BYTES[projection]
  r = size(d)
  assert row.rank == r
  assert row.state_bytes == layers * (more(d, k, r) + 2 * 4 * r * k + 2 * 4)
  assert report.state_bytes == row.state_bytes + rest + 2 * 4 + 1


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(density=1.5), ValueError, '`density` must lie between 0 and 1, got 1.5'),
    (dict(density=-0.1), ValueError, '`density`.*got -0.1'),
    (dict(update_proj_gap=0), ValueError, '`update_proj_gap` must be at least 1'),
    (dict(projection='colums'), ValueError, "did you mean 'columns'"),
    (dict(inactive='sgn'), ValueError, "`inactive` 'sgn'; did you mean 'sign'"),
    (dict(inactive_scale=-1.0), ValueError, '`inactive_scale`.*got -1.0'),
    (dict(scale='1'), TypeError, '`scale` must be a number'),
    (dict(projection='blocks', moments_on_refresh='keep'), ValueError, "'reset', got"),
    (dict(projection='blocks', side='in'), ValueError, 'has no `side`'),
    (dict(projection='blocks', order='up'), ValueError, "`order` 'up'.*ascending"),
    (dict(base_optimizer=optax.lamb(0.1)), ValueError, 'needs parameters'),
    (dict(density=jnp.float32(0.5)), TypeError, '`density`.*static_args'),
    (dict(rank=4), TypeError, 'rank'),
  ],
  # Not the values: some print their address, which differs between test processes.
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.frugal(1e-2, **bad)
