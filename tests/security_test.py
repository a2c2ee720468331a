"""What users give is data: nothing in it is run, and it names no place to write to.

Names of runs, names in foreign weights, and symlinks in the place of a report, an export
or a lock are in the tests of those.
"""

import ast
import dataclasses
import io
import itertools
import json
import pathlib
import pickle
import shutil
import typing
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints, errors, loop, optimizers
from experiments.arguments import option_types, parse_args
from experiments.command_line import read_file
from experiments.data import DataConfig, load_corpus, load_tokenizer
from experiments.data.formats import format_of, read
from experiments.kernels import KERNELS
from experiments.optimizers import METHODS
from experiments.report import load_run
from experiments.schema import members, walk
from experiments.signals import Preemption
from lrjax.models.safetensors import import_safetensors, read_config
from tests import runner

ROOT = pathlib.Path(__file__).parent.parent


# The sources.

MODULES = {
  'pickle',
  'cloudpickle',
  'dill',
  'joblib',
  'marshal',
  'shelve',
  'yaml',
  'torch',
}
FUNCTIONS = {
  'eval', 'exec', 'compile', '__import__', 'importlib.import_module', 'os.system',
  'os.popen', 'shutil.unpack_archive',
}  # fmt: skip
# That of Triton reads a device's memory.
LOADERS = {'json.load', 'json.loads', 'tomllib.loads', 'ocp.load', 'pltriton.load'}
# It times the optimizers of torch's world, and opens no file.
TRUSTED = {('contestants.py', 'torch')}
OFF = {'allow_pickle', 'shell', 'trust_remote_code'}


def faults(source):
  """Yields all that could run what a file holds."""
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Import(names=names):
        yield from {name.name.partition('.')[0] for name in names} & MODULES
      case ast.ImportFrom(module=str(module), names=names):
        yield from {module.partition('.')[0]} & MODULES
        yield from {f'{module}.{name.name}' for name in names} & FUNCTIONS
      case ast.Name() | ast.Attribute():
        yield from {ast.unparse(node)} & FUNCTIONS
      case ast.Call(
        func=ast.Attribute(attr='load' | 'loads') as function, keywords=given
      ):
        if not any(k.arg == 'allow_pickle' for k in given):
          yield from {ast.unparse(function)} - LOADERS
      case ast.keyword(arg=name, value=value) if name in OFF:
        yield from {name} if ast.unparse(value) != 'False' else ()


@pytest.mark.parametrize(
  'source',
  [
    'import pickle',
    'from torch import load',
    'from os import system',
    'import yaml.reader',
    'eval("1")',
    'np.load(path)',
    'np.load(path, allow_pickle=True)',
    'np.load(path, allow_pickle=flag)',
    'run = os.popen',
    'subprocess.run(x, shell=True)',
    'datasets.load_dataset(x, trust_remote_code=True)',
  ],
)
def test_the_scan_sees(source):
  assert list(faults(source))


def test_no_source_can_run_what_a_file_holds():
  sources = [p for d in ('lrjax', 'experiments') for p in (ROOT / d).rglob('*.py')]
  assert len(sources) > 50
  found = {(p.name, what) for p in sources for what in faults(p.read_text())}
  assert found == TRUSTED


# Files. Each payload makes a marker file if something unpickles or constructs it.


class Evil:
  """Unpickling it makes the marker."""

  def __init__(self, marker):
    self.marker = str(marker)

  def __reduce__(self):
    return open, (self.marker, 'w')


def npy(marker):
  file = io.BytesIO()
  np.save(file, np.array([Evil(marker)], object), allow_pickle=True)
  return file.getvalue()


def zipped(name, content):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as z:
    z.writestr(name, content)
  return file.getvalue()


PAYLOADS = {
  'npy': npy,
  'npz': lambda marker: zipped('arr_0.npy', npy(marker)),
  'pt': lambda marker: zipped('archive/data.pkl', pickle.dumps(Evil(marker))),
  'pickle': lambda marker: pickle.dumps(Evil(marker)),
  'text_pickle': lambda marker: pickle.dumps(Evil(marker), protocol=0),
  'yaml': lambda marker: f'!!python/object/apply:open ["{marker}", "w"]'.encode(),
}


@pytest.fixture(params=PAYLOADS)
def payload(request, tmp_path):
  """The bytes of a file that must stay bytes; checks at the end that they did."""
  marker = tmp_path / 'marker'
  # Ends as a line does: of metrics, an unfinished last line is left out in silence.
  yield PAYLOADS[request.param](marker) + b'\n'
  assert not marker.exists(), 'what a file holds was run'


@pytest.mark.parametrize('name', ['npy', 'npz', 'pickle', 'text_pickle'])
def test_the_payloads_work(name, tmp_path):
  content = io.BytesIO(PAYLOADS[name](tmp_path / 'marker') + b'\n')
  loaded = np.load(content, allow_pickle=True)
  if name == 'npz':
    loaded['arr_0']
  assert (tmp_path / 'marker').exists()


def texts(path):
  return list(read(str(path), format_of(str(path)), 'text'))


def run_of(path):
  """Reads a run of which one file is the payload."""
  metrics = path.with_name('metrics.jsonl')
  if not metrics.exists():
    metrics.write_text('{"step": 1, "loss": 1.0}\n')
  return load_run(path.parent)


@pytest.mark.parametrize(
  'name, reader',
  [
    ('run.toml', read_file),
    ('run.json', read_file),
    ('run.yaml', read_file),
    ('tokenizer.json', lambda path: load_tokenizer(str(path))),
    ('a.jsonl', texts),
    ('a.parquet', texts),
    ('a.arrayrecord', texts),
    ('config.json', lambda path: read_config(path.parent)),
    ('config.json', run_of),
    ('metrics.jsonl', run_of),
    ('timing.jsonl', run_of),
    ('summary.json', run_of),
  ],
)
def test_no_reader_runs_a_file(name, reader, payload, tmp_path):
  (tmp_path / 'files').mkdir()
  (tmp_path / 'files' / name).write_bytes(payload)
  with pytest.raises(ValueError):
    reader(tmp_path / 'files' / name)


def test_a_text_is_only_text(payload, tmp_path):
  (tmp_path / 'a.txt').write_bytes(payload)
  try:
    assert texts(tmp_path / 'a.txt') == [payload]
  except ValueError as e:
    assert 'is not UTF-8' in str(e)


def test_weights_are_not_unpickled(payload, tmp_path):
  sizes = {'vocab_size': 256, 'hidden_size': 16, 'intermediate_size': 24}
  sizes |= {'num_hidden_layers': 2, 'num_attention_heads': 2}
  (tmp_path / 'config.json').write_text(json.dumps(sizes))
  (tmp_path / 'model.safetensors').write_bytes(payload)
  with pytest.raises(ValueError, match=r'model\.safetensors is damaged'):
    import_safetensors(tmp_path, runner.tiny().model)


def test_token_files_are_not_unpickled(payload, tmp_path):
  data = runner.tiny().data
  load_corpus(data, str(tmp_path / 'tokens'))
  for file in (tmp_path / 'tokens').rglob('*.*'):
    before = file.read_bytes()
    file.write_bytes(payload)
    with pytest.raises(errors.DataError, match='damaged'):
      load_corpus(data, str(tmp_path / 'tokens'))
    file.write_bytes(before)


def test_checkpoints_are_not_unpickled(payload, tmp_path):
  state = {'w': np.arange(6, dtype=np.float32)}
  saver = checkpoints.Checkpoints(tmp_path / 'c', every=1)
  saver.save(1, state, data_state={}, meta={})
  saver.close()
  record = tmp_path / 'c' / '1' / '_CHECKPOINT_METADATA'
  others = [p for p in record.parent.rglob('*') if p.is_file() and p != record]
  assert len(others) > 3
  for files in (others, [record]):
    for file in files:
      file.write_bytes(payload)
    with pytest.raises(errors.CheckpointCorrupt):
      saver.restore(state, step=1)


# Settings.

# Text for people, or where to look for data. All other text is a name from a list.
FREE = {
  'name', 'data.paths', 'data.valid_paths', 'data.text_key', 'data.hub_name',
  'data.hub_config', 'data.hub_split', 'data.hub_valid_split', 'data.hub_revision',
  'data.tokenizer', 'data.end_token',
}  # fmt: skip
ATTACKS = [
  'os.system',
  'builtins.eval',
  'lrjax.x.__globals__',
  'logging.os.system',
  '!!python/name:os.system',
  '${HOME}',
  '$(touch marker)',
  '__import__("os").system("touch marker")',
]


def text_fields():
  """Dotted keys of all settings that hold text."""

  def holds_text(hint):
    kinds = members(hint) or getattr(hint, '__args__', ()) or (hint,)
    return str in kinds or any(isinstance(kind, str) for kind in kinds)

  fields = {key for key, hint in walk(type(runner.tiny())) if holds_text(hint)}
  options = option_types(METHODS['galore']) or {}
  fields |= {
    f'optimizer.options.{k}' for k, hint in options.items() if holds_text(hint)
  }
  return sorted(fields - {'optimizer.options', 'kernel.options'})


@pytest.mark.parametrize('key', sorted({*text_fields()} - FREE))
def test_names_come_from_fixed_lists(key):
  for attack in ATTACKS:
    with pytest.raises(ValueError, match=r'must be|expected|not one of|unknown'):
      _, (experiment,) = parse_args([f'--{key}={attack}'], METHODS)
      optimizers.make(experiment)


def _flat(hint):
  """The values of literals and the members of unions in a type."""
  parts = typing.get_args(hint)
  return [x for part in parts for x in (_flat(part) or [part])]


def test_options_of_kernels_come_from_fixed_lists():
  found = [
    (name, option)
    for name, make in KERNELS.items()
    for option, hint in (option_types(make) or {}).items()
    if any(isinstance(x, str) for x in _flat(hint))
  ]
  assert ('factorized', 'init') in found
  for (name, option), attack in itertools.product(found, ATTACKS):
    flags = [f'--kernel.name={name}', f'--kernel.options.{option}={attack}']
    with pytest.raises(errors.ConfigError, match='expected'):
      parse_args(flags, METHODS)


@pytest.mark.parametrize('attack', ATTACKS)
def test_free_text_stays_text(attack, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert {*text_fields()} >= FREE
  for key in sorted(FREE - {'name', 'data.hub_name'}):
    field = key.removeprefix('data.')
    changes = {'source': 'synthetic', field: attack}
    if 'paths' in field:
      changes |= {
        'source': 'files',
        'paths': (str(ROOT / 'LICENSE'),),
        field: (attack,),
      }
    try:
      assert getattr(load_corpus(DataConfig(**changes)).config, field) == attack
    except (ValueError, FileNotFoundError) as e:
      assert attack in str(e)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', METHODS)
def test_optimizer_state_is_arrays_alone(name):
  optimizer = dataclasses.replace(runner.tiny().optimizer, name=name, options={})
  tx = optimizers.make(runner.tiny(optimizer=optimizer))
  state = tx.init({'layers': {'kernel': jnp.ones((6, 200, 160))}, 'bias': jnp.ones(3)})
  for leaf in jax.tree.leaves(state):
    assert isinstance(leaf, jax.Array) and leaf.dtype.kind != 'O' and leaf.size


# Places.


class Never(Preemption):
  """A run that nobody interrupts."""

  def requested(self, step):
    return False


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  return loop.run(runner.tiny(steps=4), tmp_path_factory.mktemp('runs'), Never())


@pytest.mark.parametrize(
  'name',
  [
    'metrics.jsonl', 'timing.jsonl', 'attempts.json', '.lrjax.lock', 'checkpoints',
    'checkpoints/.lrjax', 'checkpoints/4', 'tensorboard', 'checkpoints/quarantine',
  ],
)  # fmt: skip
def test_nothing_is_written_through_a_symlink(name, finished, tmp_path):
  outside, place = tmp_path / 'outside', tmp_path / 'runs' / 'tiny' / name
  shutil.copytree(finished, tmp_path / 'runs' / 'tiny')
  outside.mkdir()
  if place.exists():
    shutil.move(place, outside)
  place.symlink_to(outside / place.name)
  contents = lambda: {p: p.is_file() and p.read_bytes() for p in outside.rglob('*')}
  before = contents()
  with pytest.raises(errors.RunDirError):
    loop.run(runner.tiny(steps=4), tmp_path / 'runs', Never(), resume=True)
  assert contents() == before and place.is_symlink()
