"""CR-Net against its unrolled closed form; recomputation changes memory alone."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import crnet as oracle

import lrjax
from lrjax.models import (
  LLAMA_SIZES,
  Llama,
  LlamaConfig,
  crnet,
  llama_parts,
  next_token_loss,
  param_specs,
)
from lrjax.models.huggingface import to_hf
from lrjax.modules.nnx import kernels, split

CONFIG = LlamaConfig(
  24, 16, 20, num_layers=6, num_heads=4, num_kv_heads=2, cross_layer=True
)
TOKENS = jax.random.randint(jax.random.key(5), (4, 33), 0, 24)
KERNEL = lrjax.factorized(3, 'normal')


@functools.cache
def build(config=CONFIG):
  return split(Llama(config, kernel=KERNEL, rngs=nnx.Rngs(0)))


def loss_of(config):
  graphdef, _, rest = build(config)

  def loss(params):
    logits = nnx.merge(graphdef, params, rest)(TOKENS[:, :-1])
    nats, count = next_token_loss(logits, TOKENS[:, 1:])
    return nats / count

  return loss


@functools.cache
def gradient(config=CONFIG):
  """Compiled once for all tests, as the model is built once."""
  return jax.jit(jax.value_and_grad(loss_of(config))).lower(build(config)[1]).compile()


def spread(params):
  """The same tree with larger numbers, so that no part of the model is negligible."""
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  draw = lambda x, key: x + 0.3 * jax.random.normal(key, x.shape, x.dtype)
  return treedef.unflatten([draw(x, key) for x, key in zip(leaves, keys)])


def with_beta(params, *beta):
  return params | {'cross': {role: jnp.array(beta) for role in crnet.ROLES}}


def largest(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), got, want)
  return max(jax.tree.leaves(apart))


def paths(tree):
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


# The function.


def test_equals_the_unrolled_sum():
  graphdef, params, rest = build()
  run = jax.jit(lambda params: nnx.merge(graphdef, params, rest)(TOKENS))
  # Start, half, both signs, and 0, whose sign counts as positive.
  for beta in ((0.5,) * 5, (1.0, -0.7, 0.3, -0.2, 0.0), (-0.0, 0.4, 1.2, 1.0, -1.0)):
    p = with_beta(spread(params), *beta)
    want = oracle.logits(CONFIG, p, np.asarray(TOKENS))
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(run(p), want, atol=2e-5)  # logits up to 10


def test_without_the_layer_below_it_is_a_low_rank_llama():
  """With beta = 0 only 1e-6 of the layer below is left."""
  graphdef, params, rest = build()
  params = with_beta(spread(params), *[0.0] * 5)
  logits = nnx.merge(graphdef, params, rest)(TOKENS)
  plain = dataclasses.replace(CONFIG, cross_layer=False, scan_layers=False)
  model = Llama(plain, rngs=nnx.Rngs(0))
  layers = {0: params['first']}
  plan = {path: KERNEL for path in kernels(model) if path.startswith('layers/0/')}
  for i in range(5):
    layer = jax.tree.map(operator.itemgetter(i), params['layers'])
    layers[i + 1] = lrjax.export(plan, {'layers': {0: layer}}, {})['layers'][0]
  kept = {name: params[name] for name in ('embed', 'norm', 'lm_head')}
  nnx.update(model, kept | {'layers': layers})
  np.testing.assert_allclose(model(TOKENS), logits, atol=5e-5)  # logits of 10, and 1e-6


def test_gradient_of_beta_equals_finite_differences():
  params = spread(build()[1])
  add = lambda h: (
    params | {'cross': params['cross'] | {'gate': params['cross']['gate'].at[1].add(h)}}
  )
  run = gradient()
  slope = (run(add(0.01))[0] - run(add(-0.01))[0]) / 0.02
  np.testing.assert_allclose(run(params)[1]['cross']['gate'][1], slope, rtol=1e-2)


def test_beta_is_kept_from_zero():
  at = jnp.array([-0.5, 0.0, 2.0])
  np.testing.assert_allclose(crnet.away_from_zero(at) - at, [-1e-6, 1e-6, 1e-6], 0.2)
  assert jax.grad(crnet.away_from_zero)(0.0) == 1


def test_bfloat16_keeps_beta_in_float32():
  half = dataclasses.replace(CONFIG, dtype='bfloat16', param_dtype='bfloat16')
  params = build(half)[1]
  other = {str(x.dtype) for k, x in paths(params).items() if 'cross' not in k}
  assert other == {'bfloat16'}
  assert {str(x.dtype) for x in params['cross'].values()} == {'float32'}
  value = jax.jit(loss_of(half))(params)
  want, _ = gradient()(jax.tree.map(lambda x: x.astype('f4'), params))
  # 8 bits of mantissa, a mean over 128 positions.
  np.testing.assert_allclose(value, want, rtol=2e-3)


# Recomputation.


@pytest.mark.parametrize('remat, segment', [(True, 8), ('low_rank', 2)])
def test_recomputation_changes_memory_and_nothing_else(remat, segment, monkeypatch):
  monkeypatch.setattr(crnet, 'SEGMENT', segment)  # 2: after 1 + 1, two of them
  params = spread(build()[1])
  plain = gradient()
  run = gradient(dataclasses.replace(CONFIG, remat=remat))
  want = plain(params)
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(want))
  assert largest(run(params), want) < 1e-6
  before, after = (f.memory_analysis().temp_size_in_bytes for f in (plain, run))
  assert after < before / 2, (before, after)


def test_going_backward_is_unsafe_in_bfloat16():
  """Why outputs are computed forward again: five divisions by a small beta."""

  def error(beta, dtype):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    terms = [make(64, 32) for _ in range(5)]
    ys = [make(64, 32)]
    for term in terms:
      ys.append(beta * ys[-1] + term)
    y = ys[-1]
    for term in reversed(terms):
      y = (y - term) / beta
    wrong = (y - ys[0]).astype('f4')
    return float(jnp.linalg.norm(wrong) / jnp.linalg.norm(ys[0].astype('f4')))

  assert error(0.9, jnp.float32) < 1e-5
  assert error(0.9, jnp.bfloat16) < 0.03
  assert error(0.3, jnp.bfloat16) > 0.05
  assert error(0.05, jnp.bfloat16) > 100


# The model.


@pytest.mark.parametrize(
  'size, rank, millions',
  [
    ('60m', 96, 42.49),
    ('130m', 192, 87.05),
    ('350m', 256, 192.79),
    ('1b', 448, 582.34),
  ],
)
def test_published_sizes(size, rank, millions):
  c = dataclasses.replace(LLAMA_SIZES[size], cross_layer=True)
  make = lambda: Llama(c, kernel=lrjax.factorized(rank), rngs=nnx.Rngs(0))
  count = sum(x.size for x in jax.tree.leaves(split(nnx.eval_shape(make))[1]))
  D, F, L = c.hidden_size, c.intermediate_size, c.num_layers
  kernels = 4 * D * D + 3 * D * F + (L - 1) * (rank * (11 * D + 3 * F) + 7)
  norms = (2 * L + 1) * D  # not in the totals that are told
  assert count == kernels + norms + 2 * c.vocab_size * D
  assert round((count - norms) / 1e6, 2) == millions


def test_paths_specs_and_plan():
  graphdef, params, rest = build()
  shapes = jax.tree.map(jnp.shape, paths(params))
  assert shapes['first/attn/q/kernel'] == (16, 16)
  assert shapes['layers/attn/q/kernel/a'] == (5, 16, 3)
  assert shapes['cross/down'] == (5,)
  specs = paths(param_specs(params, KERNEL))
  assert specs['first/attn/o/kernel'] == P('tensor', 'fsdp')
  assert specs['layers/attn/o/kernel/a'] == P(None, 'tensor', None)
  assert specs['cross/q'] == P(None)
  plan = kernels(nnx.merge(graphdef, params, rest))
  assert plan['first/mlp/up'] is lrjax.dense()
  assert plan['layers/mlp/up'] is KERNEL
  chosen = {k for k, x in paths(params).items() if lrjax.hidden_kernels(k, x)}
  assert not any('cross' in k for k in chosen) and 'first/attn/q/kernel' in chosen


def test_sharded_equals_unsharded():
  params = spread(build()[1])
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  place = lambda s: NamedSharding(mesh, s)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, jax.tree.map(place, param_specs(params, KERNEL)))
    value = jax.jit(loss_of(CONFIG))(placed)
  np.testing.assert_allclose(value, gradient()(params)[0], atol=1e-5)


def test_adam_learns_a_batch_and_moves_beta():
  params, tx = build()[1], optax.adam(1e-2)
  start, state, losses, update = params, tx.init(params), [], jax.jit(tx.update)
  for _ in range(20):
    value, grads = gradient()(params)
    updates, state = update(grads, state)
    params = optax.apply_updates(params, updates)
    losses.append(float(value))
  assert losses[-1] < losses[0] - 1
  moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, start)['cross']
  assert min(moved.values()) > 0.01


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r'at least two layers, got .* num_layers 1'):
    dataclasses.replace(CONFIG, num_layers=1)
  with pytest.raises(ValueError, match=r'needs scan_layers .* got scan_layers False'):
    dataclasses.replace(CONFIG, scan_layers=False)
  with pytest.raises(ValueError, match='cross_layer must be False, got True'):
    to_hf(CONFIG)
  with pytest.raises(ValueError, match='cross_layer=False'):
    llama_parts(Llama(CONFIG, rngs=nnx.Rngs(0)), lambda logits, batch: (0, None))
