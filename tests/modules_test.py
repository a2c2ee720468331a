"""The flax shells: paths, casting, and that NNX and linen compute the same."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lrjax
import lrjax.modules.linen as linen
from lrjax.modules.nnx import Dense, Fixed, split
from lrjax.parameterizations import dense
from lrjax.types import Parameterization, Split


def gathered(rank):
  """y = (x[index] a) b + x W: a dict to train; floats and integers that are fixed."""

  def init(key, shape, dtype):
    keys = jax.random.split(key, 4)
    draw = lambda i, *shape: jax.random.normal(keys[i], shape, dtype) / 4
    train = {'a': draw(0, shape[0], rank), 'b': draw(1, rank, shape[1])}
    index = jax.random.permutation(keys[3], shape[0])
    return Split(train, {'kernel': draw(2, *shape), 'index': index})

  def apply(split, x):
    low = jnp.take(x, split.fixed['index'], axis=-1) @ split.train['a']
    return low @ split.train['b'] + x @ split.fixed['kernel']

  axes = {
    'a': ('in', None),
    'b': (None, 'out'),
    'kernel': ('in', 'out'),
    'index': ('in',),
  }
  return Parameterization(init, None, apply, axes=axes)


def paired():
  """Train and fixed hold the same draw."""

  def init(key, shape, dtype):
    W = jax.random.normal(key, shape, dtype)
    return Split(W, {'copy': W})

  return Parameterization(init, None, lambda split, x: x @ split.train)


KERNELS = {'dense': dense(), 'gathered': gathered(2)}
kernels = pytest.mark.parametrize('kernel', KERNELS.values(), ids=KERNELS)
X = jax.random.normal(jax.random.key(9), (2, 5, 8))


def paths(tree):
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return [name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def test_a_bare_kernel_is_one_param():
  layer = Dense(8, 6, rngs=nnx.Rngs(0))
  _, params, rest = split(layer)
  assert paths(params) == ['kernel'] and paths(rest) == []
  np.testing.assert_allclose(layer(X), X @ params['kernel'], atol=1e-6)


def test_a_dict_kernel_is_one_param_per_entry_and_fixed_arrays_are_apart():
  layer = Dense(8, 6, kernel=gathered(2), rngs=nnx.Rngs(0))
  _, params, rest = split(layer)
  assert paths(params) == ['kernel/a', 'kernel/b']
  assert paths(rest) == ['fixed/index', 'fixed/kernel']
  assert isinstance(layer.fixed['index'], Fixed)


def test_bias_only_when_asked():
  layer = Dense(8, 6, use_bias=True, rngs=nnx.Rngs(0))
  layer.bias[...] = jnp.arange(6.0)
  np.testing.assert_allclose(
    layer(X), np.asarray(X @ layer.kernel[...]) + np.arange(6), atol=1e-6
  )


@kernels
def test_computes_in_dtype_and_stores_in_param_dtype(kernel):
  layer = Dense(8, 6, kernel=kernel, dtype='bfloat16', rngs=nnx.Rngs(0))
  assert layer(X).dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(split(layer)[1])} == {jnp.dtype('float32')}
  stored = Dense(8, 6, kernel=kernel, param_dtype='bfloat16', rngs=nnx.Rngs(0))
  assert {x.dtype for x in jax.tree.leaves(split(stored)[1])} == {jnp.dtype('bfloat16')}
  assert stored(X).dtype == jnp.float32  # no dtype: the usual promotion


@kernels
def test_split_and_merge_give_the_model_back(kernel):
  layer = Dense(8, 6, kernel=kernel, rngs=nnx.Rngs(0))
  graphdef, params, rest = split(layer)
  np.testing.assert_array_equal(nnx.merge(graphdef, params, rest)(X), layer(X))
  grads = jax.grad(lambda p: nnx.merge(graphdef, p, rest)(X).sum())(params)
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@kernels
def test_linen_computes_what_nnx_computes(kernel):
  layer = linen.Dense(6, kernel=kernel)
  variables = layer.init(jax.random.key(0), X)
  ours = Dense(8, 6, kernel=kernel, rngs=nnx.Rngs(0))
  nnx.update(ours, {'kernel': variables['params']['kernel']})
  if 'fixed' in variables:
    nnx.update(ours, {'fixed': variables['fixed']['fixed']})
  np.testing.assert_array_equal(layer.apply(variables, X), ours(X))


def test_linen_draws_both_parts_from_one_key():
  variables = linen.Dense(6, kernel=paired()).init(jax.random.key(0), X)
  kernel, fixed = variables['params']['kernel'], variables['fixed']['fixed']
  np.testing.assert_array_equal(kernel, fixed['copy'])


def test_linen_scan_reads_the_fixed_collection():
  class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return linen.Dense(8, kernel=gathered(2), name='layer')(x), None

  stack = nn.scan(
    Step, {'params': 0, 'fixed': 0}, split_rngs={'params': True}, length=3
  )()
  variables = stack.init(jax.random.key(0), X, None)
  y = X
  for i in range(3):
    layer = jax.tree.map(lambda a, i=i: a[i], variables)
    scope = {name: collection['layer'] for name, collection in layer.items()}
    y = linen.Dense(8, kernel=gathered(2)).apply(scope, y)
  np.testing.assert_allclose(stack.apply(variables, X, None)[0], y, atol=1e-5)


def test_linen_says_when_fixed_arrays_are_missing():
  layer = linen.Dense(6, kernel=gathered(2))
  params = layer.init(jax.random.key(0), X)['params']
  with pytest.raises(ValueError, match="beside 'params'"):
    layer.apply({'params': params}, X)


def test_linen_says_what_to_list_where_collections_are_listed():
  class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return linen.Dense(8, kernel=gathered(2), name='layer')(x), None

  rngs = {'params': True}
  for lifted in (
    nn.scan(Step, {'params': 0}, split_rngs=rngs, length=3),
    nn.vmap(Step, {'params': 0}, split_rngs=rngs, in_axes=(0, None)),
    nn.remat(Step, variables='params'),
  ):
    with pytest.raises(
      ValueError, match="layer: the collection 'fixed' does not reach"
    ):
      lifted().init(jax.random.key(0), X, None)
  assert 'fixed' in jax.eval_shape(nn.remat(Step)().init, jax.random.key(0), X, None)


@pytest.mark.parametrize('precision', ['highest', jax.lax.Precision.HIGHEST])
def test_precision_is_that_of_all_products(precision):
  ours = Dense(8, 6, kernel=gathered(2), precision=precision, rngs=nnx.Rngs(0))
  layer = linen.Dense(6, kernel=gathered(2), precision=(precision, precision))
  variables = layer.init(jax.random.key(0), X)
  for lowered in (
    nnx.jit(lambda m, x: m(x)).lower(ours, X),
    jax.jit(layer.apply).lower(variables, X),
  ):
    assert lowered.as_text().count('[HIGHEST, HIGHEST]') == 3
  with pytest.raises(ValueError, match='one precision'):
    linen.Dense(6, precision=('highest', 'default')).init(jax.random.key(0), X)


def test_dense_parameterization():
  W = jnp.arange(6.0).reshape(2, 3)
  kernel = dense(jax.nn.initializers.ones)
  made, error = kernel.from_dense(jax.random.key(0), W)
  assert error == 0
  np.testing.assert_array_equal(kernel.materialize(made), W)
  np.testing.assert_array_equal(
    kernel.apply(made, jnp.ones((4, 2))), jnp.ones((4, 2)) @ W
  )
  drawn = kernel.init(jax.random.key(0), (2, 3), jnp.bfloat16).train
  assert drawn.dtype == jnp.bfloat16 and (drawn == 1).all()
  drawn = dense().init(jax.random.key(0), (200, 300), jnp.float32).train
  np.testing.assert_allclose(drawn.std(), 0.02, rtol=0.02)  # 60 000 draws


def test_nnx_optimizer_steps_like_a_plain_tree():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
      return self.down(nnx.gelu(self.up(x)))

  x = jax.random.normal(jax.random.key(0), (8, 16))
  loss = lambda model: jnp.mean((model(x) - x) ** 2)
  tx = lrjax.galore(1e-2, rank=4, update_proj_gap=3)
  model = Model(nnx.Rngs(0))
  graphdef, params, rest = split(model)
  optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(params)

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))

  @jax.jit
  def plain_step(params, state):
    grads = jax.grad(lambda p: loss(nnx.merge(graphdef, p, rest)))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(5):
    step(model, optimizer)
    params, state = plain_step(params, state)
  chex.assert_trees_all_close(split(model)[1], params, atol=1e-6)
