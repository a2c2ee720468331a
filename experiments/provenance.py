"""Where a result comes from: versions, machine, commit."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

PACKAGES = (
  'lrjax',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
)
# Only these: an environment may hold secrets.
VARIABLES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')


def versions() -> dict[str, str]:
  """Versions of Python and of the packages a result depends on."""
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'not installed'
  return found


def breaking_versions() -> dict[str, str]:
  """The part of each version whose change may change numbers; compared at resume."""

  def series(version: str) -> str:
    major, *rest = version.split('.')
    return f'{major}.{rest[0]}' if major == '0' and rest else major

  return {name: series(v) for name, v in versions().items() if name != 'python'}


def machine() -> dict[str, Any]:
  """Processor, cores, devices and the settings of the compiler."""
  import jax

  set_here = {k: v for k, v in os.environ.items() if k in VARIABLES or k[:4] == 'JAX_'}
  return dict(
    system=f'{platform.system()} {platform.machine()}',
    cpu=_cpu(),
    cores=len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count(),
    device_kind=jax.devices()[0].device_kind,
    device_count=jax.device_count(),
    process_count=jax.process_count(),
    environment=set_here,
  )


def commit() -> str:
  """The commit of this repository, with '+' if files differ from it; '' if unknown."""
  root = pathlib.Path(__file__).parent
  git = lambda *args: subprocess.run(
    ['git', *args], cwd=root, capture_output=True, text=True, check=True, timeout=10
  ).stdout.strip()
  try:
    return git('rev-parse', '--short=12', 'HEAD') + '+' * bool(
      git('status', '--porcelain', '--untracked-files=no')
    )
  except (OSError, subprocess.SubprocessError):
    return ''


def _cpu() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as f:
      names = [line.partition(':')[2] for line in f if line.startswith('model name')]
  except OSError:
    names = []
  return names[0].strip() if names else platform.processor() or platform.machine()
