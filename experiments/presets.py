"""The experiments that commands start from: single runs, comparisons, their sweeps."""

from dataclasses import replace

from experiments.config import Checkpoint, Experiment, Kernel, Optimizer, Sweep
from experiments.data.config import DataConfig
from lrjax.models.llama_config import LLAMA_SIZES


def compare(base: Experiment, **optimizers: Optimizer) -> tuple[Experiment, ...]:
  """Runs on the same batches that differ in name and optimizer alone."""
  return tuple(replace(base, name=n, optimizer=o) for n, o in optimizers.items())


def _galore(learning_rate, rank, update_proj_gap, clip=1.0) -> Optimizer:
  options = {'rank': rank, 'update_proj_gap': update_proj_gap, 'scale': 0.25}
  return Optimizer('galore', learning_rate, clip=clip, options=options)


def _local(name, size, steps, optimizer, **data) -> Experiment:
  """A run of a few minutes at most on two CPU cores, on text that is always there."""
  return Experiment(
    name=name,
    steps=steps,
    # On a CPU recomputing a layer is cheaper than fetching its activations: 15 % a step.
    model=replace(LLAMA_SIZES[size], remat=True),
    data=DataConfig(valid_windows=64, **data),
    optimizer=optimizer,
    checkpoint=Checkpoint(every=steps // 4),
    eval_every=max(steps // 12, 20),
  )


def _paper(
  size, steps, rank, learning_rate=0.01, update_proj_gap=200, clip=0.0
) -> Experiment:
  """A pre-training run of the GaLore paper (arXiv 2403.03507, tables 2, 3 and 5).

  It streams C4 from the hub, and expects the tokenizer of T5-base at
  `t5-base/tokenizer.json`; `--data.tokenizer` gives another place.
  """
  return Experiment(
    name=f'galore_{size}',
    steps=steps,
    model=replace(LLAMA_SIZES[size], dtype='bfloat16', param_dtype='bfloat16'),
    data=DataConfig(
      source='hub',
      hub_name='allenai/c4',
      hub_config='en',
      hub_valid_split='validation',
      # A document of C4 has over 400 of these tokens on average: none comes twice.
      hub_documents=steps * 512 * 256 // 400,
      tokenizer='t5-base/tokenizer.json',
      seq_len=256,
      batch_size=512,
    ),
    optimizer=_galore(learning_rate, rank, update_proj_gap, clip),
    checkpoint=Checkpoint(every=1000, keep_every=10_000),
    eval_every=1000,
  )


# Learning rates of the demo: the best of a small grid for each method.
_DEMO = _local('demo', 'tiny', 400, _galore(2e-2, 32, 50), seq_len=128, batch_size=16)
_SMOKE = _local('smoke', 'smoke', 60, _galore(2e-2, 16, 20), seq_len=64, batch_size=8)

PRESETS = {
  run.name: run
  for run in (
    _DEMO,
    _SMOKE,
    _paper('60m', 10_000, rank=128),
    _paper('130m', 20_000, rank=256),
    _paper('350m', 60_000, rank=256),
    _paper('1b', 100_000, rank=512),
    _paper('7b', 150_000, 1024, learning_rate=5e-3, update_proj_gap=500, clip=1.0),
  )
}

# GaLore's embedding and head learn faster than its matrices, by its `scale`. The second
# AdamW has two rates as well, so that what rank costs is not mistaken for what they give;
# of 0.05, 0.1 and 0.25 for the matrices 0.1 ended lowest after 300 steps of the demo.
_ADAMW = {
  'adamw': Optimizer('adamw', 1e-3),
  'adamw_two_rates': Optimizer('adamw', 2e-2, options={'matrix_scale': 0.1}),
}
COMPARISONS = {
  run.name: compare(run, **_ADAMW, galore=run.optimizer) for run in (_DEMO, _SMOKE)
}

# All methods at equal tokens: rank a quarter of the width, seven refreshes.
_STUDY = replace(
  _local('optimizers', 'tiny', 200, _galore(2e-2, 32, 30), seq_len=128, batch_size=8),
  checkpoint=Checkpoint(every=200, keep=1),
  diagnostics_every=20,
)


def _studied(name, **options) -> Optimizer:
  return Optimizer(name, 2e-2, options=options)


_LOW_RANK = {'rank': 32, 'update_proj_gap': 30}
# Learning rates are the centres of sweeps. Embedding and head get the same in each but the
# first; what slows the matrices, `scale` or `matrix_scale`, brings their updates to about
# a tenth of that, the best of AdamW, or for orthonormal updates to what is usual.
_STUDIED = {
  **_ADAMW,
  'galore': _STUDY.optimizer,
  'galore_8bit': _studied('galore_8bit', **_LOW_RANK),
  'q_galore': _studied('q_galore', **_LOW_RANK),
  'q_galore_int8': replace(_studied('q_galore', **_LOW_RANK), weights='int8'),
  'golore': _studied('golore', random_after=100.0, **_LOW_RANK),
  'online_subspace_descent': _studied('online_subspace_descent', **_LOW_RANK),
  'subtrack': _studied('subtrack', **_LOW_RANK),
  'flora': _studied('flora', **_LOW_RANK),
  'fira': _studied('fira', **_LOW_RANK),
  'apollo': _studied('apollo', scale=0.25, **_LOW_RANK),
  'apollo_mini': _studied('apollo_mini', matrix_scale=0.1, update_proj_gap=30),
  'frugal': _studied('frugal', density=0.25, update_proj_gap=30, scale=0.1),
  'owlore': _studied('owlore', n_active=2, period=15, scale=0.25, **_LOW_RANK),
  'ldadam': _studied('ldadam', rank=32, matrix_scale=0.1),
  'dct_adamw': _studied('dct_adamw', rank=32, matrix_scale=0.1),
  'trion': _studied('trion', rank=32),
  'dion': _studied('dion', rank=32),
  'dion2': _studied('dion2'),
}
COMPARISONS['optimizers'] = compare(_STUDY, **_STUDIED)

# All parameterizations at equal tokens and, but for the first and what has to be dense
# while it trains, with about as many trained numbers as factors of a quarter of the width:
# 0.38 million, next to 0.87 million in the first. AdamW with two rates, as above.
_KERNELS = replace(
  _local('parameterizations', 'tiny', 200, _ADAMW['adamw_two_rates'], seq_len=128),
  checkpoint=Checkpoint(every=200, keep=1),
)
_NARROW = replace(_KERNELS.model, hidden_size=80, intermediate_size=240)


def _stored(name, model=_KERNELS.model, warm_steps=0, optimizer=None, **options):
  """A run with kernels of one kind; warm steps are taken from its steps."""
  return replace(
    _KERNELS,
    model=model,
    kernel=Kernel(name, options),
    warm_steps=warm_steps,
    steps=_KERNELS.steps - warm_steps,
    optimizer=replace(_KERNELS.optimizer, **optimizer or {}),
  )


_RESTARTS = {'restart_every': 50, 'restart_warmup': 5}
_STORED = {
  'dense': _stored('dense'),
  'dense_narrow': _stored('dense', _NARROW),
  'factorized': _stored('factorized', rank=32),
  'factorized_xavier': _stored('factorized', rank=32, init='xavier'),
  'restarts': _stored('factorized', rank=32, restart_every=50, optimizer=_RESTARTS),
  'self_guided': _stored('self_guided', rank=32, guide_steps=100),
  'relora': _stored(
    'relora', rank=32, merge_every=50, warm_steps=50, optimizer=_RESTARTS
  ),
  'switchlora': _stored(
    'switchlora', rank=32, total_steps=200, optimizer={'name': 'vector_adam'}
  ),
  'sltrain': _stored('sltrain', rank=30),
  'lost': _stored('lost', rank=30, channel_ratio=0.03),
  'cola': _stored('cola', rank=32),
  'cr_net': _stored('factorized', replace(_KERNELS.model, cross_layer=True), rank=16),
  'sst': _stored('sst', rank=32, resample_every=50, optimizer=_RESTARTS),
  'monarch': _stored('monarch', nblocks=4),
  'dsformer': _stored('dsformer', atoms=32, nnz=12, width=64, mode='factor'),
  'dsformer_latent': _stored('dsformer', atoms=32, nnz=12, width=64, refresh_every=10),
  'maestro': _stored('maestro', rank=32, shrink_every=50),
  'trp': _stored('trp', every=20),
  'householder': _stored('householder', rank=32, train_sigma=True),
  'snnk': _stored('snnk', features=58),
}
COMPARISONS['parameterizations'] = tuple(
  replace(run, name=name) for name, run in _STORED.items()
)
SWEEPS = dict.fromkeys(
  ('optimizers', 'parameterizations'),
  Sweep(factors=(1 / 3, 1.0, 3.0), seeds=2, extensions=2),
)
