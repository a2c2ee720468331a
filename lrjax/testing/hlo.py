"""What a compiled program sends between devices, read from its text."""

import math
import re

KINDS = (
  'all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all'
  '|collective-permute|collective-broadcast'
)
SENDS = re.compile(rf' = (\(.*?\)|\S+) ({KINDS})(?:-start)?\(')
BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
BRANCH = re.compile(r'(?:true|false)_computation=%?([\w.\-]+)')
CALLS = re.compile(r'(?:to_apply|calls|body|condition)=%?([\w.\-]+)')


def collectives(text: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
  """What a program sends every time, and what it sends inside conditionals.

  Args:
    text: `jax.jit(f).lower(...).compile().as_text()`.

  Returns:
    Two lists of (operation, numbers), an entry for each array on a device that results.
  """
  parts = re.split(r'\n(?=%|ENTRY )', text)
  (entry,) = (p for p in parts if p.startswith('ENTRY '))
  named = {re.split(r'[% ]', p)[1]: p for p in parts if p.startswith('%')}
  always = [entry, *_reached([entry], named, CALLS)]
  every = _reached(always, named, CALLS, BRANCHES, BRANCH)
  return _sent(always), _sent([p for p in every if p not in always])


def _reached(starts: list, named: dict, *references: re.Pattern) -> list[str]:
  """The computations that some refer to, directly or not."""
  found, todo = [], list(starts)
  while todo:
    part = todo.pop()
    names = ', '.join(x for pattern in references for x in pattern.findall(part))
    for name in re.findall(r'[\w.\-]+', names):
      if (next_part := named[name]) not in found:
        found.append(next_part)
        todo.append(next_part)
  return found


def _sent(parts: list[str]) -> list[tuple[str, int]]:
  return [
    (kind, math.prod(int(n) for n in dims.split(',') if n))
    for part in parts
    for types, kind in SENDS.findall(part)
    for dims in re.findall(r'\w+\[([\d,]*)\]', types)
  ]
