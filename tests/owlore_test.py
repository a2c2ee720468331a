"""OwLore: scores, probabilities, what decays, and what its state costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import matrix

import lrjax
from experiments.memory import abstract_params
from lrjax.models.llama_config import LLAMA_SIZES
from lrjax.testing import trajectory


def model(layers=4, outliers=(3, 0, 1, 2)):
  """Stacked layers of ones, of which some entries are outliers."""
  up, down = np.ones((layers, 64, 8)), np.ones((layers, 8, 64))
  for i, n in enumerate(outliers):
    up[i, :n, 0] = 1e3
    down[i, 0, :n] = 1e3
  kernels = {
    'up': {'kernel': jnp.asarray(up, jnp.float32)},
    'down': {'kernel': jnp.asarray(down, jnp.float32)},
  }
  layers = kernels | {'norm': {'scale': jnp.ones((layers, 8))}}
  return {'layers': layers, 'head': jnp.ones((8, 8))}


def test_outlier_ratio_in_closed_form():
  W = jnp.ones((64, 16))
  assert float(lrjax.outlier_ratio(W)) == 0
  norms = jnp.ones(64).at[5].set(1e3)
  assert float(lrjax.outlier_ratio(W, norms)) == 1 / 64
  x = jax.random.t(jax.random.key(0), 1.5, (64, 64))
  at = [float(lrjax.outlier_ratio(x, M=m)) for m in (0.0, 1.0, 3.0, 13.0, 100.0)]
  assert at == sorted(at, reverse=True) and at[0] == 1 and 0 < at[3] < 0.1
  # A power of two, so that no entry crosses the threshold by rounding.
  assert float(lrjax.outlier_ratio(1024 * x)) == at[3]
  both = lrjax.outlier_ratio(jnp.stack([W, W.at[0, 0].set(1e3)]))
  np.testing.assert_array_equal(both, [0, 1 / 1024])


def test_scores_are_means_over_the_kernels_of_a_layer():
  params = model()
  want = np.array([3, 0, 1, 2]) / 512
  np.testing.assert_allclose(lrjax.outlier_scores(params), want)
  layer = lambda i: jax.tree.map(lambda x: x[i], params['layers'])
  split = params | {'layers': [layer(i) for i in range(4)]}
  np.testing.assert_allclose(lrjax.outlier_scores(split), want)
  quiet = {
    'layers/up/kernel': jnp.zeros((4, 64)),
    'layers/down/kernel': jnp.ones((4, 8)),
  }
  for tree in (params, split):
    np.testing.assert_allclose(lrjax.outlier_scores(tree, quiet), want / 2)
  with pytest.raises(ValueError, match='no kernel belongs to a layer'):
    lrjax.outlier_scores({'layers': {'norm': jnp.ones((2, 3))}})


@pytest.mark.parametrize(
  ('mode', 'want'),
  [
    ('outliers', [3, 0, 1, 2]),
    ('reverse', [0, 3, 2, 1]),
    ('decrease', [4, 3, 2, 1]),
    ('increase', [1, 2, 3, 4]),
  ],
)
def test_modes_are_probabilities(mode, want):
  tx = lrjax.scale_by_owlore(2, 3, None, probabilities=mode)
  for init in (tx.init, jax.jit(tx.init)):
    got = jnp.exp(init(model()).log_probabilities)
    np.testing.assert_allclose(got, np.array(want) / sum(want), atol=1e-6)


def test_without_outliers_all_layers_are_alike():
  params = model(outliers=())
  for mode in ('outliers', 'reverse'):
    state = lrjax.scale_by_owlore(2, 3, None, probabilities=mode).init(params)
    assert len(np.unique(state.log_probabilities)) == 1
    assert np.isfinite(state.log_probabilities).all()
  assert (
    lrjax.scale_by_owlore(probabilities='uniform')
    .init(model(8, range(8)))
    .log_probabilities
    == ()
  )


def test_layers_with_more_outliers_train_more():
  params = model()
  tx = lrjax.sampled_layers(
    lrjax.adam(), 1, 1, probabilities=lambda p: lrjax.outlier_scores(p)
  )
  state, update, seen = tx.init(params), jax.jit(tx.update), np.zeros(4)
  for _ in range(300):
    _, state = update(params, state)
    seen[np.asarray(state.active)] += 1
  # Standard error at most 0.03.
  np.testing.assert_allclose(seen / 300, [0.5, 0, 1 / 6, 1 / 3], atol=0.1)
  assert seen[1] == 0


@pytest.mark.parametrize(
  'mask', [None, lambda p: jax.tree.map(lambda x: x.ndim > 2, p)]
)
def test_frozen_layers_keep_their_bits_and_active_ones_decay(mask):
  params = jax.tree.map(lambda x: 1.5 * x, model())
  grads = jax.tree.map(lambda x: matrix(x.shape), params)
  shared = dict(n_active=2, period=9, rank=None, probabilities='uniform')
  undecayed = lrjax.owlore(0.1, **shared)
  tx = lrjax.owlore(0.1, **shared, weight_decay=0.5, mask=mask)
  (u,), state = trajectory(tx, params, [grads])
  (bare,), _ = trajectory(undecayed, params, [grads])
  on = np.asarray(state[0].active)
  off = np.setdiff1d(range(4), on)
  moved = jax.tree.map(lambda p, u: p + u, params, u)
  for name in ('up', 'down', 'norm'):
    new, old, got, plain = (
      jax.tree.leaves(tree['layers'][name])[0] for tree in (moved, params, u, bare)
    )
    assert new[off].tobytes() == old[off].tobytes()
    decays = mask is None or name != 'norm'
    want = plain[on] - 0.1 * 0.5 * decays * old[on]
    np.testing.assert_allclose(got[on], want, atol=1e-6)
  want = bare['head'] - 0.1 * 0.5 * (mask is None) * params['head']
  np.testing.assert_allclose(u['head'], want, atol=1e-6)


def expected(config, n, rank):
  """State bytes of OwLore with Adam on a LLaMA, float32, by the docstring's formula."""
  h, f, L = config.hidden_size, config.intermediate_size, config.num_layers
  kernels = [(h, h)] * 4 + [(h, f)] * 3
  if rank is None:
    numbers = sum(2 * a * b for a, b in kernels)
    counters = 1  # of Adam
  else:
    # A basis and two moments; overdue and Adam's count for each matrix.
    numbers = sum(rank * a + 2 * rank * b + 2 for a, b in kernels)
    counters = 3  # steps, skipped, and the count of Adam for the norms
  numbers = n * (numbers + 2 * 2 * h) + counters
  outside = 2 * (2 * config.vocab_size * h + h) + 1
  flag = rank is not None
  return 4 * (numbers + outside + 2 + n + L) + flag


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize(('size', 'rank'), [('smoke', 16), ('60m', 128), ('60m', None)])
def test_state_bytes_are_those_of_the_formula(size, rank, scan):
  config = dataclasses.replace(LLAMA_SIZES[size], scan_layers=scan)
  params = abstract_params(config, 'float32')
  tx = lrjax.scale_by_owlore(2, 50, rank)
  report = lrjax.coverage(tx, params)
  assert report.state_bytes == expected(config, 2, rank)
  layers = sum(r.state_bytes for r in report.rows if r.path.startswith('layers'))
  outside = 2 * 4 * (2 * config.vocab_size + 1) * config.hidden_size
  small = 4 * (2 + 2 + config.num_layers + 1) + (4 if rank is None else 13)
  assert layers + outside + small == report.state_bytes
  if size == '60m' and rank is None:
    # A quarter of the layers: a quarter of their Adam.
    assert layers == (report.adam_bytes - outside) / 4


def test_kept_states_cost_as_much_as_all_layers():
  params = abstract_params(LLAMA_SIZES['smoke'], 'float32')
  cost = lambda **kw: (
    lrjax.coverage(lrjax.scale_by_owlore(1, 50, None, **kw), params).state_bytes
  )
  L, h, f = 2, 64, 176
  one = 4 * 2 * (4 * h * h + 3 * h * f + 2 * h)
  assert cost(compact=False) - cost() == (L - 1) * one + 4 * (L - 1)


def test_bad_modes_are_refused():
  with pytest.raises(ValueError, match=r"'outlier'; did you mean 'outliers'.*uniform"):
    lrjax.owlore(0.1, probabilities='outlier')
  with pytest.raises(ValueError, match='allowed: 1 to 4'):
    lrjax.owlore(0.1, n_active=5).init(model())
  with pytest.raises(ValueError, match=r'`outlier_threshold`.*got -1'):
    lrjax.owlore(0.1, outlier_threshold=-1)
  with pytest.raises(ValueError, match='params'):
    tx = lrjax.owlore(0.1, n_active=2, rank=None, weight_decay=0.1)
    jax.eval_shape(tx.update, model(), tx.init(model()))
