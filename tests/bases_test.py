"""Every way to find a subspace against the exact one, on good and on awkward matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import galore as oracle
from samples import matrix

import lrjax
from lrjax import bases
from lrjax.bases.orthonormal import cosines, fix_signs, signed_cosines

SHAPES = {'tall': (16, 9), 'wide': (9, 16), 'square': (12, 12)}
# The bases that look for the leading singular vectors.
LEADING = ('svd', 'eigh', 'randomized_svd', 'subspace_iteration')
RANK = 4


@functools.cache
def refresher(name, codec=None):
  """`(key, g, state) -> (state, good)` of the loop, as it runs in an optimizer."""
  basis = bases.NAMES[name](RANK)
  basis = basis if codec is None else lrjax.stored_as(basis, codec)
  rule = lrjax.low_rank(basis, optax.identity())
  return rule.init, jax.jit(rule.refresh)


def fit(name, g, times=1, codec=None):
  init, refresh = refresher(name, codec)
  state, good = init(g), jnp.asarray(True)
  for t in range(times):
    state, ok = refresh(jax.random.key(t), g, state)
    good &= ok
  return state.basis, bool(good)


def energy(p, g):
  """The share of the best rank-r approximation's energy that P catches."""
  p, g = np.asarray(p, np.float64), np.asarray(g, np.float64)
  best = np.linalg.svd(g, compute_uv=False)[: p.shape[1]]
  return np.square(p.T @ g).sum() / np.square(best).sum()


def awkward(shape):
  """Matrices on which factorisations are known to fail."""
  g = matrix(shape)
  rows, columns = jnp.arange(1.0, shape[0] + 1), jnp.cos(jnp.arange(shape[1]))
  return {
    'huge': g * 1e30,
    'tiny': g * 1e-30,
    'rank_2': g[:, :2] @ matrix((2, shape[1]), 1),
    'rank_1': jnp.outer(rows, columns),
    'zero_rows': g.at[1:-1].set(0),
    'one_row': jnp.zeros(shape).at[2].set(columns),
    'one_entry': jnp.zeros(shape).at[3, 1].set(-2.0),
    'identical_rows': jnp.ones(shape) * columns[None],
    'ones': jnp.ones(shape),
    'identity': jnp.eye(*shape),
  }


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
  ('name', 'times', 'share'),
  [
    ('svd', 1, 1 - 1e-5),
    ('eigh', 1, 1 - 1e-5),
    ('randomized_svd', 1, 0.99),
    ('subspace_iteration', 3, 0.98),
  ],
)
def test_bases_catch_the_energy_they_promise(name, times, share, shape):
  g = matrix(shape)
  p, good = fit(name, g, times)
  assert good
  assert share <= energy(p, g) < 1 + 1e-5
  np.testing.assert_allclose(p.T @ p, np.eye(RANK), atol=1e-5)


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('name', LEADING)
def test_awkward_matrices_give_orthonormal_bases(name, shape):
  for case, g in awkward(shape).items():
    p, good = fit(name, g, 2)
    assert good, case
    np.testing.assert_allclose(p.T @ p, np.eye(RANK), atol=1e-5, err_msg=case)
    if case not in ('huge', 'tiny', 'identity'):  # rank 4 holds all there is
      assert energy(p, g) == pytest.approx(1, abs=1e-4), case


@pytest.mark.parametrize('name', LEADING)
def test_powers_of_two_change_no_bit(name):
  g = matrix((9, 16))
  p, _ = fit(name, g)
  for power in (-90, 1, 90):
    np.testing.assert_array_equal(fit(name, jnp.ldexp(g, power))[0], p)


@pytest.mark.parametrize('name', LEADING)
def test_signs_and_order_are_those_of_svd(name):
  g = matrix((9, 16), decay=0.4)
  u, _, _ = np.linalg.svd(np.asarray(g, np.float64))
  p, _ = fit(name, g, 6)
  # Iterated and randomized bases differ from the exact vectors by what they miss.
  np.testing.assert_allclose(p, oracle.positive(u[:, :RANK]), atol=2e-3)
  turned = fit(name, g[:, ::-1] * -1.0, 6)[0]
  np.testing.assert_allclose(turned, p, atol=2e-3)


def test_fix_signs():
  p = jnp.array([[0.5, -0.5, 0.0], [-0.5, 0.5, -1.0]])
  np.testing.assert_array_equal(fix_signs(p), [[0.5, 0.5, 0.0], [-0.5, -0.5, 1.0]])
  np.testing.assert_array_equal(fix_signs(fix_signs(p)), fix_signs(p))


@pytest.mark.parametrize('name', LEADING)
def test_ranks_are_clipped_and_checked(name):
  make = bases.NAMES[name]
  for d, k in ((4, 6), (6, 4)):
    b = make(np.int64(99)).init(d, k, jnp.float32)
    assert b.shape == (d, 4)
    np.testing.assert_allclose(b.T @ b, np.eye(4), atol=1e-5)
  for bad, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
    with pytest.raises(error, match='`rank`'):
      make(bad)


def test_random_bases_follow_their_key():
  basis, g = lrjax.randomized_svd(2, oversample=0, power_steps=0), matrix((9, 16))
  one, same, other = (basis.fit(jax.random.key(k), g, g[:, :2]) for k in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert energy(one, g) != pytest.approx(energy(other, g), abs=1e-3)


def test_more_power_steps_catch_more():
  g, start = matrix((12, 12), decay=0.9), jnp.eye(12, 3)
  key = jax.random.key(0)
  shares = [
    energy(lrjax.randomized_svd(3, oversample=0, power_steps=q).fit(key, g, start), g)
    for q in (0, 1, 6)
  ]
  assert shares[0] < shares[1] < shares[2]
  one, four = (lrjax.subspace_iteration(3, steps=n).fit(key, g, start) for n in (1, 4))
  assert energy(one, g) < energy(four, g)


def test_cosines_are_orthonormal():
  np.testing.assert_allclose(
    cosines(7, 7, jnp.float32).T @ cosines(7, 7, jnp.float32), np.eye(7), atol=1e-5
  )
  p = signed_cosines(32, 5, jnp.float32)
  np.testing.assert_allclose(p.T @ p, np.eye(5), atol=1e-5)
  # Unlike plain cosines, they see a constant row as well as any other.
  assert np.abs(p.sum(axis=0)).max() < 0.8 * np.sqrt(32)


@pytest.mark.parametrize('name', LEADING)
def test_float64_stays_float64(name):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.standard_normal((9, 16)) * 0.7 ** np.arange(16))
    basis = bases.NAMES[name](RANK)
    p = basis.fit(jax.random.key(0), g, basis.init(9, 16, g.dtype))
    assert p.dtype == jnp.float64
    np.testing.assert_allclose(p.T @ p, np.eye(RANK), atol=1e-13)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_states_are_a_fixed_point_in_every_dtype(dtype):
  with jax.enable_x64(True):
    g = {'w': jnp.asarray(matrix((6, 8)), dtype), 'bias': jnp.ones(3, dtype)}
    tx = lrjax.scale_by_galore(rank=2, update_proj_gap=1, basis='eigh')
    state = tx.init(g)
    u, new = jax.jit(tx.update)(g, state)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(u) == types(g)
    assert types(new) == types(state)
    wide = jnp.promote_types(dtype, jnp.float32)
    assert {
      x.dtype for x in (new.slots['w'].state.basis, *new.slots['w'].state.inner[1:])
    } == {wide}
    p = np.asarray(new.slots['w'].state.basis, np.float64)
    np.testing.assert_allclose(p.T @ p, np.eye(2), atol=1e-5)


def test_stored_bases_are_as_good_as_their_codec():
  g = matrix((16, 24))
  exact, _ = fit('svd', g)
  half, good = fit('svd', g, codec=lrjax.cast(jnp.bfloat16))
  assert good
  assert half.dtype == jnp.bfloat16
  half = np.asarray(half, np.float32)
  np.testing.assert_allclose(half, exact, rtol=2.0**-8)
  # Eight bits: columns of length one to 2**-8, at angles not far from it.
  np.testing.assert_allclose(half.T @ half, np.eye(RANK), atol=2.0**-8)
  codec = lrjax.int8()
  coded, good = fit('svd', g, codec=codec)
  assert good
  assert (coded['codes'].shape, coded['codes'].dtype) == ((16, RANK), jnp.int8)
  p, largest = codec.decode(coded), np.abs(exact).max(axis=0)
  assert (np.abs(p - exact) <= largest / 254 + 1e-7).all()
  np.testing.assert_allclose(p.T @ p, np.eye(RANK), atol=2e-2)  # 2 sqrt(16) / 254


@pytest.mark.parametrize('codec', [lrjax.cast(jnp.bfloat16), lrjax.int8()])
def test_stored_bases_work_as_others_do(codec):
  g = matrix((9, 16))
  stored, plain = lrjax.stored_as(lrjax.svd(RANK), codec), lrjax.svd(RANK)
  b = stored.fit(None, g, stored.init(9, 16, g.dtype))
  p = codec.decode(b)
  low = stored.down(b, g)
  np.testing.assert_allclose(low, p.T @ g, atol=1e-6)
  np.testing.assert_allclose(stored.up(b, low, 9), p @ low, atol=1e-6)
  np.testing.assert_array_equal(stored.matrix(b, 9), p)
  assert energy(p, g) > 0.995 * energy(plain.fit(None, g, p), g)


def test_two_sided_of_a_stored_basis():
  basis = lrjax.two_sided(lrjax.stored_as(lrjax.svd(2), lrjax.cast(jnp.bfloat16)))
  g = matrix((6, 9))
  b = basis.fit(jax.random.key(0), g, basis.init(6, 9, g.dtype))
  s = np.linalg.svd(g, compute_uv=False)
  low = basis.down(b, g)
  assert low.shape == (2, 2)
  np.testing.assert_allclose(np.abs(np.diag(low)), s[:2], rtol=1e-2)
  assert basis.up(b, low, 6).shape == g.shape
  assert basis.matrix is None
