"""What a compiled program does on each device, counted from its text.

XLA's own `cost_analysis` counts the body of a loop once, takes one branch of a
conditional, knows no collectives, and is absent on some backends. Here a loop counts as
often as it runs, either branch can be chosen, and collectives are listed.
"""

import re
from collections import Counter
from typing import Literal, NamedTuple

from experiments.hlo_text import Instruction, Module, parse
from experiments.hlo_work import (
  COLLECTIVES,
  SAME,
  Collective,
  collectives,
  moved,
  moved_by_fusion,
  product,
  target,
)

Branch = Literal['cheapest', 'dearest']

# Names for what is there, and marks.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all'}
_FREE |= {'partition-id', 'replica-id', 'opt-barrier'}
_MARKS = {'AllocateBuffer', 'Sharding', 'AssumeGatherIndicesInBound', 'ConcatBitcast'}
_MARKS |= {
  'AsyncCollectiveStart',
  'AsyncCollectiveDone',
  'GatherScatterIndicesBitpacked',
}


class Cost:
  """Counts of one run of a computation on one device.

  Attributes:
    flops: of matrix products, by how they multiply: bf16, f32 (as a device does by
      default, in one pass or TF32), highest (float32 as exactly as it can).
    bytes: read from and written to main memory by operations that are not fused.
    collectives: `Collective` -> how often it runs.
    uncounted: custom calls whose work is not known -> how often they run.
    endless: number of loops whose length is not known, counted as if they ran once.
  """

  def __init__(self):
    self.flops: Counter[str] = Counter()
    self.bytes = 0.0
    self.collectives: Counter[Collective] = Counter()
    self.uncounted: Counter[str] = Counter()
    self.endless = 0

  @property
  def sent(self) -> float:
    """Bytes that the device sends."""
    return sum(n * c.sent for c, n in self.collectives.items())

  def add(self, other: 'Cost', times: int = 1) -> None:
    """Adds what another computation does, so many times."""
    for name in ('flops', 'collectives', 'uncounted'):
      counts = getattr(self, name)
      for key, n in getattr(other, name).items():
        counts[key] += times * n
    self.bytes += times * other.bytes
    self.endless += other.endless


def cost(text: str, branch: Branch = 'dearest') -> Cost:
  """Counts what one run of a compiled program does on each device.

  Products are counted exactly (`2 m n k`); elementwise work is not. Bytes are those of
  operands and results of all that is not inside a fusion: of what is only sliced the
  slice, of what is updated in place the update.

  Args:
    text: `compiled.as_text()`.
    branch: which branch of every conditional runs, by products, then by bytes.

  Returns:
    A `Cost`.

  >>> import jax, jax.numpy as jnp
  >>> x = jnp.ones((8, 8))
  >>> loop = lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x)
  >>> cost(jax.jit(loop).lower(x).compile().as_text()).flops.total() == 5 * 2 * 8**3
  True
  """
  module = parse(text)
  return _Walk(module, branch).walk(Frame(module.entry))


class Frame(NamedTuple):
  """A computation as it is called from one place."""

  computation: str
  caller: Instruction | None = None
  above: 'Frame | None' = None

  def call(self, one: Instruction, key: str) -> 'Frame':
    """The computation that an instruction of this one calls."""
    return Frame(one.called(key), one, self)


class _Walk:
  def __init__(self, module: Module, branch: Branch):
    self.module, self.branch = module, branch

  def walk(self, frame: Frame) -> Cost:
    total, channels = Cost(), set()
    for one in self.module.computations[frame.computation].table.values():
      self._count(one, frame, total, channels)
    return total

  def _count(
    self, one: Instruction, frame: Frame, total: Cost, channels: set[str]
  ) -> None:
    here = self.module.computations[frame.computation]
    if one.op == 'while':
      trips = _trips(self.module, one, frame)
      total.endless += trips is None
      total.add(self.walk(frame.call(one, 'body')), 1 if trips is None else trips)
    elif one.op == 'conditional':
      each = [self.walk(Frame(name, one, frame)) for name in one.branches]
      work = lambda c: (c.flops.total(), c.uncounted.total(), c.endless, c.bytes)
      total.add((min if self.branch == 'cheapest' else max)(each, key=work))
    elif one.op == 'fusion':
      inner = frame.call(one, 'calls')
      self._multiplied(inner, total, channels)
      given = here.operands(one)
      total.bytes += moved_by_fusion(one, given, self.module.computations)
    elif one.op == 'call':
      total.add(self.walk(frame.call(one, 'to_apply')))
    elif one.op.endswith('-start') and one.called('calls'):
      total.add(self.walk(frame.call(one, 'calls')))
    elif one.op == 'custom-call' and target(one) in _MARKS:
      pass
    elif one.op not in _FREE and not one.op.endswith(('-done', '-update')):
      self._operate(one, frame, total)
      total.bytes += moved(one, here.operands(one))

  def _multiplied(self, frame: Frame, total: Cost, channels: set[str]) -> None:
    """Products and collectives inside a fusion, whose other work stays on the chip."""
    here = self.module.computations[frame.computation]
    for one in here.table.values():
      if one.op == 'fusion':
        self._multiplied(frame.call(one, 'calls'), total, channels)
      elif one.op not in COLLECTIVES:
        self._operate(one, frame, total)
      # One that runs beside products is in several fusions, with a piece in each.
      elif (channel := one.find(r'channel_id=(\d+)')) not in channels:
        channels.add(channel)
        self._operate(one, frame, total)
        total.bytes += moved(one, here.operands(one))

  def _operate(self, one: Instruction, frame: Frame, total: Cost) -> None:
    operands = self.module.computations[frame.computation].operands(one)
    given = [x for operand in operands for x in operand.arrays]
    if one.op.removesuffix('-start') in COLLECTIVES:
      total.collectives.update(collectives(one, given, self.module.devices))
    elif found := product(one, given):
      total.flops[found[0]] += found[1]
    elif one.op == 'custom-call' and target(one) not in _MARKS:
      total.uncounted[target(one)] += 1


def _trips(module: Module, loop: Instruction, frame: Frame) -> int | None:
  """How often a loop runs, if it is `for i in range(start, stop, step)`."""
  if known := loop.find(r'"known_trip_count":\{"n":"(\d+)"'):
    return int(known)
  test = frame.call(loop, 'condition')
  while (compare := module.computations[test.computation].root).op == 'fusion':
    test = test.call(compare, 'calls')
  if compare.op != 'compare' or 'direction=LT' not in compare.rest:
    return None
  counter, end = compare.operands
  first, last = (_value(module, n, test, loop) for n in (counter, end))
  if first is None or last is None:
    return None
  step = _step(module, _index(module, counter, test), frame.call(loop, 'body'))
  return step and max(-((first - last) // step), 0)


def _index(module: Module, name: str, frame: Frame) -> str:
  """Where in what a loop carries a value of its condition is."""
  here = module.computations[frame.computation]
  one = here.skip(here.table[name], SAME)
  if one.op == 'parameter' and frame.caller and frame.above:
    return _index(module, frame.caller.operands[int(one.literal)], frame.above)
  return one.find(r'index=(\d+)')


def _step(module: Module, index: str, frame: Frame) -> int | None:
  """What the body of a loop adds to the value at `index`."""
  body = module.computations[frame.computation]
  one = body.skip(body.table[body.root.operands[int(index)]], SAME)
  while one.op == 'fusion':
    frame = frame.call(one, 'calls')
    body = module.computations[frame.computation]
    one = body.skip(body.root, SAME)
  known = [_value(module, name, frame, None) for name in one.operands]
  return next((n for n in known if n is not None), None) if one.op == 'add' else None


def _value(
  module: Module, name: str, frame: Frame, loop: Instruction | None
) -> int | None:
  """An integer known at compile time; of what `loop` counts, where it starts."""
  here = module.computations[frame.computation]
  one, index = here.skip(here.table[name], SAME), ''
  if one.op == 'get-tuple-element':
    index = one.find(r'index=(\d+)')
    one = here.skip(here.table[one.operands[0]], ('opt-barrier', 'copy'))
  if one.op == 'constant':
    return int(one.literal) if re.fullmatch(r'-?\d+', one.literal) else None
  if one.op == 'tuple':
    return _value(module, one.operands[int(index)], frame, loop)
  if one.op == 'while':
    return _carried(module, one, index, frame, loop)
  if one.op == 'parameter' and frame.caller and frame.above:
    if frame.caller.op == 'fusion':
      source = frame.caller.operands[int(one.literal)]
      return _value(module, source, frame.above, loop)
    if frame.caller.op == 'while':
      return _carried(module, frame.caller, index, frame.above, loop)
  return None


def _carried(
  module: Module, outer: Instruction, index: str, frame: Frame, loop: Instruction | None
) -> int | None:
  """What a loop was given at `index`, if it is `loop` or does not change it."""
  body = module.computations[outer.called('body')]
  out = body.skip(body.table[body.root.operands[int(index)]], SAME)
  kept = out.op == 'get-tuple-element' and out.find(r'index=(\d+)') == index
  kept = kept and body.table[out.operands[0]].op == 'parameter'
  if outer is not loop and not kept:
    return None
  here = module.computations[frame.computation]
  given = here.skip(here.table[outer.operands[0]], ('opt-barrier', 'copy'))
  if given.op == 'tuple':
    return _value(module, given.operands[int(index)], frame, None)
  return None
