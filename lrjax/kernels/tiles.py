"""Tile sizes of the kernels, from a table of candidates and of what was fastest."""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PATH = pathlib.Path(__file__).with_name('tiles.json')
PLATFORMS = ('tpu', 'gpu')
# Names of the axes of a matrix (d, k) and of a rank r.
AXES = ('d', 'k', 'r')
KEYS = {'operation', 'device', 'shape', 'dtype', 'tile', 'microseconds'}

Tile = dict[str, int]


class Device(NamedTuple):
  """`platform` is 'tpu', 'gpu' or 'cpu'; `kind` is the vendor's name of the chip."""

  platform: str
  kind: str


class Table(NamedTuple):
  """What tiles.json holds.

  Attributes:
    candidates: operation -> platform -> tiles, the first that fits is the default.
    tuned: (operation, device kind, shape class, dtype) -> row; the row's 'tile' was the
      fastest of the candidates and took 'microseconds'.
  """

  candidates: dict[str, dict[str, list[Tile]]]
  tuned: dict[tuple[str, str, str, str], dict[str, Any]]


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
  found = fitting(table, operation, platform, sizes, fits)
  here = present()
  if here.platform == platform:
    key = (operation, here.kind, shape_class(sizes), jnp.dtype(dtype).name)
    # A class holds several shapes, and a tile may be too large for some of them.
    if key in table.tuned and (best := table.tuned[key]['tile']) in found:
      return best
  return found[0] if found else None


def fitting(
  table: Table,
  operation: str,
  platform: str,
  sizes: Mapping[str, int],
  fits: Callable[[Tile], bool],
) -> list[Tile]:
  """The candidates that fit on chip and are less than half empty on every axis."""
  filled = lambda tile: all(n < 2 * sizes[a] for a, n in tile.items())
  candidates = table.candidates.get(operation, {}).get(platform, [])
  return [tile for tile in candidates if filled(tile) and fits(tile)]


@functools.cache
def read(path: pathlib.Path = PATH) -> Table:
  """Reads and checks a table.

  Raises:
    ValueError: naming the file and the row, where it is not a table of tiles.
  """
  try:
    return parse(json.loads(path.read_text(encoding='utf-8')))
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(f'{path}: not a table of tiles: {e}') from e


def render(table: Table) -> str:
  """The text of a table's file, one tile a line."""
  content = dict(candidates=table.candidates, tuned=[*table.tuned.values()])
  text = json.dumps(content, indent=2)
  return re.sub(r'{[^{}]*}', lambda tile: ' '.join(tile[0].split()), text) + '\n'


def parse(content: Any) -> Table:
  """A table from what its file holds; see `read`."""
  if not isinstance(content, dict) or content.keys() != {'candidates', 'tuned'}:
    raise ValueError("expected an object with the keys 'candidates' and 'tuned'")
  candidates = content['candidates']
  for operation, platforms in candidates.items():
    for platform, found in platforms.items():
      if platform not in PLATFORMS:
        raise ValueError(f'{operation}: platform {platform!r}; known: {PLATFORMS}')
      for tile in found:
        _check_tile(f'{operation}, {platform}', tile)
  tuned = {}
  for row in content['tuned']:
    if not isinstance(row, dict) or row.keys() != KEYS:
      raise ValueError(f'row {row!r} must have the keys {sorted(KEYS)}')
    key = (row['operation'], row['device'], row['shape'], row['dtype'])
    if not all(isinstance(part, str) for part in key):
      raise ValueError(f'row {row!r}: operation, device, shape and dtype are strings')
    if row['operation'] not in candidates:
      raise ValueError(f'row {row!r}: operation without candidates')
    jnp.dtype(row['dtype'])
    if not (isinstance(row['microseconds'], (int, float)) and row['microseconds'] > 0):
      raise ValueError(f'row {row!r}: `microseconds` must be a positive number')
    if key in tuned:
      raise ValueError(f'row {row!r}: a second one for {key}')
    _check_tile(f'row {row!r}', row['tile'])
    tuned[key] = row
  return Table(candidates, tuned)


def _check_tile(where: str, tile: Any) -> None:
  if not isinstance(tile, dict) or not tile or not tile.keys() <= {*AXES}:
    raise ValueError(f'{where}: tile {tile!r} must have axes of {AXES}')
  for n in tile.values():
    if type(n) is not int or n < 16 or n & (n - 1):
      raise ValueError(f'{where}: tile {tile!r} must have powers of two of 16 or more')
