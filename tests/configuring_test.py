"""The strict builder, config files and flags, on small stand-in dataclasses."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

import pytest

from experiments.command_line import Command, parse, read_file, read_flags
from experiments.configuring import build, from_dict, given, overlay, to_dict
from experiments.errors import ConfigError
from experiments.schema import Scalar, closest, walk


@dataclasses.dataclass(frozen=True)
class Method:
  """A method.

  Attributes:
    name: what it is called.
    rate: how fast it learns. Not too fast.
  """

  name: str = 'sgd'
  rate: float = 0.1
  schedule: Literal['cosine', 'linear'] = 'cosine'
  betas: tuple[float, float] = (0.9, 0.99)
  options: Mapping[str, Scalar] = dataclasses.field(
    default_factory=dict, metadata={'follows': 'name'}
  )

  def __post_init__(self):
    if self.rate <= 0:
      raise ValueError(f'rate must be above 0, got {self.rate}')


@dataclasses.dataclass(frozen=True)
class Run:
  name: str
  steps: int
  method: Method = Method()
  paths: tuple[str, ...] = ()
  keep: int | None = None
  label: str | None = None
  fast: bool = False

  def __post_init__(self):
    if self.keep is not None and self.keep > self.steps:
      raise ValueError(f'keep={self.keep} must be at most steps={self.steps}')
    if self.method.rate > self.steps:
      raise TypeError(f'method.rate={self.method.rate} exceeds steps')


BASE = {'name': 'a', 'steps': 3}
TEXT_BASE = {'name': 'a', 'steps': '3'}
PRESETS = {
  'one': (Run('one', 10, Method('adam', options={'b1': 0.5})),),
  'two': (Run('left', 10), Run('right', 20)),
}


def fault(mapping, **kwargs):
  with pytest.raises(ConfigError) as caught:
    build(Run, mapping, 'a.toml', **kwargs)
  assert str(caught.value).startswith('a.toml: ')
  return str(caught.value)


@pytest.mark.parametrize(
  ('change', 'parts'),
  [
    ({'steps': True}, ('steps = True', 'expected int', 'got bool')),
    ({'steps': 3.0}, ('steps = 3.0', 'expected int', 'got float')),
    ({'steps': '3'}, ("steps = '3'", 'without quotes')),
    ({'steps': None}, ('steps', 'expected int')),
    ({'fast': 1}, ('fast = 1', 'expected bool')),
    ({'label': 5}, ('label = 5', 'expected str')),
    ({'method': {'rate': '1e-3'}}, ("method.rate = '1e-3'", 'without quotes')),
    ({'method': {'rate': True}}, ('method.rate = True', 'expected float')),
    ({'method': {'rate': float('nan')}}, ('method.rate', 'finite')),
    ({'method': {'rate': float('inf')}}, ('method.rate', 'finite')),
    ({'method': {'rate': 10**400}}, ('method.rate', 'finite')),
    ({'steps': {'a': 1}}, ('steps', 'got a section')),
    ({'method': 3}, ('method = 3', 'section with the keys name, rate')),
    ({'method': {'options': {'a': [1]}}}, ('method.options.a = [1]', 'expected')),
    ({'method': {'options': {'a': float('nan')}}}, ('method.options.a', 'expected')),
    ({'method': {'betas': [1.0]}}, ('method.betas', 'expected 2 values')),
    ({'method': {'betas': [1.0, 'x']}}, ('method.betas', 'expected float')),
    ({'paths': 'abc'}, ("paths = 'abc'", 'list of str')),
    ({'method': {'schedule': 'cosin'}}, ('cosine, linear', 'did you mean cosine?')),
    ({'stps': 4}, ('stps = 4', 'unknown key', 'did you mean steps?')),
    ({'rate': 4}, ('rate = 4', 'did you mean method.rate?')),
    ({'method': {'xyz': 4}}, ('method.xyz', 'known here: name, rate')),
    ({'a\nforged': 4}, (r"'a\nforged'",)),
    ({'label': 'x' * 10**6, 'steps': 'y' * 10**6}, ('expected int',)),
    ({'steps': 1 << 20000, 'fast': 1 << 20000}, ('a huge int',)),
    ({'method': {'rate': -1}}, ('method.rate = -1', 'above 0')),
    ({'keep': 4}, ('keep = 4', 'at most steps=3')),
    ({'method': {'rate': 5}}, ('method.rate = 5', 'exceeds steps')),
  ],
)
def test_faults_name_key_value_and_what_is_allowed(change, parts):
  message = fault({**BASE, **change})
  assert all(part in message for part in parts), message
  assert len(message) < 400 and message.isprintable()


def test_missing_field_is_named():
  assert 'steps is missing' in fault({'name': 'a'})


def test_int_is_accepted_for_float_and_lists_become_tuples():
  run = build(Run, {**BASE, 'method': {'rate': 1, 'betas': [0, 1]}, 'paths': ['x']})
  assert type(run.method.rate) is float and run.method.betas == (0.0, 1.0)
  assert run.paths == ('x',)


def test_dict_round_trip_is_exact_through_json():
  method = Method('x', 1 / 3, 'linear', options={'rank': 4, 'side': 'a', 'on': True})
  run = Run('a', 3, method, paths=('p', 'q'), keep=2)
  assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run


def test_text_is_parsed_by_the_type_of_the_field():
  options = {'a': '3', 'b': '1e-3', 'c': 'svd', 'd': 'true', 'e': 'none'}
  method = {'rate': '3', 'betas': '.1,.2', 'options': options}
  text = {**BASE, 'steps': '1_000', 'method': method, 'label': '010', 'keep': 'none'}
  run = build(Run, given(text, 'command line', is_text=True))
  assert run.steps == 1000 and run.label == '010' and run.keep is None
  assert run.method.betas == (0.1, 0.2) and run.method.rate == 3.0
  expected = {'a': 3, 'b': 1e-3, 'c': 'svd', 'd': True, 'e': None}
  assert run.method.options == expected
  assert [type(v) for v in run.method.options.values()] == list(
    map(type, expected.values())
  )


@pytest.mark.parametrize('text', ['1e3', '010', '12:30', ' 3', '0x10', '٣', '', 'on'])
def test_text_that_is_no_decimal_int_is_refused(text):
  with pytest.raises(ConfigError, match=r'steps.*expected int'):
    build(Run, given({**TEXT_BASE, 'steps': text}, 'command line', is_text=True))


@pytest.mark.parametrize('text', ['nan', '.nan', 'inf', '-Infinity', '1e999', '1,5'])
def test_text_that_is_no_finite_float_is_refused(text):
  layer = {**TEXT_BASE, 'method': {'rate': text}}
  with pytest.raises(ConfigError, match=r'method\.rate.*expected'):
    build(Run, given(layer, 'command line', is_text=True))


@pytest.mark.parametrize('text', ['on', 'no', 'True', '1', ''])
def test_text_that_is_no_bool_is_refused(text):
  with pytest.raises(ConfigError, match=r'fast.*expected bool'):
    build(Run, given({**TEXT_BASE, 'fast': text}, 'command line', is_text=True))


def test_hints_replace_annotations():
  hints = {'method.options': {'rank': int}, 'method.name': Literal['sgd', 'adam']}
  assert 'method.options.rank?' in fault(
    {**BASE, 'method': {'options': {'rnk': 3}}}, hints=hints
  )
  assert 'expected int' in fault(
    {**BASE, 'method': {'options': {'rank': 'svd'}}}, hints=hints
  )
  assert 'sgd, adam' in fault({**BASE, 'method': {'name': 'os.system'}}, hints=hints)
  assert 'method.options.rank' in dict(walk(Run, hints))


def test_overlay_keeps_the_source_of_each_value():
  low = given({**BASE, 'method': {'rate': 1, 'name': 'a', 'options': {'x': 1}}}, 'low')
  high = given({'method': {'rate': -2}}, 'high')
  with pytest.raises(ConfigError, match=r'^high: method.rate = -2'):
    build(Run, overlay(Run, low, high))
  kept = overlay(Run, low, given({'method': {'name': 'a'}}, 'high'))
  assert build(Run, kept).method.options == {'x': 1}
  dropped = overlay(Run, low, given({'method': {'name': 'b'}}, 'high'))
  assert build(Run, dropped).method.options == {}


def test_closest_prefers_the_last_part():
  known = ['method', 'method.name', 'method.rate', 'method.options.rank']
  assert closest('method.rank', known) == 'method.options.rank'
  assert closest('rte', known) == 'method.rate'
  assert closest('zzz', known) is None


# Files.


def test_toml_and_json_files_give_the_same(tmp_path):
  (tmp_path / 'a.toml').write_text('steps = 1_000\n[method]\nrate = 1e-3\n')
  (tmp_path / 'a.json').write_text('{"steps": 1000, "method": {"rate": 1e-3}}')
  toml, js = read_file(tmp_path / 'a.toml'), read_file(tmp_path / 'a.json')
  assert toml['steps'].value == js['steps'].value == 1000
  assert toml['method']['rate'].value == js['method']['rate'].value == 0.001
  assert js['steps'].source.endswith('a.json')


@pytest.mark.parametrize(
  ('name', 'content', 'part'),
  [
    ('a.toml', b'steps = 1\nsteps = 2\n', 'line 2'),
    ('a.toml', b'a = 1\nb = = 2', 'line 2'),
    ('a.toml', b'steps = 010', 'line 1'),
    ('a.toml', b'a = ' + b'[' * 5000, 'nested'),
    ('a.toml', b'', 'no settings'),
    ('a.toml', b'# nothing\n', 'no settings'),
    ('a.toml', b'\xef\xbb\xbfsteps = 1', 'byte order mark'),
    ('a.toml', b'steps = "\xff"', 'utf-8'),
    ('a.toml', b'#' * (2**20 + 1), '1 MiB'),
    ('a.json', b'', 'line 1'),
    ('a.json', b'{}', 'no settings'),
    ('a.json', b'[1]', 'no settings'),
    ('a.json', b'{"a": 1, "a": 2}', "'a' is given twice"),
    ('a.json', b'{"a": {"b": 1, "b": 1}}', "'b' is given twice"),
    ('a.json', b'{"a": NaN}', 'NaN is not allowed'),
    ('a.json', b'{"a": -Infinity}', '-Infinity is not allowed'),
    ('a.json', b'{"a":' * 5000, 'nested'),
    ('a.json', b'[' * 100_000, 'nested'),
    ('a.json', b'{"a": ' + b'1' * 5000 + b'}', 'digits'),
    ('a.json', b'{"a": 1,\n\t}', 'line 2'),
    ('a.yaml', b'a: 1', '.toml or .json'),
  ],
)
def test_file_faults_name_the_file(tmp_path, name, content, part):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError) as caught:
    read_file(tmp_path / name)
  assert str(caught.value).startswith(f'{tmp_path / name}: ')
  assert part in str(caught.value)


@pytest.mark.parametrize('name', ['missing.toml', ''])
def test_unreadable_file_is_a_config_error(tmp_path, name):
  with pytest.raises(ConfigError, match=str(tmp_path)):
    read_file(tmp_path / name)


@pytest.mark.parametrize('text', ['rate = nan', 'rate = inf', 'rate = -inf'])
def test_toml_nan_and_inf_are_refused(tmp_path, text):
  (tmp_path / 'a.toml').write_text(f'[method]\n{text}')
  with pytest.raises(ConfigError, match=r'a\.toml: method\.rate.*finite'):
    parse(['--preset', 'one', '--config', str(tmp_path / 'a.toml')], PRESETS)


@pytest.mark.parametrize('suffix', ['toml', 'json'])
def test_damaged_files_give_a_config_error_or_a_config(tmp_path, suffix):
  texts = {
    'toml': b'steps = 12\nlabel = "hello"\n[method]\nrate = 1e-3\nbetas = [0.1, 1]\n',
    'json': b'{"steps": 12, "label": "hello", "method": {"rate": 1e-3}}',
  }
  whole, path = texts[suffix], tmp_path / f'a.{suffix}'
  flips = [(i, bit) for i in range(len(whole)) for bit in range(8)]
  variants = [whole[:i] for i in range(len(whole))]
  for i, bit in flips:
    variants.append(whole[:i] + bytes([whole[i] ^ (1 << bit)]) + whole[i + 1 :])
  for content in variants:
    path.write_bytes(content)
    try:
      parse(['--preset', 'one', f'--config={path}'], PRESETS)
    except ConfigError as error:
      assert str(path) in str(error) or 'preset one' in str(error)


# Flags.


def test_flags_in_their_forms():
  tree = read_flags(['--a.b', '-1', '--c=x=y', '--d', '--no-e', '--f', 'true'])
  assert tree['a']['b'][::2] == ('-1', True) and tree['c'].value == 'x=y'
  assert tree['d'].value is True and tree['e'].value is False
  assert tree['f'][::2] == ('true', True)


@pytest.mark.parametrize(
  ('argv', 'part'),
  [
    (['steps', '3'], "'steps' is not a flag"),
    (['-s', '3'], "'-s' is not a flag"),
    (['--'], 'not a flag'),
    (['--steps', '3', '--steps', '3'], 'steps.*given twice'),
    (['--fast', '--no-fast'], 'fast.*given twice'),
    (['--steps', '3', '--steps.a', '3'], 'steps was given a value before'),
    (['--steps'], 'no value.*expected int'),
    (['--label', '--steps', '3'], 'no value.*expected str'),
    (['--no-steps'], 'no value.*expected int'),
    (['--preset', 'on'], 'did you mean one?'),
    (['--preset', 'one', '--method.rat', '3'], 'did you mean method.rate?'),
    (['--runz', 'x'], 'did you mean runs?'),
    (['--a..b', '3'], 'unknown key'),
    (['--=3'], 'unknown key'),
  ],
)
def test_flag_faults(argv, part):
  with pytest.raises(ConfigError, match=part) as caught:
    parse(argv, PRESETS, Flags)
  assert str(caught.value).startswith('command line')


@dataclasses.dataclass(frozen=True)
class Flags(Command):
  """Flags.

  Attributes:
    runs: where results go.
  """

  preset: str = 'one'
  runs: str = 'runs'
  resume: bool = False


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
  file = tmp_path / 'a.toml'
  file.write_text('steps = 5\nlabel = "file"\n')
  argv = ['--config', str(file), '--steps=7', '--resume', '--runs', 'x']
  flags, (run,) = parse(argv, PRESETS, Flags)
  assert run == Run('one', 7, Method('adam', options={'b1': 0.5}), label='file')
  assert flags == Flags('one', str(file), 'x', True)


def test_keys_apply_to_all_runs_or_to_the_one_named():
  argv = ['--preset=two', '--keep', '1', '--right.keep', '2', '--right.method.rate=3']
  _, (left, right) = parse(argv, PRESETS)
  assert (left.keep, right.keep) == (1, 2)
  assert (left.method.rate, right.method.rate) == (0.1, 3.0)
  with pytest.raises(ConfigError, match='right = '):
    parse(['--preset=two', '--right', '3'], PRESETS)


def test_help_prints_every_key_with_type_value_and_meaning(capsys):
  with pytest.raises(SystemExit) as caught:
    parse(['--help'], PRESETS, Flags)
  printed = capsys.readouterr().out
  assert caught.value.code == 0 and 'one, two' in printed
  assert '--method.rate: float = 0.1\n      how fast it learns\n' in printed
  assert '--runs: str = runs\n      where results go\n' in printed
  assert '--config: str or none = none\n' in printed
  for key, hint in walk(Run):
    assert f'--{key}: ' in printed or dataclasses.is_dataclass(hint)


def test_nothing_a_user_writes_is_run(tmp_path):
  marker = tmp_path / 'marker'
  attack = f'__import__("os").system("touch {marker}")'
  for text in ('os.system', 'builtins.eval', 'lrjax.x.__globals__', attack, '$(id)'):
    run = build(Run, {**BASE, 'label': text, 'method': {'name': text}})
    assert run.label == run.method.name == text
  assert not marker.exists()
