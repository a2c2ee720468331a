"""The commands as a user types them, in this process."""

import json

import pytest

import lrjax
from experiments import bench, bench_operations, compare, jobs, memory, train
from experiments.optimizers import METHODS
from experiments.presets import PRESETS
from lrjax.kernels import tiles

pytestmark = pytest.mark.slow
SMALL = {
  'preset': 'smoke',
  'steps': 4,
  'eval_every': 2,
  'checkpoint.every': 2,
  'model.hidden_size': 16,
  'model.intermediate_size': 24,
  'model.num_heads': 2,
  'data.source': 'synthetic',
  'data.synthetic_bytes': 20000,
  'data.seq_len': 16,
  'data.batch_size': 4,
  'data.valid_windows': 4,
}


def words(root, changes=()):
  flags = SMALL | {'runs': root} | dict(changes)
  return [f'--{name}={value}' for name, value in flags.items()]


def test_compare_writes_one_report_and_keeps_what_is_done(tmp_path, capsys):
  asked = words(tmp_path, {'galore.optimizer.options.rank': 4})
  assert compare.main(asked) == 0
  out = capsys.readouterr().out
  assert '3 runs (adamw, adamw_two_rates, galore), 768 tokens in all' in out
  assert str(tmp_path / 'smoke' / 'report.html') in out
  adamw = tmp_path / 'smoke' / 'adamw'
  assert json.loads((adamw / 'config.json').read_text())['optimizer']['name'] == 'adamw'
  first = (adamw / 'summary.json').read_bytes()
  assert compare.main(asked) == 1
  assert 'RunExistsError' in capsys.readouterr().err
  assert compare.main([*asked, '--resume']) == 0
  assert (adamw / 'summary.json').read_bytes() == first
  report = (tmp_path / 'smoke' / 'report.md').read_text()
  assert 'adamw' in report and 'galore' in report


def test_a_study_states_its_size_and_keeps_what_is_done(tmp_path, capsys):
  flags = {'methods': 'adamw', 'factors': '1', 'seeds': 2, 'name': 'study'}
  asked = words(tmp_path, flags)
  assert compare.main(asked) == 0
  out = capsys.readouterr().out
  assert '2 runs, 0 of them done, 512 tokens in all' in out and 'about' in out
  found = sorted(p.name for p in (tmp_path / 'study').iterdir())
  assert found == ['adamw-lr0.001-s0', 'adamw-lr0.001-s1', 'report']
  report = (tmp_path / 'study' / 'report' / 'report.md').read_bytes()
  assert compare.main([*asked, '--resume']) == 0
  assert 'in all' not in capsys.readouterr().out
  assert (tmp_path / 'study' / 'report' / 'report.md').read_bytes() == report


def test_faults_are_told_in_a_line_with_an_exit_code(tmp_path, capsys):
  missing = {'data.source': 'files', 'data.paths': 'none.txt'}
  for changes, message in (
    ({'methods': 'galroe'}, 'adamw_two_rates'),
    ({'factors': '-1'}, 'factors must be'),
    ({'seeds': 0}, 'seeds must be'),
  ):
    assert compare.main(words(tmp_path, changes)) == 2
    assert message in capsys.readouterr().err
  for changes, code, message in (
    ({'optimizer.learning_rte': 1}, 2, 'optimizer.learning_rate'),
    ({'optimizer.options.rnk': 4}, 2, 'rank'),
    (missing, 1, 'none.txt'),
    ({'mesh.fsdp': 64, 'data.batch_size': 64}, 2, '64 devices'),
  ):
    assert train.main(words(tmp_path, changes) + ['--overwrite']) == code
    assert message in capsys.readouterr().err
  assert memory.main(['--methods', 'galroe']) == 2
  assert 'galore' in capsys.readouterr().err
  assert memory.main(['--sizes', '61m']) == 2
  assert '60m' in capsys.readouterr().err
  assert bench.main(['--methods', 'galroe']) == 2
  assert 'galore' in capsys.readouterr().err
  assert bench.main(['--size', '61m']) == 2
  assert '60m' in capsys.readouterr().err


# GB of 10^9 bytes in bf16: the whole-model sums of the GaLore configs. 7B is 9.4047,
# which some print as 9.41.
STATES = {
  '60m': (0.232, 0.164),
  '130m': (0.536, 0.343),
  '350m': (1.47, 0.653),
  '1b': (5.36, 2.085),
  '7b': (26.95, 9.405),
}


def test_memory_comes_to_the_known_sums():
  found = memory.rows(tuple(STATES), 'bfloat16', ('adamw', 'galore'))
  found = {(r.size, r.method): r for r in found}
  for size, (adam, galore) in STATES.items():
    assert found[size, 'adamw'].state / 1e9 == pytest.approx(adam, abs=0.005)
    assert found[size, 'galore'].state / 1e9 == pytest.approx(galore, abs=0.0005)
    assert found[size, 'adamw'].weights == found[size, 'galore'].gradients


# Bytes of one matrix (d, k), d compressed, in float32, by the papers; counts at the end.
FORMULAS = {
  'galore': lambda d, k, r: 4 * (r * d + 2 * r * k) + 8,
  'galore_8bit': lambda d, k, r: 4 * r * d + 2 * dynamic8(r * k) + 8,
  'q_galore': lambda d, k, r: (
    d * ceil(r, 2) + 8 * ceil(r * d, 256) + 2 * dynamic8(r * k) + 8 + 4 * 5 + 8
  ),
  'golore': lambda d, k, r: 4 * (r * d + 2 * r * k) + 12,
  'subtrack': lambda d, k, r: 4 * (r * d + 2 * r * k + 1) + 12,
  'fira': lambda d, k, r: 4 * (r * d + 2 * r * k + 1) + 8,
  'apollo': lambda d, k, r: 4 * 2 * r * k + 20,
  'apollo_mini': lambda d, k, r: 4 * 2 * k + 20,
  'frugal': lambda d, k, r: 4 * (2 * (d // 4) * k + d // 4) + 8,
  'ldadam': lambda d, k, r: 4 * (r * d + 2 * r * k + d * k) + 8,
  'dct_adamw': lambda d, k, r: 4 * (2 * r * k + r) + d * k + 4 * k + 8,
  'trion': lambda d, k, r: 4 * (d * k + r) + 4,
  'dion': lambda d, k, r: 4 * (d * k + r * d) + 4,
}


def ceil(n, m):
  return -(-n // m)


def dynamic8(n):
  return n + 4 * ceil(n, 256)


@pytest.mark.parametrize('size', ['60m', '7b'])
def test_memory_follows_the_formulas(size):
  experiment = PRESETS[f'galore_{size}']
  rank = experiment.optimizer.options['rank']
  params = memory.abstract_params(experiment.model, 'float32')
  for name in FORMULAS.keys() & METHODS.keys():
    found = lrjax.coverage(memory.with_rank(name, rank, 'float32'), params)
    rows = [row for row in found.rows if row.stack]
    assert len(rows) == 7
    for row in rows:
      d, k = sorted(row.shape[-2:])
      expected = row.stack * FORMULAS[name](d, k, rank)
      assert row.state_bytes == expected, (name, row, expected)


def test_memory_prints_a_table(capsys):
  assert memory.main(['--sizes=60m', '--dtype=float32', '--methods=adamw']) == 0
  assert '464,588,8' in capsys.readouterr().out  # Adam of 58,073,600 weights


def test_bench_compares_in_turns():
  found = bench.run(bench.Command('smoke', rank=8, rounds=1, layers=1))
  assert found['found']['optax.adamw']['steady_ratio'] == 1.0
  small = found['found']['lrjax.galore']['state_bytes']
  assert 0 < small < found['found']['optax.adamw']['state_bytes']
  adam = found['found']['optax.adamw']
  # Of Adam 7 numbers for each weight, of which its state holds 2, and a count.
  moved = adam['bytes_per_s'] * adam['steady_ms'] / 1e3
  assert moved == pytest.approx(3.5 * adam['state_bytes'], rel=1e-3)
  assert adam['of_copy'] == adam['bytes_per_s'] / found['ceilings']['bytes_per_s']
  text = bench.report(found)
  assert all(name in text for name in found['found']) and 'GFLOP/s' in text


def test_bench_times_whole_training_steps(tmp_path, capsys):
  flags = ['--size', 'smoke', '--layers', '1', '--rounds', '1']
  flags += ['--tokens', '128', '--length', '32']
  assert bench.main([*flags, '--out', str(tmp_path / 'bench')]) == 0
  result = json.loads((tmp_path / 'bench' / 'bench.json').read_text())
  full, projected = (
    result['found'][f'lrjax.galore{more}'] for more in ('', ', projected backward')
  )
  sketched = result['found']['lrjax.galore, sketched refresh']
  assert sketched['refresh_temporary_bytes'] < full['temporary_bytes']
  assert projected['temporary_bytes'] < full['temporary_bytes']
  assert projected['refresh_temporary_bytes'] == full['temporary_bytes']
  assert (tmp_path / 'bench' / 'bench.md').read_text() in capsys.readouterr().out
  assert bench.main(['--tokens', '100', '--length', '64']) == 2


def test_bench_times_operations(tmp_path, capsys, monkeypatch):
  names = ['lift_and_apply', 'column_scores']
  monkeypatch.setattr(jobs, 'OPERATIONS', {n: jobs.OPERATIONS[n] for n in names})
  flags = ['--size', 'smoke', '--kernels', '--rounds', '1', '--megabytes', '1']
  assert bench.main([*flags, '--out', str(tmp_path)]) == 0
  assert (tmp_path / 'bench.md').read_text() in capsys.readouterr().out
  result = json.loads((tmp_path / 'bench.json').read_text())
  assert result['ceilings']['flops'].keys() == {'float32', 'highest'}
  shapes = {f'{name}, 64 x {k}, r = 16' for name in names for k in (64, 176)}
  assert result['found'].keys() == shapes
  # No kernel is for a CPU.
  assert all(forms.keys() == {'xla'} for forms in result['found'].values())
  assert bench.main(['--kernels', '--tokens', '256']) == 2
  assert 'tokens' in capsys.readouterr().err


class FakeJob:
  """An operation whose forms take known seconds, one a round."""

  d, k, r, products = 8, 16, 4, 'bfloat16'
  moved, flops = 2e6, 4e9

  def __init__(self, name, **seconds):
    self.name, self.seconds = name, seconds

  def sampler(self, form, megabytes):
    if form not in self.seconds:
      raise ValueError('no tile fits')
    return iter(self.seconds[form]).__next__


def test_bench_sets_kernels_beside_xla_and_the_ceilings(monkeypatch, capsys):
  monkeypatch.setattr(tiles, 'present', lambda: tiles.Device('gpu', 'NVIDIA'))
  both = FakeJob('project', xla=[2e-3, 4e-3, 3e-3], gpu=[1e-3, 1e-3, 3e-3])
  alone = FakeJob('column_scores', xla=[2e-3] * 3)
  ceilings = dict(bytes_per_s=4e9, flops=dict(bfloat16=8e12))
  found = bench_operations.measure([both, alone], 3, 512, ceilings)
  kernel = found['project, 8 x 16, r = 4']['gpu']
  reached = dict(bytes_per_s=2e9, of_copy=0.5, flops=4e12, of_products=0.5)
  for key, value in (dict(microseconds=1000, ratio=0.5) | reached).items():
    assert kernel[key] == pytest.approx(value), key
  assert found['column_scores, 8 x 16, r = 4'].keys() == {'xla'}
  assert 'no tile fits' in capsys.readouterr().err
  row = '| gpu | 1000.0 | 0.50 | 2.0 | 0.50 | 4 | 0.50 in bfloat16 |'
  assert row in bench_operations.table(found)
