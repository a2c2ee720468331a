"""Hyperbolic layers: closed forms, HyboNet's layers, and SST inside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from parity.inputs import read

import lrjax
from lrjax import hyperbolic
from lrjax.modules import linen
from lrjax.parameterizations.sst import spectrum_of


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@jax.jit
def lift(z):
  return hyperbolic.lift(z, 2.3)


def points(seed, *shape):
  return hyperbolic.from_space(normal(seed, *shape))


def far(got, want):
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def recorded(name):
  meta, arrays = read('hyperbolic')
  mine = {k: v for k, v in arrays.items() if k.startswith(f'{name}/')}
  return meta, {k.removeprefix(f'{name}/'): v for k, v in mine.items()}


def test_points_of_all_layers_are_on_the_hyperboloid():
  x, w = points(0, 2, 6, 4), np.abs(normal(1, 2, 3, 6))
  lifted = lift(normal(2, 7, 5))
  for p in (x, lifted, hyperbolic.centroid(x, w)):
    # t reaches 11, so that float32 leaves 121 * 6e-8 for each of two squares.
    np.testing.assert_allclose(hyperbolic.inner(p, p), -1, atol=5e-5)
    assert p[..., 0].min() >= 1


def test_lift_without_a_direction_stays_on_the_hyperboloid():
  # The official layer divides by zero there.
  z = jnp.array([[0, 0, 0, 0], [1, 1e-7, 0, 0]], jnp.float32)
  x = lift(z)
  np.testing.assert_allclose(hyperbolic.inner(x, x), -1, atol=1e-6)
  assert jnp.isfinite(jax.jit(jax.grad(lambda z: lift(z).sum()))(z)).all()


def test_distance_along_a_geodesic():
  r = np.array([0.0, 1e-3, 0.5, 3.0])
  x = hyperbolic.from_space(
    jnp.asarray(np.sinh(r)[:, None] * [[0.6, 0.8]], jnp.float32)
  )
  want = np.abs(r[:, None] - r[None])
  got = hyperbolic.distance(x[:, None], x[None])
  # Squares of t - t', both about 10 and rounded to 1e-6, at a distance of 2.5.
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(got[1, 0], 1e-3, rtol=1e-4)
  near = lambda x: hyperbolic.distance(x, x.at[0].add(0.0))
  assert (jax.grad(near)(x[2]) == 0).all()


def test_a_centroid_has_the_least_weighted_sum_of_squared_distances():
  x, w = points(0, 6, 4), np.abs(normal(1, 6))

  def total(s):
    y = jnp.broadcast_to(hyperbolic.from_space(s), x.shape)
    return jnp.sum(w * (-2 - 2 * hyperbolic.inner(x, y)))

  g = jax.jit(jax.grad(total))(hyperbolic.centroid(x, w[None])[0, 1:])
  np.testing.assert_allclose(g, 0, atol=1e-5)


def test_bf16_points_stay_bf16():
  x = points(0, 6, 4).astype(jnp.bfloat16)
  made = lift(x), hyperbolic.attention(x, x, x, 2.0)
  assert all(y.dtype == jnp.bfloat16 for y in made)
  np.testing.assert_allclose(made[0].astype('f4'), lift(x.astype('f4')), rtol=2**-8)


def test_distances_equal_the_official_ones():
  _, r = read('hyperbolic')
  assert far(hyperbolic.distance(r['a'], r['b']), r['distance']) < 1e-6


def test_the_linear_layer_equals_the_official_one():
  _, r = recorded('linear')

  def apply(p):
    z = jax.nn.relu(r['x']) @ p['W'] + jnp.broadcast_to(p['b'], r['residual'].shape)
    return hyperbolic.lift(z + r['residual'], p['c'])

  p = {'W': r['weight.weight'].T, 'b': r['weight.bias'], 'c': r['scale']}
  assert far(apply(p), r['y']) < 1e-6
  grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(apply(p)))))(p)
  assert far(grads['W'], r['grad/weight.weight'].T) < 1e-5
  assert far(grads['b'], r['grad/weight.bias']) < 1e-5
  assert far(grads['c'], r['grad/scale']) < 1e-5


def test_attention_equals_the_official_one():
  meta, r = recorded('attention')
  heads, mask = meta['heads'], np.tri(r['x'].shape[1], dtype=bool)
  names = 'linear_query', 'linear_keys', 'linear_values'

  def apply(p):
    def project(name):
      z = r['x'] @ p[f'{name}.weight.weight'].T
      z = z + jnp.broadcast_to(p[f'{name}.weight.bias'], z.shape)
      z = z.reshape(*z.shape[:2], heads, -1).swapaxes(1, 2)
      return hyperbolic.lift(z, p[f'{name}.scale'])

    q, k, v = map(project, names)
    y = hyperbolic.attention(q, k, v, p['scale'][0], mask[None, None])
    return y.swapaxes(1, 2)

  p = {n: a for n, a in r.items() if n.startswith('linear_') or n == 'scale'}
  assert far(apply(p), r['y']) < 2e-6
  grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(apply(p)))))(p)
  want = {name: r[f'grad/{name}'] for name in p}
  # Some are sums of many terms that cancel, so all are measured by the largest.
  apart = [np.abs(grads[n] - w).max() for n, w in want.items()]
  assert max(apart) < 1e-5 * max(np.abs(w).max() for w in want.values())


X, Y = points(0, 32, 5), lift(normal(1, 32, 7))
KERNEL = lrjax.sst(3, 5, 1)


def test_a_kernel_of_sst_inside_gets_its_enhanced_gradients():
  split = KERNEL.from_dense(jax.random.key(0), jnp.asarray(normal(4, 6, 7)))[0]
  loss = lambda z: jnp.mean(hyperbolic.distance(lift(z), Y))
  inside = lambda train: loss(KERNEL.apply(split._replace(train=train), X))
  grads = jax.jit(jax.grad(inside))(split.train)
  G = jax.jit(jax.grad(lambda W: loss(X @ W)))(KERNEL.materialize(split))
  s = spectrum_of(split)
  assert far(grads['sigma'], np.diag(s.V.T @ G @ s.U)) < 1e-5
  assert far(grads['u'], G.T @ s.V[:, split.fixed['omega']]) < 1e-5


class Layer(nn.Module):
  """A hyperbolic layer."""

  @nn.compact
  def __call__(self, x):
    z = linen.Dense(7, kernel=KERNEL, name='q')(x)
    return hyperbolic.lift(z, self.param('scale', lambda _: jnp.float32(2.3)))


def test_a_flax_layer_with_sst_inside_learns_with_its_events():
  variables = Layer().init(jax.random.key(0), X)
  plan, tx = {'q': KERNEL}, optax.adam(0.02)
  params, fixed = variables['params'], variables['fixed']

  @jax.jit
  def step(weights, k):
    # All events at each step: one program.
    weights, _ = lrjax.run_events(plan, ['normalize', 'resample'], weights, k, tx=tx)

    def loss(params):
      out = Layer().apply({'params': params, 'fixed': weights.fixed}, X)
      return jnp.mean(hyperbolic.distance(out, Y))

    value, grads = jax.value_and_grad(loss)(weights.params)
    u, state = tx.update(grads, weights.opt_state)
    params = optax.apply_updates(weights.params, u)
    return weights._replace(params=params, opt_state=state), value

  weights, losses = lrjax.Weights(params, fixed, tx.init(params)), []
  for k in range(20):
    weights, value = step(weights, k)
    losses.append(float(value))
  assert losses[-1] < 0.8 * losses[0]
