"""The layer-wise update: the numbers of the ordinary step, without its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lrjax
from lrjax.models import Llama, LlamaConfig, next_token_loss
from lrjax.models.llama_parts import llama_parts
from lrjax.modules.nnx import split

SIZES = dict(
  vocab_size=23, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 2, 9), 0, 23)
DEPTH, WIDTH = 16, 64


def mean_loss(logits, batch):
  nats, count = next_token_loss(logits, batch[:, 1:])
  return nats / count, count


def llama(**config):
  """The parts of a small Llama, its parameters, and its ordinary loss."""
  model = Llama(LlamaConfig(**SIZES, **config), rngs=nnx.Rngs(0))
  graphdef, params, rest = split(model)
  loss = lambda params, batch: mean_loss(
    nnx.merge(graphdef, params, rest)(batch[:, :-1]), batch
  )
  return llama_parts(model, mean_loss, lambda batch: batch[:, :-1]), params, loss


def ordinary(loss, tx, clip=None):
  @jax.jit
  def step(params, state, batch):
    (value, aux), g = jax.value_and_grad(loss, has_aux=True)(params, batch)
    if clip is not None:
      g = clip(g)
    u, state = tx.update(g, state, params)
    return optax.apply_updates(params, u), state, value, aux

  return step


def deep():
  """A stack of residual layers; parts, parameters, batches, ordinary loss."""
  parts = lrjax.Parts(
    embed=lambda rest, batch: (batch @ rest['in']['kernel'], None),
    layer=lambda p, x, shared, index: x + jnp.tanh(x @ p['kernel']),
    head=lambda rest, x, batch: (jnp.mean(x**2), None),
  )
  draw = lambda seed, *shape: 0.1 * jax.random.normal(jax.random.key(seed), shape)
  params = {
    'layers': {'kernel': draw(0, DEPTH, WIDTH, WIDTH)},
    'in': {'kernel': draw(1, 5, WIDTH)},
  }

  def loss(params, batch):
    x, shared = parts.embed(params, batch)
    run = lambda x, p: (parts.layer(p, x, shared, 0), None)
    return parts.head(params, jax.lax.scan(run, x, params['layers'])[0], batch)

  return parts, params, draw(2, 4, 3, 5), loss


def assert_same_run(train, step, init, params, batches):
  """Steps both ways; losses, parameters and aux agree."""
  ours, theirs = (params, train.init(params)), (params, init(params))
  layered = jax.jit(train.step)
  for batch in batches:
    *ours, loss, aux = layered(*ours, batch)
    *theirs, want, want_aux = step(*theirs, batch)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert aux == want_aux
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(close, ours[0], theirs[0])


# Adam's first steps are signs, which divide rounding by itself; with this eps they are
# not.
ADAM = lrjax.adam(eps=1e-3)
OPTIMIZERS = {
  'sgd': optax.sgd(0.1),
  'adam': optax.chain(ADAM, optax.scale(-1e-2)),
  # Three examples make gradients of rank three; a fourth direction would be noise.
  'galore': lrjax.galore(1e-2, 2, 2, base_optimizer=ADAM, weight_decay=0.1),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_equals_the_ordinary_step(name):
  parts, params, batches, loss = deep()
  tx = OPTIMIZERS[name]
  train = lrjax.layerwise(parts, tx, tx)
  assert_same_run(train, ordinary(loss, tx), tx.init, params, batches)


@pytest.mark.parametrize('tied', [False, True])
def test_llama_takes_the_ordinary_step(tied):
  parts, params, loss = llama(tie_embeddings=tied)
  layers, rest = OPTIMIZERS['galore'], optax.sgd(0.1)
  label = lambda params: {k: 'layers' if k == 'layers' else 'rest' for k in params}
  both = optax.partition(dict(layers=layers, rest=rest), label)
  train = lrjax.layerwise(parts, layers, rest)
  assert_same_run(train, ordinary(loss, both), both.init, params, TOKENS)


def test_two_passes_clip_the_norm_of_all_gradients():
  parts, params, batches, loss = deep()
  tx, max_norm = optax.sgd(1.0), 0.05
  train = lrjax.layerwise(parts, tx, tx, max_norm=max_norm)
  clip = lambda g: optax.clip_by_global_norm(max_norm).update(g, optax.EmptyState())[0]
  step = ordinary(loss, tx, clip)
  assert_same_run(train, step, tx.init, params, batches)


def test_a_clip_inside_looks_at_one_layer():
  parts, params, batches, loss = deep()
  clip, tx = optax.clip_by_global_norm(0.01), optax.sgd(1.0)
  train = lrjax.layerwise(parts, optax.chain(clip, tx), tx)

  def per_layer(g):
    one = lambda layer: clip.update(layer, optax.EmptyState())[0]
    return g | {'layers': jax.vmap(one)(g['layers'])}

  step = ordinary(loss, tx, per_layer)
  assert_same_run(train, step, tx.init, params, batches)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_gradients_of_the_stack_never_exist(name):
  parts, params, batches, loss = deep()
  tx = OPTIMIZERS[name]
  train = lrjax.layerwise(parts, tx, tx)

  def temporaries(step, state):
    donated = jax.jit(step, donate_argnums=(0, 1))
    return donated.lower(params, state, batches[0]).compile().memory_analysis()

  ours = temporaries(train.step, train.init(params)).temp_size_in_bytes
  theirs = temporaries(ordinary(loss, tx), tx.init(params)).temp_size_in_bytes
  gradients = params['layers']['kernel'].nbytes
  # One row of parameters and state travels with the loop, two of each for a while.
  assert theirs - ours > gradients * (DEPTH - 1) / DEPTH - 4 * gradients / DEPTH
  assert ours < gradients / 2


def test_layers_draw_different_sketches():
  parts, params, batches, _ = deep()
  same = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), params['layers'])
  params = params | {'layers': same}
  make = lambda index: lrjax.galore(0.1, 2, basis='randomized_svd', seed=index)
  train = lrjax.layerwise(parts, make, optax.sgd(0.1))
  _, state, _, _ = jax.jit(train.step)(params, train.init(params), batches[0])
  leaves = jax.tree.leaves(state.layers)
  bases = np.asarray(next(x for x in leaves if x.shape == (DEPTH, WIDTH, 2)))
  gaps = np.abs(bases[1:] - bases[:-1]).max(axis=(1, 2))
  assert (gaps > 0).all()


def test_one_sketch_for_all_layers_is_refused():
  parts, params, _, _ = deep()
  random = lrjax.galore(0.1, 2, basis='randomized_svd')
  for layers in (random, lambda index: random):
    train = lrjax.layerwise(parts, layers, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r'same ones for every layer.*seed=index'):
      train.init(params)


def test_the_index_reaches_the_layer():
  parts = lrjax.Parts(
    embed=lambda rest, batch: (batch, jnp.float32(2)),
    layer=lambda p, x, shared, index: x + shared * index * p,
    head=lambda rest, x, batch: (x, None),
  )
  train = lrjax.layerwise(parts, optax.sgd(1.0), optax.sgd(1.0))
  params = {'layers': jnp.ones(4)}
  params, _, loss, _ = train.step(params, train.init(params), jnp.zeros(()))
  np.testing.assert_array_equal(loss, 12.0)
  np.testing.assert_array_equal(params['layers'], [1.0, -1.0, -3.0, -5.0])


def test_init_works_on_abstract_parameters():
  parts, params, _, _ = deep()
  train = lrjax.layerwise(parts, lrjax.galore(0.1, rank=4), optax.adam(0.1))
  abstract = jax.eval_shape(train.init, params)
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert types(abstract) == types(train.init(params))


def test_bad_input_is_named():
  parts, params, _, _ = deep()
  sgd = optax.sgd(0.1)
  with pytest.raises(TypeError, match=r'`layers` must be an optax.*got 3'):
    lrjax.layerwise(parts, 3, sgd)
  with pytest.raises(ValueError, match=r'`max_norm`.*got -1'):
    lrjax.layerwise(parts, sgd, sgd, max_norm=-1)
  train = lrjax.layerwise(parts, sgd, sgd)
  with pytest.raises(ValueError, match=r"an entry `layers`, got \['in'\]"):
    train.init({'in': params['in']})
  uneven = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 3))}
  with pytest.raises(ValueError, match=r"same leading axis.*'b': \(3,\)"):
    train.init({'layers': uneven})
  with pytest.raises(ValueError, match=r'stack the layers'):
    train.init({'layers': {'a': jnp.ones(())}})
  model = Llama(LlamaConfig(**SIZES, scan_layers=False), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r'scan_layers=True'):
    llama_parts(model, mean_loss)
