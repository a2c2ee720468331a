"""Reports of what an optimizer does, against the formula of its cost."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import matrix

import lrjax

shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
PARAMS = {
  'embed': {'embedding': shape(32, 16)},
  'layers': {
    'q': {'kernel': shape(3, 16, 16)},
    'up': {'kernel': shape(3, 16, 40)},
    'down': {'kernel': shape(3, 40, 16)},
    'norm': {'scale': shape(3, 16)},
  },
  'small': {'kernel': shape(4, 16)},
}
R = 4


def expected(stack, a, b, basis=4, mu=4, nu=4):
  """Bytes of a leaf: r a of basis and 2 r b of moments for each matrix, two counters."""
  return stack * (R * min(a, b) * basis + R * max(a, b) * (mu + nu) + 2 * 4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_bytes_are_those_of_the_formula(dtype):
  params = jax.tree.map(lambda x: shape(*x.shape, dtype=dtype), PARAMS)
  report = lrjax.coverage(lrjax.scale_by_galore(rank=R), params)
  rows = {r.path: r for r in report.rows}
  assert list(rows) == [
    'embed/embedding',
    'layers/down/kernel',
    'layers/norm/scale',
    'layers/q/kernel',
    'layers/up/kernel',
    'small/kernel',
  ]
  sizes = {'q': (3, 16, 16), 'up': (3, 16, 40), 'down': (3, 40, 16)}
  sides = {'q': 'in', 'up': 'in', 'down': 'out'}
  for name, (stack, a, b) in sizes.items():
    row = rows[f'layers/{name}/kernel']
    assert (row.side, row.rank, row.stack, row.note) == (sides[name], R, 3, '')
    assert row.state_bytes == expected(stack, a, b)
  plain = [r for r in report.rows if r.note]
  assert {r.path: r.note for r in plain} == {
    'embed/embedding': 'not chosen',
    'layers/norm/scale': 'not chosen',
    'small/kernel': 'not larger than rank 4',
  }
  moments = 2 * 4 * sum(int(np.prod(r.shape)) for r in plain)
  three = 3 * 4 + 1  # count, skipped, the plain optimizer's count, a flag
  total = sum(expected(*s) for s in sizes.values()) + moments + three
  assert report.state_bytes == total
  size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
  assert report.param_bytes == size * jnp.dtype(dtype).itemsize
  assert report.adam_bytes == 2 * report.param_bytes


def test_stored_dtypes_count():
  half = jnp.bfloat16
  params = {'w': shape(16, 40, dtype=half)}
  bytes_of = lambda **kw: (
    lrjax.coverage(lrjax.scale_by_galore(rank=R, **kw), params).rows[0].state_bytes
  )
  assert bytes_of(basis_dtype=half) == expected(1, 16, 40, basis=2)
  mu = bytes_of(base_optimizer=lrjax.adam(mu_dtype=half))
  assert mu == expected(1, 16, 40, mu=2)
  all_half = lrjax.adam(mu_dtype=half, nu_dtype=half)
  both = bytes_of(base_optimizer=all_half, basis_dtype=half)
  assert both == expected(1, 16, 40, 2, 2, 2)
  coded = bytes_of(basis=lambda r: lrjax.stored_as(lrjax.svd(r), lrjax.int8()))
  assert coded == expected(1, 16, 40, basis=1) + 4 * R  # a scale for each column


def test_a_report_equals_the_state_it_speaks_of_every_time():
  params = jax.tree.map(lambda x: jnp.ones(x.shape), PARAMS)
  tx = lrjax.galore(1e-2, rank=R)
  first = lrjax.coverage(tx, params)
  state = tx.init(params)
  assert first.state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
  slots = state[0].slots['layers/q/kernel']
  q = next(r for r in first.rows if r.path == 'layers/q/kernel')
  assert q.state_bytes == sum(x.nbytes for x in jax.tree.leaves(slots))
  assert lrjax.coverage(tx, params) == first
  assert lrjax.coverage(tx, PARAMS) == first


def wrapped(name):
  tx = lrjax.scale_by_galore(rank=R)
  labels = lambda tree: {n: 'other' if n == 'embed' else 'ours' for n in tree}
  return {
    'chain': optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(-1.0)),
    'partition': optax.partition({'ours': tx, 'other': optax.sgd(0.1)}, labels),
    'masked': optax.masked(tx, lambda tree: {n: n != 'embed' for n in tree}),
    'MultiSteps': optax.MultiSteps(tx, 2).gradient_transformation(),
    'inject': optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(
      rate=0.1
    ),
  }[name]


@pytest.mark.parametrize(
  'name', ['chain', 'partition', 'masked', 'MultiSteps', 'inject']
)
def test_reports_see_through_wrappers(name):
  rows = {r.path: r for r in lrjax.coverage(wrapped(name), PARAMS).rows}
  assert rows['layers/up/kernel'].state_bytes == expected(3, 16, 40)
  seen = name in ('partition', 'masked')
  assert rows['embed/embedding'].note == ('not seen by lrjax' if seen else 'not chosen')


def test_the_table_reads_well():
  lines = str(lrjax.coverage(lrjax.galore(1e-2, rank=R), PARAMS)).splitlines()
  assert lines[0].split('  ')[0] == 'leaf'
  assert len({line.index('(') for line in lines[1:-1]}) == 1, 'columns do not stand'
  q = next(line for line in lines if line.startswith('layers/q/kernel'))
  assert q.split() == ['layers/q/kernel', '(3,', '16,', '16)', 'in', '4', '3', '2328']
  assert lines[-1].startswith('parameters ')
  assert lines[-1].endswith(' % of Adam (41,856)')
  assert all(line == line.rstrip() for line in lines)


def test_seven_billion_parameters_cost_no_memory():
  half = jnp.bfloat16
  layers = {
    **{n: {'kernel': shape(32, 4096, 4096, dtype=half)} for n in 'qkvo'},
    **{n: {'kernel': shape(32, 4096, 11008, dtype=half)} for n in ('gate', 'up')},
    'down': {'kernel': shape(32, 11008, 4096, dtype=half)},
  }
  ends = {
    'embed': {'embedding': shape(32000, 4096, dtype=half)},
    'lm_head': {'kernel': shape(4096, 32000, dtype=half)},
    'norm': {'scale': shape(65, 4096, dtype=half)},
  }
  inner = lrjax.adam(mu_dtype=half, nu_dtype=half)
  live = len(jax.live_arrays())
  for basis in ('svd', 'subspace_iteration'):
    tx = lrjax.galore(
      0.005, rank=1024, base_optimizer=inner, basis=basis, basis_dtype=half
    )
    start = time.perf_counter()
    report = lrjax.coverage(tx, {'layers': layers, **ends})
    assert time.perf_counter() - start < 5
    assert round(report.state_bytes / 1e9, 3) == 9.405
    assert round(report.adam_bytes / 1e9, 2) == 26.95
  assert len(jax.live_arrays()) <= live + 8, 'arrays were allocated'


def test_health_reads_any_state():
  params = {'w': matrix((6, 8)), 'k': matrix((2, 6, 8))}
  bad = params | {'k': params['k'].at[0, 0, 0].set(jnp.inf)}
  zero = params | {'k': params['k'].at[1].set(0)}
  tx = optax.chain(lrjax.galore(0.1, rank=2, update_proj_gap=2), optax.scale(2.0))
  update, state = jax.jit(tx.update), tx.init(params)
  seen = []
  for g in (bad, zero, bad, params):
    _, state = update(g, state, params)
    seen.append({k: int(v) for k, v in jax.jit(lrjax.health)(state).items()})
  assert [s['skipped_steps'] for s in seen] == [1, 1, 2, 2]
  assert [s['overdue_refreshes'] for s in seen] == [0, 1, 1, 0]
  nothing = lrjax.health(optax.adam(0.1).init(params))
  assert {k: int(v) for k, v in nothing.items()} == dict(
    skipped_steps=0, overdue_refreshes=0
  )
