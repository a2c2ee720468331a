"""Tile sizes of the kernels, from a table of candidates and of what was fastest."""

import contextlib
import contextvars
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PATH = pathlib.Path(__file__).with_name('tiles.json')
PLATFORMS = ('tpu', 'gpu')
# Names of the axes of a matrix (d, k) and of a rank r.
AXES = ('d', 'k', 'r', 't')

Tile = dict[str, int]


class Device(NamedTuple):
  """`platform` is 'tpu', 'gpu' or 'cpu'; `kind` is the vendor's name of the chip."""

  platform: str
  kind: str


class Key(NamedTuple):
  """What a tuned row is found by: `device` is a kind, `shape` a class of sizes."""

  operation: str
  device: str
  shape: str
  dtype: str


KEYS = {*Key._fields, 'tile', 'microseconds'}


class Table(NamedTuple):
  """What tiles.json holds.

  Attributes:
    candidates: operation -> platform -> tiles, the first that fits is the default.
    tuned: key -> row; the row's 'tile' was the fastest of the candidates and took
      'microseconds', of one matrix.
  """

  candidates: dict[str, dict[str, list[Tile]]]
  tuned: dict[Key, dict[str, Any]]


_only: contextvars.ContextVar[Tile | None] = contextvars.ContextVar(
  'tile', default=None
)
_lookups: contextvars.ContextVar[list[Key] | None] = contextvars.ContextVar(
  'lookups', default=None
)


@contextlib.contextmanager
def only(tile: Tile) -> Iterator[None]:
  """Lets operations run with this tile alone, where it fits; for tuning."""
  token = _only.set(tile)
  try:
    yield
  finally:
    _only.reset(token)


@contextlib.contextmanager
def lookups() -> Iterator[list[Key]]:
  """Notes what operations look up for the present device, so that tuning can add it."""
  found: list[Key] = []
  token = _lookups.set(found)
  try:
    yield found
  finally:
    _lookups.reset(token)


def present() -> Device:
  """The first device of the default backend."""
  device = jax.devices()[0]
  gpu = device.platform in ('gpu', 'cuda', 'rocm')
  return Device('gpu' if gpu else device.platform, device.device_kind)


def shape_class(sizes: Mapping[str, int]) -> str:
  """Sizes rounded up to powers of two: what shares a row of the table.

  >>> shape_class({'d': 512, 'k': 1376, 'r': 128})
  'd512 k2048 r128'
  """
  return ' '.join(f'{a}{1 << (n - 1).bit_length()}' for a, n in sizes.items())


def choose(
  operation: str,
  platform: str,
  sizes: Mapping[str, int],
  dtype: Any,
  fits: Callable[[Tile], bool],
) -> Tile | None:
  """The tile an operation runs with: the tuned one, else the first candidate that fits.

  Args:
    operation: its name in the table.
    platform: 'tpu' or 'gpu'.
    sizes: axis -> size, of one matrix.
    dtype: of the leaf.
    fits: whether the tile's working set fits on chip.

  Returns:
    axis -> tile size, or None where no tile fits.

  >>> sizes = {'d': 512, 'k': 1376, 'r': 128}
  >>> choose('project', 'tpu', sizes, jnp.float32, lambda tile: tile['k'] < 512)
  {'d': 512, 'k': 256}
  >>> choose('project', 'tpu', {'d': 5, 'k': 7, 'r': 2}, jnp.float32, lambda tile: True)
  """
  table = read()
  # A tile must not only fit on chip, but be more than half full on every axis.
  full = lambda tile: all(n < 2 * sizes[a] for a, n in tile.items())
  candidates = table.candidates.get(operation, {}).get(platform, [])
  found = [tile for tile in candidates if full(tile) and fits(tile)]
  best, here = None, present()
  if here.platform == platform:
    key = Key(operation, here.kind, shape_class(sizes), jnp.dtype(dtype).name)
    best = table.tuned.get(key, {}).get('tile')
    if (noted := _lookups.get()) is not None:
      noted.append(key)
  if (tile := _only.get()) is not None:
    return tile if tile in found else None
  # A class holds several shapes, and a tile may be too large for some of them.
  return best if best in found else next(iter(found), None)


@functools.cache
def read(path: pathlib.Path = PATH) -> Table:
  """Reads and checks a table.

  Raises:
    ValueError: naming the file and the row, where it is not a table of tiles.
  """
  try:
    return parse(json.loads(path.read_text(encoding='utf-8')))
  except (AttributeError, TypeError, ValueError) as e:
    raise ValueError(f'{path}: not a table of tiles: {e}') from e


def render(table: Table) -> str:
  """The text of a table's file, one tile a line."""
  content = dict(candidates=table.candidates, tuned=[*table.tuned.values()])
  text = json.dumps(content, indent=2)
  return re.sub(r'{[^{}]*}', lambda tile: ' '.join(tile[0].split()), text) + '\n'


def parse(content: Any) -> Table:
  """A table from what its file holds; see `read`."""
  _check_keys('the file', content, {'candidates', 'tuned'})
  candidates = content['candidates']
  for operation, platforms in candidates.items():
    _check_keys(operation, platforms, {*PLATFORMS})
    for platform, found in platforms.items():
      for tile in found:
        _check_tile(f'{operation}, {platform}', tile)
  tuned = {}
  for row in content['tuned']:
    _check_keys('a row of tuned', row, KEYS)
    key = Key(*(row[name] for name in Key._fields))
    if not all(isinstance(part, str) for part in key):
      raise ValueError(f'row {row!r}: operation, device, shape and dtype are strings')
    known = candidates.get(row['operation'], {})
    if not any(row['tile'] in found for found in known.values()):
      raise ValueError(f'row {row!r}: the tile is no candidate of the operation')
    jnp.dtype(row['dtype'])
    time = row['microseconds']
    if type(time) not in (int, float) or not 0 < time < math.inf:
      raise ValueError(f'row {row!r}: `microseconds` must be a positive number')
    if key in tuned:
      raise ValueError(f'row {row!r}: a second one for {key}')
    tuned[key] = row
  return Table(candidates, tuned)


def _check_keys(where: str, content: Any, keys: set[str]) -> None:
  if not isinstance(content, dict) or content.keys() != keys:
    raise ValueError(f'{where}: {content!r} must be an object with {sorted(keys)}')


def _check_tile(where: str, tile: Any) -> None:
  if not isinstance(tile, dict) or not tile or not tile.keys() <= {*AXES}:
    raise ValueError(f'{where}: tile {tile!r} must have axes of {AXES}')
  for n in tile.values():
    if type(n) is not int or n < 16 or n & (n - 1):
      raise ValueError(f'{where}: tile {tile!r} must have powers of two of 16 or more')
