"""Trees of parameterized kernels: events, their moments, export, conversion, faults."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrjax
from lrjax import resets
from lrjax.types import Event, Parameterization, Split
from lrjax.weights import Weights

KEY = jax.random.key(0)


def stirred(touched, moments=None, everything=False):
  """A dense kernel with an event that changes nothing but moments."""
  weights = lambda key, split, k: (split, touched)
  event = Event('stir', weights, lambda k: k == 3, moments, everything)
  kernel = lrjax.dense()
  return Parameterization(
    kernel.init,
    kernel.from_dense,
    kernel.apply,
    kernel.materialize,
    kernel.axes,
    (event,),
  )


def trained(tx, shape=(2, 4, 6)):
  """Weights with moments that are not zero."""
  params = {'q': {'kernel': jnp.ones(shape)}, 'norm': jnp.ones(3)}
  _, state = tx.update(params, tx.init(params), params)
  return Weights(params, {}, state)


def test_events_are_due_by_the_count_of_updates():
  plan = {
    'q': lrjax.factorized(2, restart_every=5),
    'k': stirred({}),
    'v': lrjax.dense(),
  }
  due = [sorted(lrjax.due_events(plan, k)) for k in (0, 3, 5, 10, 11)]
  assert due == [[], ['stir'], ['restart'], ['restart'], []]
  assert lrjax.step_events(plan) == frozenset()
  assert lrjax.step_events({'q': lrjax.maestro()}) == {'sample'}


def test_a_row_mask_resets_those_rows_of_the_moments_alone():
  rows = jnp.array([[True], [False], [False], [True]])
  tx = optax.adam(0.1)
  before = trained(tx)
  new, report = lrjax.run_events({'q': stirred({'': rows})}, {'stir'}, before, 3, tx=tx)
  for moment in (new.opt_state[0].mu, new.opt_state[0].nu):
    np.testing.assert_array_equal(
      (moment['q']['kernel'] == 0).all(-1), [[True, False, False, True]] * 2
    )
    assert (moment['norm'] != 0).all()
  assert report['stir'] == (2 * 2 * 2 * 6, 2 * 2 * 2 * 6)
  assert new.opt_state[0].count == 1


def test_everything_starts_anew_but_schedules():
  tx = optax.adam(optax.linear_schedule(1.0, 0.0, 10))
  new, _ = lrjax.run_events(
    {'q': stirred({}, everything=True)}, {'stir'}, trained(tx), 3, tx=tx
  )
  chex.assert_trees_all_equal(new.opt_state[0], tx.init(new.params)[0])
  assert new.opt_state[1].count == 1


def test_moments_may_be_changed_otherwise():
  change = lambda key, x, start: x / 2
  tx = optax.trace(0.9)
  new, report = lrjax.run_events(
    {'q': stirred({'': True}, change)}, {'stir'}, trained(tx), 3, tx=tx
  )
  assert (new.opt_state.trace['q']['kernel'] == 0.5).all()
  assert report['stir'].zeros == 0


@pytest.mark.parametrize(
  'tx',
  [
    lrjax.galore(0.1, 2, 3),
    lrjax.galore_8bit(0.1, 2, 3, min_size=0),
    optax.chain(
      optax.clip(1.0), optax.masked(optax.adam(0.1), {'q': True, 'norm': False})
    ),
    lrjax.fira(0.1, 2, 3),
  ],
  ids=['galore', 'galore_8bit', 'masked', 'fira'],
)
def test_whole_leaves_are_reset_whatever_form_their_moments_have(tx):
  before = trained(tx)
  new, report = lrjax.run_events({'q': stirred({'': True})}, {'stir'}, before, 3, tx=tx)
  start = {
    jax.tree_util.keystr(p): x
    for p, x in jax.tree.leaves_with_path(tx.init(before.params))
  }
  changed = 0
  for path, x in jax.tree.leaves_with_path(new.opt_state):
    name = jax.tree_util.keystr(path)
    if 'q' in name.replace('[', '/') and ('mu' in name or 'nu' in name):
      np.testing.assert_array_equal(x, start[name])
      changed += x.size
  assert changed == report['stir'].entries > 0


def test_rows_of_projected_moments_cannot_be_told():
  tx = lrjax.galore(0.1, 2, 3)
  plan = {'q': stirred({'': jnp.ones((4, 1), bool)})}
  with pytest.raises(ValueError, match=r'q/kernel.*does not project'):
    lrjax.run_events(plan, {'stir'}, trained(tx), 3, tx=tx)


def test_an_event_that_no_kernel_has_is_refused():
  weights = trained(optax.sgd(0.1))
  with pytest.raises(
    ValueError, match=r"no kernel has an event \['merge'\]; events: stir"
  ):
    lrjax.run_events({'q': stirred({})}, {'merge'}, weights, 3)
  with pytest.raises(ValueError, match='events: none'):
    lrjax.run_events({'q': lrjax.dense()}, {'merge'}, weights, 3)


def test_moments_need_their_optimizer():
  with pytest.raises(ValueError, match='`tx` is needed'):
    lrjax.run_events({'q': stirred({'': True})}, {'stir'}, trained(optax.adam(1.0)), 3)


def test_what_the_plan_does_not_fit_is_named():
  params = {'q': {'kernel': {'a': jnp.ones((4, 2)), 'c': jnp.ones((2, 4))}}}
  with pytest.raises(ValueError, match="q: the plan says nothing of 'c'"):
    lrjax.export({'q': lrjax.factorized(2)}, params, {})
  params = {'q': {'kernel': {'a': jnp.ones((3, 4, 2)), 'b': jnp.ones((2, 4))}}}
  with pytest.raises(ValueError, match='q: its arrays do not fit the plan'):
    lrjax.export({'q': lrjax.factorized(2)}, params, {})


def test_a_kernel_without_a_matrix_says_what_to_do():
  kernel = lrjax.cola(2)
  params = {'q': {'kernel': kernel.init(KEY, (4, 4), jnp.float32).train}}
  with pytest.raises(
    ValueError, match=r'q: its kernel is not linear.*keep its factors'
  ):
    lrjax.export({'q': kernel}, params, {})


def test_convert_needs_a_dense_kernel():
  params = {'q': {'kernel': {'a': jnp.ones((4, 2))}}}
  with pytest.raises(KeyError, match='q: there is no dense kernel'):
    lrjax.convert({'q': lrjax.factorized(2)}, params, KEY)


def test_convert_and_export_keep_the_rest_and_take_layers_of_a_list():
  params = {'layers': {0: {'kernel': jnp.eye(4)}, 1: {'kernel': jnp.eye(4)}}, 'x': 1}
  plan = {'layers/1': lrjax.sltrain(4, density=0.5)}
  new, fixed, errors = lrjax.convert(plan, params, KEY)
  assert new['layers'][0] is params['layers'][0] and new['x'] == 1
  assert fixed['layers'][1]['fixed']['index'].dtype == jnp.int32
  assert errors['layers/1'] < 1e-6
  back = lrjax.export(plan, new, fixed)
  np.testing.assert_allclose(back['layers'][1]['kernel'], jnp.eye(4), atol=1e-6)


def test_draws_depend_on_seed_path_and_count_alone():
  kernel = lrjax.relora(2, 2)
  one = kernel.init(KEY, (8, 8), jnp.float32)
  fixed = {p: {'fixed': dict(one.fixed)} for p in 'qk'}
  params = {p: {'kernel': one.train} for p in 'qk'}
  run = lambda plan, k, seed: (
    lrjax.run_events(plan, {'merge'}, Weights(params, fixed), k, seed=seed)[0].params
  )
  plan = dict.fromkeys('qk', kernel)
  first = run(plan, 3, 0)
  chex.assert_trees_all_equal(first['q'], run({'q': kernel}, 3, 0)['q'])
  a = lambda tree, path: tree[path]['kernel']['a']
  for other in (a(first, 'k'), a(run(plan, 4, 0), 'q'), a(run(plan, 3, 1), 'q')):
    assert (a(first, 'q') != other).any()


def test_a_report_adds_up():
  one = resets.Touched(jnp.float32(3), jnp.float32(2))
  assert resets.total([one, one]) == (6, 4) and resets.total([]) == (0, 0)


def test_a_bare_split_is_found_by_path():
  params = {'q': {'kernel': jnp.ones(2)}}
  assert lrjax.weights.split_at('q', params, {}) == Split(params['q']['kernel'], {})
  with pytest.raises(KeyError):
    lrjax.weights.split_at('k', params, {})
