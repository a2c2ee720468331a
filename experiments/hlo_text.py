"""The text of a compiled program as computations of instructions."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 'bf16': 2, 'c64': 8, 'c128': 16}
_BYTES |= {f'{kind}{bits}': bits // 8 for kind in 'suf' for bits in (8, 16, 32, 64)}


class Array(NamedTuple):
  """Type of one array; `main`: in main memory, not on the chip or with the host."""

  dtype: str
  dims: tuple[int, ...]
  main: bool = True

  @property
  def width(self) -> float:
    """Bytes of an element; none of tokens and opaque values.

    >>> Array('bf16', (3,)).width, Array('f8e4m3fn', ()).width, Array('token', ()).width
    (2, 1, 0)
    """
    # Floats of eight bits have many names.
    return _BYTES.get(self.dtype, int(self.dtype.startswith('f8')))

  @property
  def size(self) -> float:
    """Its bytes."""
    return math.prod(self.dims) * self.width


class Instruction(NamedTuple):
  """One line of a computation; a tuple has several arrays.

  Attributes:
    name: of its result.
    arrays: the types of its result.
    op: the operation.
    operands: names in the same computation.
    literal: what is written between its parentheses.
    rest: what follows them.
  """

  name: str
  arrays: tuple[Array, ...]
  op: str
  operands: tuple[str, ...]
  literal: str
  rest: str

  def find(self, pattern: str) -> str:
    """The first group of a pattern in what follows the operands, or nothing."""
    found = re.search(pattern, self.rest)
    return found[1] if found else ''

  def called(self, key: str) -> str:
    """The computation that an attribute names."""
    return self.find(key + r'=%([\w.\-]+)')

  @property
  def branches(self) -> list[str]:
    """The computations of a conditional."""
    if listed := self.find(r'branch_computations=\{([^}]*)\}'):
      return re.findall(r'%([\w.\-]+)', listed)
    return [self.called('true_computation'), self.called('false_computation')]


class Computation(NamedTuple):
  """Instructions by name, in the order they run, and the one that is the result."""

  table: dict[str, Instruction]
  root: Instruction

  def operands(self, one: Instruction) -> list[Instruction]:
    """What an instruction is given."""
    return [self.table[name] for name in one.operands]

  def skip(self, one: Instruction, ops: Sequence[str]) -> Instruction:
    """The first instruction on the way back that is none of `ops`."""
    while one.op in ops:
      one = self.table[one.operands[0]]
    return one


class Module(NamedTuple):
  """A program for `devices` devices."""

  computations: dict[str, Computation]
  entry: str
  devices: int


def parse(text: str) -> Module:
  """Reads `compiled.as_text()`."""
  computations: dict[str, Computation] = {}
  entry = name = ''
  table: dict[str, Instruction] = {}
  for line in text.splitlines():
    if head := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$', line):
      name, table = head[2], {}
      entry = name if head[1] else entry
    elif found := re.match(r'\s+(ROOT )?%([\w.\-]+) = (.*)', line):
      one = table[found[2]] = _instruction(found[2], found[3])
      if found[1]:
        computations[name] = Computation(table, one)
  devices = re.search(r'num_partitions=(\d+)', text)
  return Module(computations, entry, int(devices[1]) if devices else 1)


def _instruction(name: str, text: str) -> Instruction:
  # Of a long tuple every fifth type has a comment.
  shape, rest = _split_shape(re.sub(r'/\*index=\d+\*/', '', text))
  op, _, rest = rest.lstrip().partition('(')
  inside = _balanced(rest)
  named = () if op in ('parameter', 'constant') else re.findall(r'%([\w.\-]+)', inside)
  return Instruction(
    name, tuple(_arrays(shape)), op, tuple(named), inside, rest[len(inside) + 1 :]
  )


def _split_shape(text: str) -> tuple[str, str]:
  """A type and what follows it."""
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
    sizes = tuple(int(n.removeprefix('<=')) for n in dims.split(',') if n)
    # Memory space 0 is the main one, and is not written.
    yield Array(dtype, sizes, not re.search(r'S\([1-9]', layout))
