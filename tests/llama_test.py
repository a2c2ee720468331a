"""The decoder against a numpy transcription, and its layouts against each other."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lrjax.models import LLAMA_SIZES, Llama, LlamaConfig, next_token_loss, param_specs
from lrjax.models.attention import causal_attention, rotary, rotate
from lrjax.models.llama_params import stack_layers, unstack_layers
from lrjax.modules.nnx import split
from lrjax.parameterizations import dense
from lrjax.types import Parameterization, Split

CONFIG = LlamaConfig(
  24, 16, 20, num_layers=3, num_heads=4, num_kv_heads=2, max_seq_len=12
)
TOKENS = jax.random.randint(jax.random.key(5), (4, 10), 0, CONFIG.vocab_size)


def low_rank(rank):
  """y = x (W + a b) with W fixed, large enough that every array matters."""

  def init(key, shape, dtype):
    keys = jax.random.split(key, 3)
    draw = lambda i, *shape: jax.random.normal(keys[i], shape, dtype) / 8
    train = {'a': draw(0, shape[0], rank), 'b': draw(1, rank, shape[1])}
    return Split(train, {'base': draw(2, *shape)})

  def apply(split, x):
    return x @ split.fixed['base'] + (x @ split.train['a']) @ split.train['b']

  axes = {'a': ('in', None), 'b': (None, 'out'), 'base': ('in', 'out')}
  return Parameterization(init, None, apply, axes=axes)


LOW_RANK = low_rank(2)
kernels = pytest.mark.parametrize(
  'kernel', [dense(), LOW_RANK], ids=['dense', 'low_rank']
)


def build(config=CONFIG, **kwargs):
  return Llama(config, rngs=nnx.Rngs(0), **kwargs)


def paths(tree):
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def spread(params):
  """The same tree with larger numbers, so that no part of the model is negligible."""
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  draw = lambda x, key: x + 0.3 * jax.random.normal(key, x.shape, x.dtype)
  return treedef.unflatten([draw(x, key) for x, key in zip(leaves, keys)])


def assert_close(a, b, atol=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), a, b)


# The model is what it says.


def numpy_llama(config, params, tokens):
  """Transcription in float64: rotations are complex multiplications."""
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  B, T = tokens.shape
  C, groups = config.head_dim, config.num_heads // config.kv_heads
  turn = np.exp(
    1j * np.outer(np.arange(T), config.rope_theta ** -np.linspace(0, 1, C // 2, False))
  )

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

  def rope(x):
    z = (x[..., : C // 2] + 1j * x[..., C // 2 :]) * turn[None, :, None]
    return np.concatenate([z.real, z.imag], -1)

  x = params['embed']['embedding'][tokens]
  for i in range(config.num_layers):
    layer = params['layers'][i]
    W = {k: v['kernel'] for k, v in {**layer['attn'], **layer['mlp']}.items()}
    h = norm(x, layer['attn_norm']['scale'])
    q, k, v = ((h @ W[n]).reshape(B, T, -1, C) for n in 'qkv')
    q, k = rope(q), rope(k)
    y = np.zeros_like(q)
    for b, t, head in np.ndindex(B, T, config.num_heads):
      s = k[b, : t + 1, head // groups] @ q[b, t, head] / np.sqrt(C)
      p = np.exp(s - s.max())
      y[b, t, head] = p @ v[b, : t + 1, head // groups] / p.sum()
    x = x + y.reshape(B, T, -1) @ W['o']
    h = norm(x, layer['mlp_norm']['scale'])
    gate = h @ W['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (h @ W['up'])) @ W['down']
  return norm(x, params['norm']['scale']) @ params['lm_head']['kernel']


@pytest.mark.parametrize('kv_heads', [None, 2, 1])
def test_equals_the_numpy_transcription(kv_heads):
  config = dataclasses.replace(CONFIG, num_kv_heads=kv_heads, rope_theta=100.0)
  graphdef, params, rest = split(build(config))
  params = spread(params)
  logits = jax.jit(lambda p: nnx.merge(graphdef, p, rest)(TOKENS))(params)
  expected = numpy_llama(config, unstack_layers(params), TOKENS)
  assert logits.dtype == jnp.float32 and np.abs(expected).max() > 1
  np.testing.assert_allclose(logits, expected, atol=2e-5)  # logits up to 10


def test_a_position_sees_only_what_is_before_it():
  model = build()
  other = TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % CONFIG.vocab_size)
  a, b = model(TOKENS), model(other)
  np.testing.assert_array_equal(a[:, :6], b[:, :6])
  assert (jnp.abs(a - b).max((0, 2))[6:] > 0).all()


def test_attention_equals_jax():
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (2, 7, h, 8)) for key, h in zip(keys, (6, 2, 2)))
  expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  np.testing.assert_allclose(causal_attention(q, k, v), expected, atol=1e-6)


def test_rotary_scores_depend_on_distance_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  turn = lambda x: rotate(jnp.tile(x, (1, 9, 1, 1)), rotary(9, 8, 50.0))[0, :, 0]
  scores = turn(q) @ turn(k).T
  for distance in range(-8, 9):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)


def test_tied_embeddings_are_the_head():
  model = build(dataclasses.replace(CONFIG, tie_embeddings=True))
  _, params, _ = split(model)
  assert 'lm_head' not in params
  untied = build()
  nnx.update(untied, params)
  nnx.update(untied, {'lm_head': {'kernel': params['embed']['embedding'].T}})
  assert_close(model(TOKENS), untied(TOKENS))


def test_bfloat16_computes_near_float32_and_returns_it():
  graphdef, params, rest = split(build(dataclasses.replace(CONFIG, dtype='bfloat16')))
  logits = nnx.merge(graphdef, params, rest)(TOKENS)
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  exact = build()(TOKENS)
  # 8 bits of mantissa over 3 layers.
  np.testing.assert_allclose(logits, exact, atol=0.03 * jnp.abs(exact).max())


# Shapes and paths.


def test_paths_with_and_without_scan():
  D, KV, F, V = 16, 8, 20, 24
  layer = {
    'attn/q/kernel': (D, D),
    'attn/k/kernel': (D, KV),
    'attn/v/kernel': (D, KV),
    'attn/o/kernel': (D, D),
    'mlp/gate/kernel': (D, F),
    'mlp/up/kernel': (D, F),
    'mlp/down/kernel': (F, D),
    'attn_norm/scale': (D,),
    'mlp_norm/scale': (D,),
  }
  top = {'embed/embedding': (V, D), 'norm/scale': (D,), 'lm_head/kernel': (D, V)}
  stacked = top | {f'layers/{k}': (3, *s) for k, s in layer.items()}
  unrolled = top | {f'layers/{i}/{k}': s for i in range(3) for k, s in layer.items()}
  for scan, expected in ((True, stacked), (False, unrolled)):
    _, params, rest = split(build(dataclasses.replace(CONFIG, scan_layers=scan)))
    assert jax.tree.map(jnp.shape, paths(params)) == expected
    assert jax.tree.leaves(rest) == []


@pytest.mark.parametrize(
  'name, millions',
  [
    ('60m', 58.07),
    ('130m', 134.11),
    ('350m', 367.97),
    ('1b', 1339.08),
    ('7b', 6738.42),
  ],
)
def test_published_sizes_without_allocation(name, millions):
  D, F, L, V = {
    '60m': (512, 1376, 8, 32000),
    '130m': (768, 2048, 12, 32000),
    '350m': (1024, 2736, 24, 32000),
    '1b': (2048, 5461, 24, 32000),
    '7b': (4096, 11008, 32, 32000),
  }[name]
  model = nnx.eval_shape(lambda: build(LLAMA_SIZES[name]))
  leaves = jax.tree.leaves(split(model)[1])
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  count = sum(x.size for x in leaves)
  assert count == L * (4 * D * D + 3 * D * F + 2 * D) + D + 2 * V * D
  assert round(count / 1e6, 2) == millions


def test_small_sizes():
  count = lambda name: sum(
    x.size
    for x in jax.tree.leaves(split(nnx.eval_shape(lambda: build(LLAMA_SIZES[name])))[1])
  )
  assert count('tiny') == 869_504
  assert LLAMA_SIZES['smoke'].hidden_size == 64


def test_every_layer_kernel_and_no_other_is_parameterized():
  _, params, rest = split(build(kernel=LOW_RANK))
  roles = {'attn/q', 'attn/k', 'attn/v', 'attn/o', 'mlp/gate', 'mlp/up', 'mlp/down'}
  kernels = {p for p in paths(params) if '/kernel' in p}
  factors = {f'layers/{r}/kernel/{leaf}' for r in roles for leaf in 'ab'}
  assert kernels == factors | {'lm_head/kernel'}
  assert set(paths(rest)) == {f'layers/{r}/fixed/base' for r in roles}
  assert paths(params)['layers/mlp/down/kernel/a'].shape == (3, 20, 2)


# Layouts and options give one function.


def loss_of(graphdef, rest):
  def loss(params):
    logits = nnx.merge(graphdef, params, rest)(TOKENS[:, :-1])
    nats, count = next_token_loss(logits, TOKENS[:, 1:])
    return nats / count

  return loss


@kernels
def test_scan_and_remat_change_neither_loss_nor_gradients(kernel):
  def run(scan, remat):
    config = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
    graphdef, params, rest = split(build(config, kernel=kernel))
    stack = lambda tree: tree if scan else stack_layers(tree)
    unstack = lambda tree: tree if scan else unstack_layers(tree)
    loss = jax.jit(jax.value_and_grad(loss_of(graphdef, rest)))
    value, grads = loss(unstack(spread(stack(params))))
    return value, stack(grads)

  expected = run(scan=True, remat=False)
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(expected))
  assert_close(run(scan=True, remat=True), expected)
  assert_close(run(scan=False, remat=True), expected)
  if kernel is not LOW_RANK:
    assert_close(run(scan=False, remat=False), expected)


def test_scan_and_loop_start_from_the_same_numbers():
  stacked = split(build(kernel=LOW_RANK))
  unrolled = split(
    build(dataclasses.replace(CONFIG, scan_layers=False), kernel=LOW_RANK)
  )
  for a, b in zip(stacked[1:], unrolled[1:]):
    jax.tree.map(np.testing.assert_array_equal, a, stack_layers(b))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(a), b)


@kernels
def test_adam_learns_a_batch(kernel):
  config = LLAMA_SIZES['smoke']
  graphdef, params, rest = split(
    build(config, **({'kernel': kernel} if kernel else {}))
  )
  tx = optax.adam(3e-3)
  loss = loss_of(graphdef, rest)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  state, losses = tx.init(params), []
  for _ in range(12):
    params, state, value = step(params, state)
    losses.append(float(value))
  assert losses[-1] < losses[0] - 1
  if kernel is not LOW_RANK:  # N(0, 0.02) starts near the uniform guess
    assert abs(losses[0] - np.log(256)) < 0.1


# The loss.


def test_loss_is_the_masked_sum():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
  targets = jnp.array([[1, 6, -100], [0, 2, 3]])
  mask = jnp.array([[1, 1, 0], [1, 0, 1]])
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  kept = [(0, 0, 1), (0, 1, 6), (1, 0, 0), (1, 2, 3)]
  expected = -sum(np.log(p[i]) for i in kept)
  nats, count = next_token_loss(logits, targets, mask)
  np.testing.assert_allclose(nats, expected, rtol=1e-6)
  assert nats.dtype == jnp.float32 and count.dtype == jnp.int32 and count == 4
  grads = jax.grad(lambda x: next_token_loss(x, targets, mask)[0])(logits)
  assert jnp.isfinite(grads).all() and (grads[0, 2] == 0).all()
  assert next_token_loss(logits.astype(jnp.bfloat16), targets)[0].dtype == jnp.float32


# On a mesh.


def mesh_of(*shape):
  names = ('data', 'fsdp', 'tensor')
  devices = jax.devices()[: int(np.prod(shape))]
  return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def test_specs_of_every_leaf():
  layer = {
    'attn/q/kernel': P('fsdp', 'tensor'),
    'attn/k/kernel': P('fsdp', 'tensor'),
    'attn/v/kernel': P('fsdp', 'tensor'),
    'attn/o/kernel': P('tensor', 'fsdp'),
    'mlp/gate/kernel': P('fsdp', 'tensor'),
    'mlp/up/kernel': P('fsdp', 'tensor'),
    'mlp/down/kernel': P('tensor', 'fsdp'),
    'attn_norm/scale': P(None),
    'mlp_norm/scale': P(None),
  }
  expected = {
    'embed/embedding': P('tensor', 'fsdp'),
    'norm/scale': P(None),
    'lm_head/kernel': P('fsdp', 'tensor'),
  }
  stacked = {f'layers/{k}': P(None, *s) for k, s in layer.items()}
  assert paths(param_specs(split(build())[1])) == expected | stacked
  loop = split(build(dataclasses.replace(CONFIG, scan_layers=False)))[1]
  unrolled = {f'layers/{i}/{k}': s for i in range(3) for k, s in layer.items()}
  assert paths(param_specs(loop)) == expected | unrolled


def test_specs_of_factors_follow_their_axes():
  _, params, rest = split(build(kernel=LOW_RANK))
  specs = paths(param_specs(params, LOW_RANK))
  assert specs['layers/attn/q/kernel/a'] == P(None, 'fsdp', None)
  assert specs['layers/attn/o/kernel/a'] == P(None, 'tensor', None)
  assert specs['layers/attn/o/kernel/b'] == P(None, None, 'fsdp')
  fixed = paths(param_specs(rest, LOW_RANK))
  assert fixed['layers/mlp/down/fixed/base'] == P(None, 'tensor', 'fsdp')
  with pytest.raises(ValueError, match=r'layers/attn/k/kernel/a: .*kernel'):
    param_specs(params)
  with pytest.raises(ValueError, match='layers/conv/kernel is not a parameter'):
    param_specs({'layers': {'conv': {'kernel': jnp.ones((2, 2))}}})


@kernels
def test_sharded_logits_and_gradients_equal_unsharded(kernel):
  graphdef, params, rest = split(build(kernel=kernel))
  params = spread(params)
  loss = jax.jit(jax.value_and_grad(loss_of(graphdef, rest)))
  expected = loss(params)
  mesh = mesh_of(1, 2, 2)
  place = lambda tree: jax.device_put(
    tree,
    jax.tree.map(lambda s: NamedSharding(mesh, s), param_specs(tree, kernel)),
  )
  with jax.set_mesh(mesh):
    placed = place(params)
    assert_close(
      jax.jit(jax.value_and_grad(loss_of(graphdef, place(rest))))(placed), expected
    )


def test_fsdp_divides_the_batch():
  """No device computes a whole batch: what is gathered is weights."""
  graphdef, params, rest = split(nnx.eval_shape(build))
  mesh = mesh_of(1, 4, 1)
  placed = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, s)
    ),
    params,
    param_specs(params),
  )
  with jax.set_mesh(mesh):
    compiled = jax.jit(lambda p: nnx.merge(graphdef, p, rest)(TOKENS)).lower(placed)
    text = compiled.compile().as_text()
  one, whole = (
    f'f32[{b},{TOKENS.shape[1]},{CONFIG.intermediate_size}]' for b in (1, 4)
  )
  assert one in text and whole not in text


# What is refused.


@pytest.mark.parametrize(
  'change, error, message',
  [
    ({'num_heads': 3}, ValueError, 'num_heads must divide hidden_size, got 3'),
    ({'num_heads': 16, 'num_kv_heads': 1}, ValueError, 'must be even.* 16 / 16 = 1'),
    ({'num_kv_heads': 3}, ValueError, 'num_kv_heads must divide num_heads, got 3'),
    ({'num_layers': 0}, ValueError, 'num_layers must be positive and finite, got 0'),
    ({'vocab_size': -1}, ValueError, 'vocab_size must be positive'),
    ({'hidden_size': 16.0}, TypeError, r'hidden_size .* int, got 16.0 \(float\)'),
    ({'num_layers': True}, TypeError, r'num_layers .* int, got True \(bool\)'),
    ({'rope_theta': float('nan')}, ValueError, 'rope_theta'),
    ({'rms_norm_eps': '1e-6'}, TypeError, r"rms_norm_eps .* float, got '1e-6' \(str\)"),
    ({'remat': 1}, TypeError, 'remat must be of type bool'),
    ({'dtype': 'float8'}, ValueError, 'dtype must be one of float32, bfloat16'),
  ],
)
def test_config_says_what_is_wrong(change, error, message):
  with pytest.raises(error, match=message):
    dataclasses.replace(CONFIG, **change)


def test_config_goes_through_json():
  text = json.dumps(dataclasses.asdict(CONFIG))
  assert LlamaConfig(**json.loads(text)) == CONFIG


@pytest.mark.parametrize(
  'tokens, error, message',
  [
    (jnp.ones((2, 3)), TypeError, 'tokens must be integers, got dtype float32'),
    (jnp.ones((3,), jnp.int32), ValueError, r'\(batch, positions\), got shape \(3,\)'),
    (jnp.ones((2, 13), jnp.int32), ValueError, 'got 13 positions, .* is 12'),
  ],
)
def test_bad_tokens(tokens, error, message):
  with pytest.raises(error, match=message):
    build()(tokens)


def test_an_unknown_token_shows_as_nan_in_its_sequence():
  logits = build()(TOKENS.at[1, 4].set(CONFIG.vocab_size))
  assert jnp.isnan(logits[1]).any() and jnp.isfinite(logits[0]).all()
