"""Reading runs back, and the report on them."""

import html.parser
import json
import math
import re
import struct

import numpy as np
import pytest

from experiments.errors import ConfigError, RunDirError
from experiments.report import load_run, terminal_table, write_report
from experiments.report.plots import draw_all
from experiments.report.tables import (
  comparison,
  details,
  provenance,
  sentences,
  settings,
)

STEPS = 30
SUMMARY = {
  'steps': STEPS,
  'tokens': 61440,
  'skipped_steps': 1,
  'valid_loss': 1.6161,
  'bits_per_byte': 2.3315,
  'perplexity': 5.0334,
  'train_seconds': 95.5,
  'compile_seconds': 8.25,
  'steady_ms': 343.0,
  'refresh_ms': None,
  'parameters': 870016,
  'parameter_bytes': 3480064,
  'gradient_bytes': 3480065,
  'optimizer_bytes': 6960132,
  'adam_bytes': 6960132,
  'corpus': {'name': 'stdlib', 'files': 658, 'sha256': 'ab12'},
  'versions': {'python': '3.11.7', 'jax': '0.10.2'},
  'machine': {'cpu': 'x86', 'cores': 2},
  'commit': '0123abc',
}
GALORE = {
  'valid_loss': 1.5191,
  'bits_per_byte': 2.1916,
  'steady_ms': 352.0,
  'refresh_ms': 467.0,
  'optimizer_bytes': 2810000,
}


def write_run(path, name, summary=(), **config):
  path.mkdir()
  config = {'name': name, 'optimizer': {'name': name, **config}}
  (path / 'config.json').write_text(json.dumps(config))
  (path / 'summary.json').write_text(json.dumps({**SUMMARY, **dict(summary)}))
  metrics, timing = [], []
  for step in range(1, STEPS + 1):
    loss = 5.5 * step**-0.3
    metrics.append({'step': step, 'split': 'train', 'loss': loss, 'attempt': 1})
    if step % 10 == 0:
      metrics.append({'step': step, 'split': 'valid', 'loss': loss + 0.1})
    refresh = name == 'galore' and step % 10 == 1
    timing.append({'step': step, 'seconds': 0.25, 'refresh': refresh})
  for file, lines in (('metrics.jsonl', metrics), ('timing.jsonl', timing)):
    (path / file).write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


@pytest.fixture
def directory(tmp_path):
  return write_run(tmp_path / 'a', 'adamw', learning_rate=1e-3)


@pytest.fixture
def runs(tmp_path, directory):
  other = write_run(tmp_path / 'b', 'galore', GALORE, learning_rate=2e-2)
  return [load_run(directory), load_run(other)]


def test_a_run_is_read_back(runs):
  run = runs[1]
  steps, losses = run.train
  np.testing.assert_array_equal(steps, np.arange(1, 31))
  np.testing.assert_array_equal(losses, [5.5 * step**-0.3 for step in range(1, 31)])
  np.testing.assert_array_equal(run.valid[0], [10, 20, 30])
  np.testing.assert_array_equal(run.timing[0][run.timing[2]], [1, 11, 21])
  assert run.name == 'galore' and run.refreshes == 3
  assert run.average_ms == pytest.approx(352 + (467 - 352) / 10, rel=1e-12)
  np.testing.assert_allclose(run.seconds_at(np.array([1, 4])), [0.25, 1.0], rtol=1e-12)


def test_seconds_count_the_steps_that_were_not_logged(directory):
  lines = [{'step': step, 'seconds': 0.5} for step in (5, 10)]
  (directory / 'timing.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  seconds = load_run(directory).seconds_at(np.array([5, 10]))
  np.testing.assert_allclose(seconds, [2.5, 5.0], rtol=1e-12)


def test_only_metrics_are_needed(directory):
  for name in ('config.json', 'summary.json', 'timing.jsonl'):
    (directory / name).unlink()
  run = load_run(directory)
  assert run.name == 'a' and run.config == {} and run.average_ms is None
  assert np.isnan(run.seconds_at(run.train[0])).all()
  assert set(draw_all([run])) == {'overview.png', 'loss.png', 'validation.png'}
  assert set(comparison([run]).rows[0][1:]) == {'–'} and not sentences([run, run])


def test_the_last_line_may_be_cut_off(directory):
  whole = (directory / 'metrics.jsonl').read_bytes()
  for cut in range(1, 40):
    (directory / 'metrics.jsonl').write_bytes(whole[:-cut])
    assert len(load_run(directory).train[0]) == STEPS - (cut > 44)


def test_the_last_of_lines_for_one_step_counts(directory):
  with open(directory / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 3, "loss": 9.5}\n{"step": 4, "loss": null}\n')
    file.write('{"step": 7, "loss": "nan"}\n{"step": 8, "loss": "-inf"}\n')
    file.write('{"step": 5, "loss": NaN}\n{"step": 6, "split": "other", "loss": 1}\n')
  _, losses = load_run(directory).train
  assert losses[2] == 9.5 and np.isnan(losses[[3, 4, 6]]).all()
  assert losses[5] != 1 and losses[7] == -np.inf
  assert draw_all([load_run(directory)])


@pytest.mark.parametrize(
  ('file', 'line', 'parts'),
  [
    ('metrics.jsonl', b'{"step": 3, "lo\n', ('metrics.jsonl:34', 'line 1')),
    ('metrics.jsonl', b'\n', ('metrics.jsonl:34', 'Expecting value')),
    ('metrics.jsonl', b'[3]\n', ('metrics.jsonl:34', 'JSON object, got list')),
    ('metrics.jsonl', b'{"loss": 1.0}\n', ('metrics.jsonl:34', 'step', 'nothing')),
    ('metrics.jsonl', b'{"step": 3}\n', ('metrics.jsonl:34', 'loss', 'nothing')),
    ('metrics.jsonl', b'{"step": true, "loss": 1}\n', ('step must be int', 'True')),
    ('metrics.jsonl', b'{"step": 3.5, "loss": 1}\n', ('step must be int', '3.5')),
    ('metrics.jsonl', b'{"step": 3, "loss": "1"}\n', ('loss must be float', "'1'")),
    ('metrics.jsonl', b'{"step": 1e400, "loss": 1}\n', ('step must be int', 'inf')),
    ('metrics.jsonl', b'{"step": 99999999999999999999, "loss": 1}\n', ('too large',)),
    ('metrics.jsonl', b'{"step": 3, "split": [], "loss": 1}\n', ('split', '[]')),
    ('metrics.jsonl', b'\xff\n', ('metrics.jsonl:34', 'utf-8')),
    ('metrics.jsonl', b'[' * 100_000 + b'\n', ('metrics.jsonl:34', 'nested')),
    ('timing.jsonl', b'{"step": 3}\n', ('timing.jsonl:31', 'seconds')),
    ('config.json', b'{', ('config.json', 'Extra data')),
    ('summary.json', b'x', ('summary.json', 'Extra data')),
  ],
)
def test_malformed_files_are_named_with_the_line(directory, file, line, parts):
  with open(directory / file, 'ab') as opened:
    opened.write(line)
  with pytest.raises(ValueError) as caught:
    load_run(directory)
  assert all(part in str(caught.value) for part in parts), caught.value


def test_malformed_summaries_name_the_key(directory):
  (directory / 'summary.json').write_text('{"steady_ms": "343", "new_in_2030": 1}')
  with pytest.raises(ConfigError, match=r"summary\.json: steady_ms = '343'.*float"):
    load_run(directory)
  (directory / 'summary.json').write_text('[]')
  with pytest.raises(ValueError, match=r'summary\.json.*got list'):
    load_run(directory)


def test_no_run_is_file_not_found(tmp_path):
  for path in (tmp_path, tmp_path / 'missing'):
    with pytest.raises(FileNotFoundError, match=str(path)):
      load_run(path)


@pytest.mark.parametrize('file', ['metrics.jsonl', 'timing.jsonl', 'summary.json'])
def test_damaged_files_give_a_value_error_or_a_run(directory, file):
  whole = (directory / file).read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(200):
    content = bytearray(whole)
    content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    (directory / file).write_bytes(content)
    try:
      load_run(directory)
    except ValueError as error:
      assert str(directory / file) in str(error)


def test_the_tables_hold_the_numbers_of_the_files(runs):
  adamw, galore = comparison(runs).rows
  assert adamw == (
    'adamw', '1.616', '2.332', '6.64 MiB', '343 ms', '–', '343 ms', '1 min 36 s'
  )  # fmt: skip
  assert galore == (
    'galore', '1.519 (−0.097)', '2.192 (−0.140)', '2.68 MiB (−60 %)', '352 ms (+3 %)',
    '467 ms', '364 ms (+6 %)', '1 min 36 s',
  )  # fmt: skip
  rows = {row[0]: row[1:] for row in details(runs).rows}
  assert rows['validation loss (nats/token)'] == ('1.6161', '1.5191')
  assert rows['optimizer state bytes'] == ('6 960 132', '2 810 000')
  assert rows['gradient bytes'] == ('3 480 065',) * 2
  assert rows['refresh steps'] == ('0', '3') and rows['skipped steps'] == ('1', '1')
  assert rows['compilation'] == ('8.2 s',) * 2


def test_settings_that_differ_and_facts_that_agree(runs):
  assert settings(runs).rows == [
    ('optimizer.name', 'adamw', 'galore'),
    ('optimizer.learning_rate', '0.001', '0.02'),
  ]
  assert ('text.sha256', 'ab12') in provenance(runs).rows
  machine = runs[1].summary.machine
  machine['cores'] = 64
  assert ('machine.cores', '2', '64') in provenance(runs).rows


def test_the_sentence_says_what_was_saved_and_what_it_cost(runs):
  said, caution = sentences(runs)
  assert 'galore kept 2.68 MiB of optimizer state where adamw kept 6.64 MiB' in said
  assert '(−60 %)' in said and '6 % longer on average' in said
  assert '3 of 30 refreshed bases in 467 ms each' in said
  assert '1.519 against 1.616 nats/token (0.097 lower)' in said
  assert caution.startswith('One seed each')


@pytest.mark.parametrize(
  ('loss', 'verdict'),
  [
    (1.617, 'no difference that one seed could show'),
    (1.9161, '0.300 higher'),
  ],
)
def test_the_sentence_does_not_flatter(tmp_path, directory, loss, verdict):
  change = {**GALORE, 'valid_loss': loss, 'steady_ms': 300.0, 'refresh_ms': 300.0}
  other = load_run(write_run(tmp_path / 'b', 'galore', change))
  said = sentences([load_run(directory), other])[0]
  assert verdict in said and '13 % less time on average' in said


class Page(html.parser.HTMLParser):
  """Collects the tags, texts and addresses of a page, and checks its nesting."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.texts, self.addresses = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.addresses += [value for name, value in attrs if name in ('src', 'href')]
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  root = tmp_path_factory.mktemp('report')
  adamw = write_run(root / 'a', 'adamw')
  galore = write_run(root / 'b', 'galore', GALORE, learning_rate=2e-2)
  runs = [load_run(adamw), load_run(galore)]
  return runs, write_report(runs, root / 'out', title='GaLore & AdamW')


def test_the_page_stands_alone(report):
  path = report[1]
  text = path.read_text()
  page = Page(text)
  assert not page.open and page.tags.count('img') == 5 and page.tags.count('table') == 4
  assert all(a.startswith('data:image/png;base64,') for a in page.addresses)
  assert not re.search(r'https?:|//', re.sub(r'base64,[^"]*', '', text))
  assert 'script' not in page.tags and 'GaLore & AdamW' in page.texts
  assert {'1.519 (−0.097)', '2.68 MiB (−60 %)', '0123abc'} <= set(page.texts)
  markdown = (path.parent / 'report.md').read_text()
  assert '| galore | 1.519 (−0.097) | 2.192 (−0.140) | 2.68 MiB (−60 %) |' in markdown
  assert markdown.startswith('# GaLore & AdamW\n')
  pictures = re.findall(r'\]\((.*)\)', markdown)
  assert len(pictures) == 6 and all((path.parent / p).exists() for p in pictures)


def test_pictures_are_pngs_of_a_readable_size(report):
  paths = list(report[1].parent.glob('*.png'))
  assert len(paths) == 6
  for path in paths:
    picture = path.read_bytes()
    assert picture[:8] == b'\x89PNG\r\n\x1a\n'
    expected = (1800, 1320) if path.name == 'overview.png' else (1200, 675)
    assert struct.unpack('>II', picture[16:24]) == expected


def test_strange_names_are_only_text(tmp_path, directory):
  name = '<script>alert("x")</script> | $\\frac$ [a](http://b) `c`\n\x1b[31mforged'
  other = load_run(write_run(tmp_path / 'b', name, GALORE))
  loaded = [load_run(directory), other]
  path = write_report(loaded, tmp_path / 'out')
  page = Page(path.read_text())
  assert not {'script', 'a'} & {*page.tags} and '\x1b' not in path.read_text()
  assert loaded[1].name in page.texts and loaded[1].name.endswith(r'\n\x1b[31mforged')
  markdown = (path.parent / 'report.md').read_text()
  lines = [line for line in markdown.splitlines() if 'forged' in line]
  assert len(lines) == 5
  for row in lines:
    assert not re.search(r'(?<!\\)[<`\[\]]', row)
    assert len(re.findall(r'(?<!\\)\|', row)) in (0, 4, 9)


def test_measured_subspaces_are_drawn(directory):
  lines = [
    {'step': i, 'split': 'subspace', 'captured_energy': 0.5, 'overlap': 0.1 * i}
    for i in (1, 11, 21)
  ]
  with open(directory / 'metrics.jsonl', 'a') as file:
    file.write(''.join(json.dumps(line) + '\n' for line in lines))
  run = load_run(directory)
  np.testing.assert_array_equal(run.subspaces[0], [1, 11, 21])
  np.testing.assert_allclose(run.subspaces[2], [0.1, 1.1, 2.1])
  assert {'energy.png', 'overlap.png'} <= {*draw_all([run])}


def test_a_symlink_is_not_written_through(runs, tmp_path, monkeypatch):
  monkeypatch.setattr('experiments.report.page.draw_all', lambda runs: {})
  target = tmp_path / 'precious'
  target.write_text('mine')
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'report.md').symlink_to(target)
  with pytest.raises(RunDirError, match=r'report\.md'):
    write_report(runs, tmp_path / 'out')
  assert target.read_text() == 'mine'


def test_a_second_report_replaces_the_first_by_the_same_bytes(report):
  _, path = report
  before = path.read_bytes()
  directories = [path.parent.parent / name for name in 'ab']
  assert write_report(directories, path.parent, title='GaLore & AdamW') == path
  assert path.read_bytes() == before
  with pytest.raises(ValueError, match='at least one run'):
    write_report([], path.parent)


def test_runs_that_blow_up_or_never_start_are_drawn(tmp_path, directory):
  bad = write_run(tmp_path / 'bad', 'bad', {'valid_loss': None, 'optimizer_bytes': 0})
  lines = [{'step': i, 'loss': 10.0**i if i < 300 else math.nan} for i in range(1, 310)]
  (bad / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  empty = tmp_path / 'empty'
  empty.mkdir()
  (empty / 'metrics.jsonl').touch()
  runs = [load_run(path) for path in (directory, bad, empty)]
  assert len(draw_all(runs)) == 6 and len(comparison(runs).rows) == 3
  assert len(draw_all(runs[2:])) == 2


def test_the_terminal_shows_the_comparison(runs, capsys):
  terminal_table(runs)
  shown = capsys.readouterr().out
  for part in ('1.519', '(−0.097)', '2.68 MiB', '(−60 %)', '467 ms', 'One seed each'):
    assert part in shown
  assert '…' not in shown
