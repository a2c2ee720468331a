"""Moments in 8 bits: against bitsandbytes, a transcription, and with every inner."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import eight_bit as oracle
from parity.inputs import read
from samples import gradients, matrix

import lrjax
from lrjax.codecs.dynamic import Dynamic8, block_of, dynamic_map
from lrjax.testing import trajectory

META, RECORDED = read('eight_bit')


@pytest.mark.parametrize('name', ['signed', 'unsigned'])
def test_map_and_codes_are_those_of_bitsandbytes(name):
  signed = name == 'signed'
  np.testing.assert_array_equal(dynamic_map(signed), RECORDED[f'{name}/map'])
  stored = lrjax.dynamic8(signed).encode(RECORDED[f'{name}/x'])
  np.testing.assert_array_equal(stored.scale, RECORDED[f'{name}/scale'])
  # Of a second moment, bitsandbytes makes zeros of what lies below its smallest value.
  flushed = (RECORDED[f'{name}/codes'] == 0) & (not signed)
  assert flushed.any() != signed
  want = np.where(flushed, 1, RECORDED[f'{name}/codes'])
  np.testing.assert_array_equal(stored.codes, want)


def test_small_second_moments_do_not_become_zero():
  nu = jnp.array([1.0, 1e-7, 1e-20, 1e-30, 0.0])
  back = lrjax.dynamic8(signed=False).decode(lrjax.dynamic8(signed=False).encode(nu))
  assert (back[:4] > 0).all()
  assert back[4] == 0


def test_equals_adam_of_bitsandbytes():
  b1, b2 = META['betas']
  tx = lrjax.eight_bit(lrjax.adam(b1, b2, META['eps']), min_size=0)
  p, update = jnp.zeros((8, 64)), jax.jit(tx.update)
  state = tx.init(p)
  for t, g in enumerate(RECORDED['gradients']):
    u, state = update(g.T, state)
    p = p - META['lr'] * u
    np.testing.assert_allclose(p.T, RECORDED['adam/p'][t], atol=1e-6)
    for moment, n in ((state.mu, 1), (state.nu, 2)):
      np.testing.assert_array_equal(moment.codes.T, RECORDED[f'adam/state{n}'][t])
      np.testing.assert_allclose(
        moment.scale, RECORDED[f'adam/absmax{n}'][t], rtol=1e-6
      )


def test_galore_8bit_equals_the_transcription():
  grads = gradients({'w': (12, 40)}, 12)
  tx = lrjax.scale_by_galore_8bit(3, 4, block=32, min_size=0)
  out, _ = trajectory(tx, grads[0], grads)
  want = oracle.galore_8bit(
    [g['w'] for g in grads], rank=3, gap=4, scale=0.25, block=32
  )
  # A moment whose float32 value falls on the other side of a threshold is one code off
  # for a step, which is 1 % of an update of size 0.25; the others agree to 1e-5.
  off = np.abs(np.stack([u['w'] for u in out]) - want)
  assert np.quantile(off, 0.99) < 1e-5
  assert off.max() < 5e-3


INNERS = {
  'adam': lrjax.adam(),
  'optax_adam': optax.scale_by_adam(mu_dtype=jnp.bfloat16),
  'amsgrad': optax.scale_by_amsgrad(),
  'lion': optax.scale_by_lion(),
  'momentum': optax.trace(0.9),
  'rms': optax.scale_by_rms(),
  'factored': lrjax.factored_rms(),
  'chain': optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.scale(2.0)),
}


@pytest.mark.parametrize('name', INNERS)
def test_serves_any_inner(name):
  inner = INNERS[name]
  tx = lrjax.eight_bit(inner, min_size=0)
  # Away from zero, where one code of a second moment may turn a sign or double a step.
  grads = [jnp.sign(g) + g for g in (matrix((8, 48), i) for i in range(4))]
  out, state = trajectory(tx, grads[0], grads)
  want, plain = trajectory(inner, grads[0], grads)
  np.testing.assert_allclose(np.stack(out), np.stack(want), atol=0.1)
  large = [x for x in jax.tree.leaves(state) if x.size >= 48]
  assert large
  assert all(x.dtype == jnp.uint8 for x in large)
  assert sum(x.nbytes for x in large) < sum(x.nbytes for x in jax.tree.leaves(plain))


def test_unknown_moments_are_refused_at_construction():
  def init(params):
    return optax.EmaState(jnp.zeros([], jnp.int32), params)

  inner = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
  with pytest.raises(ValueError, match=r'`ema` of EmaState.*mu'):
    lrjax.eight_bit(inner)
  with pytest.raises(ValueError, match='eight_bit does not know what `ema`'):
    lrjax.scale_by_galore_8bit(4, base_optimizer=inner)
  with pytest.raises(TypeError, match='GradientTransformation, got 3'):
    lrjax.eight_bit(3)
  with pytest.raises(ValueError, match='`block` must be a power of two, got 100'):
    lrjax.eight_bit(lrjax.adam(), block=100)


def test_small_arrays_stay_as_they_are():
  tx = lrjax.eight_bit(lrjax.adam())
  state = tx.init({'bias': jnp.ones(64), 'table': jnp.ones((64, 64))})
  assert state.mu['bias'].dtype == jnp.float32
  assert state.nu['table'].codes.dtype == jnp.uint8


@pytest.mark.parametrize('transport', ['reset', 'rotate', lrjax.projection_aware()])
def test_transports_work_through_it(transport):
  grads = gradients({'w': (8, 12)}, 4)
  args = dict(rank=3, update_proj_gap=2, moments_on_refresh=transport)
  tx = lrjax.scale_by_galore_8bit(**args, min_size=0)
  out, state = trajectory(tx, grads[0], grads)
  want, plain = trajectory(lrjax.scale_by_galore(**args), grads[0], grads)
  inner, inner32 = (s.slots['w'].state.inner for s in (state, plain))
  assert isinstance(inner.mu, Dynamic8)
  np.testing.assert_array_equal(inner.count, inner32.count)
  decode = lrjax.dynamic8().decode
  limit = 0.05 * np.abs(inner32.mu).max()
  np.testing.assert_allclose(decode(inner.mu), inner32.mu, atol=limit)
  # Updates are of size 0.25; those of small second moments are off by a tenth of it.
  np.testing.assert_allclose(out[-1]['w'], want[-1]['w'], atol=0.05)


def test_blocks_are_told_from_shapes():
  for n in (1, 7, 64, 65, 200, 4096):
    for block in (1, 2, 64, 128, 256):
      x = jax.ShapeDtypeStruct((1, n), jnp.float32)
      stored = jax.eval_shape(lrjax.dynamic8(block=block).encode, x)
      found = block_of(stored)
      assert found == block or max(found, block) >= n


@pytest.mark.parametrize(
  ('shape', 'rank', 'want'),
  [
    # int32 overdue and count; basis; two moments of codes and block scales
    ((16, 40), 4, 8 + 4 * 16 * 4 + 2 * (160 + 4)),
    ((4096, 11008), 1024, 8 + 4 * 4096 * 1024 + 2 * (1024 * 11008 + 4 * 44032)),
  ],
)
def test_state_bytes(shape, rank, want):
  tx = lrjax.scale_by_galore_8bit(rank, min_size=0)
  report = lrjax.coverage(tx, {'kernel': jax.ShapeDtypeStruct(shape, jnp.bfloat16)})
  assert report.rows[0].state_bytes == want


def test_stored_moments_are_placed_like_the_moments():
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'))
  params = {
    'kernel': jax.ShapeDtypeStruct((2, 64, 128), jnp.float32),
    'embed': jax.ShapeDtypeStruct((64, 16), jnp.float32),
    'small': {'kernel': jax.ShapeDtypeStruct((8, 16), jnp.float32)},
  }
  specs = {
    'kernel': P(None, 'fsdp', 'tensor'),
    'embed': P('tensor', 'fsdp'),
    'small': {'kernel': P('fsdp', 'tensor')},
  }
  tx = lrjax.scale_by_galore_8bit(4, min_size=512)
  got = lrjax.state_specs(tx, params, specs, mesh)
  inner = got.slots['kernel'].state.inner
  assert inner.mu.codes == inner.nu.codes == P(None, None, 'tensor')
  assert inner.mu.scale == P(None, None)
  # Too small to be stored, but for the sizes that roles are told by.
  assert got.slots['small/kernel'].state.inner.mu == P(None, 'tensor')
  assert got.rest.mu['embed'] == Dynamic8(P('tensor', 'fsdp'), P(None))


def test_a_sharded_step_gathers_scales_alone():
  mesh = jax.make_mesh((4,), ('tensor',), axis_types=(AxisType.Auto,))
  put = lambda spec: NamedSharding(mesh, spec)
  tx = lrjax.eight_bit(lrjax.adam(), min_size=0)
  g = matrix((4, 512))
  state = tx.init(g)
  moment = Dynamic8(put(P(None, 'tensor')), put(P()))
  where = (put(P(None, 'tensor')), type(state)(put(P()), moment, moment))
  step = jax.jit(tx.update, in_shardings=where, out_shardings=where)
  u, _ = step(*jax.device_put((g, state), where))
  np.testing.assert_allclose(u, tx.update(g, state)[0], atol=1e-6)
  text = step.lower(g, state).compile().as_text()
  moved = re.findall(r'\[([\d,]*)\]\S* (?:all-gather|all-to-all|all-reduce)\(', text)
  assert all(math.prod(map(int, x.split(','))) <= 8 for x in moved if x)
