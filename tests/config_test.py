"""The presets, and the command line of experiments."""

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax.numpy as jnp
import pytest

import lrjax
from experiments import optimizers
from experiments.arguments import option_types, parse_args
from experiments.config import Checkpoint, Experiment, Mesh, Optimizer
from experiments.configuring import from_dict, to_dict
from experiments.errors import ConfigError
from experiments.presets import COMPARISONS, PRESETS
from tests import runner


def adamw(
  learning_rate: float,
  b1: float = 0.9,
  weight_decay: float = 0.0,
  matrix_scale: float = 1.0,
): ...


def galore(
  learning_rate: float,
  rank: int | float = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  side: Literal['short', 'long'] = 'short',
  mu_dtype: str | None = None,
  mask: Callable | None = None,
  seed=0,
): ...


METHODS = {'adamw': adamw, 'galore': galore}
RUNS = [*PRESETS.values(), *sum(COMPARISONS.values(), ())]


def parse_one(*argv):
  _, (run,) = parse_args(argv, METHODS)
  return run


@pytest.mark.parametrize('run', RUNS, ids=lambda run: run.name)
def test_presets_survive_json_and_fit_their_methods(run):
  assert from_dict(Experiment, json.loads(json.dumps(to_dict(run)))) == run
  known = option_types(optimizers.METHODS[run.optimizer.name])
  assert set(run.optimizer.options) <= set(known)


def test_presets_are_the_runs_of_the_paper():
  sizes = {name[7:]: run for name, run in PRESETS.items() if 'galore' in name}
  settings = {
    size: (run.steps, *run.optimizer.options.values(), run.optimizer.learning_rate)
    for size, run in sizes.items()
  }
  assert settings == {
    '60m': (10_000, 128, 200, 0.25, 0.01),
    '130m': (20_000, 256, 200, 0.25, 0.01),
    '350m': (60_000, 256, 200, 0.25, 0.01),
    '1b': (100_000, 512, 200, 0.25, 0.01),
    '7b': (150_000, 1024, 500, 0.25, 0.005),
  }
  for run in sizes.values():
    assert (run.data.seq_len, run.data.batch_size) == (256, 512)
    assert run.warmup == run.steps // 10 and run.optimizer.final_fraction == 0.1
    assert run.model.dtype == run.model.param_dtype == 'bfloat16'
    assert run.optimizer.clip == (run.name == 'galore_7b')


def test_compared_runs_differ_in_the_method_alone():
  for name, runs in COMPARISONS.items():
    assert len({run.name for run in runs}) == len(runs)
    assert not {run.name for run in runs} & {
      f.name for f in dataclasses.fields(runs[0])
    }
    same = [dataclasses.replace(r, name='x', optimizer=runs[0].optimizer) for r in runs]
    if name == 'parameterizations':
      assert {r.steps + r.warm_steps for r in runs} == {200}
      varied = {
        f: getattr(runs[0], f) for f in ('model', 'kernel', 'steps', 'warm_steps')
      }
      same = [dataclasses.replace(r, **varied) for r in same]
    assert same[1:] == same[:-1]


def test_options_follow_the_method():
  assert parse_one().optimizer.options['rank'] == 32
  assert parse_one('--optimizer.name', 'adamw').optimizer.options == {}
  run = parse_one('--optimizer.options.rank=0.25', '--optimizer.options.scale=1')
  assert run.optimizer.options == {'rank': 0.25, 'update_proj_gap': 50, 'scale': 1.0}
  assert type(run.optimizer.options['scale']) is float


@pytest.mark.parametrize(
  ('argv', 'part'),
  [
    ('--optimizer.rank 3', 'did you mean optimizer.options.rank?'),
    ('--optimizer.options.rnk 3', 'did you mean optimizer.options.rank?'),
    ('--optimizer.options.mask x', 'unknown key'),
    ('--optimizer.options.learning_rate 1', 'unknown key'),
    ('--optimizer.options.rank x', 'expected int or float'),
    ('--optimizer.options.side shrt', 'did you mean short?'),
    ('--optimizer.name adamw --optimizer.options.rank 3', 'known here: b1'),
    ('--optimizer.name galroe', 'did you mean galore?'),
    ('--optimizer.name os.system', 'one of adamw, galore'),
    ('--optimizer.schedule builtins.eval', 'one of cosine, linear, constant'),
    ('--optimizer.learning_rate -1', 'above 0'),
    ('--optimizer.learning_rate nan', 'finite'),
    ('--optimizer.warmup 701', 'at most steps=400'),
    ('--optimizer.final_fraction 2', 'between 0 and 1'),
    ('--optimizer.clip -1', '0 (off) or above'),
    ('--optimizer.weight_decay -1', 'at least 0'),
    ('--steps 0', 'at least 1'),
    ('--seed -1', 'from 0'),
    ('--mesh.fsdp 0', 'at least 1'),
    ('--mesh.data 3', 'multiple of mesh.data * mesh.fsdp = 3'),
    ('--checkpoint.keep 0', 'at least 1'),
    ('--checkpoint.keep_every 0', 'none or at least 1'),
    ('--data.seq_len 4096', 'model.max_seq_len=1024'),
    ('--data.source lrjax.x.__globals__', 'stdlib'),
    ('--data.seqlen 4', 'did you mean data.seq_len?'),
    ('--model.num_heads 5', 'must divide'),
    ('--preset galore_6m', 'did you mean galore_60m?'),
  ],
)
def test_faults_name_the_key(argv, part):
  with pytest.raises(ConfigError) as caught:
    parse_one(*argv.split())
  assert part in str(caught.value)
  assert argv.split()[-2][2:] in str(caught.value) or 'preset demo' in str(caught.value)


@pytest.mark.parametrize(
  'name', ['../x', '..', '.', 'a/b', '/a', 'a\0', 'a' * 129, '-rf', ' a', 'a\n', '']
)
def test_names_that_could_leave_the_directory_are_refused(name):
  with pytest.raises(ConfigError, match=re.escape('name must be 1 to 128')):
    parse_one('--name=' + name)


def test_one_run_of_a_comparison_can_be_changed_alone():
  argv = ['--galore.optimizer.options.rank', '8', '--steps', '10']
  _, (first, _, second) = parse_args(argv, METHODS, COMPARISONS)
  assert (first.name, first.optimizer.options, first.steps) == ('adamw', {}, 10)
  assert second.optimizer.options['rank'] == 8 and second.warmup == 1


def test_a_saved_config_repeats_its_run(tmp_path):
  run = dataclasses.replace(
    PRESETS['smoke'], mesh=Mesh(fsdp=2), checkpoint=Checkpoint(5, keep_every=10)
  )
  (tmp_path / 'config.json').write_text(json.dumps(to_dict(run)))
  assert parse_one('--config', str(tmp_path / 'config.json')) == run


def test_methods_that_take_any_keyword_are_not_checked():
  def anything(learning_rate, **options): ...

  assert option_types(anything) is None
  argv = ['--optimizer.name=anything', '--optimizer.options.x=1e-3']
  _, (run,) = parse_args(argv, {**METHODS, 'anything': anything})
  assert run.optimizer.options == {'x': 1e-3}


def takes_all(
  learning_rate: float,
  rank: Any = 128,
  base_optimizer: Any = None,
  weight_decay: float = 0.0,
  mask: Any = None,
  *,
  eps: float = 1e-6,
  basis: str | Callable = 'eigh',
  basis_dtype: Any = None,
  limit: float | None = 1.01,
  where: str | Callable | None = None,
  seed: int = 0,
  diagnostics: int | None = None,
):
  return dict(locals())


def test_an_adapted_optimizer_offers_what_a_config_can_say():
  method = optimizers.adapt(takes_all)
  assert option_types(method) == {
    'inner': optimizers.Inner | None,
    'b1': float,
    'b2': float,
    'state_dtype': optimizers.StateDtype,
    'rank': int | float,
    'eps': float,
    'basis': str,
    'basis_dtype': optimizers.StateDtype | None,
    'limit': float | None,
    'matrix_scale': float,
  }
  defaults = {n: p.default for n, p in inspect.signature(method).parameters.items()}
  assert (defaults['eps'], defaults['inner'], defaults['limit']) == (1e-6, None, 1.01)


def test_an_adapted_optimizer_gets_its_own_options_and_a_base():
  method = optimizers.adapt(takes_all)
  given = method(0.1, rank=3, basis='svd', limit=None, seed=7)
  assert given['base_optimizer'] is None and given['basis_dtype'] is None
  assert (given['rank'], given['basis'], given['limit'], given['seed']) == (
    3, 'svd', None, 7
  )  # fmt: skip
  given = method(0.1, inner='adam', state_dtype='bfloat16', eps=1e-3)
  state = given['base_optimizer'].init(jnp.zeros(3))
  assert state.mu.dtype == state.nu.dtype == given['basis_dtype'] == jnp.bfloat16
  assert given['eps'] == 1e-3
  with pytest.raises(ValueError, match='state_dtype needs `inner`'):
    method(0.1, state_dtype='bfloat16')


def test_galore_is_adapted_without_a_change():
  params = {'layers': {'q': {'kernel': jnp.ones((8, 16))}}, 'bias': jnp.ones(3)}
  grads = {'layers': {'q': {'kernel': jnp.eye(8, 16)}}, 'bias': jnp.arange(3.0)}
  ours = optimizers.METHODS['galore'](0.1, 0.2, rank=2, b1=0.8, basis='svd', scale=0.5)
  inner = lrjax.adam(0.8)
  same = lrjax.galore(
    0.1, 2, scale=0.5, base_optimizer=inner, weight_decay=0.2, basis='svd'
  )
  both = [tx.update(grads, tx.init(params), params) for tx in (ours, same)]
  chex.assert_trees_all_equal(*both)
  slow = optimizers.METHODS['galore'](0.1, rank=2, matrix_scale=0.25, scale=1.0)
  fast = optimizers.METHODS['galore'](0.1, rank=2, scale=0.25)
  both = [tx.update(grads, tx.init(params), params)[0] for tx in (slow, fast)]
  chex.assert_trees_all_close(*both, rtol=1e-6)


def test_seed_and_diagnostics_are_those_of_the_experiment(monkeypatch):
  monkeypatch.setitem(optimizers.METHODS, 'all', optimizers.adapt(takes_all))
  monkeypatch.setattr(optimizers.optax, 'chain', lambda *parts: parts[-1])
  run = runner.tiny(optimizer=Optimizer('all', 1e-2), seed=5, diagnostics_every=3)
  given = optimizers.make(run)
  assert (given['seed'], given['diagnostics']) == (5, 3)
  given = optimizers.make(dataclasses.replace(run, diagnostics_every=0))
  assert given['diagnostics'] is None
