"""What is installed, what importing it needs and costs, and what the commands set up."""

import email
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BASE = {'jax', 'flax', 'optax', 'chex', 'einops'}
# What the extras bring, or a user may have besides; `import lrjax` reads none of it.
OTHERS = {
  'array_record', 'datasets', 'grain', 'matplotlib', 'orbax', 'pandas', 'pyarrow',
  'rich', 'safetensors', 'tensorboardX', 'tokenizers', 'torch', 'transformers',
}  # fmt: skip


def run(words, **options):
  done = subprocess.run(words, capture_output=True, text=True, timeout=300, **options)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """A wheel of this tree, by the setuptools that is installed: no network is needed."""
  pytest.importorskip('setuptools')
  root = tmp_path_factory.mktemp('wheel')
  # setuptools leaves files beside the sources, and takes in what an earlier build left.
  for name in ('lrjax', 'experiments', 'tests', 'colab'):
    skipped = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, root / 'source' / name, ignore=skipped)
  for name in ('pyproject.toml', 'LICENSE', 'README.md'):
    shutil.copy(ROOT / name, root / 'source')
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel']
  offline = ['--no-deps', '--no-index', '--no-build-isolation']
  run([*pip, *offline, '--wheel-dir', root, root / 'source'])
  (path,) = root.glob('lrjax-*.whl')
  return path


def test_the_wheel_holds_the_library_alone(wheel):
  with zipfile.ZipFile(wheel) as file:
    names = file.namelist()
    (info,) = (name for name in names if name.endswith('.dist-info/METADATA'))
    metadata = email.message_from_bytes(file.read(info))
  inside = {name for name in names if not name.startswith(info.partition('/')[0])}
  files = [*(ROOT / 'lrjax').rglob('*.py'), ROOT / 'lrjax/kernels/tiles.json']
  assert inside == {p.relative_to(ROOT).as_posix() for p in files}
  needs = [r for r in metadata.get_all('Requires-Dist') if 'extra ==' not in r]
  assert {re.split(r'\W', need)[0] for need in needs} == BASE
  assert metadata['Requires-Python'] == '>=3.11'
  extras = {'cuda', 'tpu', 'experiments', 'hub', 'dev'}
  assert set(metadata.get_all('Provides-Extra')) == extras


IMPORTS = """
import importlib, json, pkgutil, sys, time
import jax, jax.numpy
before, start = {*sys.modules}, time.process_time()
import lrjax
seconds = time.process_time() - start
new = {name.partition('.')[0] for name in {*sys.modules} - before}
others = sys.argv[1].split()
sys.modules.update(dict.fromkeys({*others} - {'rich'}))  # flax.linen needs rich
for module in pkgutil.walk_packages(lrjax.__path__, 'lrjax.'):
  importlib.import_module(module.name)
print(json.dumps([lrjax.__file__, seconds, sorted(new)]))
"""


def test_installed_alone_every_module_is_imported_at_little_cost(wheel, tmp_path):
  with zipfile.ZipFile(wheel) as file:
    file.extractall(tmp_path / 'site')
  env = os.environ | {'PYTHONPATH': str(tmp_path / 'site')}
  words = [sys.executable, '-c', IMPORTS, ' '.join(OTHERS)]
  place, seconds, new = json.loads(run(words, cwd=tmp_path, env=env))
  assert pathlib.Path(place).is_relative_to(tmp_path), 'another lrjax was imported'
  assert not OTHERS & set(new), f'import lrjax has read {OTHERS & set(new)}'
  # Of the processor, not the clock; 0.1 s where this was written.
  assert seconds < 2


@pytest.mark.parametrize('command', ['train', 'compare', 'memory', 'bench'])
def test_commands_explain_themselves(command):
  shown = run([sys.executable, '-m', f'experiments.{command}', '--help'], cwd=ROOT)
  assert len(shown.splitlines()) > 3


@pytest.fixture
def make():
  """Runs make, as if not from within make."""
  if not shutil.which('make'):
    pytest.skip('there is no make')
  env = {k: v for k, v in os.environ.items() if not k.startswith(('MAKE', 'MFLAGS'))}
  return lambda *words: subprocess.run(
    ['make', *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
  )


def test_make_names_a_python_that_is_too_old(make, tmp_path):
  old = tmp_path / 'python'
  lines = [
    f'#!{sys.executable}',
    'import sys',
    "sys.version, sys.version_info = '3.9.1 (old)', (3, 9, 1)",
    "exec(sys.argv[2] if sys.argv[1] == '-c' else 'raise SystemExit(7)')",
  ]
  old.write_text('\n'.join(lines))
  old.chmod(0o755)
  done = make('demo', f'PYTHON={old}', f'VENV={tmp_path / "venv"}')
  assert done.returncode and not (tmp_path / 'venv').exists()
  assert '3.11' in done.stderr and '3.9.1' in done.stderr and 'PYTHON=' in done.stderr


def test_make_installs_once(make, tmp_path):
  words = ('--dry-run', 'demo', 'PRESET=smoke', f'VENV={tmp_path}')
  first = make(*words).stdout
  assert 'pip install' in first and '-m venv' in first
  for name in ('bin/python', 'experiments'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  command = f'{tmp_path}/bin/python -m experiments.compare --preset smoke --overwrite'
  assert make(*words).stdout.splitlines() == [command]
