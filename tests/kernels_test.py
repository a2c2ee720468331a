"""Parameterized kernels in the runner: config, events, checkpoints."""

import json

import jax
import numpy as np
import pytest

from experiments import loop, program
from experiments.arguments import parse_args
from experiments.config import Checkpoint, Kernel, Mesh, Optimizer
from experiments.errors import CheckpointMismatch, ConfigError, Interrupted
from experiments.kernels import KERNELS
from experiments.optimizers import METHODS, schedule
from tests.runner import tiny

FACTORIZED = Kernel('factorized', {'rank': 4, 'restart_every': 5})


class Leave:
  """Asks to leave after a step."""

  def __init__(self, step=None):
    self.step = step

  def requested(self, step):
    return step == self.step


def run(tmp_path, name='run', leave=None, **changes):
  changes = dict(kernel=FACTORIZED, optimizer=Optimizer('adamw', 1e-2)) | changes
  return loop.run(tiny(name=name, **changes), tmp_path, Leave(leave), resume=True)


def lines(directory, split):
  found = map(json.loads, (directory / 'metrics.jsonl').read_text().splitlines())
  return [line for line in found if line['split'] == split]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The directory of a run that nobody interrupts."""
  return run(tmp_path_factory.mktemp('whole'))


def test_events_run_when_due_and_are_counted(whole):
  events = lines(whole, 'event')
  assert [line['step'] for line in events] == [5, 10]
  summary = json.loads((whole / 'summary.json').read_text())
  moments = 2 * summary['parameters']
  for line in events:
    assert line['restart/entries'] == line['restart/zeros'] == moments
  assert summary['temporary_bytes'] > 0 and summary['fixed_bytes'] == 0


@pytest.mark.parametrize('leave', [4, 5, 6])
def test_a_run_left_at_an_event_goes_on_with_the_same_bits(whole, tmp_path, leave):
  with pytest.raises(Interrupted):
    run(tmp_path / 'left', leave=leave)
  again = run(tmp_path / 'left')
  name = 'metrics.jsonl'
  assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_another_rank_is_not_resumed(tmp_path):
  with pytest.raises(Interrupted):
    run(tmp_path, leave=6)
  with pytest.raises(CheckpointMismatch, match=r'config\.kernel\.options\.rank'):
    run(tmp_path, kernel=Kernel('factorized', {'rank': 3, 'restart_every': 5}))


def test_a_mesh_changes_nothing(tmp_path):
  one = run(tmp_path / 'one')
  many = run(tmp_path / 'many', mesh=Mesh(fsdp=2, tensor=2))
  losses = [[x['loss'] for x in lines(d, 'train')] for d in (one, many)]
  np.testing.assert_allclose(*losses, atol=1e-4)


def test_a_kernel_is_named_on_the_command_line():
  flags = ['--preset=smoke', '--kernel.name=factorized', '--kernel.options.rank=8']
  _, (found,) = parse_args(flags, METHODS)
  assert found.kernel == Kernel('factorized', {'rank': 8})
  assert 'dense' in KERNELS and 'factorized' in KERNELS


@pytest.mark.parametrize(
  'flags, part',
  [
    (['--kernel.name=factorised'], 'factorized'),
    (['--kernel.name=factorized', '--kernel.options.rnak=8'], 'kernel.options.rank'),
    (['--kernel.name=factorized', '--kernel.options.rank=x'], 'int'),
  ],
)
def test_faults_of_a_kernel_name_the_key(flags, part):
  with pytest.raises(ConfigError, match=part):
    parse_args(['--preset=smoke', *flags], METHODS)


def test_what_does_not_fit_is_a_config_error():
  with pytest.raises(ConfigError, match=r'rank must be at most .* got 99'):
    program.build(tiny(kernel=Kernel('factorized', {'rank': 99})))
  with pytest.raises(ConfigError, match='rank'):
    program.build(tiny(kernel=Kernel('factorized')))
  optimizer = Optimizer('adamw', 1e-2, weights='int8')
  with pytest.raises(ValueError, match='dense kernels'):
    tiny(kernel=FACTORIZED, optimizer=optimizer)


def test_the_learning_rate_restarts():
  optimizer = Optimizer(
    'adamw', 1.0, 'constant', warmup=0, restart_every=6, restart_warmup=2
  )
  rate = schedule(tiny(optimizer=optimizer))
  assert [float(rate(k)) for k in (0, 5, 6, 7, 8)] == [1, 1, 0, 0.5, 1]
  with pytest.raises(ValueError, match='restart_every'):
    Optimizer('adamw', 1.0, restart_every=2, restart_warmup=2)


def test_frobenius_decay_shrinks_the_product(tmp_path):
  def size(decay):
    optimizer = Optimizer('adamw', 1e-2, frobenius_decay=decay)
    experiment = tiny(kernel=FACTORIZED, optimizer=optimizer, steps=4)
    built = program.build(experiment)
    with jax.set_mesh(built.mesh):
      state = built.init()
      tokens = np.zeros((4, 17), np.int32)
      for _ in range(4):
        state, _ = built.step(state, tokens)
    kernel = state['params']['layers']['attn']['q']['kernel']
    return float(np.linalg.norm(kernel['a'] @ kernel['b']))

  assert size(100.0) < size(0.0)


def test_checkpoints_at_every_step_hold_fixed_arrays(tmp_path):
  directory = run(tmp_path, checkpoint=Checkpoint(every=1, keep=2))
  assert (directory / 'checkpoints' / '12').exists()


def test_a_warm_start_trains_dense_kernels_first(tmp_path):
  directory = run(tmp_path, warm_steps=4)
  warm = tmp_path / 'run-warm'
  last = lines(warm, 'valid')[-1]
  assert last['step'] == 4 and lines(directory, 'train')[-1]['step'] == 12
  # Batches go on where the first run stopped, and at full rank nothing is lost: the
  # first loss is that of a fifth dense step.
  same = dict(optimizer=Optimizer('adamw', 1e-3, 'constant', warmup=0))
  full = Kernel('factorized', {'rank': 16})
  split = run(tmp_path, 'split', warm_steps=4, steps=1, kernel=full, **same)
  dense = run(tmp_path, 'dense', steps=5, kernel=Kernel(), **same)
  losses = [lines(d, 'train')[-1]['loss'] for d in (split, dense)]
  np.testing.assert_allclose(*losses, atol=1e-5)


def test_a_run_left_in_its_warm_start_goes_on(tmp_path):
  whole = run(tmp_path / 'whole', warm_steps=4)
  with pytest.raises(Interrupted):
    run(tmp_path / 'left', warm_steps=4, leave=2)
  with pytest.raises(Interrupted):
    run(tmp_path / 'left', warm_steps=4, leave=6)
  again = run(tmp_path / 'left', warm_steps=4)
  assert (again / 'metrics.jsonl').read_bytes() == (
    whole / 'metrics.jsonl'
  ).read_bytes()
