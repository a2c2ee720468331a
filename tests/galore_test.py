"""GaLore against its transcription, and its arguments."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import galore as oracle
from samples import gradients, matrix

import lrjax
from lrjax.testing import trajectory

SHAPES = {'tall': (12, 8), 'wide': (8, 12), 'square': (8, 8)}


@pytest.mark.parametrize('side', ['short', 'long', 'in', 'out'])
def test_equals_the_transcription(side):
  grads = gradients(SHAPES, 12)
  tx = lrjax.scale_by_galore(3, 5, 0.25, side=side)
  out, _ = trajectory(tx, grads[0], grads)
  for name in SHAPES:
    want = oracle.galore([g[name] for g in grads], rank=3, gap=5, scale=0.25, side=side)
    # Updates are of size 0.25. Adam turns float32 noise of 1e-7 in a small entry of the
    # projection into as much of its own; measured: 3e-6.
    np.testing.assert_allclose(np.stack([u[name] for u in out]), want, atol=1e-5)


@pytest.mark.parametrize('basis', ['eigh', 'randomized_svd', 'subspace_iteration'])
def test_bases_by_name_find_the_subspace_of_svd(basis):
  # Rank 3 exactly, so that a random range finder finds it too.
  g = {'w': matrix((8, 3), 0, 1.0) @ matrix((3, 12), 1)}
  make = lambda basis: lrjax.scale_by_galore(
    rank=3, basis=basis, base_optimizer=optax.identity(), scale=1.0
  )
  tx = make(basis)
  u, _ = jax.jit(tx.update)(g, tx.init(g))
  np.testing.assert_allclose(u['w'], g['w'], atol=1e-5)


def test_other_leaves_get_the_base_optimizer_unscaled():
  params = {'w': matrix((8, 12)), 'bias': jnp.ones(3), 'small': matrix((3, 9))}
  tx = lrjax.galore(0.1, rank=3, scale=0.25)
  u, _ = jax.jit(tx.update)(params, tx.init(params), params)
  want, _ = (plain := optax.adam(0.1)).update(params, plain.init(params))
  for name in ('bias', 'small'):
    np.testing.assert_allclose(u[name], want[name], rtol=1e-5)
  assert float(jnp.abs(u['w']).max()) < 0.1


def test_decay_is_decoupled_and_in_full_space():
  params = {'w': matrix((8, 12)), 'bias': jnp.ones(3)}
  grads = jax.tree.map(jnp.ones_like, params)
  run = lambda **kw: (tx := lrjax.galore(0.1, rank=3, **kw)).update(
    grads, tx.init(params), params
  )[0]
  plain, decayed = run(), run(weight_decay=0.5)
  masked = run(weight_decay=0.5, mask={'w': True, 'bias': False})
  for name in params:
    want = plain[name] - 0.1 * 0.5 * params[name]
    np.testing.assert_allclose(decayed[name], want, atol=1e-6)
  np.testing.assert_array_equal(masked['bias'], plain['bias'])
  with pytest.raises(ValueError, match='params'):
    tx = lrjax.galore(0.1, rank=3, weight_decay=0.5)
    tx.update(grads, tx.init(params))


def test_hyperparameters_can_be_injected():
  params = {'w': matrix((8, 12)), 'bias': jnp.ones(3)}
  rate, scale = optax.linear_schedule(0.1, 0.0, 4), optax.linear_schedule(1.0, 0.0, 8)
  make = optax.inject_hyperparams(lrjax.galore, static_args=('rank', 'update_proj_gap'))
  tx = make(learning_rate=rate, rank=3, update_proj_gap=2, scale=scale)
  out, state = trajectory(tx, params, [params] * 3)
  fixed, _ = trajectory(
    lrjax.galore(1.0, rank=3, update_proj_gap=2, scale=1.0), params, [params] * 3
  )
  for t in range(3):
    np.testing.assert_allclose(
      out[t]['w'], rate(t) * scale(t) * fixed[t]['w'], atol=1e-6
    )
    np.testing.assert_allclose(out[t]['bias'], rate(t) * fixed[t]['bias'], atol=1e-6)
  assert {'learning_rate', 'scale', 'weight_decay'} <= set(state.hyperparams)


@pytest.mark.parametrize('name', ['rank', 'update_proj_gap'])
def test_a_traced_shape_is_refused_with_the_way_out(name):
  params = {'w': matrix((8, 12))}
  static = {'rank', 'update_proj_gap'} - {name}
  tx = optax.inject_hyperparams(lrjax.galore, static_args=static)(0.1)
  with pytest.raises(TypeError, match=f'`{name}`.*static_args'):
    tx.init(params)
  with pytest.raises(TypeError, match=f'`{name}`.*static_args'):
    jax.jit(lambda n: lrjax.scale_by_galore(**{name: n}) and n)(3)


def test_its_arguments_stand_where_optax_has_them():
  pairs = (
    (lrjax.galore, optax.contrib.galore),
    (lrjax.scale_by_galore, optax.contrib.scale_by_galore),
  )
  for ours, theirs in pairs:
    named = list(inspect.signature(theirs).parameters)
    assert list(inspect.signature(ours).parameters)[: len(named)] == named
  added = set(inspect.signature(lrjax.scale_by_galore).parameters)
  assert added < set(inspect.signature(lrjax.galore).parameters)


@pytest.mark.parametrize(
  ('bad', 'error', 'message'),
  [
    (
      dict(update_proj_gap=0),
      ValueError,
      '`update_proj_gap` must be at least 1, got 0',
    ),
    (dict(update_proj_gap=-3), ValueError, 'got -3'),
    (dict(update_proj_gap=2.5), TypeError, 'got 2.5 of type float'),
    (dict(update_proj_gap=True), TypeError, 'got True of type bool'),
    (dict(scale=-1.0), ValueError, '`scale` must be at least 0 and finite, got -1.0'),
    (dict(scale=float('nan')), ValueError, '`scale`.*got nan'),
    (dict(scale='0.25'), TypeError, "`scale` must be a number, got '0.25' of type str"),
    (dict(learning_rate=float('nan')), ValueError, '`learning_rate`.*got nan'),
    (dict(learning_rate=float('inf')), ValueError, '`learning_rate`.*got inf'),
    (dict(learning_rate=-1e-3), ValueError, '`learning_rate`.*got -0.001'),
    (dict(learning_rate='1e-3'), TypeError, '`learning_rate`.*type str'),
    (dict(weight_decay=-0.1), ValueError, '`weight_decay`.*got -0.1'),
    (dict(basis='svdd'), ValueError, "`basis` 'svdd'; did you mean 'svd'.*eigh"),
    (dict(basis=4), TypeError, '`basis` must be a function or one of .*eigh.*got 4'),
    (dict(side='shrot'), ValueError, "`side` 'shrot'; did you mean 'short'.*in, long"),
    (dict(moments_on_refresh='rotat'), ValueError, "did you mean 'rotate'.*keep"),
    (dict(guard='leaf'), ValueError, "`guard` 'leaf'.*matrix, tree"),
    (dict(basis_dtype=jnp.int8), TypeError, '`basis_dtype` must be a floating-point'),
    (dict(base_optimizer=optax.adafactor(0.1)), ValueError, 'needs parameters'),
    (dict(rnk=4), TypeError, "'rnk'"),
  ],
  # Not the values: some print their address, which differs between test processes.
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_bad_arguments_are_refused_at_construction(bad, error, message):
  with pytest.raises(error, match=message):
    lrjax.galore(**{'learning_rate': 1e-2, 'rank': 4, **bad})
