"""The final numbers of a run, from its files and from shapes."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

import lrjax
from experiments import optimizers, provenance
from experiments.config import Experiment
from experiments.data import Corpus
from experiments.program import Program


def summarise(
  experiment: Experiment,
  program: Program,
  corpus: Corpus,
  directory: pathlib.Path,
  compile_seconds: float,
) -> dict[str, Any]:
  """All that a report says of a finished run; see `experiments.report.Summary`."""
  metrics = _lines(directory / 'metrics.jsonl')
  last = {line['split']: line for line in metrics}
  valid = last['valid']
  timing = _lines(directory / 'timing.jsonl')
  bytes_per_token = corpus.stats['valid'].bytes / corpus.stats['valid'].tokens
  nats = float(valid['loss'])
  return dict(
    steps=experiment.steps,
    tokens=experiment.steps * experiment.data.batch_size * experiment.data.seq_len,
    skipped_steps=last['train']['skipped_steps'],
    valid_loss=nats if math.isfinite(nats) else None,
    bits_per_byte=nats / math.log(2) / bytes_per_token if math.isfinite(nats) else None,
    perplexity=_finite(valid['perplexity']),
    train_seconds=sum(line['seconds'] for line in timing),
    compile_seconds=compile_seconds,
    steady_ms=_median_ms(timing, False),
    refresh_ms=_median_ms(timing, True),
    **_subspaces([line for line in metrics if line['split'] == 'subspace']),
    **sizes(experiment, program),
    corpus=_flat(corpus.provenance()),
    versions=provenance.versions(),
    machine=_flat(provenance.machine()),
    commit=provenance.commit(),
  )


def sizes(experiment: Experiment, program: Program) -> dict[str, int]:
  """Numbers and bytes of parameters, gradients and optimizer state, from shapes.

  What diagnostics keep belongs to no method, and does not count.
  """
  stored = jax.tree.leaves(program.state['params'])
  plain = dataclasses.replace(experiment, diagnostics_every=0)
  report = lrjax.coverage(optimizers.make(plain), program.weights)
  return dict(
    parameters=sum(x.size for x in jax.tree.leaves(program.weights)),
    parameter_bytes=sum(x.size * x.dtype.itemsize for x in stored),
    gradient_bytes=report.param_bytes,
    fixed_bytes=sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state['fixed'])
    ),
    optimizer_bytes=report.state_bytes,
    adam_bytes=report.adam_bytes,
  )


def _median_ms(timing: list[dict], refresh: bool) -> float | None:
  """Steps that measured subspaces or ran events took longer, and do not count."""
  plain = [t for t in timing if not (t['measured'] or t['event'])]
  chosen = [t for t in plain if t['refresh'] == refresh]
  seconds = [line['seconds'] for line in chosen]
  return 1e3 * float(np.median(seconds)) if seconds else None


def _subspaces(lines: list[dict]) -> dict[str, float]:
  """Means over the run; 0 stands for what a method has not, and is left out."""
  found = {}
  for name in ('captured_energy', 'overlap', 'effective_rank'):
    values = [float(line[name]) for line in lines if float(line[name]) > 0]
    if values:
      found[name] = float(np.mean(values))
  return found | ({'refreshes': float(lines[-1]['refreshes'])} if lines else {})


def _finite(value: Any) -> float | None:
  return float(value) if math.isfinite(float(value)) else None


def _flat(tree: dict, prefix: str = '') -> dict[str, Any]:
  out: dict[str, Any] = {}
  for key, value in tree.items():
    inner = _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else None
    out |= {f'{prefix}{key}': value} if inner is None else inner
  return out


def _lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]
