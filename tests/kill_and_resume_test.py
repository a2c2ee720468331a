"""Runs that are killed or interrupted end on the bits of one that was not."""

import random
import re
import time

import pytest

from experiments.config import Kernel
from tests import runner

# GaLore refits its subspaces every 5 steps; Maestro draws widths at each one and shrinks
# every 3, so that kills come right at events too.
RUN = runner.tiny(kernel=Kernel('maestro', {'rank': 8, 'shrink_every': 3}))


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """The directory, the final bits and the metrics of an undisturbed run."""
  root = tmp_path_factory.mktemp('reference')
  assert runner.finish(runner.command(RUN, root), root) == 0, runner.log_of(root)
  return root, runner.final(root / 'runs' / 'tiny')


def rooted(tmp_path, reference):
  # All trials share the reference's compiled programs.
  (tmp_path / 'cache').symlink_to(reference[0] / 'cache')
  return tmp_path


@pytest.mark.slow
# Of these numbers come kills at 10, at 2, and at 5 and 6.
@pytest.mark.parametrize('trial', [1, 2, 5])
def test_sigkill_loses_no_bits(trial, tmp_path, reference):
  root, rng = rooted(tmp_path, reference), random.Random(trial)
  run = root / 'runs' / 'tiny'
  words = runner.command(RUN, root, '--resume')
  reached = []
  kills = sorted(rng.sample(range(1, 12), rng.choice([1, 1, 2])))
  for step in kills:
    with runner.started(words, root) as process:
      runner.wait_for_step(process, run, step)
      process.send_signal(runner.KILL)
      process.wait()
    reached.append(runner.last_step(run))
  assert runner.finish(words, root) == 0, runner.log_of(root)
  assert runner.final(run) == reference[1], f'killed at {kills}'
  resumed = [int(x) for x in re.findall(r'resume step=(\d+)', runner.log_of(root))]
  assert 1 <= len(resumed) <= len(kills)
  # A save waits for the one before, so at most two intervals of 4 steps are lost. A
  # process that was killed before it said where it resumed has not gone on either.
  assert all(a - b <= 8 for a, b in zip(reached[-len(resumed) :], resumed))


@pytest.mark.slow
def test_signals_save_and_leave(tmp_path, reference):
  root = rooted(tmp_path, reference)
  run = root / 'runs' / 'tiny'
  words = runner.command(RUN, root, '--resume')
  left = None
  for number, after in ((runner.TERM, 2), (runner.INT, 7)):
    with runner.started(words, root) as process:
      runner.wait_for_step(process, run, after)
      process.send_signal(number)
      process.send_signal(number)
      assert process.wait(60) == 143, runner.log_of(root)
    step = runner.last_step(run)
    assert f'interrupted; step {step} of 12 is saved' in runner.log_of(root)
    if left is not None:
      assert f'resume step={left} ' in runner.log_of(root), 'steps were lost'
    left = step
  assert runner.finish(words, root) == 0, runner.log_of(root)
  assert f'resume step={left} ' in runner.log_of(root), 'steps were lost'
  assert runner.final(run) == reference[1]


@pytest.mark.slow
def test_a_signal_before_the_first_step_leaves_without_a_save(tmp_path):
  run = tmp_path / 'runs' / 'tiny'
  with runner.started(runner.command(RUN, tmp_path), tmp_path) as process:
    # Nothing is compiled yet for this test: seconds pass before step 1.
    while process.poll() is None and not (run / 'config.json').exists():
      time.sleep(0.01)
    process.send_signal(runner.TERM)
    assert process.wait(60) == 144, runner.log_of(tmp_path)
  assert 'nothing to save' in runner.log_of(tmp_path)
  assert runner.last_step(run) == 0
