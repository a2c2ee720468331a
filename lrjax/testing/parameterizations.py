"""The battery for parameterizations: what every stored form of a kernel must pass.

Each check takes a `Case` and raises AssertionError where it fails. A form of your own
joins by one line:

  case = Case(mine(rank=4), full=mine(rank=12))
  @pytest.mark.parametrize('check', lrjax.testing.parameterizations.CHECKS)
  def test_mine(check):
    check(case)

Kernels are (12, 16), (16, 12) and (16, 16). Events that are not of each step should be due
at 3. Sharded checks need four devices, `survives_orbax` Orbax.
"""

import functools
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lrjax.moments import adam
from lrjax.types import Parameterization, Split
from lrjax.views import VECTORS, hidden_kernels
from lrjax.weights import (
  Weights,
  convert,
  due_events,
  export,
  named_arrays,
  run_events,
  split_at,
  step_events,
)

WIDE, TALL, SQUARE = (12, 16), (16, 12), (16, 16)
PATH = 'layers/q'


class Case(NamedTuple):
  """A parameterization, and what is known of it.

  Attributes:
    kernel: at a rank or density that saves something on (12, 16).
    full: the same method where it can hold any (12, 16) and (16, 12) matrix; None: it
      never can.
    true_gradient: whether trained arrays get the gradient of the function computed, as
      opposed to one the method puts in its place.
  """

  kernel: Parameterization
  full: Parameterization | None = None
  true_gradient: bool = True


def fits_its_description(case: Case) -> None:
  """Arrays are those that `axes` tells, of the dtype asked for, the same for one key."""
  p, key = case.kernel, jax.random.key(3)
  for shape in (WIDE, TALL):
    for dtype in (jnp.float32, jnp.bfloat16):
      split = _init(p)(key, shape, dtype)
      arrays, size = named_arrays(split), dict(zip(('in', 'out'), shape))
      assert {*arrays} == {*p.axes}, f'arrays {[*arrays]}, axes {[*p.axes]}'
      for name, x in arrays.items():
        axes = p.axes[name]
        assert x.ndim == len(axes), f'{name}: {x.shape} against {axes}'
        told = [n == size[a] for n, a in zip(x.shape, axes) if a in size]
        assert all(told), f'{name}: {x.shape} against {axes}'
        if jnp.issubdtype(x.dtype, jnp.floating):
          trained = not split.fixed or name not in split.fixed
          assert x.dtype == dtype or not trained, f'{name}: {x.dtype}'
          assert np.isfinite(np.asarray(x, 'f4')).all(), f'{name} is not finite'
        else:
          assert x.dtype in (jnp.int32, bool), f'{name}: {x.dtype}'
    abstract = jax.eval_shape(functools.partial(p.init, key, shape, jnp.bfloat16))
    assert _types(abstract) == _types(split)
    _same(_init(p)(key, shape, jnp.bfloat16), split)
  seen = {
    name: hidden_kernels(f'q/kernel/{name}', jax.ShapeDtypeStruct((2, *x.shape), 'f4'))
    for name, x in named_arrays(Split(split.train)).items()
  }
  want = {name: len(p.axes[name]) > 1 and name not in VECTORS for name in seen}
  assert seen == want, f'what optimizers project: {seen}, matrices: {want}'


def applies_what_it_materializes(case: Case) -> None:
  """y = x W for the W that it tells, for any leading axes of x."""
  for shape in (WIDE, TALL):
    split = _moved(case, shape)
    x = _normal(1, (2, 3, shape[0]))
    y = _apply(case.kernel)(split, x)
    assert y.shape == (2, 3, shape[1])
    _close(np.asarray(y)[1, 2], _apply(case.kernel)(split, x[1, 2]))
    if case.kernel.materialize:
      W = _dense(case.kernel)(split)
      assert W.shape == shape
      _close(y, x @ np.asarray(W))


def imports_dense(case: Case) -> None:
  """`from_dense` tells its true error, which is 0 where the form can hold any matrix."""
  for shape in (WIDE, TALL):
    W = _normal(2, shape) / 4
    for p in filter(None, (case.kernel, case.full)):
      from_dense, key = jax.jit(p.from_dense), jax.random.key(5)
      split, error = from_dense(key, W)
      assert {*named_arrays(split)} == {*p.axes}
      assert error.shape == () and error.dtype == jnp.float32
      if p.materialize:
        true = np.linalg.norm(W - _dense(p)(split)) / np.linalg.norm(W)
        np.testing.assert_allclose(error, true, atol=2e-5)
      if p is case.full:
        assert error < 1e-5, f'at full rank the error is {error}'
      half, _ = from_dense.lower(key, W.astype(jnp.bfloat16)).out_info
      for name, x in named_arrays(Split(half.train)).items():
        assert x.dtype == jnp.bfloat16, f'{name}: {x.dtype}'


def differentiates(case: Case) -> None:
  """Gradients are those of x W for the dense W, and of finite differences."""
  if not case.true_gradient:
    return
  p, split, x = case.kernel, _moved(case, WIDE), _normal(1, (5, WIDE[0]))

  def loss(train: Any, x: jax.Array, dense: bool) -> jax.Array:
    s = split._replace(train=train)
    y = x @ p.materialize(s) if dense else p.apply(s, x)  # pyrefly: ignore
    return jnp.sum(jnp.sin(y))

  both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
  _, grads = both(split.train, x, False)
  if p.materialize:
    _close(grads, both(split.train, x, True)[1], 1e-4)
  along = jax.tree.map(lambda g: _normal(g.size, g.shape), grads)
  moved = lambda h: jax.tree.map(
    lambda v, t: np.asarray(v) + np.float32(h) * t, (split.train, x), along
  )
  step = lambda h: both(*moved(h), False)[0]
  slope = (step(1e-2) - step(-1e-2)) / 2e-2
  want = sum(np.vdot(g, t) for g, t in zip(*map(jax.tree.leaves, (grads, along))))
  np.testing.assert_allclose(slope, want, rtol=2e-2, atol=2e-2)


def learns(case: Case) -> None:
  """Forty steps with its events lower the loss of a regression; no array stays behind."""
  p, x = case.kernel, jnp.asarray(_normal(1, (32, WIDE[0])))
  y = np.asarray(x) @ _normal(4, WIDE) / 4
  plan, tx = {PATH: p}, adam()
  weights = _weights(p, _init(p)(jax.random.key(7), WIDE, jnp.float32), tx)
  start = split_at(PATH, weights.params, weights.fixed).train

  @jax.jit
  def step(weights: Weights, k: jax.Array) -> tuple[Weights, jax.Array]:
    weights, _ = run_events(plan, step_events(plan), weights, k, tx=tx)

    def loss(params: Any) -> jax.Array:
      return jnp.mean((p.apply(split_at(PATH, params, weights.fixed), x) - y) ** 2)

    value, grads = jax.value_and_grad(loss)(weights.params)
    u, opt = tx.update(grads, weights.opt_state, weights.params)
    params = jax.tree.map(lambda w, u: w - 0.02 * u, weights.params, u)
    return Weights(params, weights.fixed, opt), value

  rare = jax.jit(
    lambda names, weights, k: run_events(plan, names, weights, k, tx=tx)[0],
    static_argnums=0,
  )
  losses = []
  for k in range(40):
    if names := due_events(plan, k):
      weights = rare(names, weights, k)
    weights, value = step(weights, k)
    losses.append(float(value))
  assert min(losses[-5:]) < 0.9 * losses[0], f'{losses[0]} to {losses[-1]}'
  end = split_at(PATH, weights.params, weights.fixed).train
  for name, x in named_arrays(Split(end)).items():
    assert not _equal(x, named_arrays(Split(start))[name]), f'{name} never moved'


def stacks_like_a_loop(case: Case) -> None:
  """A stack of kernels is drawn, applied, changed by events and exported one by one."""
  p, keys = case.kernel, jax.random.split(jax.random.key(8), 2)
  x, plan = _normal(1, (2, 5, WIDE[0])), {PATH: case.kernel}
  stacked = jax.jit(jax.vmap(lambda key: p.init(key, WIDE, jnp.float32)))(keys)
  ones = [_init(p)(key, WIDE, jnp.float32) for key in keys]
  _close(jax.tree.map(lambda *a: np.stack(a), *ones), stacked)
  params, fixed, _ = _weights(p, stacked, None)

  @jax.jit
  def run(stacked: Split, params: Any, fixed: Any, x: jax.Array, W: jax.Array) -> Any:
    out = jax.vmap(p.apply)(stacked, x)
    dense = export(plan, params, fixed) if p.materialize else None
    new, _ = run_events(plan, {e.name for e in p.events}, Weights(params, fixed), 3)
    loaded = params | {'layers': {'q': {'kernel': W}}}
    back, _, errors = convert(plan, loaded, jax.random.key(0))
    return out, dense, new.params, back, errors

  W = _normal(2, (2, *WIDE))
  out, dense, new, back, errors = run(stacked, params, fixed, x, W)
  for i, one in enumerate(ones):
    _close(np.asarray(out)[i], _apply(p)(one, x[i]))
  if p.materialize:
    exported = np.asarray(dense['layers']['q']['kernel'])
    _close(exported[1], _dense(p)(ones[1]))
  assert _types(new) == _types(params)
  assert _types(back) == _types(params)
  assert errors[PATH].shape == (2,)


def computes_in_bf16(case: Case) -> None:
  """In bfloat16 it stays bfloat16 and near the float32 result."""
  split, x = _moved(case, WIDE), _normal(1, (5, WIDE[0]))
  want = np.asarray(_apply(case.kernel)(split, x))
  half = lambda a: (
    np.asarray(a, jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a
  )
  got = _apply(case.kernel)(jax.tree.map(half, split), half(x))
  assert got.dtype == jnp.bfloat16
  scale = float(np.abs(want).max())
  np.testing.assert_allclose(got.astype('f4'), want, atol=0.06 * scale)


def survives_orbax(case: Case) -> None:
  """Trained and fixed arrays come back from a checkpoint with the same bits."""
  from orbax.checkpoint import v1 as ocp

  split = _moved(case, WIDE)
  tree: Any = {
    'train': split.train,
    'fixed': dict(split.fixed) or {'none': jnp.zeros(1)},
  }
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
  with tempfile.TemporaryDirectory() as d:
    ocp.save(f'{d}/state', tree)
    _same(ocp.load(f'{d}/state', abstract), tree)


def exports_and_comes_back(case: Case) -> None:
  """Dense kernels hold the same function; a form that is not linear says so."""
  plan = {PATH: case.kernel}
  params, fixed, _ = _weights(case.kernel, _moved(case, WIDE), None)
  if case.kernel.materialize is None:
    try:
      export(plan, params, fixed)
    except ValueError as error:
      assert PATH in str(error)
      return
    raise AssertionError('exporting a form that is not linear must fail')

  @jax.jit
  def there_and_back(params: Any, fixed: Any) -> Any:
    dense = export(plan, params, fixed)
    return dense, convert({PATH: case.full or case.kernel}, dense, jax.random.key(0))

  dense, back = there_and_back(params, fixed)
  if case.full:
    W = _dense(case.full)(split_at(PATH, *back[:2]))
    _close(W, dense['layers']['q']['kernel'])


def events_keep_their_promise(case: Case) -> None:
  """Events leave the function and all moments but those they tell; they count these."""
  p, tx, x = case.kernel, adam(), _normal(1, (5, WIDE[0]))
  plan = {PATH: p}
  weights = _weights(p, _moved(case, WIDE), tx)
  full = jax.tree.map(np.ones_like, weights.opt_state)
  weights = weights._replace(opt_state=full)
  apply = lambda w: _apply(p)(split_at(PATH, w.params, w.fixed), x)
  for event in p.events:
    run = jax.jit(functools.partial(run_events, plan, {event.name}, tx=tx))
    new, report = run(weights, 3)
    _same(run(weights, 3)[0], new)
    assert _types(new) == _types(weights)
    if event.preserves:
      _close(apply(new), apply(weights), 1e-5)
    state = jax.device_get(new.opt_state)
    moments = jax.tree.leaves((state.mu, state.nu))
    changed = sum(int((a != 1).sum()) for a in moments)
    zeros = sum(int((a == 0).sum()) for a in moments)
    touched = report[event.name]
    assert zeros == touched.zeros, f'{zeros} zeros, {touched} told'
    assert changed <= touched.entries
    if event.moments is None:
      assert changed == touched.entries, f'{touched}'
    others = state.mu['norm'], state.nu['norm'], state.count
    held = all(bool((a == 1).all()) for a in others)
    assert held != event.everything, 'moments of another parameter'
    _same(new.params['norm'], weights.params['norm'])


def shards_like_one_device(case: Case) -> None:
  """On a 2 x 2 mesh function, gradients and events are as on one device."""
  p, x, plan, tx = case.kernel, _normal(1, (4, SQUARE[0])), {PATH: case.kernel}, adam()
  weights = _weights(p, _moved(case, SQUARE), tx)
  names = {e.name for e in p.events}

  def run(weights: Weights, x: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
      return jnp.sum(jnp.sin(p.apply(split_at(PATH, params, weights.fixed), x)))

    new, _ = run_events(plan, names, weights, 3, tx=tx)
    after = p.apply(split_at(PATH, new.params, new.fixed), x)
    return jax.value_and_grad(loss)(weights.params), after

  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  place = {'in': 'fsdp', 'out': 'tensor', None: None}
  specs = {
    name: NamedSharding(mesh, P(*(place[a] for a in axes)))
    for name, axes in p.axes.items()
  }
  split = split_at(PATH, weights.params, weights.fixed)
  put = lambda name, a: jax.device_put(a, specs[name])
  train = (
    {n: put(n, a) for n, a in split.train.items()}
    if isinstance(split.train, dict)
    else put('', split.train)
  )
  fixed = {n: put(n, a) for n, a in split.fixed.items()}
  spread = _weights(p, Split(train, fixed), tx)
  with jax.set_mesh(mesh):
    got = jax.jit(run)(spread, jax.device_put(x, NamedSharding(mesh, P('fsdp'))))
  _close(jax.device_get(got), jax.jit(run)(weights, x), 1e-4)


CHECKS = (
  fits_its_description,
  applies_what_it_materializes,
  imports_dense,
  differentiates,
  learns,
  stacks_like_a_loop,
  computes_in_bf16,
  survives_orbax,
  exports_and_comes_back,
  events_keep_their_promise,
  shards_like_one_device,
)


@functools.lru_cache(maxsize=64)
def _init(p: Parameterization) -> Callable:
  return jax.jit(p.init, static_argnums=(1, 2))


@functools.lru_cache(maxsize=64)
def _apply(p: Parameterization) -> Callable:
  return jax.jit(p.apply)


@functools.lru_cache(maxsize=64)
def _dense(p: Parameterization) -> Callable:
  return jax.jit(p.materialize)  # pyrefly: ignore


@functools.lru_cache(maxsize=64)
def _moved(case: Case, shape: tuple) -> Split:
  """A kernel away from its start, where one factor may be zero."""
  split = _init(case.kernel)(jax.random.key(0), shape, jnp.float32)
  noise = lambda a: jnp.asarray(
    np.asarray(a) + np.float32(0.1) * _normal(a.size, a.shape)
  )
  return split._replace(train=jax.tree.map(noise, split.train))


def _weights(p: Parameterization, split: Split, tx: Any) -> Weights:
  train = dict(split.train) if isinstance(split.train, dict) else split.train
  params = {'layers': {'q': {'kernel': train}}, 'norm': jnp.ones(3)}
  fixed = {'layers': {'q': {'fixed': dict(split.fixed)}}} if split.fixed else {}
  return Weights(params, fixed, tx.init(params) if tx else None)


def _normal(seed: int, shape: tuple) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _types(tree: Any) -> Any:
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def _close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
  """Relative to the largest entry, because sums of many terms are compared."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
    a, b = np.asarray(a), np.asarray(b)
    near = tolerance * max(1.0, float(np.abs(b).max(initial=0)))
    np.testing.assert_allclose(a, b, atol=near, err_msg=jax.tree_util.keystr(path))


def _equal(a: Any, b: Any) -> bool:
  return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _same(got: Any, want: Any) -> None:
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
    assert _equal(a, b), f'{jax.tree_util.keystr(path)}: bits differ'
