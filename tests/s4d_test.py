"""S4D: convolution, scan and steps agree; starts; limits; its place in a model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lrjax
from lrjax.models import Llama, LlamaConfig, next_token_loss, param_specs
from lrjax.models.huggingface import to_hf
from lrjax.modules.nnx import kernels, split
from lrjax.modules.s4d import S4D, LinenS4D

H, N, L = 3, 8, 21
BOTH = pytest.mark.parametrize('discretization', ['zoh', 'bilinear'])


def draw(init='lin', dtype='float32', state=N):
  """Parameters, inputs and a first state, no part of which is negligible."""
  params = lrjax.s4d_init(jax.random.key(0), H, state, init, (0.02, 0.5), dtype)
  u = jax.random.normal(jax.random.key(1), (2, L, H), dtype)
  x = jax.random.normal(jax.random.key(2), (2, H, state // 2, 2), dtype)
  return params, u, x


def numpy_recurrence(params, u, x, discretization):
  """Transcription in float64, one position after the other."""
  p = {n: np.asarray(a, np.float64) for n, a in params.items()}
  A = -np.exp(p['log_a_real']) + 1j * p['a_imag']
  B, C = p['b_real'] + 1j * p['b_imag'], p['c_real'] + 1j * p['c_imag']
  dt = np.exp(p['log_dt'])[:, None]
  if discretization == 'zoh':
    dA = np.exp(dt * A)
    dB = B * (dA - 1) / A
  else:
    dA = (1 + dt * A / 2) / (1 - dt * A / 2)
    dB = B * dt / (1 - dt * A / 2)
  x, u = np.asarray(x[..., 0] + 1j * x[..., 1], complex), np.asarray(u, np.float64)
  y = np.empty_like(u)
  for t in range(u.shape[1]):
    x = dA * x + dB * u[:, t, :, None]
    y[:, t] = 2 * (C * x).sum(-1).real + p['skip'] * u[:, t]
  return np.stack([x.real, x.imag], -1), y


@BOTH
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_convolution_scan_and_steps_are_the_recurrence(discretization, dtype):
  with jax.enable_x64(dtype == 'float64'):
    params, u, x = draw('legs', dtype)
    want_x, want = numpy_recurrence(params, u, x, discretization)
    atol = 1e-12 if dtype == 'float64' else 1e-4  # the sheet's, for y up to 20

    @jax.jit
    def forms(params, u, x):
      step = lambda x, u: lrjax.s4d_step(params, x, u, discretization)
      stepped, y = jax.lax.scan(step, x, jnp.moveaxis(u, 1, 0))
      scanned = lrjax.s4d_scan(params, u, x, discretization, chunk=8)
      y_conv = lrjax.s4d_convolve(params, u, x, discretization)
      return scanned, (stepped, jnp.moveaxis(y, 0, 1)), y_conv

    scanned, stepped, convolved = forms(params, u, x)
    for got_x, got in (scanned, stepped):
      np.testing.assert_allclose(got_x, want_x, atol=atol)
      np.testing.assert_allclose(got, want, atol=atol)
    np.testing.assert_allclose(convolved, want, atol=atol)


def test_gradients_of_convolution_and_scan_agree():
  params, u, _ = draw()
  conv = lambda p, u: jnp.sum(jnp.sin(lrjax.s4d_convolve(p, u)))
  scan = lambda p, u: jnp.sum(jnp.sin(lrjax.s4d_scan(p, u, chunk=8)[1]))
  grads = jax.jit(lambda p, u: [jax.grad(f, (0, 1))(p, u) for f in (conv, scan)])
  one, two = grads(params, u)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
  jax.tree.map(close, one, two)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(one))


def test_streaming_is_one_long_sequence():
  params, u, _ = draw()
  scan = jax.jit(lrjax.s4d_scan)
  x, first = scan(params, u[:, :8])
  x, second = scan(params, u[:, 8:], x)
  want_x, want = scan(params, u)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), want, atol=1e-5)
  np.testing.assert_allclose(x, want_x, atol=1e-5)


@pytest.mark.parametrize(
  'init, imag',
  [
    ('legs', [19.857, 5.354, 1.958, 0.427]),
    ('inv', [17.825, 4.244, 1.528, 0.364]),
    ('lin', [0, 3.142, 6.283, 9.425]),
    ('real', [0, 0, 0, 0]),
  ],
)
def test_starts(init, imag):
  params = lrjax.s4d_init(jax.random.key(0), 200, 8, init)
  np.testing.assert_allclose(params['a_imag'][7], imag, atol=1e-3)
  real = [1, 2, 3, 4] if init == 'real' else [0.5] * 4
  np.testing.assert_allclose(np.exp(params['log_a_real'][7]), real, rtol=1e-6)
  assert sum(x.size for x in params.values()) == 200 * (3 * 8 + 2)
  dt = np.exp(params['log_dt'])
  assert 0.001 <= dt.min() < 0.002 and 0.05 < dt.max() <= 0.1


def test_largest_frequencies_of_64_states():
  top = lambda init: lrjax.s4d_init(jax.random.key(0), 1, 64, init)['a_imag'][0, 0]
  np.testing.assert_allclose(top('legs'), 1303.27, atol=0.01)
  np.testing.assert_allclose(top('inv'), 1283.43, atol=0.01)


@BOTH
def test_stays_stable_whatever_an_update_does(discretization):
  params, _, _ = draw()
  keys = iter(jax.random.split(jax.random.key(3), len(params)))
  moved = {n: a + 4 * jax.random.normal(next(keys), a.shape) for n, a in params.items()}
  kernel = jax.jit(lambda p: lrjax.s4d_kernel(p, 3000, discretization))
  K = np.abs(kernel(moved))
  assert np.isfinite(K).all() and (K[-10:].max(0) <= K.max(0)).all()


def test_without_c_only_the_skip_is_left():
  params, u, _ = draw()
  params |= {n: jnp.zeros_like(params[n]) for n in ('c_real', 'c_imag')}
  want = u * params['skip'][None, None]
  np.testing.assert_allclose(jax.jit(lrjax.s4d_convolve)(params, u), want, atol=1e-6)


@BOTH
def test_small_steps(discretization):
  params, _, _ = draw('legs')
  params['log_dt'] = jnp.full(H, -14.0)
  CB = jax.lax.complex(params['c_real'], params['c_imag'])
  CB = CB * jax.lax.complex(params['b_real'], params['b_imag'])
  want = math.exp(-14) * 2 * CB.sum(-1).real
  K = jax.jit(lambda p: lrjax.s4d_kernel(p, 1, discretization)[0])(params)
  np.testing.assert_allclose(K, want, rtol=1e-4)


def test_one_real_state_is_a_moving_average():
  """A = -1/2, B = 1, real c: K_l = 4 c (1 - e^(-dt/2)) e^(-l dt/2)."""
  params, _, _ = draw('lin', state=2)
  dt, c = np.exp(params['log_dt']), np.asarray(params['c_real'][:, 0])
  params['c_imag'] = jnp.zeros((H, 1))
  l = np.arange(30)[:, None]
  want = 4 * c * (1 - np.exp(-dt / 2)) * np.exp(-l * dt / 2)
  np.testing.assert_allclose(lrjax.s4d_kernel(params, 30), want, rtol=1e-5)


def test_vanishing_a_is_no_division_by_zero():
  params, _, _ = draw()
  params |= {'log_a_real': jnp.full((H, N // 2), -200.0)}
  params |= {'a_imag': jnp.zeros((H, N // 2))}
  value, grads = jax.jit(
    jax.value_and_grad(lambda p: jnp.sum(lrjax.s4d_kernel(p, 5)[4]))
  )(params)
  want = 2 * jnp.sum(jnp.exp(params['log_dt']) * params['c_real'].sum(-1))
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_bilinear_step_of_two_time_constants():
  """dt A = -2 makes dA zero: one input is held for one position."""
  params, _, _ = draw('real', state=2)
  params['log_dt'] = jnp.full(H, math.log(2.0))
  params['log_a_real'] = jnp.zeros((H, 1))
  K = jax.jit(lambda p: lrjax.s4d_kernel(p, 4, 'bilinear'))(params)
  np.testing.assert_allclose(K[0], 2 * params['c_real'][:, 0], rtol=1e-5)
  np.testing.assert_allclose(K[1:], 0, atol=1e-5)


def test_no_array_of_all_states_and_positions():
  """Of H N/2 L complex numbers, forward and backward."""
  params = lrjax.s4d_init(jax.random.key(0), 4, 64)
  u = jax.ShapeDtypeStruct((4096, 4), 'float32')
  conv = lambda p, u: lrjax.s4d_convolve(p, u).sum()
  scan = lambda p, u: lrjax.s4d_scan(p, u)[1].sum()
  for f in (conv, scan):
    memory = jax.jit(jax.grad(f)).lower(params, u).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 4 * 32 * 4096 / 2


def test_bfloat16_is_computed_in_float32():
  params, u, _ = draw()
  half = lambda tree: jax.tree.map(lambda a: a.astype('bfloat16'), tree)
  single = lambda tree: jax.tree.map(lambda a: a.astype('float32'), tree)
  run = jax.jit(lrjax.s4d_convolve)
  got = run(half(params), half(u))
  want = run(single(half(params)), single(half(u)))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want.astype('bfloat16'))


@pytest.mark.parametrize(
  'args, error, message',
  [
    (dict(features=0), ValueError, 'at least 1'),
    (dict(state=7), ValueError, 'must be even'),
    (dict(init='hippo'), ValueError, 'unknown `init`'),
    (dict(dt_range=(0.0, 0.1)), ValueError, '0 < low <= high'),
  ],
)
def test_bad_arguments(args, error, message):
  with pytest.raises(error, match=message):
    lrjax.s4d_init(jax.random.key(0), **{'features': 2, **args})


def test_unknown_discretization():
  with pytest.raises(ValueError, match="unknown `discretization` 'euler'"):
    lrjax.s4d_kernel(draw()[0], 4, 'euler')


# In modules and models.


def test_flax_layers_are_one_function():
  kernel = lrjax.factorized(2)
  layer = S4D(H, state=N, init='inv', kernel=kernel, rngs=nnx.Rngs(0))
  _, params, _ = split(layer)
  u = draw()[1]
  linen = LinenS4D(state=N, init_a='inv', kernel=kernel)
  y = nnx.jit(lambda layer: layer(u))(layer)
  got = jax.jit(linen.apply)({'params': params}, u)
  np.testing.assert_allclose(got, y, atol=1e-6)
  drawn = jax.eval_shape(linen.init, jax.random.key(0), u)['params']
  assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
  step = jax.jit(lambda x, u: layer.step(x, u))
  x, stepped = jnp.zeros((2, H, N // 2, 2)), []
  for t in range(5):
    x, out = step(x, u[:, t])
    stepped.append(out)
  np.testing.assert_allclose(jnp.stack(stepped, 1), y[:, :5], atol=1e-5)


CONFIG = LlamaConfig(17, 8, 12, 2, 2, max_seq_len=32, mixer='s4d')


def llama(config=CONFIG, **kwargs):
  return Llama(config, rngs=nnx.Rngs(0), **kwargs)


def test_llama_whose_mixer_is_s4d_learns_and_sees_no_future():
  graphdef, params, rest = split(llama(kernel=lrjax.factorized(4)))
  tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 17)
  logits = jax.jit(lambda p, tokens: nnx.merge(graphdef, p, rest)(tokens))
  changed = tokens.at[:, 8:].set(0)
  before, after = logits(params, tokens), logits(params, changed)
  np.testing.assert_allclose(before[:, :8], after[:, :8], atol=1e-5)
  assert np.abs(before - after)[:, 8:].max() > 1e-3
  labels = lrjax.s4d_labels(params)
  rates = {'ssm': optax.adam(1e-3), 'regular': optax.adamw(1e-2, weight_decay=0.1)}
  tx = optax.multi_transform(rates, labels)

  @jax.jit
  def step(params, state):
    def loss(params):
      nats, count = next_token_loss(logits(params, tokens[:, :-1]), tokens[:, 1:])
      return nats / count

    value, grads = jax.value_and_grad(loss)(params)
    u, state = tx.update(grads, state, params)
    return optax.apply_updates(params, u), state, value

  state, losses, start = tx.init(params), [], params
  for _ in range(20):
    params, state, value = step(params, state)
    losses.append(float(value))
  assert losses[-1] < 0.9 * losses[0]
  ssm = lambda tree: tree['layers']['attn']['ssm']
  assert all((ssm(params)[n] != ssm(start)[n]).any() for n in ssm(start))


def test_llama_scans_s4d_layers_like_a_loop():
  tokens = jnp.arange(10)[None] % 17
  loop = llama(dataclasses.replace(CONFIG, scan_layers=False))
  run = nnx.jit(lambda model: model(tokens))
  np.testing.assert_allclose(run(loop), run(llama()), atol=1e-5)


def test_arrays_of_s4d_are_placed_and_not_projected():
  model = nnx.eval_shape(lambda: llama())
  _, params, _ = split(model)
  assert 'layers/attn/glu' in kernels(model)
  specs = param_specs(params)['layers']['attn']
  assert specs['ssm']['log_dt'] == P(None, 'tensor')
  assert specs['ssm']['a_imag'] == P(None, 'tensor', None)
  assert specs['glu']['kernel'] == P(None, 'tensor', 'fsdp')
  for name, leaf in params['layers']['attn']['ssm'].items():
    assert not lrjax.hidden_kernels(f'layers/attn/ssm/{name}', leaf), name


def test_sharded_llama_with_s4d_is_the_same():
  graphdef, params, rest = split(llama(dataclasses.replace(CONFIG, vocab_size=16)))
  tokens = jax.random.randint(jax.random.key(1), (4, 10), 0, 16)

  def f(params, tokens):
    loss = lambda p: jnp.sum(nnx.merge(graphdef, p, rest)(tokens) ** 2)
    return jax.value_and_grad(loss)(params)

  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    spread = jax.tree.map(place, params, param_specs(params))
    got = jax.device_get(jax.jit(f)(spread, place(tokens, P('fsdp'))))
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  jax.tree.map(close, got, jax.device_get(jax.jit(f)(params, tokens)))


def test_config_of_the_mixer():
  with pytest.raises(ValueError, match='mixer must be one of attention, s4d'):
    dataclasses.replace(CONFIG, mixer='mamba')
  with pytest.raises(ValueError, match="mixer must be 'attention', got 's4d'"):
    to_hf(CONFIG)
