"""The one training loop: resume, step, log, evaluate, save, summarise."""

import contextlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import program as programs
from experiments import provenance, rundir
from experiments.checkpoints import Checkpoints
from experiments.config import Experiment
from experiments.configuring import to_dict
from experiments.data import (
  check_vocab_size,
  fingerprint,
  iterator_at,
  load_corpus,
  train_batches,
)
from experiments.errors import ConfigError, Interrupted, NonFiniteError
from experiments.evaluate import evaluate, place
from experiments.metrics import Metrics
from experiments.optimizers import update_gap
from experiments.progress import Progress
from experiments.signals import Preemption
from experiments.summary import summarise
from lrjax import wants_gradient
from lrjax.views import leaf_path

# A resumed run may be spread and saved differently; nothing else may change unasked.
HARMLESS = ('config.mesh', 'config.checkpoint', 'config.log_every')
MOST_OVERDUE = 3


def run(
  experiment: Experiment,
  root: str | pathlib.Path,
  preemption: Preemption,
  *,
  resume: bool = False,
  overwrite: bool = False,
  allow_change: Sequence[str] = (),
) -> pathlib.Path:
  """Trains an experiment in `root/<its name>`, or goes on where it stopped.

  Args:
    experiment: what to do.
    root: directory of all runs.
    preemption: asked after each step whether to save and leave.
    resume: go on with an earlier attempt, if there is one.
    overwrite: move an earlier run of that name aside.
    allow_change: dotted config keys that may differ from the earlier attempt's.

  Returns:
    The run's directory, with config.json, metrics.jsonl (the same bytes for every run
    of this config on a machine, interrupted or not), timing.jsonl and summary.json.

  Raises:
    Interrupted: after saving, if `preemption` asked to.
    NonFiniteError: too many steps in a row had a loss or gradient that was not finite,
      or a subspace could not be fitted.
    CheckpointMismatch, RunExistsError, ConfigError, DataError, ...: see `errors`.
  """

  def attempt(stage: Experiment, dense: Any) -> _Loop:
    with contextlib.ExitStack() as held:
      open_run = rundir.open_run(root, stage.name, resume=resume, overwrite=overwrite)
      where = held.enter_context(open_run)
      one = _Loop(stage, where, preemption, held, allow_change, dense)
      one.run()
    return one

  first = experiment.warm_start
  dense = None if first is None else attempt(first, None).state['params']
  return attempt(experiment, dense).where.path


class _Loop:
  """One attempt at a run, from dense params where some are given."""

  def __init__(
    self,
    experiment: Experiment,
    where: rundir.RunDir,
    preemption: Preemption,
    held: contextlib.ExitStack,
    allow_change: Sequence[str],
    dense: Any = None,
  ):
    self.dense = dense
    self.experiment, self.where, self.preemption = experiment, where, preemption
    try:
      self.corpus = load_corpus(experiment.data, _token_cache(experiment, where))
      check_vocab_size(self.corpus.tokenizer, experiment.model.vocab_size)
    except ValueError as e:  # what the files hold does not fit what the config says
      raise ConfigError(f'data: {e}') from e
    self.program = programs.build(experiment)
    self.is_first = jax.process_index() == 0
    self.saver = Checkpoints(
      where.checkpoints,
      every=experiment.checkpoint.every,
      keep=experiment.checkpoint.keep,
      keep_every=experiment.checkpoint.keep_every,
      on_saved=lambda step: self.progress.note(f'saved step {step}'),
    )
    self.meta = dict(
      config=to_dict(experiment),
      data=fingerprint(self.corpus, experiment.seed),
      breaking_versions=provenance.breaking_versions(),
      versions=provenance.versions(),
    )
    allowed = [*HARMLESS, *(f'config.{key}' for key in allow_change)]
    self.state, self.start, self.position, quarantined = self._restore(allowed)
    if self.is_first:
      rundir.write_json(where.path / 'config.json', self.meta['config'])
    attempt = rundir.on_process_0(self._count_attempt)
    self.metrics = Metrics(
      where.path / 'metrics.jsonl', tensorboard_dir=where.path / 'tensorboard'
    )
    self.timing = Metrics(where.path / 'timing.jsonl', attempt=attempt)
    for file in (self.metrics, self.timing):
      held.callback(file.close)
      file.truncate_after(self.start if self.start else -1)
    self.progress = held.enter_context(
      Progress(experiment.name, experiment.steps, self.start, enabled=self.is_first)
    )
    if where.existed:
      self.progress.note(
        f'resume step={self.start} attempt={attempt} quarantined={quarantined}'
      )

  def run(self) -> None:
    """Steps, logs, evaluates and saves until the end, or until asked to leave."""
    e = self.experiment
    compile_seconds = self._compile_all()
    batches = iterator_at(train_batches(self.corpus, e.seed), self.position)
    if self._evaluation_is_missing():
      self._evaluate(self.start)
    self.clock = time.perf_counter()
    pending = None
    for step in range(self.start + 1, e.steps + 1):
      tokens = place(next(batches), self.program)['tokens']
      self.state, metrics = self._take(tokens)
      # One step behind, so that the device has work while the host logs.
      if pending is not None:
        self._log(*pending)
      names, report = self.program.due(step), {}
      if names:
        self.state, report = self.program.events(names)(self.state)
      pending = step, metrics, tokens, report
      leave = self.preemption.requested(step)
      if leave or names or self._is_stop(step):
        self._log(*pending)
        pending = None
        if leave or self._is_stop(step):
          self._stop(step, leave)
          self.clock = time.perf_counter()
    self.saver.close()
    if self.is_first:
      self._summarise(compile_seconds)

  def _is_stop(self, step: int) -> bool:
    e = self.experiment
    return step == e.steps or not step % e.eval_every or not step % e.checkpoint.every

  def _stop(self, step: int, leave: bool) -> None:
    """Evaluates and saves where it is time to; leaves if asked to."""
    e = self.experiment
    if not leave and (step == e.steps or not step % e.eval_every):
      # Interrupted half-way it leaves no line; the resumed run evaluates first.
      leave = not self._evaluate(step)
    self.metrics.flush()
    self.timing.flush()
    if leave or step == e.steps or not step % e.checkpoint.every:
      position = {'next_index': e.warm_steps + step}
      self.saver.save(step, self.state, data_state=position, meta=self.meta, force=True)
    if leave:
      self.saver.close()
      raise Interrupted(
        f'{e.name}: interrupted; step {step} of {e.steps} is saved, go on with --resume'
      )

  def _take(self, tokens: Any) -> tuple[Any, Any]:
    """One training step, in full where a basis is to be found."""
    if self.projected is None or wants_gradient(self.state['opt']):
      if self.refresh is None:
        return self.full(self.state, tokens)
      self.state = self.refresh(self.state, tokens)
    return self.projected(self.state, tokens)

  def _compile_all(self) -> float:
    """Compiles what `_take` needs; returns the seconds it took."""
    p, seconds = self.program, 0.0
    steps = dict(full=None if p.refresh else p.step)
    steps |= dict(projected=p.projected_step, refresh=p.refresh)
    found, sizes = {}, []
    for name, step in steps.items():
      found[name] = None
      if step is not None:
        found[name], more = self._compile(step)
        seconds += more
        memory = found[name].memory_analysis()
        sizes.append(None if memory is None else memory.temp_size_in_bytes)
    self.full, self.projected, self.refresh = found.values()
    self.temporary_bytes = None if None in sizes else max(sizes)
    return seconds

  def _compile(self, step: Any) -> tuple[Any, float]:
    """A compiled training step, and the seconds it took."""
    shape = (self.experiment.data.batch_size, self.experiment.data.seq_len + 1)
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=self.program.batch_sharding)
    start = time.perf_counter()
    with jax.set_mesh(self.program.mesh):
      compiled = step.lower(self.program.state, tokens).compile()
    return compiled, time.perf_counter() - start

  def _restore(self, allowed: Sequence[str]) -> tuple[Any, int, int, list]:
    """State, its step, the position in the data, damaged checkpoints passed over."""
    if self.where.existed:
      found = self.saver.restore(
        self.program.state,
        expect={k: v for k, v in self.meta.items() if k != 'versions'},
        allow_change=allowed,
      )
      if found is not None:
        position = found.data_state['next_index']
        return found.state, found.step, position, found.quarantined
    with jax.set_mesh(self.program.mesh):
      cold = self.dense is None
      state = self.program.init() if cold else self.program.start(self.dense)
    return state, 0, self.experiment.warm_steps, []

  def _count_attempt(self) -> int:
    path = self.where.path / 'attempts.json'
    before = json.loads(path.read_text())['attempts'] if path.exists() else 0
    rundir.write_json(path, {'attempts': before + 1})
    return before + 1

  def _evaluation_is_missing(self) -> bool:
    if not self.start or not self._is_evaluated(self.start):
      return False
    path = self.where.path / 'metrics.jsonl'
    last = lambda: path.read_text().splitlines()[-1:]
    lines = [json.loads(x) for x in rundir.on_process_0(last)]
    return not any(x['split'] == 'valid' and x['step'] == self.start for x in lines)

  def _is_evaluated(self, step: int) -> bool:
    return step == self.experiment.steps or not step % self.experiment.eval_every

  def _evaluate(self, step: int) -> bool:
    """Evaluates and logs; False if it was interrupted."""
    poll = lambda: jax.process_count() == 1 and self.preemption.requested(step)
    with jax.set_mesh(self.program.mesh):
      result = evaluate(self.program, self.corpus, self.state, poll)
    if result is None:
      return False
    values = dict(loss=result.nats, perplexity=result.perplexity, tokens=result.tokens)
    self.metrics.scalars(step, values, split='valid')
    self.progress.note(f'step {step}: validation loss {result.nats:.4f} nats a token')
    return True

  def _log(self, step: int, metrics: Any, tokens: jax.Array, report: dict) -> None:
    """Writes one step's numbers, and ends the run if too many in a row were bad."""
    e = self.experiment
    numbers = jax.device_get((metrics, report))
    metrics, report = jax.tree.map(lambda x: x.item(), numbers)
    values, subspaces = metrics, metrics.pop('subspaces')
    now = time.perf_counter()
    seconds, self.clock = now - self.clock, now
    bad, overdue = values.pop('bad'), values.pop('overdue_refreshes')
    if not step % e.log_every or step == e.steps:
      self.metrics.scalars(step, values)
    measured = bool(subspaces) and (step - 1) % e.diagnostics_every == 0
    if measured:
      self.metrics.scalars(step, subspaces, split='subspace')
    if report:
      touched = {
        f'{n}/{k}': v for n, t in report.items() for k, v in t._asdict().items()
      }
      self.metrics.scalars(step, touched, split='event')
    count = e.data.batch_size * e.data.seq_len
    times = dict(seconds=seconds, tokens_per_s=count / seconds)
    kind = dict(refresh=is_refresh(e, step), measured=measured, event=bool(report))
    self.timing.scalars(step, times | kind)
    self.progress.update(step, count, values['loss'])
    if bad >= e.max_consecutive_bad:
      raise NonFiniteError(self._describe_bad(step, values, bad, tokens))
    if overdue >= MOST_OVERDUE:
      raise NonFiniteError(
        f'step {step}: {overdue} refreshes of a subspace failed in a row; loss'
        f' {values["loss"]}, gradient norm {values["grad_norm"]}'
      )

  def _describe_bad(self, step: int, values: dict, bad: int, tokens: jax.Array) -> str:
    """What went wrong, with the first leaf whose gradient is not finite."""
    with jax.set_mesh(self.program.mesh):
      grads = self.program.gradients(self.state['params'], self.state['fixed'], tokens)
      finite = jax.jit(lambda g: jax.tree.map(lambda x: jnp.isfinite(x).all(), g))(
        grads
      )
    paths = [leaf_path(p) for p, ok in jax.tree.leaves_with_path(finite) if not ok]
    newest = self.saver.newest
    kept = 'no checkpoint' if newest is None else f'checkpoint {newest} is kept'
    return (
      f'step {step}: {bad} steps in a row were not finite; loss {values["loss"]},'
      f' gradient norm {values["grad_norm"]}, first bad gradient'
      f' {paths[0] if paths else "none (the loss alone)"}, batch {step - 1}; {kept}'
    )

  def _summarise(self, compile_seconds: float) -> None:
    numbers = summarise(
      self.experiment, self.program, self.corpus, self.where.path, compile_seconds
    )
    numbers['temporary_bytes'] = self.temporary_bytes
    rundir.write_json(self.where.path / 'summary.json', numbers)


def is_refresh(experiment: Experiment, step: int) -> bool:
  """Whether update number `step`, from 1, fits bases anew for the whole tree.

  Where every step does, none stands out.
  """
  gap = update_gap(experiment)
  return gap is not None and gap > 1 and (step - 1) % gap == 0


def _token_cache(experiment: Experiment, where: rundir.RunDir) -> str | None:
  """Where tokens of large sources are kept, beside all runs; small ones need no file."""
  large = experiment.data.source in ('files', 'hub')
  return str(where.path.parent / '.tokens') if large else None
