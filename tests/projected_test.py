"""Gradients projected in the backward pass: the numbers, the memory, what is sent."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lrjax
from lrjax.models.llama import Llama, next_token_loss
from lrjax.models.llama_config import LlamaConfig
from lrjax.modules.linen import reads_probes
from lrjax.modules.nnx import split
from lrjax.testing.hlo import collectives
from lrjax.types import Projected
from lrjax.views import leaf_path

TOKENS = jax.random.randint(jax.random.key(0), (4, 9), 0, 32)
make = functools.partial(lrjax.galore, 1e-2, rank=3, update_proj_gap=3)
METHODS = {
  'galore': make(),
  'subspace_iteration': make(basis='subspace_iteration'),
  'random_orthogonal': make(basis=lrjax.random_orthogonal),
  'columns': make(basis=lrjax.columns),
  'galore_8bit': lrjax.galore_8bit(1e-2, rank=3, update_proj_gap=3),
  'q_galore': lrjax.q_galore(1e-2, rank=3, update_proj_gap=3),
  'chain': optax.chain(optax.clip_by_global_norm(1e9), make()),
}
FULL = {
  'fira': lrjax.fira(1e-2, 3),
  'frugal': lrjax.frugal(1e-2, 0.25),
  'apollo': lrjax.apollo(1e-2, 3),
  'ldadam': lrjax.ldadam(1e-2, 3),
  'dct_adamw': lrjax.dct_adamw(1e-2, 3),
  'dion': lrjax.dion(1e-2, 3),
}
WEIGHTS = {
  'up': {'kernel': 0.3 * jax.random.normal(jax.random.key(1), (2, 8, 12))},
  'down': {'kernel': 0.3 * jax.random.normal(jax.random.key(2), (2, 12, 8))},
  'norm': {'scale': jnp.ones(8)},
}


def tower(params, x):
  """Two residual layers, scanned: a kernel that is wider than long, one the reverse."""
  kernels = params['up']['kernel'], params['down']['kernel']
  layer = lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None)
  return jnp.square(
    jax.lax.scan(layer, x * params['norm']['scale'][None], kernels)[0]
  ).sum()


def is_projected(x):
  return isinstance(x, Projected)


@functools.cache
def model(**changes):
  """The model's parameters and its loss."""
  config = LlamaConfig(32, 16, 24, num_layers=2, num_heads=2, **changes)
  graphdef, params, rest = split(Llama(config, rngs=nnx.Rngs(0)))

  def loss(params, tokens):
    logits = nnx.merge(graphdef, params, rest)(tokens[:, :-1])
    nats, count = next_token_loss(logits, tokens[:, 1:])
    return nats / count

  return params, loss


def low_of(full, projected, bases):
  """What projecting full gradients by hand gives, beside what the backward pass gave."""
  full = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(full)}
  for path, x in jax.tree.leaves_with_path(projected, is_leaf=is_projected):
    if is_projected(x):
      p, g = bases[leaf_path(path)], full[jax.tree_util.keystr(path)]
      g = g if x.side == 'in' else jnp.swapaxes(g, -1, -2)
      yield x.low, jnp.swapaxes(p, -1, -2) @ g


def bases_of(tx, params, state):
  """Path -> P, as the optimizer tells it."""
  return {k: p for k, (p, _) in lrjax.projected.bases_of(tx, params, state).items()}


@pytest.mark.parametrize('name', METHODS)
def test_it_is_the_projection_of_the_full_gradient(name):
  tx, params = METHODS[name], WEIGHTS
  full = jax.jit(lambda p, s, x: jax.value_and_grad(tower)(p, x))
  steady = jax.jit(lrjax.projected_value_and_grad(tower, tx))
  update = jax.jit(tx.update)
  state = tx.init(params)
  for t in range(5):
    x = jax.random.normal(jax.random.key(t), (5, 8))
    wants = bool(lrjax.wants_gradient(state))
    assert wants == (t % 3 == 0)
    value, g = full(params, state, x)
    same_value, low = steady(params, state, x)
    assert same_value == value
    pairs = [*low_of(g, low, bases_of(tx, params, state))]
    assert len(pairs) == 2 == len(lrjax.projectable(tx, params))
    for a, b in pairs:
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
    updates, new = update(g, state, params)
    if not wants:  # the whole step agrees, but for the last bits of codes
      other, _ = update(low, state, params)
      close = functools.partial(np.testing.assert_allclose, atol=1e-5)
      jax.tree.map(close, other, updates)
    params, state = optax.apply_updates(params, updates), new


def test_a_llama_trains_the_same():
  params, loss = model()
  tx = make()
  full = jax.jit(lambda p, s, x: jax.value_and_grad(loss)(p, x))
  steady = jax.jit(lrjax.projected_value_and_grad(loss, tx))
  update = jax.jit(tx.update)
  assert len(lrjax.projectable(tx, params)) == 7

  def train(choose):
    p, s = params, tx.init(params)
    for t in range(5):
      tokens = jax.random.randint(jax.random.key(t), (4, 9), 0, 32)
      _, g = choose(s)(p, s, tokens)
      u, s = update(g, s, p)
      p = optax.apply_updates(p, u)
    return p

  projected = train(lambda s: full if lrjax.wants_gradient(s) else steady)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(close, projected, train(lambda s: full))


@pytest.mark.parametrize('name', FULL)
def test_methods_that_read_the_whole_gradient_get_it(name):
  tx = FULL[name]
  assert lrjax.projectable(tx, WEIGHTS) == ()
  run = lambda p, x: lrjax.projected_value_and_grad(tower, tx)(p, tx.init(p), x)[1]
  grads = jax.eval_shape(run, WEIGHTS, jnp.ones((5, 8)))
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, WEIGHTS)


def test_a_refresh_waits_for_a_full_gradient():
  params = {'kernel': jnp.ones((6, 8))}
  tx = lrjax.galore(1e-2, rank=2, update_proj_gap=2)
  update = jax.jit(tx.update)
  low = {'kernel': Projected(jnp.ones((2, 8)), (6, 8), jnp.float32, 'in')}
  full = {'kernel': jnp.diag(jnp.arange(1.0, 7.0)) @ jnp.ones((6, 8))}
  _, s = update(full, tx.init(params), params)
  first = s[0].slots['kernel'].state.basis
  for _ in range(3):  # due at the second of these
    _, s = update(low, s, params)
  np.testing.assert_array_equal(s[0].slots['kernel'].state.basis, first)
  assert bool(lrjax.wants_gradient(s))
  assert lrjax.health(s)['overdue_refreshes'] == 1
  _, s = update({'kernel': full['kernel'][::-1]}, s, params)
  assert not bool(lrjax.wants_gradient(s)), 'made up for'
  assert not np.allclose(s[0].slots['kernel'].state.basis, first)


def test_a_bad_projected_gradient_changes_nothing():
  params = {'kernel': jnp.ones((6, 8)), 'bias': jnp.ones(8)}
  tx = lrjax.galore(1e-2, rank=2)
  update = jax.jit(tx.update)
  _, s = update(params, tx.init(params), params)
  low = Projected(jnp.full((2, 8), jnp.nan), (6, 8), jnp.float32, 'in')
  u, after = update({'kernel': low, 'bias': params['bias']}, s, params)
  assert all(not x.any() for x in jax.tree.leaves(u))
  assert after[0].skipped == 1
  before = s[0]._replace(skipped=after[0].skipped)
  jax.tree.map(np.testing.assert_array_equal, before, after[0])


def test_bfloat16_and_what_is_kept_for_the_backward_pass():
  params, loss = model(dtype='bfloat16', param_dtype='bfloat16')
  tx = METHODS['galore']
  state = tx.init(params)
  run = lambda keep: jax.jit(lrjax.projected_value_and_grad(loss, tx, keep=keep))
  _, a = run('input')(params, state, TOKENS)
  _, b = run('projection')(params, state, TOKENS)
  full = jax.jit(jax.grad(loss))(params, TOKENS)
  bases = bases_of(tx, params, state)
  for low, want in (*low_of(full, a, bases), *low_of(full, b, bases)):
    assert low.dtype == jnp.float32
    scale = float(jnp.abs(want).max())
    # bfloat16 has 8 bits; both ways round activations and gradients on their way.
    np.testing.assert_allclose(low, want, atol=0.03 * scale)


def test_the_gradient_is_not_formed():
  """Temporaries fall by the gradients' bytes, less those of the projections."""
  config = LlamaConfig(32, 128, 384, num_layers=4, num_heads=2)
  graphdef, params, rest = split(
    nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
  )
  loss = lambda p, x: nnx.merge(graphdef, p, rest)(x).astype(jnp.float32).sum()
  tx = lrjax.galore(1e-2, rank=8)

  def temporaries(value_and_grad):
    def step(params, state, tokens):
      _, g = value_and_grad(params, state, tokens)
      updates, state = tx.update(g, state, params)
      return optax.apply_updates(params, updates), state

    args = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((1, 8), int)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  full = temporaries(lambda p, s, x: jax.value_and_grad(loss)(p, x))
  steady = temporaries(lrjax.projected_value_and_grad(loss, tx))
  chosen = lrjax.projectable(tx, params)
  leaves = jax.tree.leaves_with_path(params)
  shapes = [x.shape for path, x in leaves if leaf_path(path) in chosen]
  formed = 4 * sum(math.prod(s) for s in shapes)
  low = 4 * sum(math.prod(s) * 8 // min(s[-2:]) for s in shapes)
  assert full - steady >= 0.95 * (formed - low)


def test_projections_are_what_data_parallel_devices_send():
  """All-reduces of kernels' gradients are smaller by the factor d / r, in the HLO."""
  params = {'a': jnp.ones((64, 128)), 'b': jnp.ones((128, 64))}
  loss = lambda p, x: jnp.square(jnp.tanh(x @ p['a']) @ p['b']).sum()
  tx = lrjax.galore(1e-2, rank=8)
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  state = jax.eval_shape(tx.init, params)

  def sent(f):
    step = jax.jit(f, in_shardings=(whole, whole, rows), out_shardings=whole)
    text = step.lower(params, state, jnp.ones((16, 64))).compile().as_text()
    sent, _ = collectives(text)
    return sum(n for kind, n in sent if kind == 'all-reduce')

  full = sent(lambda p, s, x: jax.value_and_grad(loss)(p, x))
  steady = sent(lrjax.projected_value_and_grad(loss, tx))
  assert full - 1 == 2 * 64 * 128
  assert steady - 1 == 2 * 8 * 128


def test_divided_projections_come_as_each_devices_own_columns():
  shapes = {'a': (2, 64, 128), 'b': (2, 128, 64)}
  specs = {'a': P(None, 'fsdp'), 'b': P(None, None, 'fsdp')}
  params = {n: jax.random.normal(jax.random.key(3), s) / 8 for n, s in shapes.items()}
  x = jax.random.normal(jax.random.key(4), (16, 64))
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  named = lambda specs: jax.tree.map(lambda s: NamedSharding(mesh, s), specs)

  def loss(params, x):
    layer = lambda x, p: (x + jnp.tanh(x @ p['a']) @ p['b'], None)
    return jnp.square(jax.lax.scan(layer, x, params)[0]).sum()

  plain = lrjax.galore(1e-2, rank=8)
  tx = lrjax.divided(plain, params, specs, mesh)
  _, state = plain.update(jax.grad(loss)(params, x), plain.init(params), params)

  def step(tx):
    def run(params, state, x):
      _, grads = lrjax.projected_value_and_grad(loss, tx)(params, state, x)
      return grads, tx.update(grads, state, params)[0]

    return run

  want = jax.jit(step(plain))(params, state, x)
  where = named((specs, lrjax.state_specs(tx, params, specs, mesh), P('fsdp')))
  grads, updates = jax.jit(step(tx))(*jax.device_put((params, state, x), where))
  assert all(g.low.sharding.spec == P(None, None, 'fsdp') for g in grads.values())
  # Sums in another order, of entries up to 180.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, (grads, updates), want)


class Foreign(nn.Module):
  """A linen model with scanned and rematerialized layers."""

  @nn.compact
  def __call__(self, x):
    class Block(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return x + nn.Dense(8)(nn.tanh(nn.Dense(12, dtype=x.dtype)(x))), None

    stack = nn.scan(
      nn.remat(Block),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=3,
    )
    return nn.Dense(5, name='out')(stack()(x, None)[0])


def test_dense_layers_of_a_linen_model():
  x = jax.random.normal(jax.random.key(1), (6, 8))
  params = Foreign().init(jax.random.key(0), x)['params']

  def loss(params, x):
    with reads_probes():
      return jnp.square(Foreign().apply({'params': params}, x)).sum()

  tx = lrjax.galore(1e-2, rank=3, update_proj_gap=10)
  _, state = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
  value, grads = jax.jit(lrjax.projected_value_and_grad(loss, tx))(params, state, x)
  full_value, full = jax.jit(jax.value_and_grad(loss))(params, x)
  pairs = [*low_of(full, grads, bases_of(tx, params, state))]
  assert len(pairs) == 3
  for low, want in pairs:
    np.testing.assert_allclose(low, want, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(value, full_value, rtol=1e-6)


def test_sums_over_micro_batches_stay_projected():
  params, tx = WEIGHTS, make()
  x = jax.random.normal(jax.random.key(3), (6, 8))
  run = jax.jit(lrjax.projected_value_and_grad(tower, tx))
  state = tx.init(params)
  parts = [run(params, state, half)[1] for half in (x[:3], x[3:])]
  total, whole = jax.tree.map(jnp.add, *parts), run(params, state, x)[1]
  assert total['up']['kernel'].low.shape == (2, 3, 12)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), total, whole)


def test_errors():
  with pytest.raises(
    ValueError, match=r"unknown `keep` 'inputs'; did you mean 'input'"
  ):
    lrjax.projected_value_and_grad(tower, METHODS['galore'], keep='inputs')
  params = {'kernel': jnp.ones((6, 8))}
  low = {'kernel': Projected(jnp.ones((2, 8)), (6, 8), jnp.float32, 'in')}
  fira = lrjax.fira(1e-2, rank=2)
  with pytest.raises(
    TypeError, match="leaf 'kernel': this method needs the gradient in"
  ):
    fira.update(low, fira.init(params), params)
  galore = lrjax.galore(1e-2, rank=2)
  wrong = {'kernel': Projected(jnp.ones((2, 6)), (6, 8), jnp.float32, 'out')}
  with pytest.raises(
    ValueError, match=r"'kernel': a projected gradient of shape \(2, 6\)"
  ):
    galore.update(wrong, galore.init(params), params)
  transposed = lambda p: (p['kernel'].T @ jnp.ones(6)).sum()
  with pytest.raises(AttributeError, match="'Probed' object has no attribute 'T'"):
    lrjax.projected_value_and_grad(transposed, galore)(params, galore.init(params))
