"""The conformance battery: what every gradient transformation must pass.

Each check takes a transformation and raises AssertionError where it fails. A method of
your own joins by one line:

  @pytest.mark.parametrize('check', lrjax.testing.CHECKS)
  def test_mine(check):
    check(my_method(rank=4, update_proj_gap=3))

Make it with a rank of at most 4 and a refresh interval of at most 3, so that five steps
see two refreshes. Sharded checks need eight devices, `orbax_round_trip` Orbax.
"""

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lrjax.sharding import state_specs
from lrjax.testing.hlo import collectives

Transform = optax.GradientTransformation
SHAPES = {
  'q': {'kernel': (12, 16)},
  'stack': {'kernel': (2, 16, 12)},
  'norm': {'scale': (12,)},
}
SPECS = {
  'q': {'kernel': P('fsdp', 'tensor')},
  'stack': {'kernel': P(None, 'tensor', 'fsdp')},
  'norm': {'scale': P()},
}
STEPS = 5


def example(dtype: Any = jnp.float32, seed: int = 0) -> tuple[Any, list[Any]]:
  """Parameters (a matrix, a stack, a vector) and five gradients of one dtype.

  The gradients share a decaying spectrum that turns from step to step, so that bases
  are well determined and refreshes change them.
  """
  rng = np.random.default_rng(seed)

  def draw(shape: tuple[int, ...], decay: bool) -> jax.Array:
    x = rng.standard_normal(shape)
    if decay and len(shape) > 1:
      u, s, v = np.linalg.svd(x, full_matrices=False)
      x = (u * 0.6 ** np.arange(s.shape[-1])) @ v
    return jnp.asarray(x, dtype)

  tree = lambda decay: jax.tree.map(
    lambda s: draw(s, decay), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
  )
  return tree(False), [tree(True) for _ in range(STEPS)]


def trajectory(
  tx: Transform, params: Any, grads: list[Any], state: Any = None
) -> tuple[list[Any], Any]:
  """The updates of a sequence of gradients, parameters held still, and the last state."""
  update = _jitted(tx)
  state = tx.init(params) if state is None else state
  out = []
  for g in grads:
    u, state = update(g, state, params)
    out.append(u)
  return out, state


@functools.lru_cache(maxsize=8)
def _jitted(tx: Transform) -> Callable:
  return jax.jit(tx.update)


def compiles_once(tx: Transform) -> None:
  """Five steps, refreshes among them, compile one program."""
  params, grads = example()
  update: Any = _jitted(tx)
  before = update._cache_size()
  trajectory(tx, params, grads)
  assert update._cache_size() <= before + 1, f'{update._cache_size()} compilations'


def state_is_plain(tx: Transform) -> None:
  """The state is distinct arrays of stable type, none empty, as `init` promises."""
  params, grads = example()
  state = tx.init(params)
  for path, x in jax.tree.leaves_with_path(state):
    assert isinstance(x, jax.Array), f'{path}: {type(x)} is not an array'
    assert x.size, f'{path}: empty arrays cannot be saved'
  leaves = jax.tree.leaves(state)
  assert len({id(x) for x in leaves}) == len(leaves), 'no buffer is donated twice'
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  want = _types(state)
  assert _types(jax.eval_shape(tx.init, params)) == want
  assert _types(tx.init(abstract)) == want, 'init on abstract parameters differs'
  assert _types(trajectory(tx, params, grads)[1]) == want, 'types change with the steps'


def runs_in_scan_and_cond(tx: Transform) -> None:
  """A scan over gradients, and a cond around the step, equal the plain loop."""
  params, grads = example()
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)

  @jax.jit
  def scanned(state: Any) -> Any:
    def body(state: Any, g: Any) -> tuple[Any, Any]:
      step = lambda: tx.update(g, state, params)
      u, state = jax.lax.cond(jnp.asarray(True), step, lambda: (g, state))
      return state, u

    return jax.lax.scan(body, state, stacked)

  state, out = scanned(tx.init(params))
  want, want_state = trajectory(tx, params, grads)
  _close(out, jax.tree.map(lambda *x: jnp.stack(x), *want))
  _close(state, want_state)


def keeps_dtypes(tx: Transform) -> None:
  """Updates have the gradients' dtype in a tree of bf16 and float32; all is finite."""
  params, grads = example()
  half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  mixed = lambda tree: half(tree) | {'norm': tree['norm']}
  p, gs = mixed(params), [mixed(g) for g in grads]
  out, state = trajectory(tx, p, gs)
  for u in out:
    assert _types(u) == _types(gs[0])
  for x in jax.tree.leaves((out, state)):
    assert bool(jnp.isfinite(x).all())
  whole = jax.eval_shape(lambda g: tx.update(g, tx.init(g), g)[0], half(params))
  assert _types(whole) == _types(half(params))


def passes_over_empty_leaves(tx: Transform) -> None:
  """None and MaskedNode stay where they are and leave no trace in the state."""
  params, _ = example()
  run = lambda g: tx.update(g, tx.init(g), g)
  out, state = jax.eval_shape(run, params)
  empty = {'none': None, 'masked': optax.MaskedNode()}
  got, got_state = jax.eval_shape(run, params | empty)
  assert jax.tree.structure(got) == jax.tree.structure(out | empty)
  assert _types(got_state) == _types(state)


def runs_inside_wrappers(tx: Transform) -> None:
  """Inside partition, masked, inject_hyperparams and apply_if_finite nothing changes."""
  params, grads = example()
  want, _ = trajectory(tx, params, grads)
  labels = {'q': 'a', 'stack': 'a', 'norm': 'a'}
  # All around each other, for one compilation.
  inner = optax.apply_if_finite(
    optax.masked(tx, jax.tree.map(lambda _: True, labels)), 3
  )
  parts = optax.partition({'a': inner, 'b': optax.sgd(1.0)}, labels)
  injected = optax.inject_hyperparams(lambda lr: optax.chain(parts, optax.scale(lr)))
  out, _ = trajectory(injected(lr=1.0), params, grads)
  _close(out, want)


def sees_only_its_part(tx: Transform) -> None:
  """In a partition the other group's leaves are left to the other transformation."""
  params, grads = example()
  both = optax.partition(
    {'a': tx, 'b': optax.sgd(0.5)}, {'q': 'a', 'stack': 'b', 'norm': 'b'}
  )
  out, _ = trajectory(both, params, grads)
  want, _ = trajectory(tx, {'q': params['q']}, [{'q': g['q']} for g in grads])
  _close([u['q'] for u in out], [u['q'] for u in want])
  _close(
    [u['stack'] for u in out],
    [jax.tree.map(lambda x: -0.5 * x, g['stack']) for g in grads],
  )


def accumulates(tx: Transform) -> None:
  """MultiSteps over two micro-batches equals one step on their mean gradient."""
  params, grads = example()
  twice = optax.MultiSteps(tx, 2)
  out, _ = trajectory(twice.gradient_transformation(), params, grads[:4])
  mean = lambda a, b: jax.tree.map(lambda x, y: (x + y) / 2, a, b)
  want, _ = trajectory(tx, params, [mean(*grads[:2]), mean(*grads[2:4])])
  _close([out[1], out[3]], want)


def accepts_extra_arguments(tx: Transform) -> None:
  """Unknown keyword arguments, which optax hands to every link, are let through."""
  params, _ = example()
  takes = optax.with_extra_args_support(tx)
  given = lambda g: takes.update(g, takes.init(g), g, value=1.0, unknown='x')[0]
  assert _types(jax.eval_shape(given, params)) == _types(params)


def maps_over_params(tx: Transform) -> None:
  """`optax.tree.map_params` finds its way through the state."""
  params, _ = example()
  state = tx.init(params)
  mapped = optax.tree.map_params(tx.init, lambda x: x, state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)


def transposes(tx: Transform) -> None:
  """A transposed parameter gets the transposed updates."""
  params, grads = example()
  # Of the structure that `sees_only_its_part` has: one compilation for both.
  kernel = lambda tree: {'q': tree['q']}
  turned = lambda tree: {'q': {'kernel': tree['q']['kernel'].T}}
  out, _ = trajectory(tx, turned(params), [turned(g) for g in grads])
  want, _ = trajectory(tx, kernel(params), [kernel(g) for g in grads])
  _close([u['q']['kernel'].T for u in out], [u['q']['kernel'] for u in want], 1e-4)


def stacks(tx: Transform) -> None:
  """A stack of matrices gets the updates of its slices one by one."""
  params, grads = example()
  one = lambda tree, i: {'stack': {'kernel': tree['stack']['kernel'][i]}}
  out, _ = trajectory(tx, params, grads)
  for i in range(2):
    want, _ = trajectory(tx, one(params, i), [one(g, i) for g in grads])
    _close(
      [u['stack']['kernel'][i] for u in out], [u['stack']['kernel'] for u in want], 1e-4
    )


def holds_still_on_bad_gradients(tx: Transform) -> None:
  """A step with NaN, infinity or 1e20 moves nothing; the run then goes on as if not met."""
  params, grads = example()
  want, want_state = trajectory(tx, params, grads)
  for bad, at in ((jnp.nan, 0), (jnp.inf, 1), (-jnp.inf, 3), (1e20, 2)):
    poisoned = jax.tree.map(jnp.copy, grads[at])
    poisoned['stack']['kernel'] = poisoned['stack']['kernel'].at[1, 0, 0].set(bad)
    out, state = trajectory(tx, params, [*grads[:at], poisoned, *grads[at:]])
    assert all(not x.any() for x in jax.tree.leaves(out[at])), f'{bad} moved parameters'
    _same(out[:at] + out[at + 1 :], want)
    skipped = [
      (a, b)
      for a, b in zip(*map(jax.tree.leaves, (state, want_state)))
      if not _equal(a, b)
    ]
    assert all(a.dtype == jnp.int32 and a == b + 1 for a, b in skipped), (
      'state was touched'
    )
    assert skipped, 'the skipped step is not counted'


def orbax_round_trip(tx: Transform) -> None:
  """Saved between two refreshes and restored, the run ends on the same bits."""
  from orbax.checkpoint import v1 as ocp

  params, grads = example()
  _, state = trajectory(tx, params, grads[:2])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  with tempfile.TemporaryDirectory() as d:
    ocp.save(f'{d}/state', state)
    restored = ocp.load(f'{d}/state', abstract)
  _same(restored, state)
  _same(
    trajectory(tx, params, grads[2:], restored),
    trajectory(tx, params, grads[2:], state),
  )


def shards_like_one_device(tx: Transform, most: int | None = None) -> None:
  """On 2 x 2 x 2 devices, automatic or explicit, all is as on one; one compilation.

  Args:
    tx: the transformation.
    most: how many numbers a collective of a step without a refresh may result in; None:
      any. One that holds a gradient, or only its part along one mesh axis, results in at
      least 96 of the matrix and 192 of the stack.
  """
  params, grads = example()
  want, _ = trajectory(tx, params, grads)
  _shards_on(tx, params, grads, want, AxisType.Auto, most)
  _shards_on(tx, params, grads, want, AxisType.Explicit, most)


CHECKS: tuple[Callable[[Transform], None], ...] = (
  compiles_once,
  state_is_plain,
  runs_in_scan_and_cond,
  keeps_dtypes,
  passes_over_empty_leaves,
  runs_inside_wrappers,
  sees_only_its_part,
  accumulates,
  accepts_extra_arguments,
  maps_over_params,
  transposes,
  stacks,
  holds_still_on_bad_gradients,
  orbax_round_trip,
  shards_like_one_device,
)


def _shards_on(
  tx: Transform, params: Any, grads: Any, want: Any, kind: AxisType, most: int | None
) -> None:
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(kind,) * 3)
  named = lambda specs: jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
  specs = state_specs(tx, params, SPECS, mesh)
  put = lambda tree: jax.device_put(tree, named(SPECS))
  with jax.set_mesh(mesh):
    p = put(params)
    state = jax.jit(tx.init, out_shardings=named(specs))(p)
    if kind == AxisType.Explicit:
      _same_placement(jax.jit(tx.init)(p), state)
    update = jax.jit(tx.update, out_shardings=(named(SPECS), named(specs)))
    # What is compiled ahead refuses arrays of another type or placement.
    step = update.lower(put(grads[0]), state, p).compile()
    for g, w in zip(grads, want):
      u, state = step(put(g), state, p)
      _close(jax.device_get(u), w, 1e-4)
  steady, _ = collectives(step.as_text() or '')
  over = [(op, n) for op, n in steady if most is not None and n > most]
  assert not over, f'{kind}: {over} are more than {most} numbers'


def _types(tree: Any) -> Any:
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def _close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
  # Adam divides small numbers by small ones, so what another order of sums changes in
  # the last bit may show ten times larger; checks that reorder sums pass 1e-4.
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)


def _equal(a: jax.Array, b: jax.Array) -> bool:
  return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _same(got: Any, want: Any) -> None:
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
    assert _equal(a, b), f'{jax.tree_util.keystr(path)}: bits differ'


def _same_placement(got: Any, want: Any) -> None:
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
    same = a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert same, f'{jax.tree_util.keystr(path)}: {a.sharding} is not {b.sharding}'
