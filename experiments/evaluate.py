"""The one evaluator: token-weighted mean over the whole validation split."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data import Corpus, valid_batches
from experiments.program import Program


class Evaluation(NamedTuple):
  """Attributes: nats per token, tokens counted, perplexity, bits per token."""

  nats: float
  tokens: int

  @property
  def perplexity(self) -> float:
    """exp of the mean; infinite where that overflows."""
    return math.exp(self.nats) if self.nats < 700 else math.inf

  @property
  def bits(self) -> float:
    """The mean in bits."""
    return self.nats / math.log(2)


def evaluate(
  program: Program,
  corpus: Corpus,
  state: Any,
  poll: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
  """Sum of nats over all tokens of the split, divided by their number.

  A mean of batch means is wrong where the last batch is smaller, and published code of
  this lineage divides by one batch too many.

  Args:
    program: of the run.
    corpus: whose validation split (or its `valid_windows`) is read.
    state: the run's state; its parameters are used.
    poll: asked after each batch whether to give up.

  Returns:
    The `Evaluation`, or None if `poll` said so.
  """
  nats, tokens = 0.0, 0
  for batch in valid_batches(corpus):
    arrays = place(batch, program)
    n, t = program.evaluate(
      state['params'], state['fixed'], arrays['tokens'], arrays['mask']
    )
    nats, tokens = nats + float(n), tokens + int(t)
    if poll():
      return None
  return Evaluation(nats / tokens, tokens)


def place(batch: dict[str, np.ndarray], program: Program) -> dict[str, jax.Array]:
  """A global batch on the mesh; each process keeps the rows of its own devices."""
  make = lambda x: jax.make_array_from_callback(
    x.shape, program.batch_sharding, x.__getitem__
  )
  return {k: make(np.asarray(v)) for k, v in batch.items()}
