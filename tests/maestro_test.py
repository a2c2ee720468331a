"""Maestro against its official code, closed forms and numpy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity.inputs import SMALL, read

import lrjax
from experiments import program
from experiments.config import Kernel
from lrjax.models import LLAMA_SIZES, Llama
from lrjax.modules.nnx import Dense, kernels, split
from lrjax.ordered_dropout import one_of_all
from lrjax.parameterizations.maestro import importance
from lrjax.types import Split
from tests.runner import tiny

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 10))
LASSO = lrjax.hierarchical_group_lasso
names = pytest.mark.parametrize('name', SMALL)


def widths(width, sampled=None):
  sampled = width if sampled is None else sampled
  return {'width': jnp.int32(width), 'sampled': jnp.int32(sampled)}


@functools.cache
def kernel(shape=(10, 6), seed=0):
  return lrjax.maestro().init(jax.random.key(seed), shape, jnp.float32)


def narrowed(split, width):
  return split._replace(fixed=widths(width))


def recording(name):
  meta, recorded = read('maestro')
  prefix = f'{name}/'
  own = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
  return meta, own


@names
def test_a_layer_is_the_official_one(name):
  _, want = recording(name)
  p = len(want['importance'])
  sampled = np.ceil(p * want['fractions']).astype(np.int32)
  train = {leaf: jnp.asarray(want[f'start/{leaf}']) for leaf in 'ab'}

  @jax.jit
  def ours(train, dense, x):
    start, error = lrjax.maestro().from_dense(KEY, dense)
    forward = lambda w: lrjax.maestro().apply(Split(train, widths(p, w)), x)
    lasso = jax.value_and_grad(LASSO)(train)
    return start.train, error, jax.vmap(forward)(sampled), importance(train), lasso

  start, error, forward, kept, (lasso, grads) = ours(train, want['dense'], want['x'][0])
  assert error < 1e-6
  signs = np.sign(np.sum(start['a'] * train['a'], 0))  # LAPACK's choice
  # Singular vectors of close values, from two builds of LAPACK.
  np.testing.assert_allclose(start['a'] * signs[None], train['a'], atol=3e-6)
  np.testing.assert_allclose(start['b'] * signs[:, None], train['b'], atol=3e-6)
  np.testing.assert_allclose(forward, want['forward'], atol=5e-6)
  np.testing.assert_allclose(kept, want['importance'], rtol=2e-6)
  np.testing.assert_allclose(lasso, want['lasso'], rtol=2e-6)
  for leaf, g in grads.items():
    np.testing.assert_allclose(g, want[f'lasso/{leaf}'], atol=5e-6)


@names
def test_training_is_the_official_one(name):
  meta, want = recording(name)
  p = lrjax.maestro(
    chance=0, shrink_every=meta['shrink_at'], threshold=meta['threshold']
  )
  plan = {'q': p}
  tx = optax.chain(
    lrjax.add_penalty(LASSO, meta['gp_lambda']),
    optax.trace(meta['momentum']),
    optax.scale(-meta['lr']),
  )
  train = {'a': jnp.asarray(want['start/a']), 'b': jnp.asarray(want['start/b'])}
  params = {'q': {'kernel': train}}
  fixed = {'q': {'fixed': widths(train['a'].shape[1])}}
  weights = lrjax.Weights(params, fixed, tx.init(params))

  @jax.jit
  def step(weights, sampled, x, y):
    fixed = weights.fixed['q']['fixed'] | {'sampled': sampled}

    def loss(params):
      out = p.apply(Split(params['q']['kernel'], fixed), x)
      return 0.5 * jnp.mean((out - y) ** 2)

    u, state = tx.update(
      jax.grad(loss)(weights.params), weights.opt_state, weights.params
    )
    params = optax.apply_updates(weights.params, u)
    return weights._replace(params=params, opt_state=state)

  for k, (x, y) in enumerate(zip(want['x'], want['y'])):
    if due := lrjax.due_events(plan, k):
      weights, _ = lrjax.run_events(plan, due, weights, k, tx=tx)
    assert weights.fixed['q']['fixed']['width'] == want['path/width'][k]
    weights = step(weights, jnp.asarray(want['path/sampled'][k], jnp.int32), x, y)
    for leaf, got in weights.params['q']['kernel'].items():
      np.testing.assert_allclose(got, want[f'path/{leaf}'][k], atol=5e-7)


def test_start_is_the_svd_and_importance_its_suffix_norms():
  W = jax.random.normal(KEY, (10, 6))
  train = lrjax.maestro().from_dense(KEY, W)[0].train
  s = np.linalg.svd(np.asarray(W, np.float64))[1]
  norms = [jnp.linalg.norm(train['a'], axis=0), jnp.linalg.norm(train['b'], axis=1)]
  np.testing.assert_allclose(norms[0] * norms[1], s, rtol=1e-5)
  np.testing.assert_allclose(importance(train), np.cumsum(s[::-1])[::-1], rtol=1e-5)


def test_at_full_width_a_step_is_that_of_the_factorized_kernel():
  maestro = kernel()
  factorized = lrjax.factorized(6).init(KEY, (10, 6), jnp.float32)
  loss = lambda p, train, fixed: jnp.sum(jnp.sin(p.apply(Split(train, fixed), X)))
  got = jax.value_and_grad(loss, 1)(lrjax.maestro(), *maestro)
  want = jax.value_and_grad(loss, 1)(lrjax.factorized(6), *factorized)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('w', [1, 3, 6])
def test_a_sampled_kernel_is_the_sliced_one(w):
  train = kernel().train
  sliced = {'a': train['a'][:, :w], 'b': train['b'][:w]}

  def loss(train, fixed):
    return jnp.sum(jnp.sin(lrjax.maestro().apply(Split(train, fixed), X)))

  y = lrjax.maestro().apply(Split(train, widths(6, w)), X)
  # Products of other sizes are summed in another order.
  near = dict(rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(y, (X @ sliced['a']) @ sliced['b'], **near)
  grads = jax.grad(loss)(train, widths(6, w))
  assert not grads['a'][:, w:].any() and not grads['b'][w:].any()
  want = jax.grad(loss)(sliced, widths(w))
  np.testing.assert_allclose(grads['a'][:, :w], want['a'], **near)
  small = lrjax.compact(Split(train, widths(w)))
  np.testing.assert_allclose(lrjax.factorized(w).apply(small, X), y, **near)


def test_lasso_is_its_definition():
  stack = {
    'a': jax.random.normal(KEY, (2, 5, 3)),
    'b': jax.random.normal(KEY, (2, 3, 4)),
  }
  norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
  want = sum(
    norm(a[:, k:]) + norm(b[k:]) for a, b in zip(*stack.values()) for k in range(3)
  )
  np.testing.assert_allclose(LASSO(stack), want, rtol=1e-6)


def test_lasso_has_a_gradient_where_the_public_code_has_nan():
  a = jnp.ones((5, 3)).at[:, 1:].set(0)
  tx = lrjax.add_penalty(LASSO, 1.0)
  params = {'q': {'kernel': {'a': a, 'b': jnp.zeros((3, 4))}}}
  g, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(g['q']['kernel']['a'][:, 0], 1 / np.sqrt(5), rtol=1e-6)
  assert not g['q']['kernel']['a'][:, 1:].any() and not g['q']['kernel']['b'].any()


def test_ordered_dropout_finds_the_svd():
  """A linear student: each prefix becomes the best approximation of its rank."""
  M = jnp.asarray(np.diag([3.0, 2.0, 1.0]) @ jax.random.orthogonal(KEY, 4)[:3])
  p = lrjax.maestro()
  plan = {'q': p}
  train = p.init(jax.random.key(2), (3, 4), jnp.float32)
  tx = optax.adam(optax.cosine_decay_schedule(0.03, 2000))
  params, fixed = {'q': {'kernel': train.train}}, {'q': {'fixed': train.fixed}}
  weights = lrjax.Weights(params, fixed, tx.init(params))

  def step(weights, k):
    weights, _ = lrjax.run_events(plan, {'sample'}, weights, k, tx=tx)
    # Uniform in the unit ball.
    kx, kr = jax.random.split(jax.random.fold_in(KEY, k))
    x = jax.random.normal(kx, (64, 3))
    radius = jax.random.uniform(kr, (64, 1)) ** (1 / 3)
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True) * radius

    def loss(params):
      y = p.apply(Split(params['q']['kernel'], weights.fixed['q']['fixed']), x)
      return jnp.mean((y - x @ M) ** 2)

    u, state = tx.update(jax.grad(loss)(weights.params), weights.opt_state)
    return weights._replace(
      params=optax.apply_updates(weights.params, u), opt_state=state
    )

  run = lambda w: jax.lax.scan(lambda w, k: (step(w, k), None), w, jnp.arange(2000))[0]
  train = jax.jit(run)(weights).params['q']['kernel']
  U, s, Vt = np.linalg.svd(M, full_matrices=False)
  for j in (1, 2, 3):
    off = train['a'][:, :j] @ train['b'][:j] - (U[:, :j] * s[:j]) @ Vt[:j]
    assert np.linalg.norm(off) / np.linalg.norm(M) < 1e-2


def test_shrinking_is_monotone_in_the_threshold():
  start, seen = kernel(), []
  for threshold in (0.0, 0.1, 0.2, 0.3, 1e6):
    event = lrjax.maestro(shrink_every=2, threshold=threshold).events[1]
    assert [event.due(k) for k in range(5)] == [False, False, True, False, True]
    new, touched = event.weights(KEY, start, jnp.int32(2))
    assert not touched and new.train is start.train
    assert new.fixed['sampled'] == new.fixed['width']
    drawn, _ = event.weights(KEY, start._replace(fixed=widths(6, 2)), jnp.int32(2))
    assert drawn.fixed['sampled'] == min(2, drawn.fixed['width'])
    seen.append(int(new.fixed['width']))
  assert seen == sorted(seen, reverse=True) and seen[0] == 6 and seen[-1] == 0
  assert len({*seen}) > 2


def test_width_zero_gives_zeros_of_the_right_shape_unlike_the_public_convolution():
  p, split = lrjax.maestro(), narrowed(kernel(), 0)
  new, _ = p.events[0].weights(KEY, split, jnp.int32(1))
  assert new.fixed['sampled'] == 0
  y = p.apply(new, jnp.ones((2, 7, 10)))
  assert y.shape == (2, 7, 6) and not y.any()
  small = lrjax.compact(new)
  assert small.train['a'].shape == (10, 1) and not p.apply(small, X).any()


def test_every_width_is_drawn_equally_often_and_by_chance():
  split = narrowed(kernel(), 4)

  def draw(chance):
    event = lrjax.maestro(chance=chance).events[0]
    keys = jax.random.split(jax.random.key(3), 4000)
    one = lambda key: event.weights(key, split, jnp.int32(0))[0].fixed['sampled']
    return np.bincount(jax.jit(jax.vmap(one))(keys), minlength=7) / 4000

  # Three standard deviations.
  np.testing.assert_allclose(draw(1.0)[1:5], 0.25, atol=0.021)
  few = draw(0.2)
  np.testing.assert_allclose(few[1:5], [0.05, 0.05, 0.05, 0.85], atol=0.017)
  assert few[[0, 5, 6]].sum() == 0


def test_one_of_all_visits_every_width_once_where_the_public_code_rounds_up():
  most, kept = np.array([4, 25, 6]), jnp.array([3, 25, 0], jnp.int32)
  run = jax.jit(lambda k: one_of_all(KEY, k, kept, most))
  cycles = [[tuple(map(int, run(k))) for k in range(c, c + 28)] for c in (0, 28)]
  want = {(j, 25, 0) for j in range(1, 4)} | {(3, j, 0) for j in range(1, 26)}
  for cycle in cycles:
    # (3, 25, 0) is there for both kernels.
    assert {*cycle} == want and len(want) == 27
  assert cycles[0] != cycles[1]
  assert int(np.ceil(25 * (7 / 25))) == 8  # what the public sampler makes of j = 7


class Two(nnx.Module):
  """A scanned stack of two kernels, and one more."""

  def __init__(self, kernel):
    layer = lambda key: Dense(8, 8, kernel=kernel, rngs=nnx.Rngs(key))
    self.layers = nnx.vmap(layer)(jax.random.split(KEY, 2))
    self.down = Dense(8, 6, kernel=kernel, rngs=nnx.Rngs(1))

  def __call__(self, x):
    graphdef, state = nnx.split(self.layers)
    layer = lambda x, state: (jnp.tanh(nnx.merge(graphdef, state)(x)), None)
    return self.down(jax.lax.scan(layer, x, state)[0])


def test_a_model_is_sampled_evaluated_shrunk_and_compacted():
  """One more compilation, and the same outputs."""
  model = Two(lrjax.maestro(shrink_every=2, threshold=0.015))
  graphdef, params, fixed = split(model)
  plan, tx, compiled = kernels(model), optax.adam(1e-3), []
  x = jax.random.normal(KEY, (3, 8))

  @jax.jit
  def step(weights, k):
    compiled.append(k)
    weights, _ = lrjax.run_events(plan, {'sample'}, weights, k, tx=tx)

    def loss(params, fixed):
      y = nnx.merge(graphdef, params, fixed)(x)
      return jnp.mean((y - 1) ** 2), y

    grad = jax.value_and_grad(loss, has_aux=True)
    (_, sampled), g = grad(weights.params, weights.fixed)
    _, full = loss(weights.params, lrjax.full_width(weights.fixed))
    u, state = tx.update(g, weights.opt_state)
    params = optax.apply_updates(weights.params, u)
    return lrjax.Weights(params, weights.fixed, state), sampled, full

  weights = lrjax.Weights(params, fixed, tx.init(params))
  weights, sampled, full = step(weights, 0)
  np.testing.assert_allclose(full, model(x), rtol=1e-5, atol=1e-7)
  # Dropout is on, unlike in the public script.
  assert np.abs(sampled - full).max() > 0.01 * np.abs(full).max()
  shrink = jax.jit(lambda w, k: lrjax.run_events(plan, {'shrink'}, w, k, tx=tx)[0])
  weights = shrink(weights, 2)
  width = weights.fixed['layers']['fixed']['width']
  assert 0 < width[0] != width[1] and width.max() < 8
  small = lrjax.resize(plan, lrjax.compact, weights, tx=tx)
  kernel = small.params['layers']['kernel']
  assert kernel['a'].shape == (2, 8, width.max()) and kernel['b'].shape[-1] == 8
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(small.params) == shapes(small.opt_state[0].mu)
  assert shapes(small.fixed) == shapes(fixed)

  (whole, *before), (cut, *after) = (step(w, 3) for w in (weights, small))
  for a, b in zip(before, after):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  # The step was the same: moments of the kept columns came along.
  for i, w in enumerate(width):
    a, b = (tree.params['layers']['kernel']['a'][i, :, :w] for tree in (whole, cut))
    np.testing.assert_allclose(a, b, atol=1e-6)
  step(cut, 4)
  assert len(compiled) == 2


def test_the_papers_sampler_runs_over_a_whole_model():
  model = Two(lrjax.maestro(chance=0))
  _, params, fixed = split(model)
  plan = kernels(model)
  assert not lrjax.step_events(plan)
  draw = jax.jit(lambda k: lrjax.sample_widths(plan, params, fixed, k))
  below = []
  for k in range(8 + 8 + 6):
    drawn = draw(k)
    stack, one = (drawn[path]['fixed']['sampled'] for path in ('layers', 'down'))
    missing = [int(w) for w in (8 - stack[0], 8 - stack[1], 6 - one)]
    assert np.count_nonzero(missing) <= 1
    below.append(tuple(missing))
  assert len({*below}) == 7 + 7 + 5 + 1 and sorted(below)[:3] == [(0, 0, 0)] * 3
  with pytest.raises(ValueError, match='no kernel has a width'):
    lrjax.sample_widths({'q': lrjax.dense()}, {'q': {'kernel': X}}, {}, 0)


def test_the_runner_evaluates_at_full_width():
  built = program.build(tiny(kernel=Kernel('maestro')))
  draw = lambda x: jnp.asarray(np.random.default_rng(x.size).normal(0, 0.1, x.shape))
  params = jax.tree.map(lambda x: draw(x).astype(x.dtype), built.state['params'])
  tokens, mask = jnp.zeros((4, 17), jnp.int32), jnp.ones((4, 16))

  def nats(sampled):
    fixed = jax.tree.map(lambda x: jnp.full(x.shape, 12, x.dtype), built.state['fixed'])
    q = fixed['layers']['attn']['q']['fixed']
    q['sampled'] = jnp.full_like(q['width'], sampled)
    with jax.set_mesh(built.mesh):
      return float(built.evaluate(params, fixed, tokens, mask)[0])

  assert nats(3) == nats(12)


def test_a_projected_optimizer_starts_anew_where_its_matrix_is_cut():
  p = lrjax.maestro()
  train, other = kernel((16, 12)), kernel((16, 12), 1)
  params = {'q': {'kernel': train.train}, 'k': {'kernel': other.train}}
  fixed = {'q': {'fixed': widths(7)}, 'k': {'fixed': widths(12)}}
  tx = lrjax.scale_by_galore(3)
  state = jax.tree.map(lambda x: x + 1, tx.init(params))
  weights = lrjax.Weights(params, fixed, state)
  new = lrjax.resize({'q': p, 'k': p}, lrjax.compact, weights, tx=tx)
  slots = new.opt_state.slots
  fresh = tx.init(new.params).slots['q/kernel/a']._replace(overdue=jnp.int32(1))
  assert (
    fresh.state.basis.shape == (7, 3) != state.slots['q/kernel/a'].state.basis.shape
  )
  jax.tree.map(np.testing.assert_array_equal, slots['q/kernel/a'], fresh)
  kept = slots['k/kernel/a'], state.slots['k/kernel/a']
  jax.tree.map(np.testing.assert_array_equal, *kept)
  with pytest.raises(ValueError, match='tx'):
    lrjax.resize({'q': p}, lrjax.compact, weights)


@pytest.mark.parametrize('size', ['60m', '130m', '350m', '1b'])
def test_parameter_counts(size):
  """p (in + out) for each of the seven kernels, and the rest as in the dense model."""
  c = LLAMA_SIZES[size]
  D, F = c.hidden_size, c.intermediate_size
  layer = 2 * D + 4 * D * (D + D) + 3 * D * (D + F)
  build = lambda: Llama(c, kernel=lrjax.maestro(), rngs=nnx.Rngs(0))
  _, params, _ = split(nnx.eval_shape(build))
  got = sum(x.size for x in jax.tree.leaves(params))
  assert got == 2 * c.vocab_size * D + D + c.num_layers * layer


def test_bad_input():
  with pytest.raises(ValueError, match='rank must be at most min'):
    lrjax.maestro(7).init(KEY, (10, 6), jnp.float32)
  with pytest.raises(ValueError, match='chance'):
    lrjax.maestro(chance=1.5)
  with pytest.raises(ValueError, match='threshold'):
    lrjax.maestro(threshold=-1.0)
  with pytest.raises(ValueError, match='every'):
    lrjax.maestro(shrink_every=0)
