"""What single instructions of a compiled program multiply, move and send."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from experiments.hlo_text import Array, Computation, Instruction

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all')
COLLECTIVES += ('collective-permute', 'ragged-all-to-all', 'collective-broadcast')
SAME = ('bitcast', 'copy', 'convert', 'reshape')
_SLICES = ('dynamic-slice', 'slice', 'gather')
# Of what comes out of them a slice needs only a part of what went in.
_THROUGH = (*SAME, 'pad', 'transpose')


class Collective(NamedTuple):
  """A collective operation of one device.

  Attributes:
    op: its name in HLO, without `-start`.
    dtype: of what is sent.
    size: bytes of the whole buffer: of an all-gather what comes out, else what goes in.
    group: number of devices that take part.
  """

  op: str
  dtype: str
  size: float
  group: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends, around a ring where the operation combines.

    >>> [Collective(op, 'f32', 80, 8).sent for op in ('all-gather', 'all-reduce')]
    [70.0, 140.0]
    """
    if self.op in ('collective-permute', 'collective-broadcast'):
      return float(self.size)
    return (1 + (self.op == 'all-reduce')) * self.size * (self.group - 1) / self.group


def collectives(
  one: Instruction, given: Sequence[Array], devices: int
) -> Iterator[Collective]:
  """Those of one instruction, which may send several arrays; none within one device."""
  op, group = one.op.removesuffix('-start'), _group(one, devices)
  if op in COLLECTIVES and group > 1:
    for x in given:
      yield Collective(
        op, x.dtype, x.size * (group if op == 'all-gather' else 1), group
      )


def _group(one: Instruction, devices: int) -> int:
  """Devices in a group: {{0,1},{2,3}}, [2,2]<=[4], or axes of a mesh."""
  if pairs := one.find(r'source_target_pairs=\{(\{.*?\})\}'):
    return 1 + any(a != b for a, b in re.findall(r'\{(\d+),(\d+)\}', pairs))
  axes = re.search(r'replica_groups=@?mesh\[(.*?)\][^{]*\{([^}]*)\}', one.rest)
  if axes:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
    # An axis may take part with a piece of it: 'a':(2)4.
    named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
    return math.prod(int(part or sizes[name]) for name, part in named)
  if size := one.find(r'replica_groups=\[\d+,(\d+)\]'):
    return int(size)
  first = one.find(r'replica_groups=\{\{([\d,]*)\}')
  return len(first.split(',')) if first else devices


def product(one: Instruction, given: Sequence[Array]) -> tuple[str, int] | None:
  """How an instruction multiplies matrices (see `hlo.Cost`), and its FLOPs."""
  if one.op == 'dot':
    flops = _dot(one, given[0], r'lhs_contracting_dims=\{([\d,]*)')
  elif one.op == 'convolution':
    flops = _convolution(one, given)
  elif one.op == 'custom-call' and re.search('gemm|matmul', target(one)):
    flops = _dot(one, given[0], r'"lhs_contracting_dimensions":\[([\d,"]*)')
  else:
    return None
  if min(x.width for x in given[:2]) < 4:
    return 'bf16', flops
  exact = one.find(r'(operand_precision=\{[^}]*high|"HIGHEST")')
  return 'highest' if exact else 'f32', flops


def target(one: Instruction) -> str:
  """What a custom call calls."""
  return one.find(r'custom_call_target="([^"]*)"')


def _dot(one: Instruction, lhs: Array, pattern: str) -> int:
  contracted = [int(n) for n in re.findall(r'\d+', one.find(pattern))]
  # Beside its result a library call has a workspace, of bytes.
  out = next(x for x in one.arrays if x.dtype != 's8' or len(one.arrays) == 1)
  return 2 * math.prod(out.dims) * math.prod(lhs.dims[i] for i in contracted)


def _convolution(one: Instruction, given: Sequence[Array]) -> int:
  """The form in which TPUs multiply: windows hold batch axes and further sums."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', one.rest)
  assert labels is not None, one
  lhs, rhs, out = (
    dict(zip(names, x.dims))
    for names, x in zip(labels.groups(), (given[0], given[1], one.arrays[0]))
  )
  window = dict(re.findall(r'(\w+)=([\w\-]+)', one.find(r'window=\{([^}]*)')))
  flops = 2 * out['b'] * out['f'] * rhs['i']
  each = {key: value.split('x') for key, value in window.items()}
  for i, axis in enumerate(sorted(c for c in out if c.isdigit())):
    of = {key: value[i] for key, value in each.items()}
    flops *= _meetings(
      lhs[axis],
      out[axis],
      rhs[axis],
      stride=int(of.get('stride', 1)),
      low=int(of.get('pad', '0_0').split('_')[0]),
      spread=int(of.get('lhs_dilate', 1)),
      step=int(of.get('rhs_dilate', 1)),
    )
  return flops


def _meetings(
  size: int, out: int, window: int, stride: int, low: int, spread: int, step: int
) -> int:
  """Pairs (result o, window entry w) at an entry of the input, not at padding or holes.

  Those are o stride + w step - low = spread x with 0 <= x < size.
  """
  total = 0
  for start in range(-low, out * stride - low, stride):
    if spread == 1:
      first = max(0, -(start // step))
      total += max(0, min(window, (size - 1 - start) // step + 1) - first)
    else:
      places = (divmod(start + w * step, spread) for w in range(window))
      total += sum(not hole and 0 <= x < size for x, hole in places)
  return total


def moved(one: Instruction, given: Sequence[Instruction]) -> float:
  """Bytes of main memory that an instruction outside of fusions reads and writes."""
  if one.op in _SLICES:
    read = _all(one.arrays) if given[0].arrays[0].main else 0
    return read + _main(one.arrays)
  if one.op == 'dynamic-update-slice':
    return 2 * _main(given[1].arrays)
  if one.op == 'scatter':
    return 3 * _main(given[-1].arrays) + _main(given[1].arrays)
  out = one.arrays
  if one.op == 'copy-start':
    out = out[:1]
  elif one.op.endswith('-start') and len(out) >= 2 * len(given):
    # Operands come first in the type of an operation under way, results after them.
    out = out[len(given) : 2 * len(given)]
  return _main(out) + sum(_main(g.arrays) for g in given)


def moved_by_fusion(
  one: Instruction,
  given: Sequence[Instruction],
  computations: Mapping[str, Computation],
) -> float:
  """The same of a fusion: what is only sliced or replaced in place counts by the part."""
  inner = computations[one.called('calls')]
  total = 0.0
  for p in inner.table.values():
    if p.op == 'parameter':
      whole = _main(given[int(p.literal)].arrays)
      total += min(_read(p.name, inner, computations), whole)
  outs = inner.operands(inner.root) if inner.root.op == 'tuple' else [inner.root]
  for out, x in zip(outs, one.arrays):
    total += min(_written(out, inner, computations), _main([x]))
  return total


def _read(
  name: str, inner: Computation, computations: Mapping[str, Computation]
) -> float:
  """Bytes that a fusion reads of one of its values; infinite: all of them."""
  part = 0.0
  for user in inner.table.values():
    at = [i for i, operand in enumerate(user.operands) if operand == name]
    if not at or user.op in ('tuple', *COLLECTIVES):
      continue
    if user.op == 'dynamic-update-slice' and at == [0]:
      continue
    if user.op in _SLICES and at == [0]:
      part += _all(user.arrays)
    elif user.op in _THROUGH:
      part += _read(user.name, inner, computations)
    elif user.op == 'fusion':
      nested = computations[user.called('calls')]
      for p in nested.table.values():
        if p.op == 'parameter' and int(p.literal) in at:
          part += _read(p.name, nested, computations)
    else:
      return math.inf
  return part


def _written(
  out: Instruction, inner: Computation, computations: Mapping[str, Computation]
) -> float:
  """Bytes that a fusion writes of one of its results; infinite: all of them."""
  out = inner.skip(out, SAME)
  if out.op in ('parameter', *COLLECTIVES):  # handed on, or counted by itself
    return 0
  if out.op == 'dynamic-update-slice':
    return _all(inner.table[out.operands[1]].arrays)
  if out.op == 'fusion':
    nested = computations[out.called('calls')]
    return _written(nested.root, nested, computations)
  return math.inf


def _main(arrays: Sequence[Array]) -> float:
  return sum(x.size for x in arrays if x.main)


def _all(arrays: Sequence[Array]) -> float:
  return sum(x.size for x in arrays)
