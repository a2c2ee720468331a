"""Studies: which runs they need, what they find, what their report says."""

import dataclasses
import json
import math

import pytest

from experiments import errors, tuning
from experiments.config import Experiment, Sweep
from experiments.configuring import to_dict
from experiments.presets import COMPARISONS, SWEEPS
from experiments.report import write_study
from experiments.signals import Preemption
from experiments.study import Study, findings, largest_size, next_runs, variant
from tests import runner
from tests.report_test import GALORE, Page, write_run


def study(*names, rate=1e-2, **sweep) -> Study:
  optimizer = dataclasses.replace(runner.tiny().optimizer, learning_rate=rate)
  runs = [runner.tiny(name=name, optimizer=optimizer) for name in names]
  return Study(tuple(runs), Sweep(**dict(factors=(0.3, 1.0, 3.0), seeds=2) | sweep))


def finish(asked, loss):
  """Does all runs of a study; returns their losses, in the order of the runs."""
  losses = {}
  while runs := next_runs(asked, losses):
    assert runs[0].name not in losses
    losses[runs[0].name] = loss(runs[0])
  return losses


def distance(best):
  """The loss of a run whose best learning rate is `best`."""
  return lambda run: 2 + abs(math.log(run.optimizer.learning_rate / best))


def test_the_best_rate_is_repeated_with_the_other_seeds():
  asked = study('a', 'b', seeds=3)
  losses = finish(asked, distance(1e-2))
  one = ['lr0.003-s0', 'lr0.01-s0', 'lr0.03-s0', 'lr0.01-s1', 'lr0.01-s2']
  assert [*losses] == [f'{name}-{run}' for name in 'ab' for run in one]
  assert len(losses) == largest_size(asked)
  a, b = findings(asked, losses)
  assert (a.rate, a.on_edge) == (0.01, False) and b.method == 'b'
  assert a.runs == ('a-lr0.01-s0', 'a-lr0.01-s1', 'a-lr0.01-s2')
  assert [*a.losses] == [0.003, 0.01, 0.03]


@pytest.mark.parametrize(
  ('best', 'extensions', 'rates', 'on_edge'),
  [
    (3e-2, 1, [0.003, 0.01, 0.03, 0.09], False),
    (3e-3, 1, [0.0009, 0.003, 0.01, 0.03], False),
    (3e-1, 1, [0.003, 0.01, 0.03, 0.09], True),
    (3e-1, 2, [0.003, 0.01, 0.03, 0.09, 0.27], True),
    (3e-2, 0, [0.003, 0.01, 0.03], True),
  ],
)
def test_a_sweep_goes_on_beyond_its_edge(best, extensions, rates, on_edge):
  asked = study('a', extensions=extensions)
  (found,) = findings(asked, finish(asked, distance(best)))
  assert [*found.losses] == rates and found.on_edge == on_edge
  assert found.rate == min(rates, key=lambda r: abs(math.log(r / best)))
  assert len(found.runs) == 2


def test_failed_runs_are_never_the_best():
  asked = study('a')
  small = distance(3e-3)
  too_large = lambda r: small(r) if r.optimizer.learning_rate < 5e-3 else math.inf
  (found,) = findings(asked, finish(asked, too_large))
  assert found.rate == 0.003 and math.isinf(found.losses[0.01])
  (found,) = findings(asked, finish(asked, lambda run: math.inf))
  assert found.rate is None and not found.runs and len(found.losses) == 3


def test_a_study_half_done_names_what_is_left():
  asked = study('a')
  assert [run.name for run in next_runs(asked, {'a-lr0.01-s0': 1.0})] == [
    'a-lr0.003-s0',
    'a-lr0.03-s0',
  ]
  (found,) = findings(asked, {'a-lr0.01-s0': 1.0})
  assert found.rate is None and found.losses == {0.01: 1.0}


def test_one_rate_and_one_seed_is_one_run():
  asked = study('a', factors=(1.0,), seeds=1)
  (found,) = findings(asked, finish(asked, distance(1)))
  assert (found.rate, found.on_edge, found.runs) == (0.01, False, ('a-lr0.01-s0',))


def test_variants_differ_in_seed_and_rate_alone():
  run = study('a').methods[0]
  other = variant(run, 0.5, 2)
  assert other.seed == run.seed + 2 and other.optimizer.learning_rate == 0.5
  back = dataclasses.replace(other, name='a', seed=run.seed, optimizer=run.optimizer)
  assert back == run
  assert isinstance(variant(run, 1e5, 0), Experiment)  # 1e+05 would be no file name


@pytest.mark.parametrize(
  'bad', [{'factors': ()}, {'factors': (0.0,)}, {'factors': (1.0, 1.0)}, {'seeds': 0}]
)
def test_sweeps_that_make_no_sense_are_refused(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    Sweep(**bad)


def test_the_study_of_all_methods_is_one_that_ends_within_the_hour():
  runs, sweep = COMPARISONS['optimizers'], SWEEPS['optimizers']
  names = [run.name for run in runs]
  assert {'adamw', 'adamw_two_rates', 'galore'} <= {*names}
  assert len(sweep.factors) == 3 and sweep.seeds == 2
  assert all(run.diagnostics_every for run in runs)
  assert {run.optimizer.options.get('rank', 32) for run in runs} == {32}


def done(asked, root, losses):
  """Writes what finished runs leave."""
  root.mkdir(exist_ok=True)
  for run in (r for r in finish_runs(asked, losses)):
    path = write_run(root / run.name, run.name, {**GALORE, 'valid_loss': losses(run)})
    (path / 'config.json').write_text(json.dumps(to_dict(run)))


def finish_runs(asked, loss):
  losses = {}
  while runs := next_runs(asked, losses):
    yield runs[0]
    value = loss(runs[0])
    losses[runs[0].name] = math.inf if value is None else value


def test_finished_runs_are_found_and_others_refused(tmp_path):
  asked = study('a', 'b')
  root = tmp_path / 'study'
  done(asked, root, distance(1e-2))
  losses = tuning.finished(asked, root)
  assert not next_runs(asked, losses) and len(losses) == 8
  longer = dataclasses.replace(
    asked, methods=tuple(dataclasses.replace(m, steps=13) for m in asked.methods)
  )
  with pytest.raises(errors.ConfigError, match='trained with another steps'):
    tuning.finished(longer, root)


def test_the_report_shows_what_was_found(tmp_path):
  asked = study('first', 'better', 'bad')

  def losses(run):
    if run.name.startswith('bad'):
      return None
    loss = distance(1e-2 if run.name.startswith('first') else 3e-1)(run)
    return loss - 1 * run.name.startswith('better') + 0.01 * run.seed

  root = tmp_path / 'study'
  done(asked, root, losses)
  found = findings(asked, tuning.finished(asked, root))
  path = write_study(asked, found, root, tmp_path / 'out')
  assert sorted(p.name for p in path.parent.iterdir()) == [
    'overview.png', 'report.html', 'report.md', 'study.json'
  ]  # fmt: skip
  markdown = (path.parent / 'report.md').read_text()
  table = [line for line in markdown.splitlines() if line.startswith('| ')][2:5]
  assert [row.split(' | ')[0] for row in table] == ['| first', '| better', '| bad']
  assert '2.005 ± 0.005' in table[0] and 'failed' in table[2]
  assert '0.09 (edge)' in table[1] and '0.01: 2.000' in markdown
  assert '2 of 2 methods ended above first: better, bad.' in markdown
  page = Page(path.read_text())
  assert page.tags.count('img') == 1 and not page.open
  saved = json.loads((path.parent / 'study.json').read_text())
  assert [m['loss'] for m in saved['methods']][2] is None
  assert saved['methods'][0]['sweep'] == {
    '0.003': pytest.approx(3.204, abs=1e-3),
    '0.01': 2.0,
    '0.03': pytest.approx(3.099, abs=1e-3),
  }
  assert saved['methods'][1]['on_edge'] and len(saved['methods'][0]['losses']) == 2


def test_a_run_that_fails_stays_as_a_failure(tmp_path, monkeypatch, capsys):
  (run,) = study('a').methods

  def fail(run, root, preemption, resume):
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / 'config.json').write_text(json.dumps(to_dict(run)))
    raise errors.NonFiniteError('step 3: loss nan')

  monkeypatch.setattr(tuning.loop, 'run', fail)
  asked = Study((run,), Sweep())
  tuning.train_one(*next_runs(asked, {}), tmp_path, Preemption())
  assert 'step 3: loss nan' in capsys.readouterr().out
  assert tuning.finished(asked, tmp_path) == {'a-lr0.01-s0': math.inf}
