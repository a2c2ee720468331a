"""Devices that a program can be compiled for without having them, and their ceilings."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from experiments import errors

Compiler = Literal['device', 'cpu']


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


def devices(topology: str, compiler: Compiler) -> Sequence[Any]:
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
