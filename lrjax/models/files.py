"""Files that are either read whole and undamaged, or refused; written whole or not."""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SUMS = 'SHA256SUMS'
_TEXT_LIMIT = 16 * 2**20


def check_sums(directory: Path, names: Iterable[str]) -> None:
  """Raises ValueError for a file unlike its digest in `SHA256SUMS`, if there is one."""
  path = directory / SUMS
  if not path.exists():
    return
  sums = {}
  for line in read_text(path).splitlines():
    match = re.fullmatch(r'([0-9a-f]{64})  (.+)', line)
    if not match:
      raise ValueError(f'{path}: expected lines of "sha256  file name", got {line!r}')
    sums[match[2]] = match[1]
  for name in names:
    if sums.get(name) != sha256(directory / name):
      raise ValueError(
        f'{directory / name} does not match {SUMS}: it was damaged or replaced; remove '
        f'{SUMS} if it was replaced on purpose'
      )


def read_text(path: Path) -> str:
  """The text of a file of bounded size; ValueError if it is not UTF-8."""
  if path.stat().st_size > _TEXT_LIMIT:
    raise ValueError(f'{path} is larger than {_TEXT_LIMIT} bytes')
  try:
    return path.read_text('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8: {error}') from error


def read_json(path: Path) -> dict[str, Any]:
  """The JSON object in a file; ValueError if there is none."""
  try:
    values = json.loads(read_text(path))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  if not isinstance(values, dict):
    raise ValueError(f'{path} must hold a JSON object, got {type(values).__name__}')
  return values


def sha256(path: Path) -> str:
  """The digest of a file, in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A fresh file name that takes the place of `path` when the block succeeds."""
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
  temporary.touch(exist_ok=False)
  mode = temporary.stat().st_mode
  try:
    yield temporary
    # safetensors makes files of mode 0600; what the umask says holds for all.
    temporary.chmod(mode)
    with open(temporary, 'rb') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
