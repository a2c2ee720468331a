"""Models that know nothing of lrjax, their dense layers swapped by rules on paths."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import lrjax
import lrjax.modules.linen_swap as linen_swap
import lrjax.modules.nnx_swap as nnx_swap
from lrjax.modules.nnx import Dense, Fixed, kernels, split
from lrjax.parameterizations import factors
from lrjax.types import Event, Parameterization, Split


@factors.value
def merged(rank, every=2):
  """y = x K + (x[index] a) b with fixed K and index; an event moves ab into K."""

  def around(key, K):
    n, m = K.shape
    train = {'a': jax.random.normal(key, (n, rank), K.dtype) / 4}
    train['b'] = jnp.zeros((rank, m), K.dtype)
    return Split(train, {'kernel': K, 'index': jax.random.permutation(key, n)})

  def init(key, shape, dtype):
    return around(key, jax.random.normal(key, shape, dtype) / shape[0] ** 0.5)

  def apply(s, x):
    low = jnp.take(x, s.fixed['index'], axis=-1) @ s.train['a']
    return low @ s.train['b'] + x @ s.fixed['kernel']

  def materialize(s):
    rows = jnp.zeros_like(s.train['a']).at[s.fixed['index']].set(s.train['a'])
    return s.fixed['kernel'] + factors.product(rows, s.train['b'])

  def merge(key, s, k):
    train = s.train | {'b': jnp.zeros_like(s.train['b'])}
    return Split(train, {**s.fixed, 'kernel': materialize(s)}), {'b': True}

  return Parameterization(
    init=init,
    from_dense=lambda key, W: (around(key, W), jnp.float32(0)),
    apply=apply,
    materialize=materialize,
    axes={
      'a': ('in', None),
      'b': (None, 'out'),
      'kernel': ('in', 'out'),
      'index': ('in',),
    },
    events=(Event('merge', merge, factors.periodic(every)),),
  )


D, F = 8, 12
X = jax.random.normal(jax.random.key(9), (4, 6, D))
Y = jnp.roll(X, 1, axis=1)
OPTIMIZERS = {
  'adam': optax.adam(1e-2),
  'galore': lrjax.galore(1e-2, rank=2, update_proj_gap=3),
}
optimizers = pytest.mark.parametrize('tx', OPTIMIZERS.values(), ids=OPTIMIZERS)
RULES = [('up', lrjax.factorized(D, restart_every=2)), ('qkv|down', merged(2))]


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(D, rngs=rngs)
    self.up = nnx.Linear(D, F, rngs=rngs)
    self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return x + self.dropout(self.down(nnx.gelu(self.up(self.norm(x)))))


class NnxModel(nnx.Module):
  """Layers of a list and a scanned stack, a layer in two places, dropout, a head."""

  def __init__(self, rngs):
    self.first = nnx.List([NnxBlock(rngs)])
    self.blocks = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(params=key, dropout=key)))(
      jax.random.split(rngs.params(), 3)
    )
    self.head = nnx.Linear(D, D, rngs=rngs)
    self.twice = self.head

  def __call__(self, x):
    for block in self.first:
      x = block(x)
    scan = nnx.scan(
      lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
    )
    return self.head(self.twice(scan(self.blocks, x)))


class Block(nn.Module):
  """A transformer block; returns a pair, as nn.scan wants it."""

  @nn.compact
  def __call__(self, x, _):
    heads = nn.Dense(3 * D, name='qkv')(nn.LayerNorm()(x)).reshape(*x.shape[:2], 2, -1)
    x = x + nn.dot_product_attention(*jnp.split(heads, 3, -1)).reshape(x.shape)
    h = nn.gelu(nn.Dense(F, name='up')(nn.LayerNorm()(x)))
    return x + nn.Dense(D, name='down', use_bias=False)(h), None


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, x):
    block = nn.remat(Block, prevent_cse=False)
    scan = nn.scan(block, {'params': 0}, split_rngs={'params': True}, length=3)
    return nn.Dense(D, name='head')(scan(name='layers')(x, None)[0])


class MLP(nn.Module):
  """Layers made in setup, in a list and without a name."""

  def setup(self):
    self.hidden = [nn.Dense(F, name=f'up{i}') for i in range(2)]
    self.norm = nn.BatchNorm(use_running_average=False)

  @nn.compact
  def __call__(self, x):
    for layer in self.hidden:
      x = nn.relu(self.norm(layer(x)))
    return nn.Dense(D)(x)


def filled(init, *args):
  """Variables of a model without a compilation of its init."""
  draw = np.random.default_rng(0).standard_normal
  fill = lambda x: jnp.asarray(draw(x.shape) / max(1, x.shape[-1]) ** 0.5, x.dtype)
  return jax.tree.map(fill, jax.eval_shape(init, jax.random.key(0), *args))


def loss_of(y):
  return jnp.mean((y - Y) ** 2)


def train_tree(apply, plan, weights, tx, steps=5):
  """Plain optax and lrjax.run_events; `apply(params, fixed)` gives outputs."""
  weights = weights._replace(opt_state=tx.init(weights.params))
  events = jax.jit(
    lambda names, *args: lrjax.run_events(plan, names, *args, tx=tx), static_argnums=0
  )

  @jax.jit
  def step(weights):
    loss = lambda params: loss_of(apply(params, weights.fixed))
    value, grads = jax.value_and_grad(loss)(weights.params)
    updates, state = tx.update(grads, weights.opt_state, weights.params)
    params = optax.apply_updates(weights.params, updates)
    return weights._replace(params=params, opt_state=state), value

  losses, seen = [], set()
  for k in range(steps):
    if names := lrjax.due_events(plan, k):
      before = apply(weights.params, weights.fixed)
      weights, touched = events(names, weights, k)
      seen |= {*touched}
      after = apply(weights.params, weights.fixed)
      np.testing.assert_allclose(after, before, atol=1e-5)
    weights, value = step(weights)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  assert seen == {e.name for p in plan.values() for e in p.events}
  return weights


@pytest.fixture(scope='module')
def nnx_pair():
  theirs = NnxModel(nnx.Rngs(0, dropout=1))
  theirs.eval()
  return theirs, *nnx_swap.swap(theirs, RULES, rngs=nnx.Rngs(2))


def test_nnx_swap_keeps_weights_paths_and_ties(nnx_pair):
  theirs, ours, errors = nnx_pair
  assert {*errors} == {*kernels(ours)}
  assert {*errors} == {
    f'{block}/{layer}' for block in ('first/0', 'blocks') for layer in ('up', 'down')
  }
  assert errors['blocks/up'].shape == (3,) and errors['blocks/up'].max() < 1e-5
  np.testing.assert_allclose(ours(X), theirs(X), atol=1e-5)
  assert ours.twice is ours.head and ours.head is not theirs.head
  assert isinstance(theirs.first[0].up, nnx.Linear)
  np.testing.assert_array_equal(ours.blocks.up.bias[...], theirs.blocks.up.bias[...])
  assert ours.blocks.up.bias is not theirs.blocks.up.bias


@optimizers
def test_nnx_stranger_trains_and_goes_home(nnx_pair, tx):
  _, ours, _ = nnx_pair
  graphdef, params, rest = split(ours)
  apply = jax.jit(lambda params, rest: nnx.merge(graphdef, params, rest)(X))
  plan = kernels(ours)
  weights = train_tree(apply, plan, lrjax.Weights(params, rest), tx)
  home = NnxModel(nnx.Rngs(5, dropout=1))
  home.eval()
  nnx.update(home, lrjax.export(plan, weights.params, weights.fixed))
  np.testing.assert_allclose(home(X), apply(weights.params, weights.fixed), atol=1e-5)

  if tx is OPTIMIZERS['adam']:  # the same by nnx.Optimizer
    model = nnx.clone(ours)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    run = nnx.jit(nnx_swap.run_events, static_argnames='names')

    @nnx.jit
    def step(model, optimizer):
      grads = nnx.grad(lambda model: loss_of(model(X)))(model)
      optimizer.update(model, grads)

    for k in range(5):
      if names := lrjax.due_events(plan, k):
        run(model, optimizer, names=names, k=jnp.int32(k))
      step(model, optimizer)
    _, params, rest = split(model)
    chex.assert_trees_all_close(params, weights.params, atol=1e-5)
    down = rest['blocks']['down']
    chex.assert_trees_all_close(down, weights.fixed['blocks']['down'], atol=1e-5)


def test_nnx_new_draws_and_a_second_swap(nnx_pair):
  theirs, ours, _ = nnx_pair
  drawn, errors = nnx_swap.swap(ours, RULES, rngs=nnx.Rngs(2), keep_weights=False)
  assert errors == {}
  types = lambda model: jax.tree.map(lambda x: (x.shape, x.dtype), split(model)[1:])
  assert types(drawn) == types(ours)
  stack = drawn.blocks.up.kernel['a'][...]
  assert jnp.abs(stack[0] - stack[1]).max() > 1e-3
  again = nnx_swap.swap(ours, [('up|down', lrjax.dense())], rngs=nnx.Rngs(2))[0]
  assert {*kernels(again).values()} == {lrjax.dense()}
  np.testing.assert_allclose(again(X), theirs(X), atol=1e-5)


def test_nnx_swap_is_traceable():
  def make():
    return nnx_swap.swap(NnxModel(nnx.Rngs(0)), RULES, rngs=nnx.Rngs(2))[0]

  shapes = jax.tree.map(jnp.shape, split(nnx.eval_shape(make))[2]['blocks']['down'])
  assert shapes == {'fixed': {'index': (3, F), 'kernel': (3, F, D)}}


def test_nnx_fixed_arrays_of_a_stack_that_is_not_split(nnx_pair):
  stack = nnx_pair[1].blocks
  params_only = nnx.StateAxes({nnx.Param: 0, ...: None})
  both = nnx.StateAxes({(nnx.Param, Fixed): 0, ...: None})

  def run(axes):
    stack.eval()
    call = lambda block, x: block(x)
    return nnx.scan(call, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(stack, X)

  with pytest.raises(ValueError, match='Fixed needs the same'):
    run(params_only)
  assert run(both).shape == X.shape


def test_nnx_layers_that_cannot_be_replaced():
  swap = functools.partial(nnx_swap.swap, rngs=nnx.Rngs(0))
  lora = nnx.Sequential(nnx.LoRALinear(D, D, lora_rank=2, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match='dense layers: none'):
    swap(lora, [('', lrjax.factorized(2))])
  custom = nnx.Linear(D, D, dot_general=lambda *a, **k: 0, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='its own `dot_general`'):
    swap(nnx.Sequential(custom), [('', lrjax.factorized(2))])
  shared = nnx.Sequential(*(nnx.Linear(D, D, rngs=nnx.Rngs(0)) for _ in range(2)))
  shared.layers[1].kernel = shared.layers[0].kernel
  with pytest.raises(ValueError, match='another layer has the same kernel'):
    swap(shared, [('layers/1', lrjax.factorized(2))])
  with pytest.raises(ValueError, match='rank must be at most') as e:
    swap(NnxModel(nnx.Rngs(0)), [('up', lrjax.factorized(9))])
  assert 'in the layer blocks/up' in e.value.__notes__
  with pytest.raises(TypeError, match='pairs'):
    swap(lora, [('up', 'factorized')])
  with pytest.raises(ValueError, match='not a regular expression'):
    swap(lora, [('(', None)])


def test_rules_that_decide_nothing():
  low, model = lrjax.factorized(2), NnxModel(nnx.Rngs(0))
  with pytest.raises(
    ValueError, match=r"'upp' decides no layer: it matches none.*head"
  ):
    nnx_swap.swap(model, [('up', low), ('upp', low)], rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='earlier rules take all it matches'):
    nnx_swap.swap(model, [('.*', low), ('head', None)], rngs=nnx.Rngs(0))
  for run in ('init', 'plan'):
    with pytest.raises(ValueError, match=r"'upp' decides no layer.*layers/up"):
      model = linen_swap.swap(Transformer(), [('upp', low)])
      getattr(model, run)(jax.random.key(0), X)


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_a_swapped_layer_computes_what_it_computed(dtype, param_dtype):
  options = dict(dtype=dtype, param_dtype=param_dtype, precision='highest')
  rule, draw = [('', lrjax.dense())], jax.nn.initializers.normal(1.0)
  same = lambda a, b: chex.assert_trees_all_equal(a, b, strict=True)
  layer = nnx.Linear(D, F, rngs=nnx.Rngs(0), bias_init=draw, **options)
  ours, _ = nnx_swap.swap(layer, rule, rngs=nnx.Rngs(0))
  same(ours(X), layer(X))
  layer = nn.Dense(F, bias_init=draw, **options)
  ours, variables = linen_swap.swap(layer, rule), layer.init(jax.random.key(0), X)
  for x in (X, X.astype('bfloat16'), (4 * X).astype(int)):
    same(ours.apply(variables, x), layer.apply(variables, x))
  shapes = lambda v: jax.tree.map(lambda x: (x.shape, x.dtype), v)
  assert shapes(ours.init(jax.random.key(0), X)) == shapes(variables)
  assert 'precision = [HIGHEST' in jax.jit(ours.apply).lower(variables, X).as_text()


@optimizers
def test_linen_transformer_under_scan_and_remat_trains_and_goes_home(tx):
  theirs = Transformer()
  ours = linen_swap.swap(theirs, RULES)
  dense = filled(theirs.init, X)['params']
  plan = ours.plan(jax.random.key(0), jax.ShapeDtypeStruct(X.shape, X.dtype))
  assert {*plan} == {f'layers/{name}' for name in ('qkv', 'up', 'down')}
  params, fixed, errors = lrjax.convert(plan, dense, jax.random.key(1))
  assert max(float(e.max()) for e in errors.values()) < 1e-5
  apply = jax.jit(lambda p, f: ours.apply({'params': p, 'fixed': f}, X))
  np.testing.assert_allclose(
    apply(params, fixed), theirs.apply({'params': dense}, X), atol=1e-5
  )
  weights = train_tree(apply, plan, lrjax.Weights(params, fixed), tx)
  home = lrjax.export(plan, weights.params, weights.fixed)
  chex.assert_trees_all_equal_shapes_and_dtypes(home, dense)
  np.testing.assert_allclose(
    theirs.apply({'params': home}, X), apply(weights.params, weights.fixed), atol=1e-5
  )


def test_linen_init_draws_and_leaves_the_rest():
  theirs, rules = MLP(), [('up0', None), *RULES[:1], ('', merged(2))]
  ours = linen_swap.swap(theirs, rules)
  dense, variables = (m.init(jax.random.key(0), X) for m in (theirs, ours))
  assert variables['batch_stats'].keys() == dense['batch_stats'].keys()
  assert variables['fixed'].keys() == {'Dense_0'}
  assert variables['params'].keys() == dense['params'].keys()
  chex.assert_trees_all_equal(variables['params']['up0'], dense['params']['up0'])
  assert variables['params']['up1']['kernel'].keys() == {'a', 'b'}
  # TrainState and another collection that changes.
  state = TrainState.create(
    apply_fn=ours.apply, params=variables['params'], tx=OPTIMIZERS['galore']
  )

  @jax.jit
  def step(state, rest):
    def loss(params):
      y, new = state.apply_fn({'params': params, **rest}, X, mutable=['batch_stats'])
      return loss_of(y), new

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), {**rest, **new}, value

  rest, losses = {k: variables[k] for k in ('fixed', 'batch_stats')}, []
  for _ in range(5):
    state, rest, value = step(state, rest)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  plan = ours.plan(jax.random.key(0), X)
  home = {'params': lrjax.export(plan, state.params, rest['fixed'])}
  stats = {'batch_stats': rest['batch_stats']}
  got, _ = theirs.apply(home | stats, X, mutable=['batch_stats'])
  want, new = ours.apply({'params': state.params, **rest}, X, mutable=True)
  np.testing.assert_allclose(got, want, atol=1e-5)
  chex.assert_trees_all_equal(new['params'], state.params)
  chex.assert_trees_all_equal(new['fixed'], rest['fixed'])


class Step(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(D)(x), None


split_params = {'split_rngs': {'params': True}}
LIFTS = {
  'scan': nn.scan(Step, {'params': 0}, length=3, **split_params),
  'shared': nn.scan(
    Step, variable_broadcast='params', split_rngs={'params': False}, length=3
  ),
  'vmap': nn.vmap(Step, {'params': 0}, in_axes=(0, None), **split_params),
  'remat': nn.remat(Step),
  'remat of params': nn.remat(Step, variables='params'),
  'jit': nn.jit(Step),
}


@pytest.mark.parametrize('lift', LIFTS.values(), ids=LIFTS)
def test_linen_fixed_arrays_reach_what_a_stranger_lifts(lift):
  theirs = lift()
  ours = linen_swap.swap(theirs, [('Dense', merged(2))])
  dense = filled(theirs.init, X, None)['params']
  plan = ours.plan(jax.random.key(0), X, None)
  params, fixed, _ = lrjax.convert(plan, dense, jax.random.key(1))
  variables = {'params': params, 'fixed': fixed}
  drawn = jax.eval_shape(ours.init, jax.random.key(0), X, None)
  chex.assert_trees_all_equal_shapes_and_dtypes(drawn, variables)
  y = ours.apply(variables, X, None)[0]
  np.testing.assert_allclose(y, theirs.apply({'params': dense}, X, None)[0], atol=1e-5)


def test_linen_nn_jit_does_not_confuse_two_swaps():
  theirs, once = nn.jit(Step)(), lrjax.factorized(2)
  twice = dataclasses.replace(once, apply=lambda s, x: 2 * once.apply(s, x))
  one, two = (linen_swap.swap(theirs, [('', p)]) for p in (once, twice))
  variables = one.init(jax.random.key(0), X, None)
  chex.assert_trees_all_equal(one.init(jax.random.key(0), X, None), variables)
  y, z = (m.apply(variables, X, None)[0] for m in (one, two))
  np.testing.assert_allclose(z - X, 2 * (y - X), atol=1e-5)


def test_linen_variables_that_are_not_those_of_the_rules():
  theirs = Step()
  ours = linen_swap.swap(theirs, [('Dense', merged(2))])
  variables = ours.init(jax.random.key(0), X, None)
  for wrong in (
    theirs.init(jax.random.key(0), X, None),
    {'params': variables['params']},
    linen_swap.swap(theirs, [('', merged(3))]).init(jax.random.key(0), X, None),
  ):
    with pytest.raises(ValueError, match=r'Dense_0: its rule needs arrays.*convert'):
      ours.apply(wrong, X, None)
  with pytest.raises(ValueError, match='rank must be at most') as e:
    linen_swap.swap(theirs, [('', lrjax.factorized(9))]).init(
      jax.random.key(0), X, None
    )
  assert 'in the layer Dense_0' in e.value.__notes__
  behind = nn.scan(Step, {'params': 1}, length=3, split_rngs={'params': True})()
  with pytest.raises(ValueError, match='the axis of the stack must lead'):
    linen_swap.swap(behind, [('', merged(2))]).init(jax.random.key(0), X, None)
  own = nn.Sequential([nn.Dense(D, dot_general=lambda *a, **k: 0)])
  with pytest.raises(ValueError, match='its own `dot_general`'):
    linen_swap.swap(own, [('', merged(2))]).init(jax.random.key(0), X)
  for wrong in ([('up', 'x')], ['up'], [('up',)]):
    with pytest.raises(TypeError, match='pairs'):
      linen_swap.swap(theirs, wrong)


def test_linen_other_methods_are_swapped_too():
  class Coder(nn.Module):
    def setup(self):
      self.up, self.down = nn.Dense(F), nn.Dense(D)

    def encode(self, x):
      return self.up(x)

    def __call__(self, x):
      return self.down(self.encode(x))

  theirs = Coder()
  ours = linen_swap.swap(theirs, [('up', lrjax.factorized(2))])
  variables = ours.init(jax.random.key(0), X)
  low = variables['params']['up']['kernel']
  for method in ('encode', Coder.encode, theirs.encode):
    y = ours.apply(variables, X, method=method)
    np.testing.assert_allclose(y, X @ low['a'] @ low['b'], atol=1e-5)


def test_a_replacement_is_a_dense():
  ours, _ = nnx_swap.swap(
    nnx.Linear(D, F, rngs=nnx.Rngs(0)), [('', merged(2))], rngs=nnx.Rngs(0)
  )
  assert isinstance(ours, Dense) and (ours.in_features, ours.out_features) == (D, F)
  assert {*kernels(ours)} == {''}
  _, params, rest = split(ours)
  np.testing.assert_allclose(
    lrjax.export(kernels(ours), params, rest)['kernel'],
    rest['fixed']['kernel'],
    atol=1e-6,
  )


def test_names_of_axes_stay_with_the_arrays():
  names, rules = ('embed', 'mlp'), [('', merged(2))]
  P = jax.sharding.PartitionSpec
  want = {'a': P('embed', None), 'b': P(None, 'mlp')}
  fixed = {'index': P('embed'), 'kernel': P('embed', 'mlp')}
  draw = jax.nn.initializers.lecun_normal()
  on_layers = lambda tree: jax.tree.map(
    lambda spec: P('layers', *spec), tree, is_leaf=lambda x: isinstance(x, P)
  )

  class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      init = nn.with_partitioning(draw, names)
      return nn.Dense(D, kernel_init=init, name='layer')(x), None

  scanned = nn.scan(
    Step,
    {'params': 0},
    split_rngs={'params': True},
    length=3,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )()
  ours = linen_swap.swap(scanned, rules)
  args = (jax.random.key(0), X, None)
  specs = nn.get_partition_spec(jax.eval_shape(ours.init, *args))
  assert specs['params']['layer']['kernel'] == on_layers(want)
  assert specs['fixed']['layer']['fixed'] == on_layers(fixed)
  variables = ours.init(*args)
  y, _ = ours.apply(variables, X, None)
  np.testing.assert_array_equal(ours.apply(nn.unbox(variables), X, None)[0], y)

  with nnx.use_eager_sharding(False):
    init = nnx.with_partitioning(draw, names)
    make = lambda key: nnx.Linear(D, D, kernel_init=init, rngs=nnx.Rngs(key))
    stack = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: 'layers'})
    one, three = make(0), stack(jax.random.split(jax.random.key(0), 3))
    for model, of in ((one, lambda tree: tree), (three, on_layers)):
      ours, _ = nnx_swap.swap(model, rules, rngs=nnx.Rngs(0))
      specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(ours)))
      assert specs['kernel'] == of(want) and specs['fixed'] == of(fixed)
