"""What a compiled program does on each device, counted from its text.

XLA's own `cost_analysis` counts the body of a loop once, takes the dearest branch of a
conditional, knows no collectives, and is absent on some backends. Here a loop counts as
often as it runs, either branch can be chosen, and collectives are listed.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

Branch = Literal['cheapest', 'dearest']
Array = tuple[str, tuple[int, ...], bool]  # dtype, dimensions, in main memory

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's4': 0.5, 'u4': 0.5, 'bf16': 2, 'f16': 2}
_BYTES |= {'s16': 2, 'u16': 2, 'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8}
_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all')
_COLLECTIVES += ('collective-permute', 'ragged-all-to-all', 'collective-broadcast')
# They move nothing: names for what is there, or the ends of what was counted before.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all'}
_FREE |= {'partition-id', 'replica-id', 'opt-barrier', 'optimization-barrier'}
_SLICES = {'dynamic-slice', 'slice', 'gather'}
_SAME = {'bitcast', 'copy', 'convert', 'reshape'}


class Collective(NamedTuple):
  """A collective operation of one device.

  Attributes:
    op: its name in HLO, without `-start`.
    dtype: of what is sent.
    size: bytes of the whole buffer, that of all devices of the group together for an
      all-gather and a reduce-scatter.
    group: number of devices that take part.
  """

  op: str
  dtype: str
  size: float
  group: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends, by a ring where the operation combines.

    >>> Collective('all-reduce', 'f32', 80, 8).sent, Collective('all-gather', 'f32', 80, 8).sent
    (140.0, 70.0)
    """
    if self.op in ('collective-permute', 'collective-broadcast'):
      return float(self.size)
    return (1 + (self.op == 'all-reduce')) * self.size * (self.group - 1) / self.group


class Cost:
  """Counts of one run of a computation on one device.

  Attributes:
    flops: of matrix products, by how they multiply: bf16, f32 (one pass or TF32, as the
      device does by default), highest (float32 as exact as it gets).
    bytes: read from and written to main memory, once for each operation that is not fused.
    collectives: `Collective` -> how often it runs.
    uncounted: custom calls whose work is not known -> how often they run.
    endless: loops whose length is not known, counted as if they ran once.
  """

  def __init__(self):
    self.flops: Counter[str] = Counter()
    self.bytes = 0.0
    self.collectives: Counter[Collective] = Counter()
    self.uncounted: Counter[str] = Counter()
    self.endless = 0

  def add(self, other: 'Cost', times: int = 1) -> None:
    """Adds what another computation does, so many times."""
    for mine, theirs in (
      (self.flops, other.flops),
      (self.collectives, other.collectives),
      (self.uncounted, other.uncounted),
    ):
      for key, n in theirs.items():
        mine[key] += times * n
    self.bytes += times * other.bytes
    self.endless += other.endless

  @property
  def sent(self) -> float:
    """Bytes that a device sends."""
    return sum(n * c.sent for c, n in self.collectives.items())


class Instruction(NamedTuple):
  """One line of a computation; `rest` is what follows the operands."""

  name: str
  arrays: tuple[Array, ...]
  op: str
  operands: tuple[str, ...]
  literal: str
  rest: str

  def called(self, key: str) -> str:
    """The computation that an attribute names."""
    return _search(key + r'=%([\w.\-]+)', self.rest)


class Frame(NamedTuple):
  """A computation as it is called from one place."""

  computation: str
  caller: Instruction | None = None
  above: 'Frame | None' = None


def cost(text: str, branch: Branch = 'dearest') -> Cost:
  """Counts what one run of a compiled program does on each device.

  Products are counted exactly (`2 m n k`); elementwise work is not. Bytes are those of
  operands and results of every operation that is not inside a fusion; of operands that are
  only sliced the slice, and of what is updated in place the update.

  Args:
    text: `compiled.as_text()`.
    branch: which branch of every conditional runs.

  Returns:
    A `Cost`.

  >>> import jax, jax.numpy as jnp
  >>> x = jnp.ones((8, 8))
  >>> loop = lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x)
  >>> cost(jax.jit(loop).lower(x).compile().as_text()).flops.total() == 5 * 2 * 8**3
  True
  """
  return _Program(text, branch).run()


class _Program:
  """A parsed module and the walk over it."""

  def __init__(self, text: str, branch: Branch):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.roots: dict[str, Instruction] = {}
    self.entry, self.branch = '', branch
    self.devices = int(_search(r'num_partitions=(\d+)', text[:10_000]) or 1)
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
      if line.endswith('{') and (
        head := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> ', line)
      ):
        current = self.computations[head[2]] = {}
        self.entry = head[2] if head[1] else self.entry
        name = head[2]
      elif found := re.match(r'\s+(ROOT )?%([\w.\-]+) = (.*)', line):
        current[found[2]] = one = _instruction(found[2], found[3])
        if found[1]:
          self.roots[name] = one

  def run(self) -> Cost:
    return self._walk(Frame(self.entry))

  def _walk(self, frame: Frame) -> Cost:
    total = Cost()
    for one in self.computations[frame.computation].values():
      self._count(one, frame, total)
    return total

  def _count(self, one: Instruction, frame: Frame, total: Cost) -> None:
    inside = lambda key: Frame(one.called(key), one, frame)
    if one.op == 'while':
      trips = self._trips(one, frame)
      total.endless += trips is None
      total.add(self._walk(inside('body')), 1 if trips is None else trips)
    elif one.op == 'conditional':
      both = [self._walk(Frame(name, one, frame)) for name in _branches(one)]
      by = lambda c: (c.flops.total(), c.endless, c.uncounted.total(), c.bytes)
      total.add((min if self.branch == 'cheapest' else max)(both, key=by))
    elif one.op == 'fusion':
      self._products(inside('calls'), total)
      total.bytes += self._fusion_bytes(one, frame)
    elif one.op in ('call', 'async-start') or (
      one.op.endswith('-start') and 'calls=' in one.rest
    ):
      key = 'to_apply' if 'to_apply=' in one.rest and one.op == 'call' else 'calls'
      total.add(self._walk(inside(key)))
    elif one.op not in _FREE and not one.op.endswith(('-done', '-update')):
      self._product(one, frame, total)
      total.bytes += self._bytes(one, frame)

  def _products(self, frame: Frame, total: Cost) -> None:
    """Products and collectives inside a fusion, whose other work stays on chip."""
    for one in self.computations[frame.computation].values():
      if one.op == 'fusion':
        self._products(Frame(one.called('calls'), one, frame), total)
      else:
        self._product(one, frame, total)

  def _product(self, one: Instruction, frame: Frame, total: Cost) -> None:
    table = self.computations[frame.computation]
    arrays = [table[n].arrays[0] for n in one.operands if table[n].arrays]
    base = one.op.removesuffix('-start')
    if base in _COLLECTIVES:
      for c in _collectives(base, arrays, one.rest, self.devices):
        total.collectives[c] += 1
    elif one.op == 'dot':
      total.flops[_kind(one, arrays)] += _dot(one, arrays[0], 'lhs_contracting_dims')
    elif one.op == 'convolution':
      total.flops[_kind(one, arrays)] += _convolution(one, arrays)
    elif one.op == 'custom-call':
      target = _search(r'custom_call_target="([^"]*)"', one.rest)
      if 'gemm' in target or 'matmul' in target:
        key = 'lhs_contracting_dimensions'
        total.flops[_kind(one, arrays)] += _dot(one, arrays[0], key)
      elif target not in _HARMLESS:
        total.uncounted[target] += 1

  def _bytes(self, one: Instruction, frame: Frame) -> float:
    table = self.computations[frame.computation]
    given = [table[n] for n in one.operands]
    if one.op in _SLICES:
      return 2 * _size(one.arrays)
    if one.op == 'dynamic-update-slice':
      return 2 * _size(given[1].arrays)
    if one.op == 'scatter':
      return 3 * _size(given[-1].arrays) + _size(given[1].arrays)
    if one.op == 'copy-start':
      return _size(one.arrays[:1]) + _size(given[0].arrays)
    started = one.op.endswith('-start') and len(one.arrays) > 1
    out = one.arrays[len(one.arrays) // 2 :] if started else one.arrays
    return _size(out) + sum(_size(g.arrays) for g in given)

  def _fusion_bytes(self, one: Instruction, frame: Frame) -> float:
    table = self.computations[frame.computation]
    inner = self.computations[one.called('calls')]
    root = self.roots[one.called('calls')]
    users: dict[str, list[Instruction]] = {name: [] for name in inner}
    for user in inner.values():
      for name in user.operands:
        users[name].append(user)

    def read(name: str, whole: float) -> float:
      """Bytes read of an operand: what is sliced or replaced is not read whole."""
      part = 0.0
      for user in users[name]:
        if user.op in _SLICES and user.operands[0] == name:
          part += _size(user.arrays, anywhere=True)
        elif user.op == 'dynamic-update-slice' and user.operands[0] == name:
          pass
        elif user.op in _SAME:
          part += read(user.name, whole)
        else:
          return whole
      return min(part, whole)

    def written(out: Instruction) -> float:
      while out.op in _SAME:
        out = inner[out.operands[0]]
      if out.op == 'dynamic-update-slice':
        return _size(inner[out.operands[1]].arrays, anywhere=True)
      return _size(out.arrays, anywhere=True)

    total = 0.0
    for p in (i for i in inner.values() if i.op == 'parameter'):
      whole = _size(table[one.operands[int(p.literal)]].arrays)
      total += read(p.name, whole) if whole else 0
    outs = [inner[n] for n in root.operands] if root.op == 'tuple' else [root]
    for out, array in zip(outs, one.arrays):
      total += min(written(out), _size((array,)))
    return total

  def _trips(self, loop: Instruction, frame: Frame) -> int | None:
    """How often a loop runs, of the form `for i in range(start, stop)`."""
    if known := _search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known)
    test = Frame(loop.called('condition'), loop, frame)
    compare = self.roots[test.computation]
    while compare.op == 'fusion':
      test = Frame(compare.called('calls'), compare, test)
      compare = self.roots[test.computation]
    if compare.op != 'compare' or 'direction=LT' not in compare.rest:
      return None
    first, last = (self._value(n, test, loop) for n in compare.operands)
    return None if first is None or last is None else max(last - first, 0)

  def _value(self, name: str, frame: Frame, loop: Instruction | None) -> int | None:
    """An integer known at compile time; of what `loop` changes, its start."""
    one, index = self.computations[frame.computation][name], None
    if one.op == 'constant':
      return int(one.literal) if re.fullmatch(r'-?\d+', one.literal) else None
    if one.op in _SAME:
      return self._value(one.operands[0], frame, loop)
    if one.op == 'get-tuple-element':
      index = int(_search(r'index=(\d+)', one.rest))
      one = self.computations[frame.computation][one.operands[0]]
    if one.op == 'tuple' and index is not None:
      return self._value(one.operands[index], frame, loop)
    if one.op == 'while' and index is not None:
      return self._through(one, index, frame, None)
    if one.op != 'parameter' or frame.caller is None or frame.above is None:
      return None
    if frame.caller.op == 'fusion':
      source = frame.caller.operands[int(one.literal)]
      return self._value(source, frame.above, loop)
    if frame.caller.op == 'while' and index is not None:
      return self._through(frame.caller, index, frame.above, loop)
    return None

  def _through(
    self, outer: Instruction, index: int, frame: Frame, loop: Instruction | None
  ) -> int | None:
    """What a loop was given at `index`, if it hands it on unchanged or is `loop`."""
    body = self.computations[outer.called('body')]
    out = body[self.roots[outer.called('body')].operands[index]]
    while out.op in _SAME:
      out = body[out.operands[0]]
    same = out.op == 'get-tuple-element' and body[out.operands[0]].op == 'parameter'
    if outer is not loop and not (same and f'index={index}' in _attributes(out.rest)):
      return None
    given = self.computations[frame.computation][outer.operands[0]]
    while given.op in ('opt-barrier', 'copy'):
      given = self.computations[frame.computation][given.operands[0]]
    if given.op == 'tuple':
      return self._value(given.operands[index], frame, None)
    if given.op == 'parameter' and frame.caller and frame.above:
      if frame.caller.op == 'while':
        return self._through(frame.caller, index, frame.above, None)
    return None


# Custom calls that mark something, and compute nothing.
_HARMLESS = {'AllocateBuffer', 'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape'}
_HARMLESS |= {'AssumeGatherIndicesInBound', 'annotate_device_placement'}


def _instruction(name: str, text: str) -> Instruction:
  text = re.sub(r'/\*.*?\*/', '', text)
  shape, rest = _split_shape(text)
  op, _, rest = rest.lstrip().partition('(')
  inside = _balanced(rest)
  return Instruction(
    name,
    tuple(_arrays(shape)),
    op,
    () if op in ('parameter', 'constant') else tuple(re.findall(r'%([\w.\-]+)', inside)),
    inside,
    rest[len(inside) + 1 :],
  )


def _split_shape(text: str) -> tuple[str, str]:
  if not text.startswith('('):
    shape, _, rest = text.partition(' ')
    return shape, rest
  inside = _balanced(text[1:])
  return inside, text[len(inside) + 2 :]


def _balanced(text: str) -> str:
  """The beginning up to the parenthesis that closes one before it."""
  depth = 1
  for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text):
    depth += {'(': 1, ')': -1}.get(found[0], 0)
    if not depth:
      return text[: found.start()]
  raise ValueError(f'no closing parenthesis in {text[:80]!r}')


def _arrays(shape: str) -> Iterator[Array]:
  for dtype, dims, layout in re.findall(r'(\w+)\[([\d,<=]*)\](\{[^}]*\})?', shape):
    # Memory space 0 is the main one; others are on the chip or of the host.
    main = not re.search(r'S\([1-9]\d*\)', layout)
    yield dtype, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n), main


def _size(arrays: tuple[Array, ...], anywhere: bool = False) -> float:
  """Bytes of those arrays that are in main memory."""
  each = ((math.prod(d) * _width(t), main) for t, d, main in arrays)
  return sum(n for n, main in each if main or anywhere)


def _width(dtype: str) -> float:
  if dtype in _BYTES:
    return _BYTES[dtype]
  # Tokens and opaque values have no size; eight-bit floats have many names.
  return float(dtype.startswith('f8'))


def _branches(one: Instruction) -> list[str]:
  listed = _search(r'branch_computations=\{([^}]*)\}', one.rest)
  if listed:
    return re.findall(r'%([\w.\-]+)', listed)
  return [one.called('true_computation'), one.called('false_computation')]


def _attributes(rest: str) -> list[str]:
  return [part.strip() for part in rest.split(',')]


def _search(pattern: str, text: str) -> str:
  found = re.search(pattern, text)
  return found[1] if found else ''


def _kind(one: Instruction, arrays: list[Array]) -> str:
  """How a product multiplies."""
  if _width(arrays[0][0]) < 4 or _width(arrays[1][0]) < 4:
    return 'bf16'
  precise = re.search(r'operand_precision=\{[^}]*high|"HIGHEST"', one.rest)
  return 'highest' if precise else 'f32'


def _dot(one: Instruction, lhs: Array, key: str) -> int:
  listed = _search(key + r'"?[=:][\[{]([\d,"]*)', one.rest)
  contracted = [int(n) for n in re.findall(r'\d+', listed)]
  out = max(math.prod(dims) for _, dims, _ in one.arrays)
  return 2 * out * math.prod(lhs[1][i] for i in contracted)


def _convolution(one: Instruction, arrays: list[Array]) -> int:
  """Multiply-adds where the window meets the input, as TPUs write matrix products."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', one.rest)
  assert labels is not None
  (_, lhs, _), (_, rhs, _), (_, out, _) = arrays[0], arrays[1], one.arrays[0]
  window = dict(re.findall(r'(\w+)=([\w\-x]+)', _search(r'window=\{([^}]*)', one.rest)))
  spatial = sorted(c for c in labels[3] if c.isdigit())
  flops = 2 * out[labels[3].index('b')] * out[labels[3].index('f')]
  flops *= rhs[labels[2].index('i')]
  for i, c in enumerate(spatial):
    at = lambda key, default: window.get(key, 'x'.join([default] * len(spatial)))
    of = lambda key, default: at(key, default).split('x')[i]
    low = int(of('pad', '0_0').split('_')[0])
    flops *= _meetings(
      lhs[labels[1].index(c)],
      out[labels[3].index(c)],
      rhs[labels[2].index(c)],
      stride=int(of('stride', '1')),
      low=low,
      spread=int(of('lhs_dilate', '1')),
      step=int(of('rhs_dilate', '1')),
    )
  return flops


def _meetings(
  size: int, out: int, window: int, stride: int, low: int, spread: int, step: int
) -> int:
  """Pairs of a result and an entry of the window that meet an entry of the input."""
  total = 0
  for o in range(out):
    # o stride + w step - low = spread x for 0 <= x < size
    start = o * stride - low
    if spread == 1:
      first = max(0, -(start // step))
      last = min(window - 1, (size - 1 - start) // step)
      total += max(0, last - first + 1)
    else:
      for w in range(window):
        x, left = divmod(start + w * step, spread)
        total += not left and 0 <= x < size
  return total


def _collectives(
  op: str, arrays: list[Array], rest: str, devices: int
) -> Iterator[Collective]:
  group = _group(rest, devices)
  if group > 1:
    for dtype, dims, _ in arrays:
      size = math.prod(dims) * _width(dtype) * (group if op == 'all-gather' else 1)
      yield Collective(op, dtype, size, group)


def _group(rest: str, devices: int) -> int:
  """Devices in a group: replica_groups={{0,1},{2,3}}, [2,2]<=[4] or mesh axes."""
  if pairs := _search(r'source_target_pairs=\{(\{.*?\})\}', rest):
    return 1 + any(a != b for a, b in re.findall(r'\{(\d+),(\d+)\}', pairs))
  if axes := re.search(r"replica_groups=@?mesh\[(.*?)\][^{]*\{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
    named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
    return math.prod(int(part or sizes[name]) for name, part in named)
  if listed := re.search(r'replica_groups=\[(\d+),(\d+)\]', rest):
    return int(listed[2])
  first = _search(r'replica_groups=\{\{([\d,]*)\}', rest)
  return len(first.split(',')) if first else devices
