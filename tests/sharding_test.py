"""Where state lives on a mesh, and what a step sends over it."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lrjax
from lrjax.matrices import MatricesState, nodes
from lrjax.testing import collectives

MESH = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
# leaf: shape, its spec, what the basis (stack, d, r) and moments (stack, r, k) get
ROLES = {
  'wide': (
    (8, 12),
    P('fsdp', 'tensor'),
    P('fsdp', None),
    P(None, 'tensor'),
  ),
  'tall': (
    (12, 8),
    P('fsdp', 'tensor'),
    P('tensor', None),
    P(None, 'fsdp'),
  ),
  'short_spec': ((8, 12), P('fsdp'), P('fsdp', None), P(None, None)),
  'whole': ((8, 12), P(), P(None, None), P(None, None)),
  'both': (
    (8, 12),
    P(None, ('fsdp', 'tensor')),
    P(None, None),
    P(None, ('fsdp', 'tensor')),
  ),
  'scan': (
    (2, 8, 12),
    P('fsdp', None, 'tensor'),
    P('fsdp', None, None),
    P('fsdp', None, 'tensor'),
  ),
  'experts': (
    (2, 4, 12, 8),
    P(None, 'tensor', 'fsdp'),
    P(None, 'tensor', None, None),
    P(None, 'tensor', None, 'fsdp'),
  ),
  'heads_out': (
    (8, 4, 5),
    P('fsdp', 'tensor'),
    P('fsdp', None),
    P(None, 'tensor'),
  ),
  'heads_in': (
    (4, 5, 8),
    P('tensor', None, 'fsdp'),
    P('fsdp', None),
    P(None, 'tensor'),
  ),
  'conv': (
    (3, 3, 4, 8),
    P(None, None, 'fsdp', 'tensor'),
    P('tensor', None),
    P(None, None),
  ),
}
VIEWS = [
  ('heads_out', lrjax.View(0, (1, 2))),
  ('heads_in', lrjax.View((0, 1), 2)),
  ('conv', lrjax.View((0, 1, 2), 3)),
]
PARAMS = {n: shape(*s) for n, (s, *_) in ROLES.items()} | {'bias': shape(8)}
SPECS = {n: spec for n, (_, spec, *_) in ROLES.items()} | {'bias': P('tensor')}
galore = functools.partial(lrjax.scale_by_galore, rank=3)
GALORE = lrjax.scale_by_galore(rank=3, weight_dimension_numbers=VIEWS)


def padded(spec, rank):
  return (*spec, *(None,) * (rank - len(spec)))


def check_roles(state):
  for name, (leaf, _, basis, moments) in ROLES.items():
    rank = len(leaf) if name in ('scan', 'experts') else 2
    slot = state.slots[name]
    stack = padded(basis, rank)[:-2]
    assert padded(slot.state.basis, rank) == padded(basis, rank), name
    assert padded(slot.state.inner.mu, rank) == padded(moments, rank), name
    assert padded(slot.state.inner.nu, rank) == padded(moments, rank), name
    assert padded(slot.overdue, rank - 2) == stack, name
    assert padded(slot.state.inner.count, rank - 2) == stack, name
  assert state.rest.mu['bias'] == P('tensor')
  assert state.count == P()


def test_specs_follow_the_side_each_axis_runs_along():
  check_roles(lrjax.state_specs(GALORE, PARAMS, SPECS, MESH))


def test_specs_do_not_depend_on_the_types_of_the_mesh_axes():
  explicit = jax.make_mesh((2, 2), ('fsdp', 'tensor'))
  check_roles(lrjax.state_specs(GALORE, PARAMS, SPECS, explicit))


WRAPPED = {
  'chain': optax.chain(optax.clip_by_global_norm(1.0), GALORE, optax.scale(-0.1)),
  'partition': optax.partition(
    {'a': GALORE, 'b': optax.adam(0.1)}, lambda tree: dict.fromkeys(tree, 'a')
  ),
  'MultiSteps': optax.MultiSteps(GALORE, 2).gradient_transformation(),
  'inject_hyperparams': optax.inject_hyperparams(
    lambda rate: optax.chain(GALORE, optax.scale(rate))
  )(rate=0.1),
  'galore': lrjax.galore(0.1, rank=3, weight_decay=0.1, weight_dimension_numbers=VIEWS),
}


@pytest.mark.parametrize('name', WRAPPED)
def test_specs_through_wrappers(name):
  tx = WRAPPED[name]
  specs = lrjax.state_specs(tx, PARAMS, SPECS, MESH)
  (ours,) = nodes(specs, MatricesState)
  check_roles(ours)
  state = jax.eval_shape(tx.init, PARAMS)
  whole = [(len(x.shape), s) for x, s in zip(*map(jax.tree.leaves, (state, specs)))]
  assert jax.tree.structure(state) == jax.tree.structure(specs)
  assert all(isinstance(s, P) and len(s) <= n for n, s in whole)
  if name == 'MultiSteps':
    # the sums of gradients are as long as the parameters and lie where they lie
    assert all(padded(s, 4) == padded(SPECS[n], 4) for n, s in specs.acc_grads.items())


@pytest.mark.parametrize(
  ('specs', 'message'),
  [
    (
      P('model', None),
      r"leaf 'q/kernel': no mesh axis 'model'.*'fsdp': 2, 'tensor': 2",
    ),
    (P(None, 'fsdp'), r"leaf 'q/kernel' of shape \(8, 9\): dimension 9.*by 2.*'fsdp'"),
    (P(('fsdp', 'tensor'), 'tensor'), 'dimension 9'),
    (P(None, None, 'fsdp'), r"leaf 'q/kernel' of shape \(8, 9\): .*too many axes"),
  ],
)
def test_specs_that_do_not_fit_are_refused(specs, message):
  with pytest.raises(ValueError, match=message):
    lrjax.state_specs(
      GALORE, {'q': {'kernel': shape(8, 9)}}, {'q': {'kernel': specs}}, MESH
    )


def sent(tx, shape, spec):
  """(operation, elements) for what every step sends, and for what refreshes send."""
  params, where = {'w': jax.ShapeDtypeStruct(shape, jnp.float32)}, {'w': spec}
  named = lambda tree: jax.tree.map(lambda s: NamedSharding(MESH, s), tree)
  placed = named(where), named(lrjax.state_specs(tx, params, where, MESH))
  update = jax.jit(tx.update, in_shardings=placed, out_shardings=placed)
  text = update.lower(params, jax.eval_shape(tx.init, params)).compile().as_text()
  assert ' conditional(' in text
  return collectives(text)


def test_a_steady_step_sends_the_projection_once_and_nothing_else():
  tx = lrjax.scale_by_galore(rank=3)
  steady, _ = sent(tx, (16, 24), P('fsdp', 'tensor'))
  assert {op for op, _ in steady} == {'all-reduce'}
  assert [n for _, n in steady if n > 1] == [3 * 24 // 2]
  steady, _ = sent(tx, (16, 24), P(None, 'tensor'))
  assert [n for _, n in steady if n > 1] == []


@pytest.mark.parametrize(
  ('basis', 'stagger'),
  [
    ('subspace_iteration', False),
    ('subspace_iteration', True),
    ('randomized_svd', False),
  ],
)
def test_refreshes_by_products_send_nothing_larger_than_they_keep(basis, stagger):
  spec, rank = P(None, 'fsdp', 'tensor'), 3 if basis == 'subspace_iteration' else 3 + 8
  _, refresh = sent(galore(basis=basis, stagger=stagger), (4, 32, 48), spec)
  assert {op for op, _ in refresh} <= {'all-reduce', 'all-gather'}
  matrices = 1 if stagger else 4
  # Products that end on rows or columns of half a gradient, and r x r matrices; fixing
  # signs gathers the two candidates of each column.
  assert max(n for op, n in refresh) == matrices * 48 // 2 * rank
  gathered = [n for op, n in refresh if op == 'all-gather']
  assert max(gathered) <= max(matrices * 2 * 3, 4)


def test_one_matrix_of_a_split_stack_is_all_that_is_sent():
  spec = P('fsdp', None, 'tensor')
  tx = galore(basis='subspace_iteration', stagger=True)
  _, refresh = sent(tx, (4, 32, 48), spec)
  assert max(n for _, n in refresh) == 32 * 48 // 2


SPLIT_STACK = {
  'eigh': lrjax.scale_by_galore(rank=3),
  'randomized_svd': lrjax.scale_by_galore(rank=3, basis='randomized_svd'),
  'subspace_iteration': lrjax.scale_by_galore(rank=3, basis='subspace_iteration'),
  'fira': lrjax.scale_by_fira(rank=3, guard='matrix'),
}


@pytest.mark.parametrize('name', SPLIT_STACK)
def test_a_split_stack_sends_flags_only_refreshes_included(name):
  steady, refresh = sent(SPLIT_STACK[name], (4, 16, 24), P('fsdp', None, None))
  # Whether all gradients are good, and whether any basis is due.
  assert {op for op, _ in steady + refresh} == {'all-reduce'}
  assert max(n for _, n in steady + refresh) == 1
