"""Predicts a training step on devices not at hand: `python -m experiments.predict`.

`--preset galore_7b --topology v5e:16x16 --mesh.fsdp 256 --data.seq_len 2048` compiles
the step of that run for the topology, from shapes alone, and counts what the compiled
program does on each device; see `experiments.hlo`. TPUs need the package libtpu, GPUs the
CUDA plugin of jax, neither needs a device; `--compiler cpu` needs neither, but its fusions
and temporary memory are those of a CPU.

Times are bounds: a roofline at the vendor's peaks, with communication hidden behind
computation or not at all. Nothing reaches its peak, so the truth is slower.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from experiments import command_line, errors, hlo, one_process
from experiments.config import Experiment


class Device(NamedTuple):
  """Ceilings of one device.

  Attributes:
    flops: FLOP/s of matrix products, by the kinds of `hlo.Cost.flops`.
    memory: bytes.
    bandwidth: bytes/s of main memory.
    link: bytes/s that it can send to the others of its slice or node.
    source: of these numbers.
  """

  flops: dict[str, float]
  memory: float
  bandwidth: float
  link: float
  source: str


DEVICES = {
  'v5e': Device(
    # One pass in bfloat16 is the default for float32, six are its highest precision.
    dict(bf16=197e12, f32=197e12, highest=197e12 / 6),
    memory=16e9,
    bandwidth=819e9,
    link=200e9,
    source='cloud.google.com/tpu/docs/v5e; half of the bidirectional 400 GB/s',
  ),
  'h200': Device(
    dict(bf16=989e12, f32=494e12, highest=67e12),
    memory=141e9,
    bandwidth=4.8e12,
    link=450e9,
    source='datasheet of the SXM form, dense; half of the bidirectional 900 GB/s',
  ),
}
# What the CUDA compiler asks of the device, as the driver of one would answer.
_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000  device_memory_size: 141000000000
}
"""


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
  compiler: Literal['device', 'cpu'] = 'device'


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


def parse_topology(name: str) -> tuple[str, int]:
  """The kind and number of devices of a topology.

  Raises:
    ConfigError: it is none that can be predicted.

  >>> parse_topology('v5e:16x16'), parse_topology('h200:8')
  (('v5e', 256), ('h200', 8))
  """
  found = re.fullmatch(r'v5e:[1-9]\d{0,2}x[1-9]\d{0,2}|h200:[1-8]', name)
  if not found:
    raise errors.ConfigError(
      f'topology: {name!r}; write v5e:<rows>x<columns>, at most 16x16, or h200:<1 to 8>'
    )
  kind, _, sizes = name.partition(':')
  return kind, math.prod(int(n) for n in sizes.split('x'))


def devices(topology: str, compiler: str) -> Sequence[Any]:
  """Devices to compile for, which need not be there.

  Raises:
    ConfigError: the topology is unknown, or there is no compiler for it.
  """
  import jax
  from jax.experimental import topologies

  kind, count = parse_topology(topology)
  if compiler == 'cpu':
    if count > len(jax.devices('cpu')):
      raise errors.ConfigError(f'{topology} needs {count} simulated CPU devices')
    return jax.devices('cpu')[:count]
  try:
    if kind == 'h200':
      asked = dict(target_config=_H200, topology=f'1x1x{count}')
      return topologies.get_topology_desc(platform='cuda', **asked).devices
    return topologies.get_topology_desc(topology, platform='tpu').devices
  except (RuntimeError, NotImplementedError) as e:
    package = {'h200': 'jax[cuda12]', 'v5e': 'jax[tpu]'}[kind]
    raise errors.ConfigError(
      f'topology {topology}: {e}; install {package!r}, or use --compiler cpu'
    ) from e


def compile_step(experiment: Experiment, topology: str, compiler: str) -> Any:
  """The compiled training step of a run; nothing is allocated.

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
    lowered = built.step.lower(built.state, tokens)
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


def table(name: str, found: Sequence[Prediction]) -> str:
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
      f'| {name} | {p.step}{mark} | {p.arguments / 1e9:.2f} | {p.peak / 1e9:.2f} |'
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
  print(table(f'{experiment.name}, {experiment.optimizer.name}', found))
  for p in found:
    c = p.cost
    print(f'{p.step} sends (GB): {collectives(c)}')
    if c.endless or c.uncounted:
      print(f'{p.step} lacks: {c.endless} loops of unknown length, {dict(c.uncounted)}')
  return errors.EXIT_DONE


if __name__ == '__main__':
  sys.exit(main())
