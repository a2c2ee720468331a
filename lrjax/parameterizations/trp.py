"""Trained rank pruning as a kernel: dense, and truncated to a low rank now and then.

Xu et al., "Trained Rank Pruning for Efficient Deep Neural Networks", 2020, arXiv
2004.14566.
"""

import dataclasses

import jax

from lrjax import rank_truncation
from lrjax.parameterizations import factors
from lrjax.parameterizations.dense import dense
from lrjax.parameterizations.factors import value
from lrjax.types import Event, Parameterization, Split


@value
def trp(every: int = 5, energy: float = 0.9, gram: bool = False) -> Parameterization:
  r"""A dense kernel that becomes its truncated SVD every m updates: y = x W.

  .. math::
    W \leftarrow U_k S_k V_k^\top, \quad
    k = \min \{k : \textstyle\sum_{i \le k} s_i^2 \ge e \sum_i s_i^2\}

  In between W is free. Moments are not touched, and unlike in the public code there is no
  truncation before the first update. Put
  `lrjax.rank_truncation.add_nuclear_subgradient(3e-4, every)` before the optimizer for
  the paper's regularizer, and take `lrjax.rank_truncation.to_factors` of the last weights.

  Memory: in out weights and moments, as dense; an SVD of each kernel every m updates.

  Choose it to learn what ranks a trained layer needs, not to train with less.

  Args:
    every: m, updates between truncations.
    energy: e, the fraction of the squared Frobenius norm that stays.
    gram: see `lrjax.rank_truncation.truncate`.

  Returns:
    A Parameterization; its event is `truncate`, and changes the function.

  Raises:
    ValueError: for an energy outside of (0, 1].

  >>> trp(every=5).events[0].name
  'truncate'
  """
  event = truncation(every, rank_truncation.by_energy(energy), gram=gram)
  return dataclasses.replace(dense(), events=(event,))


def truncation(every: int, rule: rank_truncation.Rule, *, gram: bool = False) -> Event:
  """The truncation of a dense kernel as an event, exact in its own dtype."""

  def weights(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    return split._replace(
      train=rank_truncation.truncate(split.train, rule, gram=gram)
    ), {}

  return Event('truncate', weights, factors.periodic(every), preserves=False)
