"""The training loop in one process: learning, faults, resuming, meshes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import errors, loop
from experiments.config import Checkpoint, Mesh, Optimizer
from experiments.signals import Preemption
from tests import runner

pytestmark = pytest.mark.slow


class Never(Preemption):
  """A run that nobody interrupts; handlers stay out of the test process."""

  def requested(self, step):
    return False


def run(experiment, root, **flags):
  directory = loop.run(experiment, root, Never(), **flags)
  lines = [
    json.loads(x) for x in (directory / 'metrics.jsonl').read_text().splitlines()
  ]
  return directory, lines


def losses(lines, split='train'):
  return np.array([float(x['loss']) for x in lines if x['split'] == split])


@pytest.mark.parametrize('name', ['adamw', 'galore'])
def test_learns_and_leaves_its_files(name, tmp_path):
  options = runner.GALORE if name == 'galore' else {}
  optimizer = Optimizer(name, 1e-2, options=options)
  tiny = runner.tiny(optimizer=optimizer, steps=24, diagnostics_every=4)
  directory, lines = run(tiny, tmp_path)
  assert [x['step'] for x in lines if x['split'] == 'train'] == list(range(1, 25))
  assert [x['step'] for x in lines if x['split'] == 'valid'] == [6, 12, 18, 24]
  assert losses(lines)[0] > np.log(256) - 0.2 and losses(lines)[-3:].mean() < 4.5
  summary = json.loads((directory / 'summary.json').read_text())
  assert summary['tokens'] == 24 * 4 * 16
  assert summary['valid_loss'] == losses(lines, 'valid')[-1]
  assert (summary['optimizer_bytes'] < summary['adam_bytes']) == (name == 'galore')
  assert list((directory / 'tensorboard').iterdir())
  refresh = [
    json.loads(x)['refresh']
    for x in (directory / 'timing.jsonl').read_text().splitlines()
  ]
  expected = [t % 5 == 0 for t in range(24)] if name == 'galore' else [False] * 24
  assert refresh == expected
  subspaces = [x for x in lines if x['split'] == 'subspace']
  if name == 'adamw':
    assert not subspaces and 'overlap' not in summary
    return
  assert [x['step'] for x in subspaces] == [1, 5, 9, 13, 17, 21]
  refreshes = [x['refreshes'] for x in subspaces]
  assert refreshes == pytest.approx([1, 1, 2, 3, 4, 5], rel=1e-6)  # a mean
  leaves = [k for k in subspaces[-1] if k.startswith('captured_energy/')]
  assert 'captured_energy/layers/attn/q/kernel' in leaves and len(leaves) == 7
  mean = np.mean([subspaces[-1][k] for k in leaves])
  assert subspaces[-1]['captured_energy'] == pytest.approx(mean, rel=1e-5)
  assert 0 < summary['captured_energy'] <= 1 and 0 < summary['overlap'] <= 1


def test_a_run_is_not_overwritten_and_another_config_is_refused(tmp_path):
  run(runner.tiny(steps=4), tmp_path)
  with pytest.raises(errors.RunExistsError, match='resume'):
    run(runner.tiny(steps=4), tmp_path)
  other = Optimizer('galore', 2e-2, options=runner.GALORE | {'rank': 3})
  with pytest.raises(errors.CheckpointMismatch) as e:
    run(runner.tiny(steps=8, optimizer=other), tmp_path, resume=True)
  assert 'config.optimizer.learning_rate: saved 0.01, now 0.02' in str(e.value)
  assert 'config.optimizer.options.rank: saved 4, now 3' in str(e.value)
  assert 'config.steps: saved 4, now 8' in str(e.value)
  # saved more often from here on, and for longer: asked for by name
  longer = runner.tiny(steps=8, checkpoint=Checkpoint(every=2))
  _, lines = run(longer, tmp_path, resume=True, allow_change=['steps'])
  assert max(x['step'] for x in lines) == 8


def test_a_resumed_run_with_another_rank_names_the_leaves(tmp_path):
  run(runner.tiny(steps=4), tmp_path)
  other = Optimizer('galore', 1e-2, options=runner.GALORE | {'rank': 3})
  changed = ['optimizer.options.rank']
  with pytest.raises(errors.CheckpointMismatch, match=r'attn/q/kernel.*basis'):
    run(
      runner.tiny(steps=4, optimizer=other), tmp_path, resume=True, allow_change=changed
    )


def poison(monkeypatch, steps):
  """Puts a token outside the vocabulary into some batches, which makes the loss NaN."""
  count, place = iter(range(1, 100)), loop.place  # one call a training step

  def placed(batch, program):
    if next(count) in steps:
      batch = {k: np.full_like(v, 999) for k, v in batch.items()}
    return place(batch, program)

  monkeypatch.setattr(loop, 'place', placed)


def test_one_bad_batch_is_skipped_and_counted(tmp_path, monkeypatch):
  poison(monkeypatch, {3, 6})
  directory, lines = run(runner.tiny(steps=12), tmp_path)
  train = [x for x in lines if x['split'] == 'train']
  assert [x['step'] for x in train if x['loss'] == 'nan'] == [3, 6]
  assert [x['skipped_steps'] for x in train] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
  assert np.isfinite(losses(lines)[6:]).all()
  assert json.loads((directory / 'summary.json').read_text())['skipped_steps'] == 2


def test_too_many_bad_batches_end_the_run_usefully(tmp_path, monkeypatch):
  poison(monkeypatch, range(6, 100))
  with pytest.raises(errors.NonFiniteError) as e:
    run(runner.tiny(max_consecutive_bad=3), tmp_path)
  for text in ('step 8: 3 steps in a row', 'loss nan', 'gradient layers/', 'batch 7'):
    assert text in str(e.value)
  assert 'checkpoint 4 is kept' in str(e.value) or 'checkpoint 8' in str(e.value)


def test_vocabulary_and_devices_that_do_not_fit(tmp_path):
  small = replace(runner.tiny().model, vocab_size=100)
  with pytest.raises(ValueError, match=r'256.*100|100.*256'):
    run(runner.tiny(model=small), tmp_path)
  with pytest.raises(errors.ConfigError, match='16 devices, but there are 8'):
    wide = runner.tiny(
      mesh=Mesh(data=4, fsdp=4), data=replace(runner.tiny().data, batch_size=16)
    )
    run(wide, tmp_path, overwrite=True)


def test_eight_devices_train_like_one(tmp_path):
  assert jax.device_count() == 8
  data = replace(runner.tiny().data, batch_size=8)
  _, one = run(runner.tiny(name='one', data=data), tmp_path)
  cube = runner.tiny(name='cube', data=data, mesh=Mesh(data=2, fsdp=2, tensor=2))
  _, eight = run(cube, tmp_path)
  # Only the order of float32 sums differs.
  np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-5)
  np.testing.assert_allclose(losses(eight, 'valid'), losses(one, 'valid'), rtol=1e-5)


def test_a_run_goes_on_on_another_mesh(tmp_path):
  data = replace(runner.tiny().data, batch_size=8)
  half = Checkpoint(every=6)
  _, want = run(runner.tiny(name='whole', data=data, checkpoint=half), tmp_path)
  first = runner.tiny(
    name='moved', data=data, checkpoint=half, mesh=Mesh(fsdp=2, tensor=2)
  )

  class AtSix(Preemption):
    def requested(self, step):
      return step == 6

  with pytest.raises(errors.Interrupted, match='step 6 of 12 is saved'):
    loop.run(first, tmp_path, AtSix())
  _, lines = run(replace(first, mesh=Mesh()), tmp_path, resume=True)
  assert [x['step'] for x in lines] == [x['step'] for x in want]
  np.testing.assert_allclose(losses(lines), losses(want), rtol=1e-5)


def test_interrupted_in_an_evaluation_it_evaluates_first_when_it_goes_on(tmp_path):
  want, _ = run(runner.tiny(name='whole'), tmp_path)

  class InEvaluation(Preemption):
    calls = 0

    def requested(self, step):
      self.calls += step == 6
      return self.calls > 1

  cut = runner.tiny(name='cut')
  with pytest.raises(errors.Interrupted, match='step 6 of 12 is saved'):
    loop.run(cut, tmp_path, InEvaluation())
  directory, _ = run(cut, tmp_path, resume=True)
  read = lambda d: (d / 'metrics.jsonl').read_bytes()
  assert read(directory) == read(want)


def test_weights_in_8_bits_go_on_where_they_stopped(tmp_path):
  optimizer = Optimizer('adamw', 1e-2, weights='int8')
  whole = runner.tiny(name='whole', optimizer=optimizer)
  want, lines = run(whole, tmp_path)
  assert losses(lines)[-3:].mean() < losses(lines)[0] - 0.2
  summary = json.loads((want / 'summary.json').read_text())
  kernels = 2 * (4 * 16 * 16 + 3 * 16 * 24)  # two layers
  groups = 2 * (6 * 16 + 24)  # one for each row
  saved = 4 * kernels - (kernels + 8 * groups)
  assert summary['parameter_bytes'] == summary['gradient_bytes'] - saved

  class AtSix(Preemption):
    def requested(self, step):
      return step == 6

  cut = replace(whole, name='cut')
  with pytest.raises(errors.Interrupted):
    loop.run(cut, tmp_path, AtSix())
  directory, _ = run(cut, tmp_path, resume=True)
  read = lambda d: (d / 'metrics.jsonl').read_bytes()
  assert read(directory) == read(want)
  assert runner.final(directory)[0] == runner.final(want)[0]
