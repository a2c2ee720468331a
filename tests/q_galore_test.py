"""Q-GaLore against its transcription, its limits, its bytes, its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import q_galore as oracle
from samples import gradients, matrix

import lrjax
from lrjax.testing import trajectory


def slowly(shape, steps, seed=0):
  """Gradients that turn little from step to step."""
  return [matrix(shape, seed) + 0.05 * matrix(shape, 50 + t) for t in range(steps)]


def test_equals_the_transcription():
  args = dict(bits=4, group=16, threshold=0.4, window=2, growth=2)
  grads = slowly((12, 20), 12)
  tx = lrjax.scale_by_q_galore(
    4,
    1,
    base_optimizer=lrjax.eight_bit(lrjax.adam(), block=32, min_size=0),
    basis='svd',
    **args,
  )
  state, update, got = tx.init({'w': grads[0]}), jax.jit(tx.update), []
  for g in grads:
    u, state = update({'w': g}, state)
    got.append((u['w'], int(state.slots['w'].state.refresh.gap)))
  want, gaps = oracle.q_galore(grads, rank=4, gap=1, scale=0.25, block=32, **args)
  assert [gap for _, gap in got] == gaps
  assert gaps[-1] == 8
  # A moment or an entry of P that float32 puts on the other side of a threshold is one
  # code off; the others agree to 1e-5.
  off = np.abs(np.stack([u for u, _ in got]) - want)
  assert np.quantile(off, 0.99) < 1e-5
  assert off.max() < 5e-3


def test_without_codes_and_growth_it_is_galore():
  grads = gradients({'w': (8, 12)}, 6)
  want, _ = trajectory(lrjax.scale_by_galore(3, 2, basis='svd'), grads[0], grads)

  def check(basis, tolerance):
    rule = lambda rank: lrjax.low_rank(
      basis, lrjax.adam(), refresh=lrjax.lazy(2, window=9), residual=lrjax.drop(0.25)
    )
    out, _ = trajectory(lrjax.on_matrices(rule, rank=3), grads[0], grads)
    for u, w in zip(out, want):
      np.testing.assert_allclose(u['w'], w['w'], atol=tolerance)

  check(lrjax.svd(3), 1e-6)
  # A step of 8 bits is 1/255 of the range of P; where a gradient is small after its
  # projection, Adam shows that in an update of size 0.25.
  check(lrjax.stored_as(lrjax.svd(3), lrjax.affine(8)), 0.05)


def test_a_basis_of_unit_vectors_survives_four_bits():
  # Lossless: P of a diagonal gradient has entries 0 and 1, which every grid holds.
  g = {'w': jnp.eye(4, 6) * jnp.array([4.0, 3.0, 2.0, 1.0])[:, None]}
  tx = lrjax.scale_by_q_galore(3, base_optimizer=optax.identity(), basis='svd')
  u, _ = trajectory(tx, g, [g])
  want = 0.25 * g['w'].at[3, 3].set(0)
  np.testing.assert_allclose(u[0]['w'], want, atol=1e-5)


@pytest.mark.parametrize(
  ('shape', 'rank', 'basis'),
  [
    ((16, 40), 4, 16 * 2 + 8 * 1),
    ((16, 40), 5, 16 * 3 + 8 * 1),
    ((4096, 11008), 1024, 4096 * 512 + 8 * 4096 * 4),
  ],
)
def test_state_bytes(shape, rank, basis):
  tx = lrjax.scale_by_q_galore(
    rank, base_optimizer=lrjax.eight_bit(lrjax.adam(), min_size=0)
  )
  report = lrjax.coverage(tx, {'kernel': jax.ShapeDtypeStruct(shape, jnp.bfloat16)})
  n = rank * shape[1]
  # moments and their block scales; gap, refreshes and queue; overdue and Adam's count
  rest = 2 * (n + 4 * -(-n // 256)) + (8 + 4 * 5) + 8
  assert report.rows[0].state_bytes == basis + rest


def test_checkpointed_state_tells_of_the_refresh_policy():
  tx = lrjax.q_galore(1e-2, 4, 2, window=1)
  params = {'w': matrix((2, 8, 12))}
  _, state = trajectory(tx, params, [params] * 5)
  refresh = state[0].slots['w'].state.refresh
  np.testing.assert_array_equal(refresh.gap, [8, 8])
  np.testing.assert_array_equal(refresh.refreshes, [3, 3])
  assert refresh.queue.shape == (2, 1)


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (dict(bits=3), ValueError, '`bits` must be 4 or 8, got 3'),
    (dict(group=0), ValueError, '`group` must be at least 1, got 0'),
    (dict(threshold=-1.0), ValueError, '`threshold` must be at least 0'),
    (dict(window=0), ValueError, '`window` must be at least 1, got 0'),
    (dict(growth=0.5), ValueError, '`growth` must be at least 1, got 0.5'),
    (
      dict(measure='overlop'),
      ValueError,
      "`measure` 'overlop'; did you mean 'overlap'",
    ),
    (dict(update_proj_gap=0), ValueError, '`update_proj_gap` must be at least 1'),
    (dict(basis=lambda r: lrjax.two_sided(lrjax.svd(r))), ValueError, 'one matrix P'),
    (dict(moments_on_refresh='rotat'), ValueError, "did you mean 'rotate'"),
    (dict(bitz=4), TypeError, 'bitz'),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.q_galore(**{'learning_rate': 1e-2, 'rank': 4, **bad})


def test_weights_decay_by_what_they_were_before_the_update():
  # The official code decays the updated weights.
  params = {'w': jnp.full((4, 6), 2.0)}
  g = {'w': matrix((4, 6))}
  make = lambda **more: lrjax.q_galore(0.1, 2, base_optimizer=optax.identity(), **more)
  run = lambda tx: jax.jit(lambda: tx.update(g, tx.init(params), params)[0]['w'])()
  want = run(make()) - 0.1 * 0.5 * 2.0
  np.testing.assert_allclose(run(make(weight_decay=0.5)), want, atol=1e-7)
