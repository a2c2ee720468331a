"""Every optimizer on meshes of eight devices: where its state lies and what it sends."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_test import METHODS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import matrix

import lrjax
from lrjax.testing import collectives, trajectory

MESHES = {
  '1 x 8': ((1, 8), ('fsdp', 'tensor')),
  '8 x 1': ((8, 1), ('fsdp', 'tensor')),
  '4 x 2': ((4, 2), ('fsdp', 'tensor')),
  '2 x 2 x 2': ((2, 2, 2), ('data', 'fsdp', 'tensor')),
}
# d = 24 lies along `fsdp` and k = 32 along `tensor`, whatever way a matrix is turned.
D, K = 24, 32
# Long enough for blocks of 8-bit moments that no device shares with another.
V = 2048
SHAPES = {
  'q/kernel': (D, K),
  'stack/kernel': (2, K, D),
  'embedding': (V, D),
  'scale': (D,),
}
SPECS = {
  'q/kernel': P('fsdp', 'tensor'),
  'stack/kernel': P(None, 'tensor', 'fsdp'),
  'embedding': P('tensor', 'fsdp'),
  'scale': P('fsdp'),
}
SIDES = {D: 'fsdp', K: 'tensor', V: 'tensor'}
PARAMS = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}


def mesh_of(name):
  sizes, axes = MESHES[name]
  return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize('name', METHODS)
def test_state_is_split_along_sides_and_never_along_ranks(name):
  tx = METHODS[name]
  state = jax.eval_shape(tx.init, PARAMS)
  for mesh in map(mesh_of, MESHES):
    specs = lrjax.state_specs(tx, PARAMS, SPECS, mesh)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    seen = set()
    for (path, x), spec in zip(
      jax.tree.leaves_with_path(state), jax.tree.leaves(specs)
    ):
      # A rank, a stack, the blocks of 8-bit moments: all have other sizes.
      for size, axis in zip(x.shape, (*spec, *[None] * (x.ndim - len(spec)))):
        leaf = jax.tree_util.keystr(path)
        assert axis == SIDES.get(size), f'{leaf} {x.shape}: {spec}'
        seen.add(axis)
    assert {'fsdp', 'tensor'} <= seen


def drawn():
  """Parameters, and gradients of four steps."""
  params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), PARAMS)
  draw = lambda x, t: matrix(x.shape, t) if x.ndim > 1 else jnp.ones(D)
  return params, [{n: draw(x, t) for n, x in params.items()} for t in range(4)]


@functools.cache
def on_one_device(name):
  """The updates of these gradients on one device."""
  return trajectory(METHODS[name], *drawn())[0]


def compiled(tx, mesh, shapes=PARAMS, specs=SPECS):
  """The update for this placement, and the placement."""
  named = lambda specs: jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
  specs = named(specs), named(lrjax.state_specs(tx, shapes, specs, mesh))
  update = jax.jit(tx.update, in_shardings=(*specs, specs[0]), out_shardings=specs)
  state = jax.eval_shape(tx.init, shapes)
  return update.lower(shapes, state, shapes).compile(), specs


# The most numbers that one collective may result in, for the stack of two and rank 4.
FLAGS = 2
BASIS = 2 * 4 * D
# What steps between refreshes send besides P^T G.
ALSO = {
  # At this size a block of 8-bit moments, a group of a basis in codes, has parts on
  # several devices.
  'galore_8bit': 2 * 4 * K,
  'q_galore': max(2 * 4 * K, BASIS),
  # B B^T P, and all rows of it for a QR.
  'ldadam': BASIS,
  # B P, and the gradient by P: both (d, r) and summed over k.
  'dion': BASIS,
  'online_subspace_descent': BASIS,
  # R R^T (r, r) of the orthogonalization.
  'trion': 2 * 4 * 4,
  'dion2': 2 * 4 * 4,
  # Adafactor's sums of squares over k.
  'flora': 2 * D,
}
# These choose a basis at every step: of all d rows of Q^T G, by the sizes of d slices.
CHOICES = {'dct_adamw': D * K, 'trion': D * K, 'dion2': 0}
RANKS = {'apollo_mini': 1, 'frugal': 6, 'frugal_svd': 6}
# A layer at a time; the base of `frugal_blocks` is Adam.
LAYERS = {'owlore': 1, 'frugal_blocks': 0}


def allowed(name, mesh):
  """The most numbers that a collective of a step between refreshes may result in."""
  summed = RANKS.get(name, 4) * K // mesh.shape['tensor'] * LAYERS.get(name, 2)
  return max(FLAGS, ALSO.get(name, 0), summed if mesh.shape['fsdp'] > 1 else 0)


def allowed_to_choose(name, mesh):
  """The same for the choice of a basis."""
  scores = 2 * CHOICES[name] // mesh.shape['tensor']
  return max(2 * D, scores if mesh.shape['fsdp'] > 1 else 0)


# What runs on these meshes too, and in a larger tree.
RUN = ['fira', 'galore_8bit', 'ldadam']


@pytest.mark.parametrize('mesh', ['1 x 8', '8 x 1', '4 x 2'])
@pytest.mark.parametrize('name', RUN)
def test_eight_devices_are_one_device_and_no_gradient_travels(name, mesh):
  mesh = mesh_of(mesh)
  step, (where, state_where) = compiled(METHODS[name], mesh)
  (params, grads), want = drawn(), on_one_device(name)
  params, state = jax.device_put(
    (params, METHODS[name].init(params)), (where, state_where)
  )
  # One program for all steps: it refuses a state that is placed otherwise.
  for g, w in zip(grads, want):
    u, state = step(jax.device_put(g, where), state, params)
    for leaf, x in u.items():
      # Adam divides small numbers by small ones: sums in another order show.
      np.testing.assert_allclose(x, w[leaf], atol=1e-4, rtol=1e-4, err_msg=leaf)
  steady, _ = collectives(step.as_text())
  assert max(n for _, n in steady) <= allowed(name, mesh)


@pytest.mark.parametrize('mesh', ['1 x 8', '8 x 1', '4 x 2'])
@pytest.mark.parametrize('name', sorted({*METHODS} - {*RUN}))
def test_no_step_sends_more_than_its_method_needs(name, mesh):
  mesh, stack = mesh_of(mesh), lambda tree: {'stack/kernel': tree['stack/kernel']}
  step, _ = compiled(METHODS[name], mesh, stack(PARAMS), stack(SPECS))
  steady, rare = collectives(step.as_text())
  assert max((n for _, n in steady), default=0) <= allowed(name, mesh)
  if name in CHOICES:
    assert max(n for _, n in rare) <= allowed_to_choose(name, mesh)


def with_and_without_division(tx, mesh, specs=SPECS):
  """(updates, numbers of inner state on a device, what a steady step sends), twice."""
  kernels = lambda tree: {n: tree[n] for n in ('q/kernel', 'stack/kernel')}
  shapes, specs = kernels(PARAMS), kernels(specs)
  params, grads = drawn()
  params, grads = kernels(params), [kernels(g) for g in grads]

  def run(tx):
    step, (where, placed) = compiled(tx, mesh, shapes, specs)
    weights, state = jax.device_put((params, tx.init(params)), (where, placed))
    updates = []
    for g in grads:
      u, state = step(jax.device_put(g, where), state, weights)
      updates.append(jax.device_get(u))
    inner = [s.state.inner.mu for s in state.slots.values()]
    moments = [x for x in jax.tree.leaves(inner) if K in x.shape]
    kept = sum(x.addressable_shards[0].data.size for x in moments)
    return updates, kept, collectives(step.as_text())[0]

  return run(tx), run(lrjax.divided(tx, shapes, specs, mesh))


# Bases found by products alone, so that little is compiled.
FAST = dict(update_proj_gap=3, basis='subspace_iteration')
DIVIDED = {
  'galore': lrjax.scale_by_galore(4, **FAST),
  'fira': lrjax.scale_by_fira(4, **FAST),
  'frugal': METHODS['frugal'],
  'apollo': METHODS['apollo'],
}
# What is mapped over a stack must leave a split of it as it is.
SPLIT_STACK = SPECS | {'stack/kernel': P('data', 'tensor', 'fsdp')}


@pytest.mark.parametrize(
  ('name', 'mesh', 'specs'),
  [
    ('galore', '8 x 1', SPECS),
    ('galore', '2 x 2 x 2', SPLIT_STACK),
    *((name, '4 x 2', SPECS) for name in DIVIDED),
  ],
)
def test_divided_moments_have_the_same_bits_in_less_memory(name, mesh, specs):
  mesh = mesh_of(mesh)
  (want, whole, plain), (got, part, sent) = with_and_without_division(
    DIVIDED[name], mesh, specs
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert part * mesh.shape['fsdp'] == whole
  # Each sum P'G is followed by a gather of the same size, and that is all there is more.
  sums = sorted(n for op, n in sent if op == 'all-reduce' and n > 2)
  assert sums == sorted(n for op, n in plain if op == 'all-reduce' and n > 2)
  assert sums == sorted(n for op, n in sent if op == 'all-gather')


def test_moments_in_8_bits_are_divided_between_their_blocks():
  tx = lrjax.scale_by_galore_8bit(4, 3, basis=FAST['basis'], block=16, min_size=0)
  mesh = mesh_of('4 x 2')
  (want, whole, plain), (got, part, sent) = with_and_without_division(tx, mesh)
  # The compiler fuses the arithmetic around codes in another way.
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)
  jax.tree.map(close, got, want)
  assert part * mesh.shape['fsdp'] == whole
  more = Counter(sent) - Counter(plain)
  assert sorted(more) == [('all-gather', 4 * K // 2), ('all-gather', 2 * 4 * K // 2)]


def test_moments_stay_whole_where_columns_or_blocks_do_not_divide():
  mesh = mesh_of('4 x 2')
  specs = {'kernel': P('fsdp', 'tensor')}
  for tx, k in (
    (lrjax.scale_by_galore(4), 36),
    (lrjax.scale_by_fira(4), 36),
    (lrjax.scale_by_galore_8bit(4, min_size=0, block=32), 32),
    (lrjax.scale_by_ldadam(4), 32),
  ):
    params = {'kernel': jax.ShapeDtypeStruct((24, k), jnp.float32)}
    tx = lrjax.divided(tx, params, specs, mesh)
    moments = lrjax.state_specs(tx, params, specs, mesh).slots['kernel'].state.inner
    assert getattr(moments.mu, 'codes', moments.mu) == P(None, 'tensor')


def test_moments_are_not_divided_over_explicit_axes():
  mesh = jax.make_mesh((1,), ('fsdp',), axis_types=(AxisType.Explicit,))
  with pytest.raises(ValueError, match='type Auto'):
    lrjax.divided(lrjax.scale_by_galore(4), {}, {}, mesh)
