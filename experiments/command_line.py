"""Command lines and config files to checked configs: preset < file < flags.

`--preset demo --config file.toml --optimizer.learning_rate 3e-3 --data.seq_len=256`
"""

import collections
import dataclasses
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments.configuring import Given, build, given, overlay, to_dict
from experiments.errors import ConfigError
from experiments.schema import children, expected, meanings, one_of

T = TypeVar('T')

MAX_BYTES = 2**20
SOURCE = 'command line'


@dataclasses.dataclass(frozen=True)
class Command:
  """Flags of every command; a command with more of them derives from this.

  Attributes:
    preset: the settings to start from.
    config: a .toml or .json file with settings that replace those of the preset.
  """

  preset: str = 'demo'
  config: str | None = None


def parse(
  argv: Sequence[str],
  presets: Mapping[str, tuple],
  command: type[Command] = Command,
  refine: Callable[[Mapping], Mapping] = lambda tree: {},
) -> tuple[Command, tuple]:
  """Reads a command line; `--help` prints every key and exits.

  Flags are dotted keys. They apply to every run of the preset; `--a.b 1` applies to
  the run named `a` alone, where there is one.

  Args:
    argv: arguments without the program's name.
    presets: name -> configs of one dataclass, with distinct `name` fields.
    command: the flags of the command itself, all with defaults.
    refine: marked values of one run -> `hints` for `build`.

  Returns:
    The command's own flags, and the configs of the preset with file and flags applied.

  Raises:
    ConfigError: naming source, key, value, and what is allowed.
  """
  wants_help = not {'-h', '--help'}.isdisjoint(argv)
  flags = read_flags([word for word in argv if word not in ('-h', '--help')])
  own = {name: flags.pop(name) for name in children(command) if name in flags}
  asked = build(command, own, SOURCE, {'preset': one_of(presets)})
  runs = presets[asked.preset]
  layers = [flags] if asked.config is None else [read_file(asked.config), flags]
  trees = list(_overlaid(runs, layers, f'preset {asked.preset}'))
  if wants_help:
    print(usage(asked, type(runs[0]), presets, trees[0], refine(trees[0])))
    raise SystemExit(0)
  source, known = f'preset {asked.preset}', list(children(command))
  cls = type(runs[0])
  return asked, tuple(build(cls, tree, source, refine(tree), known) for tree in trees)


def parse_flags(argv: Sequence[str], command: type[T]) -> T:
  """The flags of a command without runs; `--help` prints them and exits.

  Raises:
    ConfigError: naming key, value, and what is allowed.
  """
  if not {'-h', '--help'}.isdisjoint(argv):
    print('\n'.join(_lines(command, to_dict(command()), {})))
    raise SystemExit(0)
  return build(command, read_flags(argv), SOURCE)


def read_flags(words: Sequence[str]) -> dict[str, Any]:
  """`--a.b 1 --c=2 --yes --no-way` as nested marked values.

  Text is parsed by the type of the field later; a flag without a value is True, and
  False with `--no-` before its key.

  Raises:
    ConfigError: for words that are not flags, and flags given twice.
  """
  tree: dict[str, Any] = {}
  words = list(words)
  while words:
    word = words.pop(0)
    if not word.startswith('--') or word == '--':
      raise ConfigError(f'{SOURCE}: {word!r} is not a flag; write --key value')
    key, has_value, value = word[2:].partition('=')
    if has_value:
      item = Given(value, SOURCE, is_text=True)
    elif words and not words[0].startswith('--') and not key.startswith('no-'):
      item = Given(words.pop(0), SOURCE, is_text=True)
    else:
      item = Given(not key.startswith('no-'), f'{SOURCE} (no value)')
      key = key.removeprefix('no-')
    *sections, name = key.split('.')
    inner = tree
    for section in sections:
      inner = inner.setdefault(section, {})
      if isinstance(inner, Given):
        raise ConfigError(f'{SOURCE}: {key}: {section} was given a value before')
    if name in inner:
      raise ConfigError(f'{SOURCE}: {key} = {item.value!r}: given twice')
    inner[name] = item
  return tree


def read_file(path: str | Path) -> dict[str, Any]:
  """A TOML or JSON file, at most 1 MiB, as nested marked values.

  Raises:
    ConfigError: naming the file, and the line where the parser knows it.
  """
  try:
    with open(path, 'rb') as file:
      content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
      raise ValueError('larger than 1 MiB')
    if content.startswith(b'\xef\xbb\xbf'):
      raise ValueError('begins with a byte order mark; save it as plain UTF-8')
    mapping = _parser(Path(path).suffix)(content.decode('utf-8'))
    if not isinstance(mapping, dict) or not mapping:
      raise ValueError('holds no settings')
    return given(mapping, str(path))
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror or error}') from error
  except RecursionError:
    raise ConfigError(f'{path}: brackets are nested too deeply') from None
  except ValueError as error:
    raise ConfigError(f'{path}: {error}') from error


def usage(asked, cls, presets, tree, hints) -> str:
  """Presets and every key with its type, value and meaning."""
  lines = [
    'Flags are --key value or --key=value; true or false may be left out: --key,',
    f'--no-key. Presets: {", ".join(presets)}. Values below: {asked.preset}.',
    *_lines(type(asked), to_dict(asked), {}),
    *_lines(cls, tree, hints),
  ]
  return '\n'.join(lines)


def _overlaid(runs, layers, source) -> Iterator[dict]:
  names = {run.name for run in runs}
  for run in runs:
    tree = given(to_dict(run), source)
    for layer in layers:
      own = {key: layer[key] for key in names & {*layer} if type(layer[key]) is dict}
      common = {key: item for key, item in layer.items() if key not in own}
      tree = overlay(type(run), tree, common)
      tree = overlay(type(run), tree, own.get(run.name, {}))
    yield tree


def _parser(suffix):
  parsers = {'.toml': tomllib.loads, '.json': _parse_json}
  if suffix not in parsers:
    raise ValueError(f'a config file ends in .toml or .json, not in {suffix!r}')
  return parsers[suffix]


def _parse_json(text):
  def unique(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    for key, count in counts.items():
      if count > 1:
        raise ValueError(f'key {key[:80]!r} is given twice')
    return dict(pairs)

  def refuse(constant):
    raise ValueError(f'{constant} is not allowed; write a finite number')

  return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _lines(cls, tree, hints, prefix=''):
  """Help on the leaves of a section, one line each."""
  texts = meanings(cls)
  for name, hint in children(cls).items():
    hint = hints.get(prefix + name, hint)
    if children(hint) or isinstance(hint, dict):
      yield from _lines(hint, tree.get(name, {}), hints, f'{prefix}{name}.')
    else:
      value = _shown(tree[name]) if name in tree else "the method's own"
      yield f'  --{prefix}{name}: {expected(hint)} = {value}'
      if name in texts:
        yield f'      {texts[name]}'


def _shown(item):
  value = item.value if isinstance(item, Given) else item
  if isinstance(value, list):
    return ','.join(map(str, value)) or "''"
  return str(value).lower() if value is None or isinstance(value, bool) else str(value)
