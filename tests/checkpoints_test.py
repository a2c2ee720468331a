"""Saved means durable, damage is noticed, nothing foreign is touched.

Promises R3, R4, R5, R7, R10, R15, R20 in their quick tiers; seeds are fixed.
"""

import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import errors
from experiments.checkpoints import Checkpoints

# Orbax leaves coroutines behind when a load fails.
pytestmark = [
  pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
  pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning'),
]
META = {'config': {'lr': 0.1, 'model': {'rank': 4}}, 'fingerprint': 'abc'}


def state(step, rank=4):
  """A small training state whose every value depends on the step."""
  x = np.random.default_rng(step).standard_normal((64, rank)).astype(np.float32)
  params = {'w': jnp.asarray(x), 'b': jnp.asarray(x[0], jnp.bfloat16)}
  tx = optax.masked(optax.scale_by_adam(), {'w': True, 'b': False})
  opt = jax.tree.map(lambda m: m + step, tx.init(params))
  return {'params': params, 'opt': opt, 'key': jax.random.key(step), 'step': step}


def save(checkpoints, *steps, **kwargs):
  for step in steps:
    checkpoints.save(step, state(step), data_state={'at': step}, meta=META, **kwargs)
  checkpoints.wait()


def assert_is(found, step):
  """The restored step holds exactly what was saved at that step."""
  assert (found.step, found.data_state, found.meta) == (step, {'at': step}, META)
  expected = state(step)
  assert jax.tree.structure(found.state) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected)):
    assert type(a) is type(b)
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_saves_are_reported_once_durable_and_come_back_in_bits(tmp_path):
  saved = []
  c = Checkpoints(tmp_path / 'c', every=2, on_saved=saved.append)
  assert c.newest is None and c.restore(state(0)) is None
  assert [
    c.save(s, state(s), data_state={'at': s}, meta=META) for s in range(1, 6)
  ] == [
    False,
    True,
    False,
    True,
    False,
  ]
  assert saved == [2] and c.newest == 4
  c.close(timeout=60)
  assert saved == [2, 4]
  assert c.save(5, state(5), data_state={'at': 5}, meta=META, force=True)
  assert_is(c.restore(state(0), expect=META), 5)
  assert_is(Checkpoints(tmp_path / 'c', every=1).restore(state(0), step=2), 2)


def test_a_step_not_newer_is_an_error_not_silence(tmp_path):
  c = Checkpoints(tmp_path / 'c', every=1)
  save(c, 7)
  for step in (7, 6):
    with pytest.raises(ValueError, match=f'step {step} is not newer than step 7'):
      save(c, step)


def test_state_may_be_donated_right_after_save(tmp_path):
  c = Checkpoints(tmp_path / 'c', every=1)
  x = jnp.arange(1 << 20, dtype=jnp.float32)
  expected = np.asarray(x).copy()
  c.save(1, {'x': x}, data_state={}, meta={})
  step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  for _ in range(3):
    x = step(x)
  c.wait()
  np.testing.assert_array_equal(c.restore({'x': x}).state['x'], expected)


def test_retention_keeps_the_newest_and_every_nth(tmp_path):
  c = Checkpoints(tmp_path / 'c', every=1, keep=2, keep_every=4)
  (tmp_path / 'c' / '2019').mkdir()  # appears while the run is going on
  (tmp_path / 'c' / '2019' / 'notes.txt').write_text('mine')
  save(c, *range(1, 8))
  assert sorted(os.listdir(tmp_path / 'c')) == ['.lrjax', '2019', '4', '6', '7']


@pytest.mark.parametrize(
  'make',
  [
    lambda d: (d / 'notes').mkdir(),
    lambda d: (d / 'README').write_text('x'),
    lambda d: (d / '3').write_text('a file'),
    lambda d: (d / '007').mkdir(),
    lambda d: (d / '٣').mkdir(),
    lambda d: (d / '2019').mkdir() or (d / '2019' / 'notes.txt').write_text('x'),
    lambda d: (d / '3').symlink_to(d / '1'),
    lambda d: (d / '3.orbax-checkpoint-tmp').symlink_to(d / '1'),
  ],
)
def test_foreign_entries_are_refused_and_left_alone(tmp_path, make):
  save(Checkpoints(tmp_path, every=1), 1)
  make(tmp_path)
  before = sorted(str(p) for p in tmp_path.rglob('*'))
  with pytest.raises(errors.RunDirError, match='did not make'):
    Checkpoints(tmp_path, every=1)
  assert sorted(str(p) for p in tmp_path.rglob('*')) == before


def test_leftovers_of_a_kill_are_removed_at_start(tmp_path):
  save(Checkpoints(tmp_path, every=1), 1)
  shutil.copytree(tmp_path / '1', tmp_path / '2.orbax-checkpoint-tmp')
  shutil.copytree(tmp_path / '1', tmp_path / '0.deleted')
  Checkpoints(tmp_path, every=1)
  assert sorted(os.listdir(tmp_path)) == ['.lrjax', '1']


def test_another_config_is_named_key_by_key(tmp_path):
  c = Checkpoints(tmp_path, every=1)
  save(c, 1)
  other = {'config': {'lr': 0.2, 'model': {'rank': 8}, 'new': 1}, 'fingerprint': 'abd'}
  with pytest.raises(errors.CheckpointMismatch) as e:
    c.restore(state(0), expect=other)
  for line in (
    'config.lr: saved 0.1, now 0.2',
    'config.model.rank: saved 4, now 8',
    'config.new: saved absent, now 1',
    'fingerprint: saved "abc", now "abd"',
  ):
    assert line in str(e.value)
  allowed = ['config.lr', 'config.model', 'config.new', 'fingerprint']
  assert_is(c.restore(state(0), expect=other, allow_change=allowed), 1)
  many = {'config': {f'k{i}': i for i in range(99)}}
  with pytest.raises(errors.CheckpointMismatch, match='and 83 more') as e:
    c.restore(state(0), expect=many)
  assert len(str(e.value).splitlines()) == 20


def test_another_model_is_named_leaf_by_leaf_and_not_quarantined(tmp_path):
  c = Checkpoints(tmp_path, every=1)
  save(c, 1, 2)
  cast = state(0)
  cast['params']['w'] = cast['params']['w'].astype(jnp.bfloat16)
  without = state(0)
  del without['params']['b']
  for template, line in (
    (state(0, rank=8), 'params/w: saved float32[64, 4], now float32[64, 8]'),
    (state(0, rank=2), 'opt/inner_state/mu/w: saved float32[64, 4], now'),
    (cast, 'params/w: saved float32[64, 4], now bfloat16[64, 4]'),
    (without, 'params/b: saved bfloat16[4], now absent'),
    (state(0) | {'ema': jnp.ones(3)}, 'ema: saved absent, now float32[3]'),
    (state(0) | {'step': jnp.int32(0)}, 'step: saved int[], now int32[]'),
  ):
    with pytest.raises(errors.CheckpointMismatch) as e:
      c.restore(template)
    assert line in str(e.value)
  no_sharding = jax.eval_shape(lambda: jnp.ones(3))
  with pytest.raises(ValueError, match="'ema' has no sharding"):
    c.restore(state(0) | {'ema': no_sharding})
  assert sorted(os.listdir(tmp_path)) == ['.lrjax', '1', '2']


def test_a_sharding_that_does_not_fit_is_no_damage(tmp_path):
  c = Checkpoints(tmp_path, every=1)
  c.save(1, {'x': jnp.ones((6, 8))}, data_state={}, meta={})
  mesh = jax.make_mesh((8,), ('a',), axis_types=(AxisType.Auto,))
  template = lambda spec: {
    'x': jax.ShapeDtypeStruct((6, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
  }
  with pytest.raises(ValueError, match="leaf 'x'"):
    c.restore(template(P('a')))
  found = c.restore(template(P(None, 'a'))).state['x']
  assert found.sharding.spec == P(None, 'a') and bool((found == 1).all())


def test_no_zero_size_and_no_text_leaves(tmp_path):
  c = Checkpoints(tmp_path, every=1)
  with pytest.raises(ValueError, match="leaf 'a/empty' has shape \\(0, 3\\)"):
    c.save(1, {'a': {'empty': jnp.ones((0, 3))}}, data_state={}, meta={})
  with pytest.raises(TypeError, match="leaf 'name'"):
    c.save(1, {'name': 'x'}, data_state={}, meta={})
  assert c.restore({'a': jnp.ones(3)}) is None


def test_absent_steps_name_those_that_exist(tmp_path):
  c = Checkpoints(tmp_path, every=1)
  save(c, 1, 2)
  with pytest.raises(errors.CheckpointNotFound, match=r'no step 3.*\[1, 2\]'):
    c.restore(state(0), step=3)


def flip(files, rng):
  sizes = [f.stat().st_size for f in files]
  file = rng.choices(files, sizes)[0]
  data = bytearray(file.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  file.write_bytes(data)


def cut(files, rng):
  file = rng.choice([f for f in files if f.stat().st_size])
  os.truncate(file, rng.randrange(file.stat().st_size))


def empty(files, rng):
  os.truncate(rng.choice(files), 0)


def delete(files, rng):
  rng.choice(files).unlink()


def break_json(files, rng):
  file = rng.choice(
    [f for f in files if f.name in ('_CHECKPOINT_METADATA', '_METADATA')]
  )
  text = file.read_text()
  at = rng.randrange(len(text))
  file.write_text(rng.choice([text[:at], text[:at] + '}' + text[at:], '[' * 5000]))


def drop_item(files, rng):
  shutil.rmtree(next(p for f in files for p in f.parents if p.name == 'state'))


def empty_step(files, rng):
  step = next(p for f in files for p in f.parents if p.parent.name == 'run')
  shutil.rmtree(step)
  step.mkdir()


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  path = tmp_path_factory.mktemp('two') / 'run'
  save(Checkpoints(path, every=1), 1, 2)
  return path


@pytest.mark.parametrize(
  'damage, trials, always',
  [
    (flip, 20, False),
    (cut, 5, False),
    (empty, 5, False),
    (delete, 5, False),
    (break_json, 5, True),
    (drop_item, 1, True),
    (empty_step, 1, True),
  ],
)
def test_damage_is_noticed_or_harmless(two_steps, tmp_path, damage, trials, always):
  fallbacks = 0
  for seed in range(trials):
    run = tmp_path / str(seed) / 'run'
    shutil.copytree(two_steps, run)
    files = sorted(p for p in (run / '2').rglob('*') if p.is_file())
    damage(files, random.Random(seed))
    c = Checkpoints(run, every=1)
    found = c.restore(state(0), expect=META)
    assert_is(found, found.step)
    if found.step == 1:
      fallbacks += 1
      assert [s for s, _ in found.quarantined] == [2]
      assert os.listdir(run / 'quarantine') == ['2_0']
    else:
      assert found.quarantined == [] and not (run / 'quarantine').exists()
    save(c, 3 if found.step == 2 else 2)  # the way ahead is free
  assert fallbacks == trials if always else fallbacks > 0


def test_fallback_goes_down_to_none(two_steps, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(two_steps, run)
  (run / '9').mkdir()
  for step in '12':
    (run / step / '_CHECKPOINT_METADATA').write_text('{}')
  c = Checkpoints(run, every=1)
  assert c.newest == 9
  assert c.restore(state(0)) is None and c.newest is None
  assert sorted(os.listdir(run / 'quarantine')) == ['1_0', '2_0', '9_0']
  save(c, 1)
  assert_is(c.restore(state(0)), 1)


def test_an_explicit_damaged_step_raises_and_stays(two_steps, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(two_steps, run)
  shutil.rmtree(run / '2' / 'state' / 'd')
  c = Checkpoints(run, every=1)
  with pytest.raises(errors.CheckpointCorrupt, match=r'step 2 .*: \[1\]') as e:
    c.restore(state(0), step=2)
  assert e.value.__cause__ is not None and (run / '2').exists()
  shutil.move(run / '1', run / '3')
  with pytest.raises(errors.CheckpointCorrupt, match='it is step 1 renamed'):
    c.restore(state(0), step=3)


@pytest.mark.parametrize('error', [MemoryError(), PermissionError(13, 'no')])
def test_a_machine_in_trouble_does_not_condemn_a_step(two_steps, tmp_path, error):
  run = tmp_path / 'run'
  shutil.copytree(two_steps, run)
  with pytest.MonkeyPatch.context() as m:
    from experiments import checkpoints

    m.setattr(checkpoints, '_read_state', lambda *a: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
      Checkpoints(run, every=1).restore(state(0))
  assert_is(Checkpoints(run, every=1).restore(state(0)), 2)


def test_a_save_that_finds_no_room_leaves_the_earlier_steps(tmp_path):
  # A limit on the file size stands for a full disk: the write fails half-way.
  c = Checkpoints(tmp_path, every=1)
  save(c, 1)
  big = np.random.default_rng(0).standard_normal(1 << 20)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
  try:
    c.save(2, {'x': big}, data_state={}, meta={})
    with pytest.raises(errors.CheckpointSaveError) as e:
      c.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert f'step 2 was not saved at {tmp_path / "2"}' in str(e.value)
  assert '8388608 bytes' in str(e.value) and 'free' in str(e.value)
  assert sorted(os.listdir(tmp_path)) == ['.lrjax', '1'] and c.newest == 1
  assert_is(c.restore(state(0)), 1)
  save(c, 2)
  assert_is(c.restore(state(0)), 2)


ENV = {
  **os.environ,
  'PYTHONPATH': str(pathlib.Path(__file__).parents[1]),
  'JAX_PLATFORMS': 'cpu',
  'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
}
SAVER = """
import itertools, sys
import numpy as np
from experiments.checkpoints import Checkpoints
c = Checkpoints(sys.argv[1], every=1, on_saved=lambda s: print(s, flush=True))
for s in itertools.count((c.newest or 0) + 1):
  c.save(s, {'x': np.full((256, 256), s)}, data_state={'at': s}, meta={})
"""


def test_a_killed_saver_has_what_it_reported(tmp_path):
  rng = random.Random(0)
  reported = 0
  for _ in range(4):
    child = subprocess.Popen(
      [sys.executable, '-c', SAVER, str(tmp_path)], stdout=subprocess.PIPE, env=ENV
    )
    first = child.stdout.readline()
    time.sleep(rng.uniform(0, 0.4))
    child.send_signal(signal.SIGKILL)
    lines = (first + child.communicate(timeout=60)[0]).split()
    reported = int(lines[-1])
    found = Checkpoints(tmp_path, every=1).restore({'x': np.zeros((256, 256), int)})
    assert found.step >= reported and found.quarantined == []
    assert found.data_state == {'at': found.step}
    assert (found.state['x'] == found.step).all()
  assert reported > 4


PAIR = """
import os, signal, sys, time
from experiments.signals import Preemption
with Preemption() as preemption:
  import jax
  import numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  rank, port, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
  out = open(f'{root}/out.{rank}', 'w')  # Gloo writes to stdout
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{port}', 2, rank)
  from experiments import rundir
  from experiments.checkpoints import Checkpoints

  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Auto,))
  def state(step):
    w = np.random.default_rng(step).standard_normal((8, 8192)).astype(np.float32)
    put = lambda i: w[i]
    return {'w': jax.make_array_from_callback(
      w.shape, NamedSharding(mesh, P('x')), put), 'step': step}

  with rundir.open_run(root, 'r') as run:
    c = Checkpoints(run.checkpoints, every=1)
    for s in (1, 2):
      c.save(s, state(s), data_state={}, meta={})
    c.wait()
    if rank == 0:  # only the other process reads these
      for p in (run.checkpoints / '2' / 'state').glob('ocdbt.process_1/d/*'):
        os.truncate(p, 0)
    found = c.restore(state(0))
    quarantined = [s for s, _ in found.quarantined]
    print('restored', found.step, found.state['step'], quarantined, file=out)
    try:
      c.restore(state(0), expect={'lr': 1})
    except ValueError as e:
      print(type(e).__name__, file=out)
    for step in range(3, 400):
      if preemption.requested(step):
        break
      if step == 10 and rank == 1:
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
      time.sleep(0.05)
    c.save(step, state(step), data_state={}, meta={})
    c.close(60)
    print('left', step, file=out)
"""


@pytest.mark.slow
@pytest.mark.parametrize('signal_name', ['SIGTERM', 'SIGINT'])
def test_two_processes_decide_as_one(tmp_path, signal_name):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  pair = [
    subprocess.Popen(
      [sys.executable, '-c', PAIR, str(i), str(port), str(tmp_path), signal_name],
      stderr=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      env=ENV,
    )
    for i in range(2)
  ]
  try:
    logs = [p.communicate(timeout=90)[1].decode() for p in pair]
  finally:
    for p in pair:
      p.kill()
  assert [p.returncode for p in pair] == [0, 0], logs
  lines = [(tmp_path / f'out.{i}').read_text().splitlines() for i in range(2)]
  assert lines[0] == lines[1]
  assert lines[0][:2] == ['restored 1 1 [2]', 'CheckpointMismatch']
  step = lines[0][2].removeprefix('left ')
  assert int(step) < 399 and step in os.listdir(tmp_path / 'r' / 'checkpoints')
