"""Tile sizes: the table, the choice, and the command that extends the table."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from experiments import tune
from experiments.jobs import Job, jobs
from experiments.operations import OPERATIONS
from lrjax import kernels
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


class FakeJob:
  """A job of `project` whose tiles take known seconds, one a round."""

  name = 'project'

  def __init__(self, seconds, sizes=SIZES):
    self.seconds, self.sizes = seconds, sizes

  def sampler(self, platform, megabytes):
    tile = tiles.choose('project', platform, self.sizes, 'float32', lambda t: True)
    if tile is None:
      raise ValueError('no tile fits')
    return iter(self.seconds[tile['k']]).__next__


KEY = tiles.Key('project', FAKE.kind, 'd512 k2048 r128', 'float32')


def test_the_tile_of_the_least_median_is_kept(on_tpu):
  slow, fast, spiky = [9e-6] * 3, [2e-6, 8e-6, 3e-6], [1e-6, 9e-6, 9e-6]
  job = FakeJob({512: slow, 256: fast, 128: spiky})
  row = tune.tune(tiles.read(), KEY, job, tune.Command(rounds=3))
  assert row['tile']['k'] == 256 and row['microseconds'] == 3.0
  assert row.keys() == tiles.KEYS and row['device'] == FAKE.kind


def test_nothing_is_kept_where_no_tile_fits(on_tpu, capsys):
  job = FakeJob({}, dict(d=9, k=9, r=2))
  assert tune.tune(tiles.read(), KEY, job, tune.Command()) is None
  assert 'no tile fits' in capsys.readouterr().err


@pytest.fixture
def chosen(monkeypatch):
  """The tiles that operations were given for the TPU, in order."""
  found, real = [], tiles.choose

  def choose(operation, platform, *args):
    tile = real(operation, platform, *args)
    found.extend([tile] * (platform == 'tpu'))
    return tile

  monkeypatch.setattr(tiles, 'choose', choose)
  return found


def test_the_command_extends_the_table_for_what_operations_look_up(
  on_tpu, chosen, monkeypatch, tmp_path, capsys
):
  def sampler(job, platform, megabytes):
    # The kernel is traced, which refuses tiles that do not fit; the smallest is fastest.
    jax.eval_shape(job.call(platform), *job.shapes((1,)))
    size = math.prod(chosen[-1].values())
    return lambda: 1e-9 * size

  monkeypatch.setattr(Job, 'sampler', sampler)
  # Of all candidates the first, which is the default, and the last.
  ends = lambda found: {p: [*found[p][:1], *found[p][1:][-1:]] for p in found}
  table = tiles.read()
  candidates = {name: ends(found) for name, found in table.candidates.items()}
  path = tmp_path / 'tiles.json'
  tune.write(table._replace(candidates=candidates), path)
  words = ['--size', '60m', '--rank', '128', '--rounds', '1', '--table', str(path)]
  assert tune.main([*words, '--operations', ','.join(kernels.__all__)]) == 0
  assert [*tmp_path.iterdir()] == [path]
  table = tiles.parse(json.loads(path.read_text(encoding='utf-8')))
  assert {key.operation for key in table.tuned} == table.candidates.keys()
  # Blocks of the support are of 128 rows and columns, and these do not divide 1376.
  assert capsys.readouterr().out.count('no tile fits') == 2
  key = tiles.Key('project', FAKE.kind, 'd2048 k512 r128', 'bfloat16')
  assert table.tuned[key]['tile'] == {'d': 128, 'k': 128}

  monkeypatch.setattr(tiles, 'read', lambda: table)
  for job in jobs('60m', 128, 'bfloat16', ['project_int4', *kernels.__all__]):
    row = table.tuned.get(job.key())
    assert row is None or chosen[-1] == row['tile'], job


def test_every_operation_is_tuned(on_tpu):
  assert {*kernels.__all__} <= OPERATIONS.keys()
  found = {Job(name, 512, 512, 128, 'float32').key() for name in OPERATIONS}
  assert {key.operation for key in found} == tiles.read().candidates.keys()
  # Rows do not tell how P is stored.
  assert len(found) == len(kernels.__all__)


def test_the_command_needs_an_accelerator(capsys):
  assert tune.main([]) == 2
  assert 'cpu' in capsys.readouterr().err
  assert tune.main(['--operations', 'projekt']) == 2
  assert 'low_rank_adam' in capsys.readouterr().err
  assert tune.main(['--table', 'nowhere.json']) == 2
  assert 'nowhere.json' in capsys.readouterr().err
  assert tune.main(['--size', '60m', '--rank', '513']) == 2
  assert '1 to 512' in capsys.readouterr().err


def test_what_must_be_moved_and_done():
  d, k, r = 128, 256, 32
  job = lambda name, dtype='float32': Job(name, d, k, r, dtype)
  assert job('project').moved == 4 * (d * r + d * k + r * k)
  assert job('project_int4').moved == d * r // 2 + d * r // 32 + 4 * (d + r) * k
  numbers = 4 * (d * r + 5 * r * k + 1)  # P; M and V twice, N; the count
  assert job('low_rank_adam', 'bfloat16').moved == 2 * d * k + numbers
  assert job('lift_and_apply', 'bfloat16').moved == 4 * (d * k + d * r + r * k)
  # Moments of a byte and a scale each 256 of them, and counts, both ways; G, U.
  assert job('adam_8bit').moved == 2 * (4 + 2 * (r * k + r * k // 64)) + 8 * r * k
  for name in OPERATIONS:
    lowered = jax.jit(job(name).call('xla')).lower(*job(name).shapes((1,)))
    done = lowered.cost_analysis()['flops']
    # XLA's forms do a little elementwise besides.
    assert 0.99 <= done / max(job(name).flops, 1) < 2.5 or name == 'adam_8bit', name


@pytest.mark.parametrize('operation', OPERATIONS)
def test_operations_run_for_the_sake_of_their_time(operation):
  sample = Job(operation, 72, 80, 16, 'float32').sampler('xla', megabytes=0)
  # Again, with what it has replaced.
  assert sample() > 0 and sample() > 0
