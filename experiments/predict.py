"""Predicts a training step on devices not at hand: `python -m experiments.predict`.

`--preset galore_7b --topology v5e:16x16 --mesh.fsdp 256 --data.seq_len 2048` compiles
the step of that run for the topology, from shapes alone, and counts what the compiled
program does on each device; see `experiments.hlo`. TPUs need the package libtpu, GPUs the
CUDA plugin of jax, neither needs a device; `--compiler cpu` needs neither, but its fusions
and temporary memory are those of a CPU. With `--optimizer.projected_backward true
--optimizer.clip 0` it is the step between refreshes, without their QR or `eigh`.

Times are bounds: a roofline at the vendor's peaks, with communication hidden behind
computation or not at all. Nothing reaches its peak, so the truth is slower.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments import command_line, errors, hlo, one_process
from experiments.config import Experiment
from experiments.targets import DEVICES, Compiler, Device, devices, parse_topology


@dataclasses.dataclass(frozen=True)
class Command(command_line.Command):
  """Flags of this command.

  Attributes:
    topology: v5e:<rows>x<columns>, or h200:<count> within one node of 8.
    compiler: that of the device, or that of the CPU at hand, which divides the program
      between devices in the same way.
  """

  preset: str = 'galore_7b'
  topology: str = 'v5e:16x16'
  compiler: Compiler = 'device'


class Prediction(NamedTuple):
  """One kind of step on one device; times in seconds, sizes in bytes.

  Attributes:
    step: which branch of every conditional it takes: steady or refresh.
    arguments: state of the run and tokens.
    peak: all of memory in use at once.
    cost: what the program does.
    compute, memory, network: time at the ceilings.
  """

  step: str
  arguments: int
  peak: int
  cost: hlo.Cost
  compute: float
  memory: float
  network: float

  @property
  def overlapped(self) -> float:
    """The step where all is hidden behind what takes longest."""
    return max(self.compute, self.memory, self.network)

  @property
  def serial(self) -> float:
    """The step where nothing runs beside communication."""
    return max(self.compute, self.memory) + self.network


def compile_step(experiment: Experiment, topology: str, compiler: Compiler) -> Any:
  """The compiled training step of a run; nothing is allocated.

  With `optimizer.projected_backward` it is the step between two refreshes.

  Raises:
    ConfigError: the mesh does not match the topology, or the step needs more memory
      than a device has.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import AxisType, Mesh

  from experiments import program

  m, found = experiment.mesh, devices(topology, compiler)
  sizes = (m.data, m.fsdp, m.tensor)
  if math.prod(sizes) != len(found):
    raise errors.ConfigError(
      f'mesh.data * mesh.fsdp * mesh.tensor = {math.prod(sizes)}, but {topology} has '
      f'{len(found)} devices'
    )
  grid = np.asarray(found).reshape(sizes)
  mesh = Mesh(grid, ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  built = program.build(experiment, mesh)
  window = (experiment.data.batch_size, experiment.data.seq_len + 1)
  tokens = jax.ShapeDtypeStruct(window, jnp.int32, sharding=built.batch_sharding)
  with jax.set_mesh(mesh):
    lowered = (built.projected_step or built.step).lower(built.state, tokens)
    try:
      return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      raise errors.ConfigError(f'{topology}: {str(e).splitlines()[0]}') from e


def predict(compiled: Any, device: Device) -> list[Prediction]:
  """A compiled step at the ceilings of a device.

  Args:
    compiled: what `compile_step` returns.
    device: of `DEVICES`.

  Returns:
    The steady step; and the one that takes the dearest branches, if it differs.
  """
  m, text = compiled.memory_analysis(), compiled.as_text()
  used = m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes
  peak = sum(used) - m.alias_size_in_bytes
  out = []
  kinds: tuple[tuple[str, hlo.Branch], ...]
  kinds = (('steady', 'cheapest'), ('refresh', 'dearest'))
  for step, branch in kinds:
    c = hlo.cost(text, branch)
    if out and vars(c) == vars(out[0].cost):
      break
    compute = sum(n / device.flops[kind] for kind, n in c.flops.items())
    memory, network = c.bytes / device.bandwidth, c.sent / device.link
    out.append(Prediction(step, used[0], peak, c, compute, memory, network))
  return out


def table(name: str, found: Sequence[Prediction], device: Device) -> str:
  """Predictions in Markdown: GB of 10^9 bytes and ms, all of one device."""
  lines = [
    '| run | step | state GB | peak GB | TFLOP | memory GB | sent GB | compute ms |'
    ' memory ms | network ms | step ms |',
    '|' + '---|' * 11,
  ]
  for p in found:
    c, ms = p.cost, [1e3 * t for t in (p.compute, p.memory, p.network)]
    mark = '*' if c.endless or c.uncounted else ''
    lines.append(
      f'| {name} | {p.step}{mark} | {p.arguments / 1e9:.2f} | {p.peak / 1e9:.2f} of'
      f' {device.memory / 1e9:.0f} |'
      f' {c.flops.total() / 1e12:.2f} | {c.bytes / 1e9:.1f} | {c.sent / 1e9:.2f} |'
      f' {ms[0]:.1f} | {ms[1]:.1f} | {ms[2]:.1f} |'
      f' {1e3 * p.overlapped:.0f} to {1e3 * p.serial:.0f} |'
    )
  return '\n'.join(lines)


def collectives(cost: hlo.Cost) -> str:
  """What is sent, by operation and dtype, in GB of each device."""
  sums: dict[tuple[str, str], list[float]] = {}
  for c, times in cost.collectives.items():
    one = sums.setdefault((c.op, c.dtype), [0, 0.0])
    one[0], one[1] = one[0] + times, one[1] + times * c.sent
  each = (f'{n:.0f} {op} {t} {sent / 1e9:.3f}' for (op, t), (n, sent) in sums.items())
  return ', '.join(each) or 'none'


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  words = sys.argv[1:] if argv is None else argv
  one_process()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  # Otherwise libtpu waits for the metadata server that TPU machines have.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  flags = os.environ.get('XLA_FLAGS', '')
  if 'host_platform_device_count' not in flags:
    # Only for --compiler cpu; a simulated device costs nothing until it is used.
    count = '--xla_force_host_platform_device_count=256'
    os.environ['XLA_FLAGS'] = f'{flags} {count}'.strip()
  from experiments.arguments import parse_args
  from experiments.optimizers import METHODS

  try:
    asked, (experiment,) = parse_args(words, METHODS, command=Command)
    kind, _ = parse_topology(asked.topology)
    compiled = compile_step(experiment, asked.topology, asked.compiler)
  except errors.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return errors.EXIT_BAD_CONFIG
  found = predict(compiled, DEVICES[kind])
  print(f'{asked.topology}, compiler of the {asked.compiler}; {DEVICES[kind].source}')
  print(table(f'{experiment.name}, {experiment.optimizer.name}', found, DEVICES[kind]))
  for p in found:
    c = p.cost
    print(f'{p.step} sends (GB): {collectives(c)}')
    if c.endless or c.uncounted:
      print(f'{p.step} lacks: {c.endless} loops of unknown length, {dict(c.uncounted)}')
  return errors.EXIT_DONE


if __name__ == '__main__':
  sys.exit(main())
