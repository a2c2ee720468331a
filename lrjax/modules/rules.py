"""Which layers of a model get which parameterization, by rules on their paths."""

import re
from collections.abc import Iterable, Sequence

from lrjax.checks import pattern as compiled
from lrjax.types import Parameterization

Rule = tuple[str, Parameterization | None]
Rules = Sequence[Rule]


def check_rules(rules: Rules) -> tuple[Rule, ...]:
  """The rules as a tuple, each a pattern and a parameterization or None.

  Raises:
    TypeError: for anything else.
    ValueError: for a pattern that is no regular expression.
  """
  for rule in rules:
    pair = isinstance(rule, tuple) and len(rule) == 2
    if not pair or not isinstance(rule[1], Parameterization | None):
      raise TypeError(
        '`rules` must be pairs (pattern, Parameterization or None), such as'
        f" [('mlp', lrjax.factorized(32))], got {rule!r}"
      )
    compiled('rules', rule[0])
  return tuple(rules)


def choose(rules: Rules, paths: Iterable[str]) -> dict[str, Parameterization]:
  """The plan that rules make of a model with dense layers at these paths.

  The first rule whose pattern is found in a path decides; None leaves the layer.

  Raises:
    ValueError: for a rule that decides nothing, because nothing matches it or because
      earlier rules take all that does.
  """
  paths = [*dict.fromkeys(paths)]
  first = {path: _first(rules, path) for path in paths}
  for i, (pattern, _) in enumerate(rules):
    if i not in first.values():
      taken = any(re.search(pattern, path) for path in paths)
      why = 'earlier rules take all it matches' if taken else 'it matches none'
      listed = ', '.join(paths) or 'none'
      raise ValueError(
        f'the rule {pattern!r} decides no layer: {why}; dense layers: {listed}'
      )
  decided = {path: rules[i][1] for path, i in first.items() if i is not None}
  return {path: p for path, p in decided.items() if p is not None}


def _first(rules: Rules, path: str) -> int | None:
  matches = (i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path))
  return next(matches, None)
