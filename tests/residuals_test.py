"""Residuals against closed forms, and the limit on the growth of a norm."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import gradients, matrix

import lrjax
from lrjax import residuals
from lrjax.residuals.scaled import limited
from lrjax.stacks import formed
from lrjax.testing import trajectory

SHAPES = {'tall': (12, 8), 'wide': (8, 12)}


def lifted(residual, inner=None, basis=None):
  inner = optax.identity() if inner is None else inner
  make = lambda rank: lrjax.low_rank(
    (basis or lrjax.svd)(rank), inner, refresh=lrjax.every(3), residual=residual
  )
  return lrjax.on_matrices(make, rank=3)


@pytest.mark.parametrize('basis', [lrjax.svd, lrjax.gaussian])
@pytest.mark.parametrize(
  ('residual', 'factor'),
  [
    (residuals.fira(0.25), 1.0),
    (residuals.fira(0.25, per='tensor'), 1.0),
    (residuals.fira(0.25, 'paper'), 0.25),
    (residuals.scale_full(), 1.0),
    (residuals.scale_full(16.0, per='tensor', front=True), 4.0),
  ],
)
def test_with_an_identity_inside_the_update_is_the_gradient(residual, factor, basis):
  grads = gradients(SHAPES, 1)
  # One step, which nothing limits: the ratio is one, whatever the subspace.
  out, _ = trajectory(lifted(residual, basis=basis), grads[0], grads)
  for name, g in grads[0].items():
    np.testing.assert_allclose(out[0][name], factor * g, atol=1e-6)


def test_the_update_is_parallel_to_the_gradient_in_each_channel():
  g = matrix((8, 12))
  grads = [{'w': g}]
  for per in ('channel', 'tensor'):
    tx = lifted(residuals.scale_full(per=per), lrjax.adam(), lrjax.gaussian)
    out, _ = trajectory(tx, grads[0], grads)
    quotient = np.asarray(out[0]['w'] / g)
    axis = (0, 1) if per == 'tensor' else 0  # d = in = 8, one ratio for each output
    spread = quotient.max(axis, keepdims=True) - quotient.min(axis, keepdims=True)
    assert (spread < 1e-5 * np.abs(quotient).max(axis, keepdims=True)).all(), per
    assert (quotient > 0).all()
    if per == 'channel':
      assert quotient[0].std() > 0.01


def test_the_residual_is_orthogonal_to_the_basis_in_the_form_of_the_paper():
  b, g = lrjax.svd(3), matrix((8, 12))
  p = b.fit(None, matrix((8, 12), 1), b.init(8, 12, g.dtype))
  low = b.down(p, g)
  r = residuals.fira(1.0, 'paper')
  out, _ = r.after(g, low, jnp.zeros_like(low), lambda x: b.up(p, x, 8), r.init(g))
  assert not out.any()  # no inner update: nothing to scale the residual by
  out, _ = r.after(g, low, low, lambda x: b.up(p, x, 8), r.init(g))
  np.testing.assert_allclose(b.down(p, out), low, atol=1e-5)


EVERY = [
  *(
    residuals.fira(0.25, mode, per=per)
    for mode in ('official', 'paper')
    for per in ('channel', 'tensor')
  ),
  residuals.scale_full(2.0),
  *(residuals.state_free(rule, 0.3, 0.5) for rule in ('sign', 'sgd')),
]


@pytest.mark.parametrize('residual', EVERY)
def test_parts_are_the_update_where_the_basis_is_orthonormal(residual):
  p = jnp.linalg.qr(matrix((8, 3), 1, decay=1))[0]
  # Unlike columns: a ratio for all of them is not that of any.
  g = matrix((8, 12)) * jnp.linspace(0.1, 2, 12)[None]
  low, u = p.T @ g, matrix((3, 12), 2)
  up = lambda x: p @ x
  # The first step; a norm that grows too fast; no such.
  norms = [jnp.float32(x) for x in (-1, 0.5, 1e6)]
  for last in norms if jax.tree.leaves(residual.init(g)) else [()]:
    want, want_last = residual.after(g, low, u, up, last)
    parts, got_last = residual.parts(lambda c: jnp.sum((c * g) ** 2), low, u, last)
    np.testing.assert_allclose(formed(parts, g, up), want, atol=1e-5)
    np.testing.assert_allclose(got_last, want_last, rtol=1e-5)


def test_parts_where_the_subspace_misses_nothing_or_the_norm_overflows():
  p = jnp.linalg.qr(matrix((8, 3), 1, decay=1))[0]
  low, u, up = matrix((3, 12)), matrix((3, 12), 2), lambda x: p @ x
  residual = residuals.fira(1.0)
  # The sums of squares cancel: what is left is rounding, and no root of a negative.
  g = p @ low
  total = lambda c: jnp.sum((c * g) ** 2)
  parts, last = residual.parts(total, low, u, jnp.float32(5))
  np.testing.assert_allclose(formed(parts, g, up), p @ u, atol=1e-5)
  assert 0 <= last <= 5
  parts, last = residual.parts(lambda c: jnp.inf, low, u, jnp.float32(5))
  np.testing.assert_allclose(formed(parts, g, up), p @ u, atol=1e-5)
  assert last == 5


def test_a_column_the_subspace_misses_gives_no_nan():
  g = jnp.zeros((4, 3)).at[3, 0].set(1.0)  # outside the first two unit vectors
  b = lrjax.svd(2)
  p = b.init(4, 3, g.dtype)
  low = b.down(p, g)
  for r in (residuals.fira(0.5), residuals.scale_full()):
    out, _ = r.after(g, low, low, lambda x: b.up(p, x, 4), r.init(g))
    assert bool(jnp.isfinite(out).all())


def norms(raw, growth_limit=1.01, floor=0.0):
  """Frobenius norms after the limit, of matrices with these norms."""
  x, last, out = matrix((3, 4)), jnp.float32(-1), []
  x = x / jnp.linalg.norm(x)
  for n in raw:
    y, last = limited(n * x, last, growth_limit, floor)
    size = float(jnp.linalg.norm(y))
    out.append(size)
    if size:
      np.testing.assert_allclose(y / size, x, atol=1e-6)  # the direction stays
  return out


def test_growth_is_limited_and_shrinking_is_free():
  want = [1.0, 1.01, 1.0201, 0.1, 0.101]
  np.testing.assert_allclose(norms([1, 5, 5, 0.1, 5]), want, rtol=1e-5)


def test_an_infinite_limit_switches_it_off():
  raw = [1, 5, 0.1, 500]
  np.testing.assert_allclose(norms(raw, math.inf), raw, rtol=1e-6)


def test_a_zero_residual_does_not_lock_the_limiter():
  raw = [1, 0, 1, 0, 0, 1.005]
  np.testing.assert_allclose(norms(raw), raw, rtol=1e-5)
  # The official code's memory, for comparison, and a floor above zero.
  locked = norms(raw, floor=None)
  assert locked[2] < 1e-7 and locked[5] < 1e-7
  np.testing.assert_allclose(norms([1, 1e-3, 1.0], floor=1e-2), [1, 1e-3, 1], rtol=1e-5)


@pytest.mark.parametrize('floor', [0.0, None])
def test_an_overflowing_residual_does_not_enter_the_memory(floor):
  x = jnp.full((2, 2), 3e38)
  y, last = limited(x, jnp.float32(1), 1.01, floor)
  assert not y.any() and last == 1
  y, last = limited(x, jnp.float32(-1), 1.01, floor)
  assert not y.any() and last == -1


def test_the_root_of_scale_ahead_of_the_limit_changes_the_memory_alone():
  grads = gradients(SHAPES, 5)
  run = lambda front: trajectory(
    lifted(residuals.scale_full(16.0, front=front), lrjax.adam()), grads[0], grads
  )
  (a, ahead), (b, behind) = run(True), run(False)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  for name in SHAPES:
    last = [s.slots[name].state.residual for s in (ahead, behind)]
    np.testing.assert_allclose(last[0], 4 * last[1], rtol=1e-5)


def test_the_memory_is_one_number_for_each_matrix_of_a_stack():
  shapes = {'stack': (2, 8, 12)}
  grads = gradients(shapes, 3)
  grads = [{'stack': g['stack'].at[1].mul(1.5**t)} for t, g in enumerate(grads)]
  tx = lifted(residuals.scale_full(), lrjax.adam())
  _, state = trajectory(tx, grads[0], grads)
  last = state.slots['stack'].state.residual
  assert last.shape == (2,) and last.dtype == jnp.float32 and last.nbytes == 8
  for i in range(2):
    _, one = trajectory(
      tx, {'w': grads[0]['stack'][i]}, [{'w': g['stack'][i]} for g in grads]
    )
    np.testing.assert_allclose(last[i], one.slots['w'].state.residual, rtol=1e-5)


def test_a_two_sided_basis_needs_one_ratio_for_all():
  basis = lambda rank: lrjax.two_sided(lrjax.svd(rank))
  grads = gradients(SHAPES, 1)
  trajectory(lifted(residuals.fira(per='tensor'), basis=basis), grads[0], grads)
  for r in (residuals.fira(), residuals.scale_full()):
    with pytest.raises(ValueError, match=r"keeps columns apart.*per='tensor'"):
      lrjax.low_rank(basis(2), lrjax.adam(), residual=r)


@pytest.mark.parametrize(
  ('make', 'bad', 'error', 'message'),
  [
    (residuals.fira, dict(mode='code'), ValueError, "`mode` 'code'.*official, paper"),
    (residuals.fira, dict(per='row'), ValueError, "`per` 'row'.*channel, tensor"),
    (residuals.fira, dict(scale=-1.0), ValueError, '`scale`.*got -1.0'),
    (residuals.scale_full, dict(per='chanel'), ValueError, "did you mean 'channel'"),
    (residuals.scale_full, dict(growth_limit=0.9), ValueError, 'at least 1, got 0.9'),
    (residuals.scale_full, dict(growth_limit=math.nan), ValueError, 'got nan'),
    (
      residuals.scale_full,
      dict(growth_limit='1'),
      TypeError,
      '`growth_limit`.*type str',
    ),
    (residuals.scale_full, dict(floor=-1.0), ValueError, '`floor`.*got -1.0'),
  ],
)
def test_bad_arguments_are_refused(make, bad, error, message):
  with pytest.raises(error, match=message):
    make(**bad)
