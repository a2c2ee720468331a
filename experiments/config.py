"""What an experiment is made of; `experiments.presets` has those to start from.

A config is a frozen dataclass of JSON-able fields: it goes into checkpoints and
results, and `configuring.from_dict` brings it back.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from experiments.data.config import DataConfig
from experiments.schema import Scalar
from lrjax.models.llama_config import LlamaConfig


def _require(config, name, holds, allowed):
  value = getattr(config, name)
  if not holds(value):
    raise ValueError(f'{name} must be {allowed}, got {value!r}')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """How gradients become updates.

  Attributes:
    name: a method of `experiments.optimizers.METHODS`.
    learning_rate: its peak, reached at the end of warm-up.
    schedule: of the learning rate between warm-up and the last step.
    warmup: steps over which the learning rate rises linearly from 0; none: a tenth of
      all steps.
    final_fraction: the last learning rate as a fraction of the peak.
    clip: largest global norm of a gradient; 0: not clipped.
    weight_decay: decoupled, times the learning rate.
    weights: how hidden kernels are kept between steps: as they are, or in 8 bits with
      stochastic rounding (Q-GaLore).
    restart_every: the learning rate falls and rises again at multiples of so many
      updates, as kernels with restarts ask for; none: never.
    restart_warmup: updates of each rise.
    restart_start: where it starts, as a fraction of where it ends.
    frobenius_decay: weight of half the squared norm of factorized kernels in the loss.
    projected_backward: form only the projections of gradients, except at refreshes; for
      methods that need no more. Gradient norms are then those of what is formed.
    sketched_refresh: find bases by thin products in further backward passes, so that not
      even refreshes form gradients in full; for `basis` 'subspace_iteration' and
      'randomized_svd', with `projected_backward`.
    kernels: move weights by the device's own kernel, `lrjax.kernels.lift_and_apply`, where
      the method's updates are lifted ones; on one device.
    stochastic_rounding: round such weights in bfloat16 up with the probability of the
      fraction.
    options: further keyword arguments of the method.
  """

  name: str
  learning_rate: float
  schedule: Literal['cosine', 'linear', 'constant'] = 'cosine'
  warmup: int | None = None
  final_fraction: float = 0.1
  clip: float = 1.0
  weight_decay: float = 0.0
  weights: Literal['float', 'int8'] = 'float'
  restart_every: int | None = None
  restart_warmup: int = 10
  restart_start: float = 0.0
  frobenius_decay: float = 0.0
  projected_backward: bool = False
  sketched_refresh: bool = False
  kernels: bool = False
  stochastic_rounding: bool = False
  options: Mapping[str, Scalar] = dataclasses.field(
    default_factory=dict, metadata={'follows': 'name'}
  )

  def __post_init__(self):
    _require(self, 'learning_rate', lambda x: 0 < x < math.inf, 'above 0 and finite')
    _require(self, 'warmup', lambda x: x is None or x >= 0, 'none or at least 0')
    _require(self, 'final_fraction', lambda x: 0 <= x <= 1, 'between 0 and 1')
    _require(self, 'clip', lambda x: 0 <= x < math.inf, '0 (off) or above, finite')
    for name in ('weight_decay', 'frobenius_decay'):
      _require(self, name, lambda x: 0 <= x < math.inf, 'at least 0, finite')
    _require(self, 'restart_warmup', lambda x: x >= 1, 'at least 1')
    warmup = self.restart_warmup
    longer = lambda x: x is None or x > warmup
    _require(self, 'restart_every', longer, f'none or above restart_warmup={warmup}')
    _require(self, 'restart_start', lambda x: 0 <= x <= 1, 'between 0 and 1')
    for name in ('kernels', 'stochastic_rounding'):
      if self.weights == 'int8' and getattr(self, name):
        raise ValueError(f"{name} is for weights='float', got weights='int8'")
    if self.sketched_refresh and not self.projected_backward:
      raise ValueError('sketched_refresh goes with projected_backward=True')
    if self.projected_backward and self.clip:
      raise ValueError(
        f'projected_backward needs clip=0, got clip={self.clip}: the norm of a gradient of'
        ' which only a projection is formed is not known'
      )


@dataclasses.dataclass(frozen=True)
class Kernel:
  """How the seven kernels of each layer are stored and trained.

  Attributes:
    name: a parameterization of `experiments.kernels.KERNELS`.
    options: its keyword arguments.
  """

  name: str = 'dense'
  options: Mapping[str, Scalar] = dataclasses.field(
    default_factory=dict, metadata={'follows': 'name'}
  )


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How many devices share each kind of work; the product is their number.

  Attributes:
    data: copies of the model, each with a part of the batch.
    fsdp: parts of the batch between which parameters and states are divided.
    tensor: devices between which each matrix is divided.
  """

  data: int = 1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _require(self, field.name, lambda x: x >= 1, 'at least 1')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """When a run is saved, and which saves stay.

  Attributes:
    every: steps between saves; the last step is saved always.
    keep: newest saves that stay.
    keep_every: saves at multiples of so many steps stay for good; none: no such.
  """

  every: int
  keep: int = 3
  keep_every: int | None = None

  def __post_init__(self):
    _require(self, 'every', lambda x: x >= 1, 'at least 1')
    _require(self, 'keep', lambda x: x >= 1, 'at least 1')
    _require(self, 'keep_every', lambda x: x is None or x >= 1, 'none or at least 1')


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One training run.

  Attributes:
    name: of the run and of its directory.
    seed: of the initial weights, the order of the data, and the method.
    steps: optimizer steps in all.
    warm_steps: further steps before these in which the kernels are dense; they are a run
      of their own, `<name>-warm`, with this run's settings.
    model: the network.
    data: what it reads.
    optimizer: how it learns.
    kernel: what its kernels are.
    checkpoint: how it is saved.
    eval_every: steps between evaluations; the last step is evaluated always.
    log_every: steps between lines of metrics.
    diagnostics_every: steps between measurements of subspaces; 0: none, at no cost.
    max_consecutive_bad: so many non-finite steps in a row end the run.
    mesh: how it is spread over devices.
  """

  name: str
  steps: int
  model: LlamaConfig
  data: DataConfig
  optimizer: Optimizer
  checkpoint: Checkpoint
  eval_every: int
  kernel: Kernel = Kernel()
  warm_steps: int = 0
  seed: int = 0
  log_every: int = 1
  diagnostics_every: int = 0
  max_consecutive_bad: int = 10
  mesh: Mesh = Mesh()

  def __post_init__(self):
    is_name = partial(re.fullmatch, r'[A-Za-z0-9][A-Za-z0-9._-]{0,127}')
    _require(self, 'name', is_name, '1 to 128 of A-Z a-z 0-9 . _ -, not first . _ -')
    _require(self, 'seed', lambda x: 0 <= x < 2**32, 'from 0 to 2**32 - 1')
    for name in ('steps', 'eval_every', 'log_every', 'max_consecutive_bad'):
      _require(self, name, lambda x: x >= 1, 'at least 1')
    for name in ('diagnostics_every', 'warm_steps'):
      _require(self, name, lambda x: x >= 0, 'at least 0')
    if self.warmup > self.steps:
      raise ValueError(
        f'optimizer.warmup={self.optimizer.warmup} must be at most steps={self.steps}'
      )
    if self.optimizer.weights == 'int8' and self.kernel.name != 'dense':
      raise ValueError(
        f"optimizer.weights='int8' is for dense kernels, got kernel.name="
        f'{self.kernel.name!r}'
      )
    if self.data.seq_len > self.model.max_seq_len:
      raise ValueError(
        f'data.seq_len={self.data.seq_len} must be at most '
        f'model.max_seq_len={self.model.max_seq_len}'
      )
    if (
      self.optimizer.kernels and self.mesh.data * self.mesh.fsdp * self.mesh.tensor > 1
    ):
      raise ValueError(f'optimizer.kernels is for one device, got {self.mesh}')
    if self.data.batch_size % (self.mesh.data * self.mesh.fsdp):
      raise ValueError(
        f'data.batch_size={self.data.batch_size} must be a multiple of mesh.data * '
        f'mesh.fsdp = {self.mesh.data * self.mesh.fsdp}'
      )

  @property
  def warm_start(self) -> 'Experiment | None':
    """The run with dense kernels that comes first, if there is one."""
    if not self.warm_steps:
      return None
    return replace(
      self,
      name=f'{self.name}-warm',
      steps=self.warm_steps,
      warm_steps=0,
      kernel=Kernel(),
      optimizer=replace(self.optimizer, restart_every=None, frobenius_decay=0.0),
    )

  @property
  def warmup(self) -> int:
    """Steps of warm-up."""
    warmup = self.optimizer.warmup
    return self.steps // 10 if warmup is None else warmup


@dataclasses.dataclass(frozen=True)
class Sweep:
  """How the runs of a comparison are tuned and repeated; see `experiments.study`.

  Attributes:
    factors: of the learning rate that a run names; each is tried.
    seeds: how many, the first one for the sweep, all of them at the best rate.
    extensions: how often a sweep goes on beyond its edge where the best rate lies there.
  """

  factors: tuple[float, ...] = (1.0,)
  seeds: int = 1
  extensions: int = 1

  def __post_init__(self):
    _require(self, 'factors', lambda x: x and min(x) > 0, 'one or more, above 0')
    _require(self, 'factors', lambda x: len({*x}) == len(x), 'all different')
    _require(self, 'seeds', lambda x: x >= 1, 'at least 1')
    _require(self, 'extensions', lambda x: x >= 0, 'at least 0')
