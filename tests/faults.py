"""Injects bad gradients and prints a JSON line for each case: {case: error or ''}.

Run by `faults_test.py` in a process of its own, because a factorisation that meets an
infinity may never return.
"""

import functools
import hashlib
import json
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import gradients

import lrjax

# Shapes on which plain LAPACK hung with an infinity at [0, 0], and a stack.
SHAPES = {
  'tall': (16, 12),
  'wide': (12, 16),
  'square': (8, 8),
  'small': (4, 4),
  'stack': (2, 12, 16),
}
GAP = 3
BAD = {
  'nan': np.nan,
  'inf': np.inf,
  '-inf': -np.inf,
  '1e20': 1e20,
  '1e25': 1e25,
  '1e37': 1e37,
}
GRADS = jax.device_get(gradients(SHAPES, 7))
BASES = ('svd', 'eigh', 'randomized_svd', 'subspace_iteration')


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(
      path
    )


@functools.cache
def galore(basis):
  """(jitted update, first state, gradients)."""
  tx = lrjax.scale_by_galore(rank=3, update_proj_gap=GAP, basis=basis)
  # The costly ones to compile meet two shapes only.
  names = SHAPES if basis in ('svd', 'eigh') else ('small', 'stack')
  grads = [{n: g[n] for n in names} for g in GRADS]
  return jax.jit(tx.update), jax.device_get(tx.init(grads[0])), grads


def run(update, state, grads):
  out = []
  for g in grads:
    u, state = jax.device_get(update(g, state))
    out.append(u)
  return out, state


def one_entry(tree, name, value):
  x = tree[name].copy()
  x.flat[0] = value
  return tree | {name: x}


def every_entry(tree, name, value):
  return tree | {name: np.full_like(tree[name], value)}


def scaled(tree, name, value):
  """Huge but finite gradients keep their directions; others become `value`."""
  if not np.isfinite(value):
    return every_entry(tree, name, value)
  return tree | {name: tree[name] * np.float32(value)}


def held_still(basis):
  """L1 to L3: a bad gradient changes nothing but the counter of skipped steps."""
  update, start, grads = galore(basis)
  want, end = run(update, start, grads)
  for at in (0, 1, GAP):  # the first step, between refreshes, on a refresh
    before, after = grads[:at], grads[at:]
    _, state = run(update, start, before)
    for kind, value in BAD.items():
      for how in (one_entry, every_entry, scaled):
        for name in grads[0]:
          (u,), held = run(update, state, [how(grads[at], name, value)])
          case = (at, kind, how.__name__, name)
          assert all(not x.any() for x in u.values()), case
          assert int(held.skipped) == 1, case
          same(held._replace(skipped=state.skipped), state)
      # all states are alike now, so one of them stands for all that comes after
      u, last = run(update, held, after)
      same(u, want[at:])
      same(last._replace(skipped=end.skipped), end)


def bad_slice(batched):
  """L2: under guard='matrix' the other slices go on as if alone."""
  tx = lrjax.scale_by_galore(
    rank=3, update_proj_gap=GAP, guard='matrix', stagger=not batched
  )
  params = {'stack': GRADS[0]['stack'], 'bias': np.ones(3, np.float32)}
  grads = [
    {'stack': g['stack'], 'bias': np.full(3, t + 1.0, np.float32)}
    for t, g in enumerate(GRADS)
  ]
  update, start = jax.jit(tx.update), jax.device_get(tx.init(params))
  want, end = run(update, start, grads)
  pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  for at in (0, 1, GAP):
    for value in BAD.values():
      bad = list(grads)
      bad[at] = one_entry(grads[at], 'stack', value)
      u, last = run(update, start, bad)
      assert not u[at]['stack'][0].any()
      assert u[at]['stack'][1].any()
      same([x['stack'][1] for x in u], [x['stack'][1] for x in want])
      same(pick(last.slots['stack'], 1), pick(end.slots['stack'], 1))
      same([x['bias'] for x in u], [x['bias'] for x in want])
      assert int(last.slots['stack'].state.inner.count[0]) == len(grads) - 1
      assert (int(last.skipped), int(last.count)) == (1, len(grads))
      assert all(np.isfinite(x).all() for x in jax.tree.leaves((u, last)))
      if at != 1:  # the refresh that was due is made up for at the next step
        now, before = (run(update, start, bad[: at + n])[1] for n in (2, 0))
        new, old = (s.slots['stack'].state.basis[0] for s in (now, before))
        assert (new != old).any()
        assert not now.slots['stack'].overdue.any()
  rest = every_entry(grads[2], 'bias', np.nan)
  u, last = run(update, start, [*grads[:2], rest, *grads[2:]])
  assert not u[2]['bias'].any()
  same([x['bias'] for x in u[:2] + u[3:]], [x['bias'] for x in want])


def in_scan_and_vmap():
  """L2: the same under a scan of a vmapped step."""
  tx = lrjax.scale_by_galore(rank=3, update_proj_gap=GAP)
  grads = {'w': jnp.stack([g['wide'] for g in GRADS])}
  bad = {'w': grads['w'].at[GAP, 0, 0].set(jnp.inf)}
  pair = jax.tree.map(lambda a, b: jnp.stack([a, b], 1), grads, bad)
  start = jax.vmap(tx.init)({'w': pair['w'][0]})

  def step(state, g):
    u, state = jax.vmap(tx.update)(g, state)
    return state, u

  state, u = jax.jit(lambda s: jax.lax.scan(step, s, pair))(start)
  assert state.skipped.tolist() == [0, 1]
  assert bool(u['w'][GAP, 0].any())
  assert not u['w'][GAP, 1].any()
  assert bool(jnp.isfinite(u['w']).all())
  assert bool(u['w'][GAP + 1].any(axis=(1, 2)).all())


def goes_on(basis):
  """L3: after one huge gradient the next sixty steps train as well as before."""
  update, state, grads = galore(basis)
  for t in range(60):
    g = grads[t % len(grads)]
    if t == 7:
      g = jax.tree.map(lambda x: x * np.float32(1e25), g)
    (u,), state = run(update, state, [g])
    sizes = [np.sqrt(np.mean(x**2)) for x in u.values()]
    assert min(sizes) > 1e-2 or t == 7
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def bad_start(basis, value):
  """L5: after zero or bad gradients at steps 0 to 3 the first good one refreshes."""
  update, start, grads = galore(basis)
  _, fresh = run(update, start, grads[:1])
  for n in (1, 4):  # so that the good one is not on the schedule
    bad = jax.tree.map(lambda x: np.full_like(x, value), grads[1])
    _, state = run(update, start, [bad] * n)
    bases = lambda s: [x.state.basis for x in s.slots.values()]
    same(bases(state), bases(start))
    _, state = run(update, state, grads[:1])
    if basis == 'randomized_svd' and value == 0:  # its draws depend on the step
      assert all((a != b).any() for a, b in zip(bases(state), bases(start)))
    else:
      same(bases(state), bases(fresh))
    assert not any(s.overdue.any() for s in state.slots.values())


def digest(mesh_shape):
  """L14: the bits after 50 steps with refreshes, bad and zero steps among them."""
  tx = lrjax.galore(0.1, rank=3, update_proj_gap=12)
  mesh = jax.make_mesh(mesh_shape, ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
  specs = {'stack': P('x', None, 'y')}
  grads = [{n: g[n] for n in specs} for g in GRADS]
  named = lambda tree: jax.tree.map(lambda s: NamedSharding(mesh, s), tree)
  place = named(specs), named(lrjax.state_specs(tx, grads[0], specs, mesh))

  def step(params, state, g):
    u, state = tx.update(g, state, params)
    return optax.apply_updates(params, u), state

  step = jax.jit(step, out_shardings=place)
  params, state = jax.device_put((grads[0], tx.init(grads[0])), place)
  for t in range(50):
    g = grads[t % len(grads)]
    g = one_entry(g, 'stack', np.inf) if t == 12 else g
    g = jax.tree.map(np.zeros_like, g) if t == 25 else g
    params, state = step(params, state, jax.device_put(g, place[0]))
  final = hashlib.sha256()
  for x in jax.tree.leaves(jax.device_get((params, state))):
    final.update(np.asarray(x).tobytes())
  return final.hexdigest()


CASES = {
  **{f'held_still {b}': (held_still, b) for b in BASES},
  'bad_slice batched': (bad_slice, True),
  'bad_slice in turn': (bad_slice, False),
  'in_scan_and_vmap': (in_scan_and_vmap,),
  **{f'goes_on {b}': (goes_on, b) for b in BASES},
  **{
    f'bad_start {b} {v}': (bad_start, b, v)
    for b in ('svd', 'randomized_svd')
    for v in (0.0, float('nan'), float('inf'))
  },
}
DIGESTS = {'one device': (1, 1), 'four devices': (2, 2)}


def main():
  if 'cases' in sys.argv:
    for name, (case, *args) in CASES.items():
      try:
        error = case(*args) or ''
      except Exception:
        error = traceback.format_exc()
      print(json.dumps({name: error}), flush=True)
  for name, shape in DIGESTS.items():
    print(json.dumps({name: digest(shape)}), flush=True)


if __name__ == '__main__':
  main()
