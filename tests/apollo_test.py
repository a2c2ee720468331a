"""APOLLO against its transcription, its sketches, its memory, and its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import apollo as oracle
from samples import gradients, matrix

import lrjax
from lrjax.residuals.scaled import ratio
from lrjax.testing import trajectory

SHAPES = {'tall': (12, 8), 'wide': (8, 12), 'square': (8, 8)}


def sketches_of(tx, grads, rank):
  """leaf -> the sketches (d, r) after each step, and the updates."""
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  found, out = {name: [] for name in grads[0]}, []
  for g in grads:
    u, state = update(g, state)
    out.append(u)
    for name, slot in state.slots.items():
      d = min(g[name].shape)
      found[name].append(lrjax.gaussian(rank).matrix(slot.state.basis, d))
  return found, out


@pytest.mark.parametrize('mini', [False, True], ids=['channel', 'tensor'])
def test_equals_the_transcription(mini):
  grads = gradients(SHAPES, 12)
  if mini:
    tx, rank, args = lrjax.scale_by_apollo_mini(5), 1, dict(scale=128.0, per='tensor')
  else:
    tx, rank, args = lrjax.scale_by_apollo(3, 5), 3, dict(scale=1.0, per='channel')
  found, out = sketches_of(tx, grads, rank)
  for name, (rows, columns) in SHAPES.items():
    left = rows <= columns
    canonical = [g[name] if left else g[name].T for g in grads]
    want = oracle.apollo(canonical, found[name][::5], gap=5, **args)
    want = want if left else want.transpose(0, 2, 1)
    # Of size 1, for Mini 10.
    got = np.stack([u[name] for u in out])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_mini_is_rank_one_with_one_ratio():
  grads = gradients({'w': (8, 12)}, 3)
  want = lrjax.scale_by_apollo(1, 2, 128.0, scale_type='tensor', scale_front=True)
  want, _ = trajectory(want, grads[0], grads)
  mini = lrjax.scale_by_apollo_mini(2, scale_front=True)
  out, _ = trajectory(mini, grads[0], grads)
  jax.tree.map(np.testing.assert_array_equal, out, want)


def test_the_first_update_in_closed_form():
  # Adam's first direction is the sign of R: a norm of sqrt(r) in each channel.
  g = {'w': matrix((8, 12))}
  found, (u,) = sketches_of(lrjax.scale_by_apollo(3, eps=0.0), [g], 3)
  low = found['w'][0].T @ g['w']
  want = g['w'] * jnp.sqrt(3.0) / jnp.linalg.norm(low, axis=0, keepdims=True)
  np.testing.assert_allclose(u['w'], want, rtol=1e-5)


def test_square_matrices_have_a_ratio_for_each_output_channel():
  g = {'w': matrix((8, 8), decay=1.0)}
  out, _ = trajectory(lrjax.scale_by_apollo(3), g, [g])
  quotient = np.asarray(out[0]['w'] / g['w'])
  np.testing.assert_allclose(quotient, quotient[:1] + 0 * quotient, rtol=1e-5)
  assert quotient[0].std() > 0.01


def test_every_matrix_has_a_sketch_of_its_own_at_every_refresh():
  # Two names with one checksum (crc32), and a stack, whose official form is refused.
  shapes = {'plumless': (8, 12), 'buckeroo': (8, 12), 'stack': (2, 8, 12)}
  grads = gradients(shapes, 4)
  tx = lrjax.scale_by_apollo(3, 2)
  keys = sketch_keys(tx, grads)
  before, after = keys[1], keys[2]
  assert len(before) == 4 and len(before | after) == 8
  assert keys[0] == keys[1] and keys[2] == keys[3]
  # Not an index among the parameters, as in the official code: another leaf moves none.
  fewer = [{k: v for k, v in g.items() if k != 'buckeroo'} for g in grads[:1]]
  assert sketch_keys(tx, fewer)[0] < before


def sketch_keys(tx, grads):
  """The set of keys (one for each matrix) after each step."""
  state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
  for g in grads:
    _, state = update(g, state)
    data = [np.asarray(s.state.basis).reshape(-1, 2) for s in state.slots.values()]
    out.append({tuple(row) for row in np.concatenate(data).tolist()})
  return out


def test_a_restored_run_draws_the_same_sketches():
  grads = gradients({'w': (8, 12)}, 4)
  tx = lrjax.scale_by_apollo(3, 2)
  want, _ = trajectory(tx, grads[0], grads)
  _, state = trajectory(tx, grads[0], grads[:1])
  state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
  out, _ = trajectory(tx, grads[0], grads[1:], state)
  jax.tree.map(np.testing.assert_array_equal, out, want[1:])


def test_a_stored_sketch_is_the_one_that_is_drawn():
  grads = gradients({'w': (8, 12)}, 3)
  want, _ = trajectory(lrjax.scale_by_apollo(3, 2), grads[0], grads)
  stored = lrjax.scale_by_apollo(3, 2, basis=lambda r: lrjax.gaussian(r, stored=True))
  out, state = trajectory(stored, grads[0], grads)
  for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert state.slots['w'].state.basis.shape == (8, 3)


def test_sketches_keep_norms_on_average():
  g, b, draws = matrix((8, 4)), lrjax.gaussian(4), 10_000
  keys = jax.random.split(jax.random.key(0), draws)
  low = jax.vmap(lambda key: b.down(b.fit(key, g, None), g))(keys)
  square = jnp.sum(jnp.square(low), axis=1)  # (draws, k)
  want = jnp.sum(jnp.square(g), axis=0)
  np.testing.assert_allclose(square.mean(0), want, rtol=0.03)
  # A chi-square of r = 4 degrees of freedom: its deviation is sqrt(2 / r) of the mean.
  np.testing.assert_allclose(square.std(0) / want, np.full(4, np.sqrt(0.5)), rtol=0.05)


def test_a_sketch_of_rank_r_shrinks_the_ratio_by_the_root_of_its_share():
  n, k, r = 64, 256, 16
  g = jnp.asarray(np.random.default_rng(0).standard_normal((n, k)), jnp.float32)
  b = lrjax.gaussian(r)
  low = b.down(b.fit(jax.random.key(0), g, None), g)
  first = lambda x: ratio(jnp.sign(x), x, 'channel')  # Adam's first direction
  share = float(jnp.mean(first(low) / first(g)))
  # The mean of 1 / chi is above 1 / its mean, by 3 / (4 r) = 5 % here.
  np.testing.assert_allclose(share, np.sqrt(r / n) * (1 + 3 / (4 * r)), rtol=0.03)


def test_a_sketch_may_be_wider_than_the_matrix_but_is_no_projection():
  g, b = matrix((4, 6)), lrjax.gaussian(8)
  state = b.init(4, 6, g.dtype)
  assert b.down(state, g).shape == (8, 6)
  assert b.up(state, b.down(state, g), 4).shape == (4, 6)
  with pytest.raises(ValueError, match='orthonormal'):
    lrjax.low_rank(b, lrjax.adam(), residual=lrjax.error_feedback())


def test_a_codec_on_a_key_is_refused():
  params = {'w': matrix((8, 12))}
  basis = lambda r: lrjax.stored_as(lrjax.gaussian(r), lrjax.cast(jnp.bfloat16))
  with pytest.raises(TypeError, match='spoil the uint32 numbers'):
    lrjax.scale_by_apollo(3, basis=basis).init(params)


def test_the_limiter_does_not_lock_after_a_zero_gradient():
  grads = gradients({'w': (8, 12)}, 5)
  grads[2] = jax.tree.map(jnp.zeros_like, grads[2])
  norms = lambda floor: [
    float(jnp.linalg.norm(u['w']))
    for u in trajectory(lrjax.scale_by_apollo(3, floor=floor), grads[0], grads)[0]
  ]
  n = norms(0.0)
  assert n[2] == 0 and n[3] > 0.1 * n[1]
  assert norms(None)[4] < 1e-6  # the official code's memory


def test_a_basis_by_svd():
  grads = gradients({'w': (8, 12)}, 2)
  out, state = trajectory(lrjax.scale_by_apollo(3, basis='svd'), grads[0], grads)
  assert state.slots['w'].state.basis.shape == (8, 3)
  quotient = np.asarray(out[0]['w'] / grads[0]['w'])
  np.testing.assert_allclose(quotient, quotient[:1] + 0 * quotient, rtol=1e-5)


@pytest.mark.parametrize(('d', 'k', 'r'), [(8, 12, 3), (4096, 11008, 256)])
def test_state_bytes(d, k, r):
  params = {'kernel': jax.ShapeDtypeStruct((d, k), jnp.float32)}
  size = lambda tx: lrjax.coverage(tx, params).rows[0].state_bytes
  # Moments, key, last norm, two counts; the official code keeps P besides.
  assert size(lrjax.scale_by_apollo(r)) == 8 * r * k + 8 + 4 + 8
  assert size(lrjax.scale_by_apollo_mini()) == 8 * k + 20
  stored = lrjax.scale_by_apollo(r, basis=lambda r: lrjax.gaussian(r, stored=True))
  assert size(stored) == 8 * r * k + 4 * r * d + 4 + 8


@pytest.mark.parametrize('name', ['apollo', 'apollo_mini'])
def test_hyperparameters_can_be_injected(name):
  params = {'w': matrix((8, 12)), 'bias': jnp.ones(3)}
  fixed = (
    dict(rank=3, update_proj_gap=2) if name == 'apollo' else dict(update_proj_gap=2)
  )
  make, args = getattr(lrjax, name), dict(learning_rate=0.1, weight_decay=0.1, **fixed)
  tx = optax.inject_hyperparams(make, static_args=tuple(fixed))(**args)
  out, state = trajectory(tx, params, [params])
  want, _ = trajectory(make(**args), params, [params])
  np.testing.assert_allclose(out[0]['w'], want[0]['w'], rtol=1e-5)
  assert {'learning_rate', 'scale', 'growth_limit'} <= set(state.hyperparams)


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (
      dict(scale_type='tensr'),
      ValueError,
      "`scale_type` 'tensr'; did you mean 'tensor'",
    ),
    (dict(growth_limit=0.5), ValueError, '`growth_limit` must be at least 1, got 0.5'),
    (dict(scale=-1.0), ValueError, '`scale`.*got -1.0'),
    (dict(rank=0), ValueError, '`rank`.*got 0'),
    (dict(basis='gausian'), ValueError, "did you mean 'gaussian'"),
    (dict(base_optimizer=optax.adafactor(0.1)), ValueError, 'needs parameters'),
    (dict(proj='random'), TypeError, "'proj'"),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.apollo(1e-2, **{'rank': 4, **bad})
