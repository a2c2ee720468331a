"""Trained rank pruning against its official code, numpy float64 and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity.inputs import read

import lrjax
from lrjax import View
from lrjax import rank_truncation as trp

# Of flax kernels (h, w, in, out).
SCHEMES = {
  'NC': View((0, 1, 2), 3),
  'VH': View((2, 0), (3, 1)),
  'ND': View(2, (0, 1)),
}
RULE = trp.by_energy(0.9)


def matrix(shape=(8, 6), seed=0, decay=0.6):
  """A matrix whose singular values are 1, decay, decay^2, ..."""
  rng = np.random.default_rng(seed)
  U, _, Vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
  return jnp.asarray(U * decay ** np.arange(min(shape)) @ Vt, jnp.float32)


def numpy_truncated(W, k):
  U, s, Vt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
  return (U[:, :k] * s[:k]) @ Vt[:k], U[:, :k] @ Vt[:k]


def flax(x):
  """torch's (out, in, h, w) as flax has it."""
  return jnp.asarray(np.moveaxis(x, (-2, -1, -3, -4), (-4, -3, -2, -1)))


@pytest.mark.parametrize('scheme', SCHEMES)
def test_equals_the_official_code(scheme):
  meta, recorded = read('trp')
  view = dict(weight_dimension_numbers=SCHEMES[scheme])
  every, lr = meta['period'], meta['lr']
  cut = trp.truncate_rank(1, trp.by_energy(meta['energy']), **view)
  pull = trp.add_nuclear_subgradient(meta['nuclear_weight'], every, **view)
  tx = optax.chain(
    pull,
    optax.trace(meta['momentum']),
    optax.scale(-lr),
    trp.truncate_rank(every, trp.by_energy(meta['energy']), **view),
  )
  start, zeros = flax(recorded['start']), jnp.zeros_like(flax(recorded['start']))

  # The official loop truncates before its first update too.
  w = start + cut.update(zeros, cut.init(start), start)[0]
  np.testing.assert_allclose(w, flax(recorded[f'{scheme}/truncated']), atol=1e-6)
  sub = pull.update(zeros, pull.init(w), w)[0] / meta['nuclear_weight']
  np.testing.assert_allclose(sub, flax(recorded[f'{scheme}/subgradient']), atol=3e-6)

  @jax.jit
  def run(w, gradients):
    def step(carry, g):
      w, state = carry
      u, state = tx.update(g, state, w)
      return (w + u, state), None

    return jax.lax.scan(step, (w, tx.init(w)), gradients)[0][0]

  end = run(w, flax(recorded['gradients']))
  np.testing.assert_allclose(end, flax(recorded[f'{scheme}/end']), atol=3e-6)


def test_the_subgradient_is_the_gradient_of_the_nuclear_norm():
  W = matrix(decay=0.8)
  norm = lambda W: jnp.linalg.svd(W, full_matrices=False, compute_uv=False).sum()
  np.testing.assert_allclose(trp.nuclear_subgradient(W), jax.grad(norm)(W), atol=1e-5)


@pytest.mark.parametrize('gram', [False, True])
@pytest.mark.parametrize('shape', [(8, 6), (6, 8)])
def test_truncation_and_subgradient_are_those_of_numpy(shape, gram):
  W = matrix(shape)
  want, polar = numpy_truncated(W, 3)
  got = trp.truncate(W, trp.by_rank(3), gram=gram)
  np.testing.assert_allclose(got, want, atol=2e-6)
  np.testing.assert_allclose(
    # Its singular values are divided out, and the third of them is 0.36.
    trp.nuclear_subgradient(got, gram=gram),
    polar,
    atol=1e-5,
  )
  np.testing.assert_allclose(
    trp.nuclear_subgradient(W, trp.by_rank(3), gram=gram), polar, atol=1e-5
  )


@pytest.mark.parametrize('e, k', [(0.6, 1), (0.9, 2), (0.95, 3), (0.9999, 3), (1.0, 3)])
def test_energy_rule(e, k):
  assert trp.by_energy(e)(jnp.array([3.0, 2.0, 1.0])) == k


def test_rank_and_value_rules():
  s = jnp.array([3.0, 2.0, 1.0, 0.5])
  assert [int(trp.by_rank(r)(s)) for r in (2, 9, 0.8, 0.01)] == [2, 4, 3, 1]
  assert [int(trp.by_value(t)(s)) for t in (0.0, 1.0, 4.0)] == [4, 3, 0]


def test_truncation_loses_no_more_than_the_rule_allows_and_ends_there():
  W = matrix()
  once = trp.truncate(W, RULE)
  lost = jnp.sum((W - once) ** 2) / jnp.sum(W**2)
  assert 0 < lost <= 0.1
  k = int(RULE(jnp.linalg.svd(W)[1]))
  assert np.linalg.matrix_rank(once, tol=1e-6) == k
  np.testing.assert_allclose(trp.truncate(once, trp.by_rank(k)), once, atol=1e-6)


def test_without_cut_and_weight_the_optimizer_is_the_bare_one_bit_for_bit():
  grads = jax.random.normal(jax.random.key(1), (5, 8, 6))
  rule = trp.by_energy(1.0)
  bare = optax.adam(0.1)
  whole = optax.chain(
    trp.add_nuclear_subgradient(0.0), bare, trp.truncate_rank(2, rule)
  )
  ends = []
  for tx in (whole, bare):
    w, state = matrix(), tx.init(matrix())
    update = jax.jit(tx.update)
    for g in grads:
      u, state = update(g, state, w)
      w = w + u
    ends.append(np.asarray(w))
  assert ends[0].tobytes() == ends[1].tobytes()


def test_the_subgradient_alone_lowers_every_singular_value_and_then_oscillates():
  lr, weight = 0.5, 0.1
  tx = optax.chain(trp.add_nuclear_subgradient(weight, 2), optax.sgd(lr))
  W = jnp.asarray(numpy_truncated(matrix(decay=0.8), 6)[0], jnp.float32)
  s, state, update = np.linalg.svd(W)[1], tx.init(W), jax.jit(tx.update)
  for k in range(18):
    u, state = update(jnp.zeros_like(W), state, W)
    W = W + u
    if k % 2 == 0:  # the applied ones
      s = np.sort(np.abs(s - lr * weight))[::-1]
    np.testing.assert_allclose(np.linalg.svd(W)[1], s, atol=1e-5)


def test_event_truncates_and_leaves_the_moments_alone():
  p, tx = lrjax.trp(every=3), optax.adam(0.1)
  params, plan = {'q': {'kernel': jnp.stack([matrix(), matrix(seed=1)])}}, {'q': p}
  _, state = tx.update(params, tx.init(params), params)
  assert [bool(lrjax.due_events(plan, k)) for k in range(5)] == [0, 0, 0, 1, 0]
  run = jax.jit(lambda w: lrjax.run_events(plan, {'truncate'}, w, 3, tx=tx))
  new, touched = run(lrjax.Weights(params, {}, state))
  assert touched['truncate'].entries == 0
  for got, W in zip(new.params['q']['kernel'], params['q']['kernel']):
    want, _ = numpy_truncated(W, int(RULE(jnp.linalg.svd(W)[1])))
    np.testing.assert_allclose(got, want, atol=2e-6)
  for a, b in zip(jax.tree.leaves(new.opt_state), jax.tree.leaves(state)):
    np.testing.assert_array_equal(a, b)


def test_factors_are_the_truncated_kernel_at_the_largest_rank_of_a_stack():
  W = jnp.stack([matrix(decay=0.5), matrix(seed=1, decay=0.8)])
  ks = [int(RULE(s)) for s in jnp.linalg.svd(W)[1]]
  weights = lrjax.Weights({'q': {'kernel': W}}, {})
  params, _, _ = lrjax.resize(['q'], lambda s: trp.to_factors(s.train, RULE), weights)
  kernel = params['q']['kernel']
  assert ks[0] < ks[1] == kernel['a'].shape[-1]
  x = jax.random.normal(jax.random.key(0), (4, 8))
  for i, k in enumerate(ks):
    one = lrjax.Split({name: array[i] for name, array in kernel.items()})
    got = lrjax.factorized(k).apply(one, x)
    np.testing.assert_allclose(got, x @ numpy_truncated(W[i], k)[0], atol=1e-5)


def test_a_convolution_of_size_one_is_truncated_as_the_dense_kernel():
  W = matrix()
  tx = lambda view: trp.truncate_rank(1, RULE, weight_dimension_numbers=view)
  dense, conv = tx(View()), tx(SCHEMES['NC'])
  a, _ = dense.update(jnp.zeros_like(W), dense.init(W), W)
  W4 = W[None, None]
  b, _ = conv.update(jnp.zeros_like(W4), conv.init(W4), W4)
  np.testing.assert_array_equal(a, b[0, 0])


def test_a_matrix_that_is_not_finite_is_skipped():
  W = matrix().at[0, 0].set(jnp.nan)
  np.testing.assert_array_equal(trp.truncate(W, RULE), W)
  assert not trp.nuclear_subgradient(W).any()


def test_in_bfloat16_rounding_is_not_taken_for_a_direction():
  W = jax.jit(lambda W: trp.truncate(W, trp.by_rank(3)))(matrix().astype(jnp.bfloat16))
  tx = trp.add_nuclear_subgradient(1.0)
  u, _ = tx.update(jnp.zeros((8, 6)), tx.init(W), W)
  s = np.linalg.svd(np.float32(W))[1]
  assert W.dtype == jnp.bfloat16 and 1e-5 < s[3] < 0.004
  # The sub-gradient has the dtype of W.
  np.testing.assert_allclose(np.linalg.svd(u)[1], [1, 1, 1, 0, 0, 0], atol=0.01)


def test_embeddings_and_vectors_are_passed_over():
  params = {'embed': matrix(), 'q': {'kernel': matrix(), 'bias': jnp.ones(6)}}
  tx = trp.truncate_rank(1, RULE)
  u, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  assert u['q']['kernel'].any()
  assert not u['embed'].any() and not u['q']['bias'].any()


def test_bad_input():
  with pytest.raises(ValueError, match='energy must be above 0'):
    lrjax.trp(energy=0.0)
  with pytest.raises(ValueError, match='energy must be above 0'):
    trp.by_energy(1.5)
  with pytest.raises(ValueError, match='rank'):
    trp.by_rank(0)
  with pytest.raises(ValueError, match='every'):
    trp.truncate_rank(0, RULE)
  tx = trp.truncate_rank(1, RULE)
  with pytest.raises(ValueError, match='params'):
    tx.update(matrix(), tx.init(matrix()))
