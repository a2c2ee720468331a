"""CoLA against its official code and closed forms; CoLA-M keeps what it should."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals
from parity.inputs import read

import lrjax
from lrjax.models import LLAMA_SIZES, Llama, LlamaConfig, next_token_loss
from lrjax.models.huggingface import to_hf
from lrjax.models.llama_params import stack_layers
from lrjax.modules.nnx import split

CONFIG = LlamaConfig(16, 8, 12, num_layers=2, num_heads=2, max_seq_len=8)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nested(flat):
  """Nested dicts of arrays by path, layers stacked."""
  tree = {}
  for path, x in flat.items():
    *way, name = [int(p) if p.isdigit() else p for p in path.split('/')]
    node = tree
    for part in way:
      node = node.setdefault(part, {})
    node[name] = x
  return stack_layers(tree)


def loss_of(config, tokens, rank=3):
  """params -> mean loss of a CoLA Llama, and its first params."""
  model = Llama(config, kernel=lrjax.cola(rank), rngs=nnx.Rngs(0))
  graphdef, params, rest = split(model)

  def loss(params):
    logits = nnx.merge(graphdef, params, rest)(tokens[:, :-1])
    nats, count = next_token_loss(logits, tokens[:, 1:])
    return nats / count

  return loss, params


def largest(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), got, want)
  return max(jax.tree.leaves(apart))


# The official code.


@pytest.mark.parametrize('gate_act, remat', [('silu', False), ('none', 'low_rank')])
def test_equals_the_official_code(gate_act, remat):
  meta, recorded = read('cola')
  assert meta['colam_apart'] == 0, 'CoLA and CoLA-M are one function'
  config = dataclasses.replace(CONFIG, gate_act=gate_act, remat=remat)
  weights = {k[8:]: x for k, x in recorded.items() if k.startswith('weights/')}
  loss, start = loss_of(config, recorded['tokens'])
  params = nested(weights)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, start)
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  sizes = [weights[n].size for n in sorted(weights)]
  parts = np.split(recorded[f'{gate_act}/grads'], np.cumsum(sizes)[:-1])
  pairs = zip(sorted(weights), parts)
  want = nested({n: g.reshape(weights[n].shape) for n, g in pairs})
  assert abs(value - recorded[f'{gate_act}/loss']) < 1e-6
  assert max(np.abs(g).max() for g in jax.tree.leaves(want)) > 0.1
  assert largest(grads, want) < 1e-6


# One kernel.


def test_gradients_equal_their_closed_form():
  split = lrjax.cola(5).init(jax.random.key(0), (12, 9), jnp.float32)
  x, g = normal(1, 7, 12), normal(2, 7, 9)
  apply = lambda train, x: lrjax.cola(5).apply(split._replace(train=train), x)
  y, pull = jax.vjp(apply, split.train, x)
  a, b = (np.asarray(split.train[n], np.float64) for n in 'ab')
  z = x @ a
  sigma = 1 / (1 + np.exp(-z))
  gz = (g @ b.T) * sigma * (1 + z * (1 - sigma))
  want = {'a': x.T @ gz, 'b': (z * sigma).T @ g}, gz @ a.T
  np.testing.assert_allclose(y, z * sigma @ b, atol=1e-5)
  assert largest(pull(jnp.asarray(g)), want) < 1e-5


def test_starts_with_the_spread_of_the_paper():
  p, shape, r = lrjax.cola(128, act=None), (512, 512), 128
  split = p.init(jax.random.key(0), shape, jnp.float32)
  for factor in split.train.values():
    assert abs(factor.std() / 0.052556 - 1) < 0.01
  assert abs(p.materialize(split).std() / 1024**-0.5 - 1) < 0.01
  x = normal(3, 200, 512)
  assert abs(p.apply(split, x).std() / 0.5**0.5 - 1) < 0.02
  wide = lrjax.cola(r).init(jax.random.key(0), (300, 700), jnp.float32)
  assert abs(wide.train['b'].std() / (r * 1000) ** -0.25 - 1) < 0.01


def test_without_a_nonlinearity_it_is_the_factorized_kernel():
  p, q = lrjax.cola(4, act=None), lrjax.factorized(4)
  split = p.init(jax.random.key(0), (12, 16), jnp.float32)
  x = normal(1, 5, 12)
  np.testing.assert_array_equal(p.apply(split, x), q.apply(split, x))
  np.testing.assert_array_equal(p.materialize(split), q.materialize(split))


@pytest.mark.parametrize('act', ['silu', 'relu', 'gelu'])
@pytest.mark.parametrize('rank', [6, 7, 1])
def test_dense_comes_in_as_a_linear_function(act, rank):
  p, W, x = lrjax.cola(rank, act=act), normal(4, 12, 9), normal(5, 30, 12)
  split, error = p.from_dense(jax.random.key(0), W)
  U, s, Vt = np.linalg.svd(W)
  best = (U[:, : rank // 2] * s[: rank // 2]) @ Vt[: rank // 2]
  np.testing.assert_allclose(p.apply(split, x), x @ best, atol=2e-5)  # entries of 10
  lost = np.linalg.norm(s[rank // 2 :]) / np.linalg.norm(s)
  np.testing.assert_allclose(error, lost, atol=1e-6)
  # Every unit learns: none has both factors at zero.
  a, b = split.train['a'], split.train['b']
  assert ((jnp.abs(a).max(0) > 0) | (jnp.abs(b).max(1) > 0)).all()


def test_no_rank_makes_it_linear():
  p = lrjax.cola(9)
  assert p.materialize is None
  split, x = p.init(jax.random.key(0), (12, 9), jnp.float32), normal(1, 5, 12)
  assert jnp.abs(p.apply(split, 2 * x) - 2 * p.apply(split, x)).max() > 0.1
  params = {'q': {'kernel': split.train}}
  with pytest.raises(ValueError, match='q: its kernel is not linear'):
    lrjax.export({'q': p}, params, {})


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="'silu', 'relu', 'gelu', got 'tanh'"):
    lrjax.cola(4, act='tanh')
  with pytest.raises(ValueError, match=r'min\(in, out\) = 9 .*got 10'):
    lrjax.cola(10).init(jax.random.key(0), (12, 9), jnp.float32)
  with pytest.raises(ValueError, match='at least 1, got 0'):
    lrjax.cola(0).from_dense(jax.random.key(0), jnp.ones((3, 3)))


# Models.


@pytest.mark.parametrize(
  'size, rank, millions',
  [
    ('60m', 128, 42.77),
    ('130m', 256, 94.0),
    ('350m', 256, 185.22),
    ('1b', 512, 609.31),
  ],
)
def test_published_sizes(size, rank, millions):
  c = LLAMA_SIZES[size]
  make = lambda: Llama(c, kernel=lrjax.cola(rank), rngs=nnx.Rngs(0))
  count = sum(x.size for x in jax.tree.leaves(split(nnx.eval_shape(make))[1]))
  D, F, L = c.hidden_size, c.intermediate_size, c.num_layers
  kernels = rank * (11 * D + 3 * F)
  assert count == L * (kernels + 2 * D) + D + 2 * c.vocab_size * D
  assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize('gate_act, number', [('silu', 8), ('none', 7)])
def test_number_of_nonlinearities_in_a_layer(gate_act, number):
  config = dataclasses.replace(CONFIG, gate_act=gate_act)
  loss, params = loss_of(config, jnp.zeros((1, 5), jnp.int32))
  assert str(jax.make_jaxpr(loss)(params)).count('name=silu') == number


@pytest.mark.parametrize(
  'change, message',
  [
    ({'remat': 'lowrank'}, "remat must be a bool or one of low_rank, got 'lowrank'"),
    ({'gate_act': 'relu'}, "gate_act must be one of silu, none, got 'relu'"),
  ],
)
def test_unknown_choices_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_a_model_without_its_gate_is_no_transformers_llama():
  with pytest.raises(ValueError, match="gate_act must be 'silu', got 'none'"):
    to_hf(dataclasses.replace(CONFIG, gate_act='none'))


def test_grouped_queries_have_narrow_keys_and_values():
  """The official model gives k and v the width of q and fails with fewer heads."""
  config = dataclasses.replace(CONFIG, num_kv_heads=1)
  tokens = jnp.asarray(read('cola')[1]['tokens'])
  loss, params = loss_of(config, tokens)
  assert params['layers']['attn']['k']['kernel']['b'].shape == (2, 3, 4)
  assert jnp.isfinite(jax.jit(loss)(params))


# CoLA-M.

WIDE = LlamaConfig(16, 32, 48, num_layers=6, num_heads=4)
BATCH = jax.random.randint(jax.random.key(5), (4, 33), 0, 16)


def test_recomputation_changes_memory_and_nothing_else():
  """One tree, where the official CoLA-M cannot read the checkpoints of CoLA."""
  results, temporary = {}, {}
  for remat in (False, 'low_rank'):
    loss, params = loss_of(dataclasses.replace(WIDE, remat=remat), BATCH, rank=4)
    run = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    results[remat] = params, run(params)
    temporary[remat] = run.memory_analysis().temp_size_in_bytes
  assert largest(*results.values()) < 1e-6
  assert temporary['low_rank'] < temporary[False] / 4, temporary


def test_kept_are_seven_thin_activations_and_the_residual_stream_twice(capsys):
  loss, params = loss_of(dataclasses.replace(WIDE, remat='low_rank'), BATCH, rank=4)
  print_saved_residuals(loss, params)
  kept = re.findall(r'f32\[6,4,32,(\d+)\] output of scan', capsys.readouterr().out)
  assert sorted(map(int, kept)) == [4] * 7 + [32] * 2
