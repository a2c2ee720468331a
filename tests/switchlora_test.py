"""SwitchLoRA against its official code, its closed forms, and the defects of that code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity.inputs import read

import lrjax
from lrjax.parameterizations.switchlora import spreads, switch, switch_rate

OFTEN = dict(total_steps=1000, interval=2, freeze=1)
GAIN = np.sqrt(1 / 3)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def moved(p, shape=(10, 9)):
  split = p.init(jax.random.key(0), shape, jnp.float32)
  return split._replace(
    train={n: x + normal(1, *x.shape) for n, x in split.train.items()}
  )


def told(p, counts, rank, freeze):
  """The parameterization, exchanging as many vectors as it is told at each k."""
  counts = jnp.asarray(counts)
  event = lambda key, split, k: switch(split, counts[k], 1 / rank, freeze, rank)
  return dataclasses.replace(p, events=(lrjax.Event('switch', event),))


def in_training(p, tx, xs, gs):
  """`(weights, k) -> weights` after the events of k and the update on xs[k], gs[k]."""

  @jax.jit
  def step(weights, k):
    weights, _ = lrjax.run_events({'q': p}, {'switch'}, weights, k, tx=tx)

    def loss(params):
      one = lrjax.Split(params['q']['kernel'], weights.fixed['q']['fixed'])
      return jnp.sum(p.apply(one, xs[k]) * gs[k])

    grads = jax.grad(loss)(weights.params)
    u, state = tx.update(grads, weights.opt_state, weights.params)
    params = optax.apply_updates(weights.params, u)
    return weights._replace(params=params, opt_state=state)

  return step


def weights_of(split, tx):
  params = {'q': {'kernel': split.train}}
  return lrjax.Weights(params, {'q': {'fixed': split.fixed}}, tx.init(params))


def test_equals_the_official_code():
  meta, recorded = read('switchlora')
  r, freeze = meta['rank'], meta['freeze']
  p = lrjax.switchlora(r, total_steps=1000, freeze=freeze)
  names = ('kernel', 'cand_a', 'cand_b', 'sel_a', 'sel_b', 'freeze_a', 'freeze_b')
  first = {n: jnp.asarray(recorded[n][0]) for n in ('a', 'b', *names)}
  ours, _ = p.from_dense(jax.random.key(0), jnp.asarray(recorded['start']))
  for name in ('sel_a', 'sel_b', 'freeze_a', 'freeze_b'):
    np.testing.assert_array_equal(ours.fixed[name], first[name])
  train = {n: first.pop(n) for n in 'ab'}
  split = lrjax.Split(train, {**ours.fixed, **first})
  np.testing.assert_allclose(p.materialize(split), recorded['start'], atol=1e-6)
  p = told(p, recorded['counts'], r, freeze)
  tx = lrjax.vector_adam(meta['lr'])
  step = in_training(p, tx, jnp.asarray(recorded['x']), jnp.asarray(recorded['g']))
  weights, worst = weights_of(split, tx), 0.0
  for k in range(len(recorded['counts'])):
    weights = step(weights, k)
    got = weights.params['q']['kernel'] | weights.fixed['q']['fixed']
    for name in ('a', 'b', 'kernel'):
      worst = max(worst, float(np.abs(got[name] - recorded[name][k + 1]).max()))
    for name in ('sel_a', 'sel_b'):
      np.testing.assert_array_equal(got[name], recorded[name][k + 1])
    for name in ('freeze_a', 'freeze_b'):  # the code counts down after the exchange
      np.testing.assert_array_equal(np.maximum(got[name] - 1, 0), recorded[name][k + 1])
  assert (got['ptr_a'], got['ptr_b']) == tuple(recorded['ptr'])
  for name in ('cand_a', 'cand_b'):
    worst = max(worst, float(np.abs(got[name] - recorded[name][-1]).max()))
  # Weights are of size 1 and 24 updates of lr 0.02 are summed.
  assert worst < 1e-6


def test_spreads_and_rate_equal_the_official_code():
  meta, recorded = read('switchlora')
  got = [np.sqrt(3) * np.array(spreads(*map(int, s))) for s in recorded['shapes']]
  np.testing.assert_allclose(got, recorded['bounds'], rtol=1e-6)
  rates = switch_rate(jnp.array(meta['rates']['at']), meta['rates']['horizon'])
  np.testing.assert_allclose(rates, recorded['rates'], rtol=1e-5)
  np.testing.assert_allclose(switch_rate(99, 100), 0.3, rtol=1e-6)


def test_starts_with_the_spread_of_kaiming():
  std_a, std_b = spreads(512, 512, 128)
  np.testing.assert_allclose([std_a, std_b], 0.53728, atol=1e-5)
  np.testing.assert_allclose(
    std_a * std_b / np.sqrt(128), GAIN / np.sqrt(512), rtol=1e-6
  )
  split = lrjax.switchlora(16, 1000).init(jax.random.key(0), (64, 48), jnp.float32)
  product = split.train['a'] @ split.train['b'] / 16
  np.testing.assert_allclose(product.std(), GAIN / np.sqrt(64), rtol=0.1)


def test_any_exchange_keeps_the_function_and_all_vectors():
  r, p = 4, lrjax.switchlora(4, **OFTEN)
  split = moved(p)
  W, before = p.materialize(split), vectors(split)
  exchange = jax.jit(functools.partial(switch, scale=1 / r, freeze=1, block=r))
  exchanged = 0
  for count in [1, 2, 0, 1, 3, 1, 2, 2, 2, 1, 0, 1, 1, 2, 2]:
    new, touched = exchange(split, count)
    np.testing.assert_allclose(p.materialize(new), W, atol=1e-5)
    done = {n: int(touched[n].sum()) for n in 'ab'}
    assert done['a'] == done['b'] <= count
    # What starts anew is the counterpart of what was exchanged, and is frozen.
    for one, other in ('ab', 'ba'):
      moved_one = split.fixed[f'sel_{one}'] != new.fixed[f'sel_{one}']
      np.testing.assert_array_equal(moved_one, touched[other].ravel())
      np.testing.assert_array_equal(moved_one, new.fixed[f'freeze_{other}'] == 1)
      np.testing.assert_array_equal(
        split.train[one][other_axis(one, ~moved_one)],
        new.train[one][other_axis(one, ~moved_one)],
      )
      assert len({*new.fixed[f'sel_{one}'].tolist()}) == r
      order = np.roll(new.fixed[f'sel_{one}'], -int(new.fixed[f'ptr_{one}']))
      assert (np.diff(order) % 9 == 1).all()
    split, exchanged = new, exchanged + done['a']
  assert exchanged > 9  # once round the pools
  np.testing.assert_allclose(vectors(split), before, atol=1e-6)


def other_axis(name, flags):
  """Selects vectors: columns of a, rows of b."""
  return (slice(None), flags) if name == 'a' else flags


def vectors(split):
  """All vectors of a, live or in the pool, in one order."""
  pool = np.array(split.fixed['cand_a'])
  pool[np.array(split.fixed['sel_a'])] = split.train['a'].T
  return pool[np.argsort(pool[:, 0])]


@pytest.mark.parametrize('out', [4, 5, 6])
def test_few_idle_candidates_do_not_make_the_function_jump(out):
  # The public code folds a stale copy of a live vector: W then moves by 2.6 for out = 5.
  p = lrjax.switchlora(4, **OFTEN)
  split = moved(p, (10, out))
  W = p.materialize(split)
  for _ in range(5):
    split, touched = switch(split, 2, 1 / 4, 0, 4)
    np.testing.assert_allclose(p.materialize(split), W, atol=1e-5)
    assert touched['b'].sum() == min(2, out - 4)


def test_without_exchanges_it_is_lora():
  p = lrjax.switchlora(4, total_steps=1, interval=10**6, decay=1e-3)
  split, x, g = moved(p), normal(2, 7, 10), normal(3, 7, 9)
  new, touched = p.events[0].weights(jax.random.key(0), split, jnp.int32(9))
  assert not any(mask.any() for mask in touched.values())
  jax.tree.map(np.testing.assert_array_equal, new, split)
  a, b = split.train['a'], split.train['b']
  np.testing.assert_allclose(
    p.apply(split, x), x @ split.fixed['kernel'] + (x @ a) @ b / 4, atol=1e-5
  )
  loss = lambda train: jnp.sum(p.apply(split._replace(train=train), x) * g)
  grads = jax.grad(loss)(split.train)
  np.testing.assert_allclose(grads['a'], x.T @ g @ b.T / 4, atol=1e-4)
  np.testing.assert_allclose(grads['b'], a.T @ x.T @ g / 4, atol=1e-4)


def test_an_exchanged_vector_keeps_its_gradient_and_moments():
  p, x, y = lrjax.switchlora(4, **OFTEN), normal(2, 7, 10), normal(3, 7, 9)
  split = moved(p)
  new, _ = switch(split, 2, 1 / 4, 0, 4)
  grads = [
    jax.grad(lambda t, s=s: jnp.sum((p.apply(s._replace(train=t), x) - y) ** 2))(
      s.train
    )
    for s in (split, new)
  ]
  np.testing.assert_allclose(grads[1]['a'][:, :2], grads[0]['a'][:, :2], rtol=1e-4)
  np.testing.assert_allclose(grads[1]['b'][2:], grads[0]['b'][2:], rtol=1e-4)


def test_a_counterpart_stands_still_and_then_starts_anew():
  p = told(lrjax.switchlora(4, total_steps=1000), [0, 0, 1] + [0] * 9, 4, 5)
  tx = lrjax.vector_adam(0.01, eps=1e-12)
  # One input throughout, so that no gradient changes its sign.
  step = in_training(
    p,
    tx,
    jnp.tile(normal(2, 1, 7, 10), (12, 1, 1)),
    jnp.tile(normal(3, 1, 7, 9), (12, 1, 1)),
  )
  weights, path = weights_of(moved(p), tx), []
  for k in range(9):
    path.append(weights)
    weights = step(weights, k)
  path.append(weights)
  b = [np.asarray(w.params['q']['kernel']['b']) for w in path]
  still = [np.array_equal(b[k][0], b[k + 1][0]) for k in range(9)]
  assert still == [False, False, True, True, True, True, True, False, False]
  assert all((b[k][1] != b[k + 1][1]).all() for k in range(9))
  rule = lambda k: path[k].opt_state[0]
  for k in (3, 7):
    assert not rule(k).mu['q']['kernel']['b'][0].any()
    assert not rule(k).nu['q']['kernel']['b'][0].any()
  assert rule(7).vector_count['q']['kernel']['b'].ravel().tolist() == [5, 7, 7, 7]
  # Moments of one gradient, corrected for six: 0.1 / (1 - 0.9^6) over the root of
  # 0.001 / (1 - 0.999^6).
  np.testing.assert_allclose(np.abs(b[8][0] - b[7][0]) / 0.01, 0.5221, atol=1e-3)


def test_how_many_are_exchanged_has_the_mean_of_the_schedule():
  p = lrjax.switchlora(8, total_steps=100, interval=4, freeze=0)
  split = p.init(jax.random.key(0), (20, 24), jnp.float32)
  one = lambda key: p.events[0].weights(key, split, jnp.int32(3))[1]['b'].sum()
  counts = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 400))
  q = 8 * 0.3 ** (4 / 10) / 4
  assert {*counts.tolist()} == {1, 2}
  assert abs(float(counts.mean()) - q) < 4 * 0.5 / 20


@pytest.mark.parametrize(('n', 'm', 'r'), [(512, 512, 128), (2048, 5461, 512)])
def test_counts_of_numbers(n, m, r):
  p = lrjax.switchlora(r, total_steps=1000)
  split = jax.eval_shape(
    lambda key: p.init(key, (n, m), jnp.float32), jax.random.key(0)
  )
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  pools = [split.fixed['cand_a'], split.fixed['cand_b']]
  assert size(split.train) == r * (n + m)
  assert size(pools) == min(n, m) * (n + m)
  assert size(split.fixed) == n * m + size(pools) + 4 * r + 2


@pytest.mark.parametrize(
  ('options', 'error', 'match'),
  [
    (dict(total_steps=0), ValueError, 'total_steps'),
    (dict(total_steps=10, interval=9), ValueError, 'twice `freeze`=5, got 9'),
    (dict(total_steps=10, freeze=-1), ValueError, 'at least 1'),
    (dict(total_steps=10, decay=0.0), ValueError, 'above 0'),
    (dict(total_steps=10, freeze=0.5), TypeError, 'freeze'),
    (dict(total_steps=10, rank=0), ValueError, 'rank'),
    (dict(total_steps=10, rank=9), ValueError, 'rank must be at most'),
  ],
)
def test_bad_input(options, error, match):
  with pytest.raises(error, match=match):
    p = lrjax.switchlora(**{'rank': 4} | options)
    p.init(jax.random.key(0), (8, 12), jnp.float32)
