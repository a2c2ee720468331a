"""The files that paths name, in an order that is the same every time."""

import glob
import os
import sysconfig

from experiments.data import formats

# Not the language's own text, or stripped from many installations.
_PRUNED = frozenset(
  ['site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__']
)


def find_files(paths: tuple[str, ...], format: str) -> list[tuple[str, str]]:
  """The files that paths name: in the order of the paths, those of each sorted.

  Args:
    paths: files, directories (searched through, without hidden and empty files), or
      glob patterns (`**` for any depth).
    format: other than 'auto' and 'text', only such files of a directory.

  Returns:
    Pairs of a name that does not depend on where the directory lies, and a path.

  Raises:
    FileNotFoundError: if a path names nothing.
    ValueError: if a named file is empty.
  """
  found = {}
  for given in paths:
    if os.path.isdir(given):
      matches = [
        (os.path.relpath(p, given), p)
        for p in _walk(given, {'__pycache__'})
        if _fits(p, format)
      ]
    elif os.path.isfile(given):
      if not os.path.getsize(given):
        raise ValueError(f'{given} is empty')
      matches = [(os.path.basename(given), given)]
    else:
      matches = [
        (os.path.basename(p), p)
        for p in sorted(glob.glob(given, recursive=True))
        if os.path.isfile(p) and os.path.getsize(p)
      ]
    if not matches:
      raise FileNotFoundError(
        f'{given!r} holds no {"" if format == "auto" else format + " "}file: give a '
        'file, a directory, or a pattern that matches files that are not empty'
      )
    found |= {os.path.realpath(p): (n.replace(os.sep, '/'), p) for n, p in matches}
  return list(found.values())


def _walk(root, pruned=frozenset()):
  def stop(error):
    raise error

  for directory, children, names in os.walk(root, onerror=stop):
    children[:] = sorted(
      c for c in children if c not in pruned and not c.startswith('.')
    )
    for path in (os.path.join(directory, n) for n in sorted(names) if n[0] != '.'):
      if os.path.isfile(path) and os.path.getsize(path):
        yield path


def _fits(path, format):
  return format in ('auto', 'text') or formats.format_of(path) == format


def stdlib_files() -> list[tuple[str, str]]:
  """The running Python's standard library without its tests and extensions.

  Returns:
    Pairs of a name relative to the library, and a path.

  Raises:
    FileNotFoundError: if this Python has no sources.
  """
  root = sysconfig.get_paths()['stdlib']
  files = []
  if os.path.isdir(root):
    files = [
      (os.path.relpath(path, root).replace(os.sep, '/'), path)
      for path in _walk(root, _PRUNED)
      if path.endswith('.py')
    ]
  if not files:
    raise FileNotFoundError(
      f'no Python sources under {root}: this Python has its standard library zipped or '
      "stripped. Pass source='files' with paths=..., or source='synthetic'"
    )
  return files
