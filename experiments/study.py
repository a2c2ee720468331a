"""Which runs a study of several methods needs next, from the losses that are known.

A sweep of learning rates for each method with the first seed, one rate further where the
best lies on the edge, then the best rate with every other seed: so no method is untuned,
and the numbers that are reported are not from the seed that chose the rate alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from experiments.config import Experiment, Sweep

Losses = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Study:
  """Methods x learning rates x seeds.

  Attributes:
    methods: one run of each, whose learning rate is the centre of its sweep.
    sweep: rates and seeds.
  """

  methods: tuple[Experiment, ...]
  sweep: Sweep


class Finding(NamedTuple):
  """What a study found for one method; losses in nats, infinite where a run failed.

  Attributes:
    method: its name.
    losses: learning rate -> validation loss with the first seed, rates ascending.
    rate: the best of them; None before the sweep is done, or if all runs failed.
    on_edge: whether the best rate is the lowest or the highest tried.
    runs: names of the runs at the best rate, one a seed, those that are done.
  """

  method: str
  losses: dict[float, float]
  rate: float | None
  on_edge: bool
  runs: tuple[str, ...]


def next_runs(study: Study, losses: Losses) -> tuple[Experiment, ...]:
  """The runs that can be started now; none when the study is done.

  Args:
    study: what is asked.
    losses: name of a run -> its validation loss, for those that are finished.

  Returns:
    Runs that are not in `losses`, in the order in which to do them.
  """
  found = []
  for method in study.methods:
    found += [variant(method, rate, 0) for rate in _rates(study, method, losses)]
    best = _best(study, method, losses)
    if best is not None:
      found += [variant(method, best, seed) for seed in range(1, study.sweep.seeds)]
  return tuple(run for run in found if run.name not in losses)


def findings(study: Study, losses: Losses) -> tuple[Finding, ...]:
  """What is known of each method."""
  out = []
  for method in study.methods:
    rates = _rates(study, method, losses)
    named = {rate: variant(method, rate, 0).name for rate in rates}
    known = {rate: losses[name] for rate, name in named.items() if name in losses}
    best = _best(study, method, losses)
    runs = []
    if best is not None:
      runs = [variant(method, best, seed).name for seed in range(study.sweep.seeds)]
    out.append(
      Finding(
        method.name,
        known,
        best,
        len(rates) > 1 and best in (rates[0], rates[-1]),
        tuple(name for name in runs if name in losses),
      )
    )
  return tuple(out)


def variant(method: Experiment, rate: float, seed: int) -> Experiment:
  """One run of a method."""
  return replace(
    method,
    name=f'{method.name}-lr{rate:.3g}-s{seed}'.replace('+', ''),
    seed=method.seed + seed,
    optimizer=replace(method.optimizer, learning_rate=rate),
  )


def largest_size(study: Study) -> int:
  """Number of runs if no best rate lies on an edge."""
  return len(study.methods) * (len(study.sweep.factors) + study.sweep.seeds - 1)


def _rates(study: Study, method: Experiment, losses: Losses) -> Sequence[float]:
  """The rates of a sweep, ascending, with those beyond an edge that was best."""
  centre, sweep = method.optimizer.learning_rate, study.sweep
  rates = sorted(_round(centre * factor) for factor in sweep.factors)
  if len(rates) < 2:
    return rates
  for _ in range(sweep.extensions):
    best = _lowest(method, rates, losses)
    if best == rates[0]:
      rates = [_round(rates[0] ** 2 / rates[1]), *rates]
    elif best == rates[-1]:
      rates = [*rates, _round(rates[-1] ** 2 / rates[-2])]
  return rates


def _best(study: Study, method: Experiment, losses: Losses) -> float | None:
  return _lowest(method, _rates(study, method, losses), losses)


def _lowest(method: Experiment, rates: Sequence[float], losses: Losses) -> float | None:
  """The rate of lowest loss; None before all are known, or if all failed."""
  names = [variant(method, rate, 0).name for rate in rates]
  found = [losses[name] for name in names if name in losses]
  if len(found) < len(names) or not any(map(math.isfinite, found)):
    return None
  return rates[found.index(min(found))]


def _round(rate: float) -> float:
  """To three digits, as names show it."""
  return float(f'{rate:.3g}')
