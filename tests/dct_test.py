"""The DCT basis and DCT-AdamW against closed forms, their transcription and defects."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from oracles import dct as oracle
from samples import gradients, matrix

import lrjax
from lrjax.bases.dct import columns, idct, makhoul
from lrjax.testing import trajectory

PATHS = ('matmul', 'fft')
full = lambda **kw: lrjax.dct(99, **kw)


def fit(basis, g):
  g = jnp.asarray(g, jnp.float32)
  return basis.fit(None, g, basis.init(*g.shape, g.dtype))


def normal(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('d', [8, 9, 13])
def test_all_columns_are_orthogonal_and_both_paths_are_scipys_transform(d):
  q = columns(jnp.arange(d), d, jnp.float32)
  np.testing.assert_allclose(q.T @ q, np.eye(d), atol=1e-6)
  np.testing.assert_allclose(q, oracle.dct2(d), atol=1e-6)
  q3 = columns(jnp.arange(d), d, jnp.float32, 'dct3')
  np.testing.assert_allclose(q3, oracle.dct2(d).T, atol=1e-6)
  g = normal((d, 5))
  want = scipy.fft.dct(g.astype(np.float64), axis=0, norm='ortho')
  np.testing.assert_allclose(q.T @ g, want, atol=2e-6)
  np.testing.assert_allclose(makhoul(g), want, atol=2e-6)
  np.testing.assert_allclose(idct(want.astype(np.float32)), g, atol=2e-6)


def test_columns_of_long_sides_lose_no_digits():
  d, index = 46_340, np.array([0, 1, 46_339])
  got = columns(jnp.asarray(index), d, jnp.float32)
  turns = (2 * np.arange(d)[:, None] + 1) * index % (4 * d)
  want = np.cos(np.pi * turns / (2 * d)) * np.sqrt(np.where(index == 0, 1, 2) / d)
  np.testing.assert_allclose(got, want, atol=1e-9)
  with pytest.raises(ValueError, match='up to 46340, got d = 46341'):
    jax.eval_shape(
      lambda g: fit(lrjax.dct(2), g), jax.ShapeDtypeStruct((46_341, 1), 'f')
    )


@pytest.mark.parametrize('path', PATHS)
def test_the_choice_by_l2_is_the_best_of_all(path):
  q = oracle.dct2(7)
  for seed in range(5):
    g = normal((7, 4), seed)
    lost = {}
    for i in map(list, itertools.combinations(range(7), 3)):
      lost[tuple(i)] = np.linalg.norm(g - q[:, i] @ q[:, i].T @ g)
    best = min(lost, key=lost.__getitem__)
    assert tuple(fit(lrjax.dct(3, norm='l2', path=path), g).tolist()) == best


def test_what_is_lost_is_what_the_other_rows_hold():
  g, b = normal((12, 20)), lrjax.dct(5)
  index = fit(b, g)
  back = b.up(index, b.down(index, jnp.asarray(g)), 12)
  s = oracle.dct2(12).T @ g
  lost = float(jnp.sum(jnp.square(g - back)))
  kept = float(np.sum(s[np.asarray(index)] ** 2))
  np.testing.assert_allclose(lost, np.sum(g**2) - kept, rtol=1e-4)
  assert lost <= (1 - 5 / 12) * np.sum(g**2)


@pytest.mark.parametrize('form', ['dct2', 'dct3'])
def test_a_sum_of_r_columns_is_captured_exactly(form):
  b = lrjax.dct(3, form=form)
  want = jnp.array([1, 4, 10])
  p = columns(want, 12, jnp.float32, form)
  g = p @ normal((3, 9))
  index = fit(b, g)
  assert index.tolist() == want.tolist()
  np.testing.assert_allclose(b.up(index, b.down(index, g), 12), g, atol=1e-5)


def test_at_a_tie_the_lower_index_wins_and_indices_rise():
  for seed in range(3):
    index = fit(lrjax.dct(3), normal((8, 5), seed)).tolist()
    assert index == sorted(set(index))
  # A zero matrix is one tie.
  assert fit(lrjax.dct(3), np.zeros((8, 5))).tolist() == [0, 1, 2]


def test_kept_columns_carry_their_moments_bit_for_bit():
  x = jnp.asarray(normal((4, 5)))
  old = jnp.array([1, 4, 6, 9])
  for new, want in (
    ([1, 4, 6, 9], x),
    ([0, 2, 3, 5], 0 * x),
    ([4, 7, 9, 11], jnp.stack([x[1], 0 * x[0], x[3], 0 * x[0]])),
  ):
    change = lrjax.dct(4).change(old, jnp.array(new), 12)
    np.testing.assert_array_equal(change.rotate(x), want)
    np.testing.assert_array_equal(change.square(x), want)
    P = lambda i: columns(jnp.asarray(i), 12, jnp.float32)
    np.testing.assert_allclose(P(new).T @ P(old) @ x, want, atol=1e-5)


@pytest.mark.parametrize(
  ('gap', 'feedback', 'norm', 'path'),
  [(1, 'full', 'l1', 'matmul'), (5, 'none', 'l2', 'fft'), (3, 'full', 'l1', 'fft')],
)
def test_equals_the_transcription(gap, feedback, norm, path):
  grads = gradients({'wide': (8, 12), 'tall': (12, 8)}, 12)
  make = functools.partial(lrjax.dct, norm=norm, path=path)
  tx = lrjax.scale_by_dct_adamw(3, gap, error_feedback=feedback, basis=make)
  out, _ = trajectory(tx, grads[0], grads)
  arguments = dict(rank=3, gap=gap, ell=int(norm[1]), feedback=feedback == 'full')
  for name in grads[0]:
    turn = (lambda x: x) if name == 'wide' else np.transpose
    want = oracle.dct_adamw([turn(g[name]) for g in grads], **arguments)
    got = np.stack([turn(u[name]) for u in out])
    # Adam turns float32 noise of 1e-7 in a small entry into as much of its own.
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_full_rank_with_a_plain_inner_is_the_gradient():
  grads = gradients({'w': (8, 12)}, 4)
  rule = lambda _: lrjax.low_rank(full(), optax.identity(), refresh=lrjax.every(3))
  out, _ = trajectory(lrjax.on_matrices(rule), grads[0], grads)
  for u, g in zip(out, grads):
    np.testing.assert_allclose(u['w'], g['w'], atol=1e-5)


@pytest.mark.parametrize(
  ('codec', 'part'),
  [(None, 1e-5), (lrjax.int8(), 1 / 254), (lrjax.affine(bits=4), 1 / 15)],
  ids=['full', 'int8', 'int4'],
)
def test_updates_and_the_last_error_sum_to_the_gradients(codec, part):
  residual = lrjax.error_feedback(codec=codec)
  rule = lambda rank: lrjax.low_rank(
    lrjax.dct(rank), optax.identity(), refresh=lrjax.every(1), residual=residual
  )
  grads = gradients({'w': (8, 12)}, 8)
  out, state = trajectory(lrjax.on_matrices(rule, rank=2), grads[0], grads)
  e = state.slots['w'].state.residual
  e = codec.decode(e) if codec else e
  got = sum(u['w'] for u in out) + e
  want = sum(g['w'] for g in grads)
  # A codec rounds E eight times, each time by at most this part of its largest entry.
  np.testing.assert_allclose(got, want, atol=8 * part * float(jnp.abs(e).max()))


# --- Defects of the released code that are not repeated here.


def test_defect_one_q_for_the_whole_model_and_fft_orientation_of_tall_matrices():
  # At full rank nothing is lost, by whatever path, if each side has its own Q.
  g = {'a': matrix((8, 12)), 'b': matrix((20, 16)), 'c': matrix((6, 5))}
  for path in PATHS:
    make = functools.partial(full, path=path)
    tx = lrjax.on_matrices(
      lambda _, make=make: lrjax.low_rank(make(), optax.identity())
    )
    u, _ = jax.jit(tx.update)(g, tx.init(g))
    for name, x in g.items():
      np.testing.assert_allclose(u[name], x, atol=1e-5)


@pytest.mark.parametrize('shape', [(512, 3584), (3584, 512)])
def test_defect_sides_of_certain_shapes_are_exchanged(shape):
  tx = lrjax.scale_by_dct_adamw(4)
  state = jax.eval_shape(tx.init, {'w': jax.ShapeDtypeStruct(shape, jnp.float32)})
  assert state.slots['w'].state.inner.mu.shape == (4, 3584)


def test_defect_8_bit_feedback_divides_by_15():
  e, codec = normal((64, 16)), lrjax.int8()
  error = np.abs(codec.decode(codec.encode(jnp.asarray(e))) - e).max()
  assert error <= np.abs(e).max() / 254 * 1.0001  # 15 levels would leave up to 1/30


def test_defect_4_bit_feedback_returns_values_in_other_places():
  e, codec = normal((6, 16)), lrjax.affine(bits=4, group=16)
  error = np.abs(codec.decode(codec.encode(jnp.asarray(e))) - e)
  step = (e.max(axis=1, keepdims=True) - e.min(axis=1, keepdims=True)) / 15
  assert (error <= 0.501 * step).all()


def test_defect_more_than_two_axes_are_never_updated():
  grads = {'stack': {'kernel': jnp.stack([matrix((8, 12), i) for i in range(2)])}}
  tx = lrjax.scale_by_dct_adamw(3)
  u, _ = jax.jit(tx.update)(grads, tx.init(grads))
  assert (jnp.abs(u['stack']['kernel']).max(axis=(1, 2)) > 0.1).all()


def test_defect_rotation_writes_into_its_own_input():
  x = jnp.asarray(normal((3, 5)))
  swap = lrjax.dct(3).change(jnp.array([1, 4, 6]), jnp.array([4, 6, 7]), 8)
  np.testing.assert_array_equal(swap.rotate(x), jnp.stack([x[1], x[2], 0 * x[0]]))


def test_defect_gradients_are_overwritten():
  g = {'w': normal((8, 12))}
  before = g['w'].copy()
  tx = lrjax.scale_by_dct_adamw(3)
  jax.jit(tx.update)(g, tx.init(g))
  np.testing.assert_array_equal(g['w'], before)


def test_defect_without_rotation_moments_of_different_columns_mix():
  # Two columns exchange their ranks of size; neither leaves the set.
  q = oracle.dct2(8)
  big, small = 3 * normal((1, 12), 1), normal((1, 12), 2)
  grads = [
    {'w': jnp.asarray(q[:, [2]] @ a + q[:, [6]] @ b, jnp.float32)}
    for a, b in ((big, small), (small, big), (big, small))
  ]
  kept, _ = trajectory(lrjax.scale_by_dct_adamw(2), grads[0], grads)
  plain = lrjax.scale_by_dct_adamw(2, moments_on_refresh='keep')
  out, _ = trajectory(plain, grads[0], grads)
  for a, b in zip(out, kept):
    np.testing.assert_allclose(a['w'], b['w'], atol=1e-5)


# --- Memory and arguments.


def test_hyperparameters_can_be_injected():
  params = {'w': matrix((8, 12))}
  static = ('rank', 'update_proj_gap')
  for method in (lrjax.dct_adamw, lrjax.trion):
    make = optax.inject_hyperparams(method, static_args=static)
    tx = make(learning_rate=optax.linear_schedule(0.1, 0.0, 4), rank=3)
    out, state = trajectory(tx, params, [params] * 2)
    want, _ = trajectory(method(0.1, rank=3), params, [params])
    np.testing.assert_allclose(out[0]['w'], want[0]['w'], atol=1e-6)
    assert {'learning_rate', 'weight_decay'} <= set(state.hyperparams)


@pytest.mark.parametrize(
  ('feedback', 'd', 'k', 'rank'),
  [
    ('none', 8, 12, 3),
    ('full', 8, 12, 3),
    ('int8', 8, 12, 3),
    ('int4', 8, 12, 3),
    ('int4', 4096, 11008, 256),
    ('int8', 4096, 11008, 256),
  ],
)
def test_state_bytes(feedback, d, k, rank):
  tx = lrjax.scale_by_dct_adamw(rank, error_feedback=feedback)
  params = {'w': jax.ShapeDtypeStruct((k, d), jnp.bfloat16)}
  int4 = d * k // 2 + 8 * math.ceil(d * k / 256)
  e = dict(none=0, full=4 * d * k, int8=d * k + 4 * k, int4=int4)[feedback]
  counts = 4 + 4 + 1 + 4 + 4  # steps, skipped, a flag, overdue, Adam's
  want = (
    8 * rank * k + 4 * rank + e + counts + 4
  )  # and Adam's count of the other leaves
  assert lrjax.coverage(tx, params).state_bytes == want


@pytest.mark.parametrize(
  ('make', 'error', 'message'),
  [
    (lambda: lrjax.dct(0), ValueError, '`rank` must be at least 1, got 0'),
    (lambda: lrjax.dct(2, norm='l3'), ValueError, "`norm` 'l3'.*l1, l2"),
    (lambda: lrjax.dct(2, form='dct4'), ValueError, "`form` 'dct4'.*dct2, dct3"),
    (lambda: lrjax.dct(2, path='ftt'), ValueError, "`path` 'ftt'; did you mean 'fft'"),
    (
      lambda: lrjax.dct_adamw(1e-3, error_feedback='int3'),
      ValueError,
      "`error_feedback` 'int3'.*full, int4, int8, none",
    ),
    (
      lambda: lrjax.dct_adamw(1e-3, error_feedback=8),
      TypeError,
      '`error_feedback` must be.*got 8',
    ),
    (lambda: lrjax.dct_adamw(1e-3, b2=1.0), ValueError, '`b2`.*below 1.0, got 1.0'),
    (lambda: lrjax.dct_adamw(1e-3, update_proj_gap=0), ValueError, 'got 0'),
  ],
)
def test_bad_arguments_are_refused(make, error, message):
  with pytest.raises(error, match=message):
    make()


@pytest.mark.parametrize('transport', [lrjax.rotate_abs, lrjax.reset])
@pytest.mark.parametrize('basis', [lrjax.dct, lrjax.svd], ids=['dct', 'svd'])
def test_low_rank_muon_is_the_loop_with_optaxs_muon_inside(basis, transport):
  rule = lambda rank: lrjax.low_rank(
    basis(rank),
    optax.contrib.scale_by_muon(nesterov=False),
    refresh=lrjax.every(2),
    transport=transport,
  )
  grads = [
    {'w': jnp.stack([g['a'], g['b']])}
    for g in gradients({'a': (8, 12), 'b': (8, 12)}, 3)
  ]
  out, state = trajectory(lrjax.on_matrices(rule, rank=3), grads[0], grads)
  assert state.slots['w'].state.inner.mu.shape == (2, 3, 12)
  for u in out:
    s = np.linalg.svd(u['w'], compute_uv=False)
    assert (s[:, :3] > 0.6).all() and (s[:, :3] < 1.3).all() and (s[:, 3:] < 1e-5).all()
