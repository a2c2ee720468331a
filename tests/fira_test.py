"""Fira against its transcription, its limits, its memory, and its arguments."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import fira as oracle
from samples import gradients, matrix

import lrjax
from lrjax.testing import trajectory

SHAPES = {'tall': (12, 8), 'wide': (8, 12), 'square': (8, 8)}


@pytest.mark.parametrize(
  ('mode', 'per'), [('official', 'channel'), ('paper', 'channel'), ('paper', 'tensor')]
)
def test_equals_the_transcription(mode, per):
  grads = gradients(SHAPES, 12)
  tx = lrjax.scale_by_fira(3, 5, 0.25, mode=mode, per=per)
  out, _ = trajectory(tx, grads[0], grads)
  for name in SHAPES:
    want = oracle.fira(
      [g[name] for g in grads], rank=3, gap=5, scale=0.25, mode=mode, per=per
    )
    np.testing.assert_allclose(np.stack([u[name] for u in out]), want, atol=1e-5)


def test_the_ratio_follows_the_compressed_side():
  # The official code infers it from the low-rank shape, which errs on the long side.
  grads = gradients({'w': (8, 12)}, 4)
  out, _ = trajectory(lrjax.scale_by_fira(3, 5, side='long'), grads[0], grads)
  args = dict(rank=3, gap=5, scale=0.25, mode='official', left=False)
  want = oracle.fira([g['w'] for g in grads], **args)
  np.testing.assert_allclose(np.stack([u['w'] for u in out]), want, atol=1e-5)


def run(rule, grads):
  """The updates of one matrix, P found at the first gradient."""
  s = rule.init(grads[0])
  s, good = rule.refresh(jax.random.key(0), grads[0], s)
  assert good
  out, update = [], jax.jit(rule.update)
  for g in grads:
    u, s = update(g, s)
    out.append(u)
  return np.stack(out)


def test_at_full_rank_and_scale_one_it_is_galore():
  grads = [matrix((6, 8), seed) for seed in range(3)]
  make = lambda residual: lrjax.low_rank(lrjax.svd(6), lrjax.adam(), residual=residual)
  got, want = (
    run(make(lrjax.residuals.fira(1.0)), grads),
    run(make(lrjax.drop()), grads),
  )
  # What is left of G - P P'G is rounding, 1e-7, times a ratio of up to 20.
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_both_forms_have_one_direction_at_scale_one():
  grads = gradients({'w': (8, 12)}, 1)
  # Decays that are exact in binary: of 1 - 0.999 float32 keeps five digits.
  args = dict(scale=1.0, eps=0.0, b1=0.5, b2=0.75)
  make = lambda mode: lrjax.scale_by_fira(3, mode=mode, **args)
  one, other = (trajectory(make(m), grads[0], grads)[0] for m in ('official', 'paper'))
  np.testing.assert_allclose(one[0]['w'], other[0]['w'], atol=1e-5)


def test_the_scale_of_gradients_does_not_matter():
  grads = gradients({'w': (8, 12)}, 4)
  tx = lrjax.scale_by_fira(3, 2, eps=0.0)
  want, _ = trajectory(tx, grads[0], grads)
  out, _ = trajectory(tx, grads[0], [jax.tree.map(lambda x: 64 * x, g) for g in grads])
  for a, b in zip(out, want):
    np.testing.assert_allclose(a['w'], b['w'], atol=1e-5)  # 1e-8 beside norms


def after_a_zero_gradient(floor):
  """Norms of the updates outside the subspace: before a zero gradient, and after it."""
  grads = gradients({'w': (8, 12)}, 6)
  grads[3] = jax.tree.map(jnp.zeros_like, grads[3])
  tx = lrjax.scale_by_fira(3, 10, floor=floor)
  out, state = trajectory(tx, grads[0], grads)
  P = np.asarray(state.slots['w'].state.basis)
  outside = [u['w'] - P @ (P.T @ u['w']) for u in out]
  return [float(np.linalg.norm(x)) for x in outside]


def test_the_limiter_does_not_lock_after_a_zero_gradient():
  n = after_a_zero_gradient(0.0)
  assert n[3] < 1e-6
  assert n[4] > 0.1 * n[2]
  assert after_a_zero_gradient(None)[5] < 1e-6  # the official code's memory


def test_other_leaves_get_adam_with_the_bias_corrected_in_the_same_way():
  params = {'w': matrix((8, 12)), 'bias': jnp.arange(1.0, 4.0)}
  out, _ = trajectory(lrjax.scale_by_fira(3, eps=0.1), params, [params])
  want = np.sqrt(1e-3) / 0.1 * 0.1 * params['bias']
  want = want / (np.sqrt(1e-3) * params['bias'] + 0.1)
  np.testing.assert_allclose(out[0]['bias'], want, rtol=1e-5)


def test_another_optimizer_inside_is_taken_as_it_is():
  grads = gradients({'w': (8, 12)}, 2)
  grads = [g | {'bias': jnp.ones(3)} for g in grads]
  tx = lrjax.scale_by_fira(3, 5, 1.0, optax.identity(), growth_limit=math.inf)
  out, _ = trajectory(tx, grads[0], grads)
  for u, g in zip(out, grads):
    np.testing.assert_allclose(u['w'], g['w'], atol=1e-6)
    np.testing.assert_array_equal(u['bias'], g['bias'])


@pytest.mark.parametrize(('d', 'k', 'r'), [(8, 12, 3), (4096, 11008, 1024)])
def test_state_bytes(d, k, r):
  params = {'kernel': jax.ShapeDtypeStruct((d, k), jnp.float32)}
  row = lrjax.coverage(lrjax.scale_by_fira(r), params).rows[0]
  assert row.state_bytes == 4 * (r * d + 2 * r * k + 1) + 8


def test_hyperparameters_can_be_injected():
  params = {'w': matrix((8, 12)), 'bias': jnp.ones(3)}
  make = optax.inject_hyperparams(lrjax.fira, static_args=('rank', 'update_proj_gap'))
  tx = make(learning_rate=0.1, rank=3, weight_decay=0.1)
  out, state = trajectory(tx, params, [params])
  want, _ = trajectory(lrjax.fira(0.1, rank=3, weight_decay=0.1), params, [params])
  np.testing.assert_allclose(out[0]['w'], want[0]['w'], rtol=1e-5)
  assert {'learning_rate', 'scale', 'growth_limit', 'floor'} <= set(state.hyperparams)


def test_its_first_arguments_are_those_of_galore():
  named = list(inspect.signature(lrjax.scale_by_galore).parameters)[:4]
  assert list(inspect.signature(lrjax.scale_by_fira).parameters)[:4] == named


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(mode='offical'), ValueError, "`mode` 'offical'; did you mean 'official'"),
    (dict(per='row'), ValueError, "`per` 'row'.*channel, tensor"),
    (dict(growth_limit=0.5), ValueError, '`growth_limit` must be at least 1, got 0.5'),
    (dict(scale=-1.0), ValueError, '`scale`.*got -1.0'),
    (dict(b2=1.0), ValueError, '`b2`.*got 1.0'),
    (dict(update_proj_gap=0), ValueError, '`update_proj_gap`.*got 0'),
    (dict(basis='svdd'), ValueError, "did you mean 'svd'"),
    (dict(basis_dtype=jnp.int8), TypeError, '`basis_dtype`'),
    (dict(base_optimizer=optax.adafactor(0.1)), ValueError, 'needs parameters'),
    (dict(alpha=0.25), TypeError, "'alpha'"),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.fira(1e-2, **{'rank': 4, **bad})
