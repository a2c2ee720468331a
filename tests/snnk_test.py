"""SNNK: what its features estimate, bundling, the last layer in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lrjax
from lrjax.models import LLAMA_SIZES, Llama
from lrjax.modules.nnx import Dense, split
from lrjax.parameterizations import random_features as rf
from lrjax.types import Split

WIDTH, OUT = 6, 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((4, WIDTH)) / 2, jnp.float32)
W = jnp.asarray(RNG.standard_normal((WIDTH, OUT)) / 2, jnp.float32)
EACH = [('exp', {'normalize': 1.5}), ('sin', {'M': 0.1})]


def arc_cosine(x, w):
  lengths = np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(w, axis=0))
  t = np.arccos(x @ w / lengths)
  return lengths / (2 * np.pi) * (np.sin(t) + (np.pi - t) * np.cos(t))


FUNCTIONS = {
  'relu': arc_cosine,
  'cos': lambda x, w: np.cos(x @ w / math.sqrt(WIDTH)),
  'sin': lambda x, w: np.sin(x @ w / math.sqrt(WIDTH)),
  'exp': lambda x, w: np.exp(x @ w / math.sqrt(WIDTH)),
}


def terms(kind, count, orthogonal=False, **options):
  """What each random row adds to y, times their number: (count, 4, OUT)."""
  o = rf.Features(kind, **options)

  @jax.jit
  def products():
    G = rf.gaussian(jax.random.key(1), WIDTH, count, orthogonal)
    phi = rf.of_inputs(o, X @ G, rf.square(X), o.factor(WIDTH))
    phi = phi.numbers * (1 if phi.log is None else jnp.exp(phi.log))
    return jnp.einsum('tl,lo->lto', phi, rf.of_weights(o, W, G))

  each = products()
  pairs = 2 if kind in ('cos', 'sin') else 1
  return count * np.asarray(each, np.float64).reshape(pairs, count, 4, OUT).sum(0)


@pytest.mark.parametrize(
  'kind, M',
  [('relu', 0), ('cos', 0), ('sin', 0), ('exp', 0), ('cos', 0.1), ('exp', 0.1)],
)
def test_estimates_its_function_without_bias(kind, M):
  z = terms(kind, 100_000, M=M)
  sigma = z.std(axis=0) / math.sqrt(len(z))
  error = np.abs(z.mean(axis=0) - FUNCTIONS[kind](X, W))
  # Twelve estimates, with the heavy tails of e^(g.x): 4 sigma where one would have 3.
  assert (error < 4 * sigma).all()


def test_four_times_the_features_halve_the_error():
  z = terms('relu', 80_000)
  error = lambda count: z.reshape(-1, count, 4, OUT).mean(axis=1).std(axis=0)
  np.testing.assert_allclose(error(50) / error(200), 2, rtol=0.2)


def test_orthogonal_rows():
  G = np.asarray(rf.gaussian(jax.random.key(0), WIDTH, 8003, True), np.float64)
  for block in (G[:, :WIDTH], G[:, 7998:]):
    gram = block.T @ block
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
  squares = (G**2).sum(0)  # chi^2 of WIDTH degrees: mean WIDTH, variance 2 WIDTH
  np.testing.assert_allclose(squares.mean(), WIDTH, rtol=0.05)
  np.testing.assert_allclose(squares.var(), 2 * WIDTH, rtol=0.1)


@pytest.mark.parametrize('kind', ['relu', 'exp'])
def test_orthogonal_rows_estimate_better_and_without_bias(kind):
  """The official code's do not: the signs of its QR follow the entries."""
  blocks = lambda orthogonal: (
    terms(kind, WIDTH * 8000, orthogonal).reshape(8000, WIDTH, 4, OUT).mean(axis=1)
  )
  own, plain = blocks(True), blocks(False)
  sigma = own.std(axis=0) / math.sqrt(8000)
  assert (np.abs(own.mean(axis=0) - FUNCTIONS[kind](X, W)) < 4 * sigma).all()
  assert own.var(axis=0).mean() < plain.var(axis=0).mean()


def test_starts_as_features_of_a_dense_kernel():
  """Float64: y = Phi(x) Phi(W)'."""
  kernel = lrjax.snnk(10, threshold=-0.1)
  arrays, error = kernel.from_dense(jax.random.key(0), W)
  G = np.asarray(arrays.fixed['proj'], np.float64)
  phi = lambda z: np.maximum(np.asarray(z, np.float64) @ G, -0.1) / math.sqrt(10)
  np.testing.assert_allclose(kernel.apply(arrays, X), phi(X) @ phi(W.T).T, atol=1e-6)
  assert 0 < error < 10


@pytest.mark.parametrize('kind, options', EACH)
def test_rank_of_the_input_does_not_matter(kind, options):
  """In the official code |x|^2 / 2 is |x|^2 and lengths are along axis 1 in 3-D."""
  kernel = lrjax.snnk(5, kind, **options)
  arrays, _ = jax.jit(kernel.from_dense)(jax.random.key(0), W)
  apply = jax.jit(kernel.apply)
  y = apply(arrays, X.reshape(2, 2, WIDTH))
  np.testing.assert_allclose(y.reshape(4, OUT), apply(arrays, X), rtol=1e-5)


@pytest.mark.parametrize('kind', ['relu', 'exp'])
def test_normalized_layers_can_be_built(kind):
  """The official `NNK` and `CustomAdapter` fail on a misspelt attribute."""
  kernel = lrjax.snnk(40_000, kind, normalize=0.7)
  arrays, _ = jax.jit(kernel.from_dense)(jax.random.key(0), W)
  unit = lambda z, axis: 0.7 * z / np.linalg.norm(z, axis=axis, keepdims=True)
  x, w = unit(X, 1), unit(W, 0)
  scale = 1 if kind == 'relu' else WIDTH**0.25
  np.testing.assert_allclose(
    kernel.apply(arrays, X), FUNCTIONS[kind](scale * x, scale * w), atol=0.05
  )


@pytest.mark.parametrize('kind', ['sin', 'exp'])
def test_normalized_features_do_not_overflow(kind):
  kernel = lrjax.snnk(8, kind, normalize=1.0)
  arrays = kernel.init(jax.random.key(0), (WIDTH, OUT), jnp.float16)
  loss = lambda s, x: jnp.sum(kernel.apply(s, x).astype('f4'))
  grad = jax.jit(jax.grad(loss, (0, 1)))
  for size in (0.0, 1e3):
    leaves = jax.tree.leaves(grad(arrays, (size * X).astype('float16')))
    assert all(bool(jnp.isfinite(g).all()) for g in leaves)


def test_low_precision_holds_large_features():
  """The part e^(|x|^2 / 2) is multiplied on after the product, in float32."""
  kernel = lrjax.snnk(8, 'cos')
  x = jnp.full((1, WIDTH), 3.2, jnp.float16)
  assert math.exp(rf.square(x / WIDTH**0.25).item() / 2) > 65504
  split = Split(
    {'readout': jnp.full((16, OUT), 1e-7, 'f2')},
    {'proj': jnp.eye(WIDTH, 8, dtype='f2')},
  )
  y = kernel.apply(split, x)
  assert y.dtype == jnp.float16 and bool(jnp.isfinite(y).all()) and bool((y != 0).all())


def test_projection_is_standard_normal():
  """In the official code adapters draw it uniformly, and `NNK_Asym_Kernel` times 0.02."""
  fixed = lrjax.snnk(400).init(jax.random.key(0), (100, 2), jnp.float32).fixed
  assert abs(float(fixed['proj'].mean())) < 0.02
  np.testing.assert_allclose(fixed['proj'].var(), 1, atol=0.03)


def test_projection_is_saved_with_the_model():
  """The official one is a plain attribute: a reloaded model has another."""
  make = lambda seed: Dense(WIDTH, OUT, kernel=lrjax.snnk(4), rngs=nnx.Rngs(seed))
  _, params, rest = split(make(0))
  reloaded = nnx.merge(split(make(1))[0], params, rest)
  np.testing.assert_array_equal(reloaded(X), make(0)(X))
  assert rest['fixed']['proj'].shape == (WIDTH, 4)


def two_layers(kind, width=9, **options):
  """(kernel, arrays) of both, with larger numbers where y would be tiny."""
  layers, size = [], 30 if kind == 'relu' else 1
  for count, shape in ((5, (WIDTH, width)), (4, (width, OUT))):
    kernel = lrjax.snnk(count, kind, **options)
    init = jax.jit(lambda key: kernel.init(key, shape, jnp.float32))  # noqa: B023
    arrays = init(jax.random.key(count))
    arrays = arrays._replace(train=jax.tree.map(lambda R: size * R, arrays.train))
    layers.append((kernel, arrays))
  return layers


@pytest.mark.parametrize(
  'kind, width, options',
  [
    ('relu', 9, {}),
    ('relu', 3, {'normalize': 2.0}),
    ('exp', 9, {'normalize': 1.5}),
    ('sin', 9, {'M': 0.1}),
    ('cos', 30, {}),
  ],
)
def test_bundled_layers_are_the_same_function(kind, width, options):
  """With more and with fewer units between the layers than features."""
  (one, first), (two, second) = two_layers(kind, width, **options)
  both = lrjax.bundle(first, second, kind, options.get('normalize'))
  want = jax.jit(lambda x: two.apply(second, one.apply(first, x)))(X)
  y = jax.jit(lrjax.snnk((5, 4), kind, **options).apply)(both, X)
  assert 1e-2 < np.abs(want).max() < 1e3
  np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())


def test_three_layers_bundle_one_by_one():
  (one, first), (two, second) = two_layers('relu')
  third = lrjax.snnk(7).init(jax.random.key(2), (OUT, 2), jnp.float32)
  chain = lrjax.bundle(lrjax.bundle(first, second), third)
  y = lrjax.snnk(7).apply(third, two.apply(second, one.apply(first, X)))
  kernel = lrjax.snnk((5, 4, 7))
  np.testing.assert_allclose(kernel.apply(chain, X), y, rtol=1e-4, atol=1e-6)
  init = lambda: kernel.init(jax.random.key(0), (WIDTH, 2), jnp.float32)
  shapes = jax.tree.map(jnp.shape, jax.eval_shape(init))
  assert shapes == jax.tree.map(jnp.shape, chain)
  with pytest.raises(ValueError, match='one layer of 2 inputs'):
    lrjax.bundle(chain, first)
  with pytest.raises(ValueError, match='`ridge` must be at least 0'):
    lrjax.solve_last_layer(kernel, chain, X, X[:, :2], -1.0)


def test_gradient_of_omega_follows_the_chain_rule():
  (one, first), (two, second) = two_layers('relu')
  bundled = lrjax.snnk((5, 4))
  both = lrjax.bundle(first, second)
  loss = lambda y: jnp.sum(jnp.sin(y))
  apart = lambda train: loss(two.apply(second, one.apply(Split(train, first.fixed), X)))
  joined = lambda train: loss(bundled.apply(Split(train, both.fixed), X))
  inner = jax.grad(apart)(first.train)['readout']
  omega = jax.grad(joined)(both.train)['omega_0']
  want = omega @ second.fixed['proj'].T
  np.testing.assert_allclose(inner, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('ridge', [0.0, 0.1])
def test_last_layer_is_the_least_squares_solution(ridge):
  kernel, x = lrjax.snnk((8, 4)), jnp.asarray(RNG.standard_normal((30, WIDTH)), 'f4')
  arrays = kernel.init(jax.random.key(0), (WIDTH, OUT), jnp.float32)
  # Features of size 1, as those of a trained chain.
  arrays = arrays._replace(train=jax.tree.map(lambda a: 30 * a, arrays.train))
  y = jnp.asarray(RNG.standard_normal((30, OUT)), 'f4')
  solved = lrjax.solve_last_layer(kernel, arrays, x, y, ridge)

  def loss(readout):
    split = solved._replace(train={**solved.train, 'readout': readout})
    error = kernel.apply(split, x) - y
    return jnp.mean(error**2) + ridge * jnp.sum(readout**2) / y.size

  R = solved.train['readout']
  assert float(jnp.linalg.norm(jax.grad(loss)(R))) < 1e-6
  zero = solved._replace(train={**solved.train, 'readout': jnp.eye(4)})
  F = np.asarray(kernel.apply(zero, x), np.float64)
  want = np.linalg.solve(F.T @ F + ridge * np.eye(4), F.T @ np.asarray(y, np.float64))
  np.testing.assert_allclose(R, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize('size', ['60m', '130m', '350m', '1b'])
def test_parameter_counts(size):
  """Trained are l out of each kernel; G has l in fixed ones."""
  c, l = LLAMA_SIZES[size], 64
  model = nnx.eval_shape(lambda: Llama(c, kernel=lrjax.snnk(l), rngs=nnx.Rngs(0)))
  _, params, rest = split(model)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  D, F, L = c.hidden_size, c.intermediate_size, c.num_layers
  plain = 2 * c.vocab_size * D + (2 * L + 1) * D
  assert count(params) == plain + L * l * (5 * D + 2 * F)
  assert count(rest) == L * l * (6 * D + F)


@pytest.mark.parametrize(
  'args, error, message',
  [
    ((0,), ValueError, 'at least 1'),
    ((4.5,), TypeError, 'int of at least 1'),
    (((),), ValueError, 'at least one number'),
    ((4, 'tanh'), ValueError, 'unknown `kind`'),
    ((4, 'exp', False, 0.0), ValueError, '`normalize` must be positive'),
    ((4, 'exp', False, None, 0.1), ValueError, '`threshold` has no meaning'),
    ((4, 'relu', False, None, 0.0, 0.1), ValueError, '`M` has no meaning'),
    ((4, 'cos', False, None, 0.0, -0.25), ValueError, 'above -1/4'),
  ],
)
def test_bad_arguments(args, error, message):
  with pytest.raises(error, match=message):
    lrjax.snnk(*args)
