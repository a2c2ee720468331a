"""Tile sizes: the table, the choice, and the command that extends the table."""

import json

import jax.numpy as jnp
import pytest

from experiments import tune
from lrjax.kernels import tiles

FAKE = tiles.Device('tpu', 'TPU v99')
SIZES = {'d': 512, 'k': 1376, 'r': 128}
ROW = dict(
  operation='project',
  device='TPU v99',
  shape='d512 k2048 r128',
  dtype='float32',
  tile={'d': 128, 'k': 128},
  microseconds=3.5,
)


@pytest.fixture
def on_tpu(monkeypatch):
  monkeypatch.setattr(tiles, 'present', lambda: FAKE)


@pytest.fixture
def table(monkeypatch):
  found = tune.extended(tiles.read(), ROW)
  monkeypatch.setattr(tiles, 'read', lambda: found)
  return found


def choose(sizes=SIZES, dtype=jnp.float32, fits=lambda tile: True):
  return tiles.choose('project', 'tpu', sizes, dtype, fits)


def test_the_table_is_what_render_writes():
  assert tiles.PATH.read_text(encoding='utf-8') == tiles.render(tiles.read())


def test_operations_have_candidates_for_both_platforms():
  for name, platforms in tiles.read().candidates.items():
    assert platforms.keys() == {*tiles.PLATFORMS}
    # SLTrain's product has no kernel for a GPU, see there.
    assert all(platforms.values()) or name == 'sparse_plus_low_rank'


def test_the_tuned_tile_is_chosen_for_its_device_class_and_type(on_tpu, table):
  first = table.candidates['project']['tpu'][0]
  assert choose() == ROW['tile'] != first
  assert choose(SIZES | {'k': 1100}) == ROW['tile']  # the same class
  assert choose(SIZES | {'r': 64}) == first
  assert choose(dtype=jnp.bfloat16) == first


def test_a_tuned_tile_that_does_not_fit_is_passed_over(on_tpu, table):
  assert choose(fits=lambda tile: tile['d'] > 128)['d'] > 128


def test_another_device_takes_the_first_candidate_that_fits(table):
  assert choose() == table.candidates['project']['tpu'][0]
  assert choose(fits=lambda tile: tile['k'] < 512)['k'] < 512
  assert choose(fits=lambda tile: False) is None


def test_no_tile_may_be_half_empty():
  assert choose({'d': 65, 'k': 65, 'r': 8}) == {'d': 128, 'k': 128}
  assert choose({'d': 64, 'k': 65, 'r': 8}) is None


def test_only_one_tile(table):
  with tiles.only({'d': 256, 'k': 256}):
    assert choose() == {'d': 256, 'k': 256}
    assert choose(fits=lambda tile: tile['d'] < 256) is None


BAD = {
  'not an object': [],
  'another key': {'candidates': {}, 'tuned': [], 'more': 1},
  'operations': {'candidates': [], 'tuned': []},
  'platform': {'candidates': {'project': {'cuda': []}}, 'tuned': []},
  'axes': {'candidates': {'project': {'tpu': [{'x': 16}], 'gpu': []}}, 'tuned': []},
  'power': {'candidates': {'project': {'tpu': [{'d': 100}], 'gpu': []}}, 'tuned': []},
  'integer': {
    'candidates': {'project': {'tpu': [{'d': 64.0}], 'gpu': []}},
    'tuned': [],
  },
  'row': [ROW | {'more': 1}],
  'operation': [ROW | {'operation': 'projekt'}],
  'device': [ROW | {'device': 5}],
  'dtype': [ROW | {'dtype': 'float31'}],
  'tile': [ROW | {'tile': {'d': True}}],
  'other axes': [ROW | {'tile': {'d': 128}}],
  'microseconds': [ROW | {'microseconds': -1}],
  'twice': [ROW, ROW],
}


@pytest.mark.parametrize('name', BAD)
def test_a_table_that_is_none_is_refused(name, tmp_path):
  content = BAD[name]
  if isinstance(content, list) and content:
    candidates = {'project': {'tpu': [ROW['tile']], 'gpu': []}}
    content = {'candidates': candidates, 'tuned': content}
  path = tmp_path / 'tiles.json'
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r'tiles\.json: not a table of tiles'):
    tiles.read(path)


def prepare(seconds):
  """In place of `sampler`: the times of each tile, one a round."""

  def one(job, platform):
    tile = tiles.choose(job.operation, platform, job.sizes, job.dtype, lambda t: True)
    if tile is None:
      raise ValueError('no tile fits')
    return iter(seconds(tile)).__next__

  return one


def test_the_tile_of_the_least_median_is_kept(on_tpu):
  job = tune.Job('project', SIZES, 'float32')
  slow, fast, spiky = [9e-6] * 3, [2e-6, 8e-6, 3e-6], [1e-6, 9e-6, 9e-6]
  times = {512: slow, 256: fast, 128: spiky}
  row = tune.tune(tiles.read(), job, FAKE, 3, prepare(lambda tile: times[tile['k']]))
  assert row['tile']['k'] == 256 and row['microseconds'] == 3.0
  assert row.keys() == tiles.KEYS and row['device'] == FAKE.kind


def test_nothing_is_kept_where_no_tile_fits(on_tpu, capsys):
  job = tune.Job('project', dict(d=9, k=9, r=2), 'float32')
  assert tune.tune(tiles.read(), job, FAKE, 3, prepare(lambda tile: [1])) is None
  assert 'no tile fits' in capsys.readouterr().err


def test_the_command_extends_the_table(on_tpu, monkeypatch, tmp_path):
  path = tmp_path / 'tiles.json'
  path.write_text(tiles.PATH.read_text(encoding='utf-8'))
  found = prepare(lambda tile: [tile['k'] * 1e-6] * 2)
  monkeypatch.setattr(
    tune, 'sampler', lambda job, platform, stack: found(job, platform)
  )
  words = ['--size', '60m', '--rank', '128', '--rounds', '2', '--table', str(path)]
  assert tune.main(words) == 0
  table = tiles.parse(json.loads(path.read_text(encoding='utf-8')))
  assert len(table.tuned) == 2 * len(tune.TUNABLE)
  key = ('project', FAKE.kind, 'd512 k2048 r128', 'bfloat16')
  assert table.tuned[key]['tile']['k'] == 128
  assert [*tmp_path.iterdir()] == [path]


def test_the_command_needs_an_accelerator(capsys):
  assert tune.main([]) == 2
  assert 'cpu' in capsys.readouterr().err
  assert tune.main(['--operations', 'projekt']) == 2
  assert 'low_rank_adam' in capsys.readouterr().err
  assert tune.main(['--table', 'nowhere.json']) == 2
  assert 'nowhere.json' in capsys.readouterr().err


@pytest.mark.parametrize('operation', tune.TUNABLE)
def test_operations_run_for_the_sake_of_their_time(operation):
  job = tune.Job(operation, dict(d=72, k=72, r=16), 'float32')
  assert tune.sampler(job, 'xla', stack=2)() > 0
