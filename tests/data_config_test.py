"""Every field of a data config is checked when it is made."""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments.data import DataConfig


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'source': 'stdlb'}, "source='stdlb' is not one of .* did you mean 'stdlib'"),
    ({'format': 'jsonlines'}, "format='jsonlines' .* did you mean 'jsonl'"),
    ({'seq_len': 0}, 'seq_len=0 must be at least 1'),
    ({'batch_size': -3}, 'batch_size=-3 must be at least 1'),
    ({'valid_windows': 0}, 'valid_windows=0 must be at least 1'),
    ({'synthetic_seed': -1}, 'synthetic_seed=-1 must be at least 0'),
    ({'valid_fraction': 0.0}, 'valid_fraction=0.0 is not between 0 and 1'),
    ({'valid_fraction': 1}, 'valid_fraction=1 is not between'),
    ({'valid_fraction': float('nan')}, 'valid_fraction=nan is not between'),
    ({'source': 'files'}, "source='files' needs paths"),
    ({'source': 'hub'}, "source='hub' needs hub_name"),
    (
      {'source': 'hub', 'hub_name': 'json', 'valid_paths': ('x',)},
      "valid_paths with source='hub' needs hub_valid_split",
    ),
    ({'paths': ('x.txt',)}, "paths is read by source='files'"),
    ({'hub_name': 'allenai/c4'}, "hub_name is read by source='hub'"),
  ],
)
def test_values(fields, message):
  with pytest.raises(ValueError, match=message):
    DataConfig(**fields)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'seq_len': True}, 'seq_len=True must be int, got bool'),
    ({'seq_len': 128.0}, r'seq_len=128\.0 must be int, got float'),
    ({'batch_size': '16'}, "batch_size='16' must be int, got str"),
    ({'valid_fraction': '0.1'}, "valid_fraction='0.1' must be float, got str"),
    ({'tokenizer': None}, 'tokenizer=None must be str'),
    ({'source': 'files', 'paths': 'a.txt'}, "paths='a.txt' must be a tuple of str"),
    ({'source': 'files', 'paths': (1,)}, r'paths=\(1,\) must be a tuple of str'),
  ],
)
def test_types(fields, message):
  with pytest.raises(TypeError, match=message):
    DataConfig(**fields)


def test_json_round_trip():
  config = DataConfig(source='files', paths=('a', 'b'), valid_windows=3)
  assert DataConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_import_is_light():
  code = (
    'import sys, experiments.data; '
    "heavy = {'pyarrow', 'datasets', 'tokenizers', 'array_record', 'grain', 'jax'}; "
    'sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
