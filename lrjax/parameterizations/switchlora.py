"""SwitchLoRA: a frozen kernel plus factors whose vectors are exchanged one at a time.

Zhou, Wang, Xu, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank
Information", 2024, arXiv 2406.06564.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lrjax.bases.orthonormal import mm
from lrjax.checks import finite, positive_int
from lrjax.parameterizations import factors
from lrjax.parameterizations.factors import value
from lrjax.types import Event, Parameterization, Split


@value
def switchlora(
  rank: int,
  total_steps: int,
  alpha: float = 1.0,
  interval: int = 40,
  decay: float = 0.1,
  freeze: int = 5,
) -> Parameterization:
  r"""W = K + s ab with K frozen: y = x K + s (x a) b, vectors of a and b from two pools.

  Before update k each factor may exchange vectors, the next ones in turn: column i of a
  returns to its pool of min(in, out) candidates and candidate c takes its place,

  .. math::
    K \leftarrow K + s\,(a_i - c)\,b_i^\top, \quad a_i \leftarrow c,

  so that the function stays; likewise rows of b. The gradient of :math:`a_i` depends on
  :math:`b_i` and W alone and stays too, so its moments are kept. Those of the counterpart
  :math:`b_i` start anew, and it is frozen for `freeze` updates. How many vectors: with
  :math:`q = r \max(0.3^{(k + 1) / (\rho\,T)}, 10^{-8}) / \mathrm{interval}`, the floor of
  q and one more with the probability of the rest, the same number for a and b, and at
  most as many as keeps either from reaching frozen vectors of the other.

  Start: candidates and factors uniform, with variances that give s ab the spread of
  Kaiming's draw; K = :math:`W_0` - s ab, so W is the dense draw or the given kernel.

  Give it `lrjax.vector_adam`, whose bias correction restarts with each vector, and a
  learning rate 10 to 20 times that of full training, because s = 1/r.

  Memory: r (in + out) trained weights with two moments, in out frozen ones, and pools of
  min(in, out) (in + out) frozen ones: twice a square kernel. They stay on the device; the
  public code keeps them on the host. Multiplications a token: in out + r (in + out)
  forward; a step adds 2 (r / interval + 1) in out for the exchange, whatever the batch.

  Choose it where gradient traffic and moments are what limits: full-rank learning with
  low-rank gradients. Where weights limit it costs more than dense training does.

  Args:
    rank: r, at most min(in, out); at that rank nothing is exchanged.
    total_steps: T, updates of the whole run.
    alpha: s = alpha / r.
    interval: updates between two exchanges of one vector at the start, at least twice
      `freeze`.
    decay: rho, the fraction of the run after which they are 0.3 times as frequent.
    freeze: updates for which a counterpart is frozen; 0: none.

  Returns:
    A Parameterization; its event is `switch`, at every step.

  Raises:
    ValueError: for an interval below twice `freeze`, numbers out of range, or at `init`
      for a rank that does not fit.

  Notes:
    The public code exchanges after the gradient, before the optimizer; here it comes
    before the gradient. Weights agree, because the gradients that an exchange would change
    are those of frozen vectors (with freeze = 0 they count); a norm to clip by agrees but
    for these. It draws the number from a generator of each process; here seed, path and
    step tell it. Where fewer candidates are idle than are exchanged at once, its function
    jumps, and here fewer are exchanged.

    In bfloat16 every exchange rounds K; keep the weights in float32.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> p = switchlora(2, total_steps=1000)
    >>> split, error = p.from_dense(jax.random.key(0), jnp.eye(4))
    >>> bool(jnp.allclose(p.materialize(split), jnp.eye(4), atol=1e-6))
    True
  """
  scale = finite('alpha', alpha) / positive_int('rank', rank)
  horizon = finite('decay', decay) * positive_int('total_steps', total_steps)
  if not horizon:
    raise ValueError(f'`decay` must be above 0, got {decay}')
  if positive_int('interval', interval) < 2 * (
    freeze and positive_int('freeze', freeze)
  ):
    raise ValueError(
      f'`interval` must be at least twice `freeze`={freeze}, got {interval}'
    )
  # More than the floor of q and one are never asked for, more than r do not exist.
  block = min(math.ceil(rank / interval) + 1, rank)

  def start(key: jax.Array, W: jax.Array) -> Split:
    (n, m), r = W.shape, factors.check_rank(rank, W.shape)
    key_a, key_b, c = *jax.random.split(key), min(n, m)
    std_a, std_b = spreads(n, m, r)
    draw = lambda key, shape, std: (
      math.sqrt(3) * std * jax.random.uniform(key, shape, minval=-1)
    ).astype(W.dtype)
    cand_a, cand_b = draw(key_a, (c, n), std_a), draw(key_b, (c, m), std_b)
    sel_a = jnp.arange(c - r, c, dtype=jnp.int32)
    sel_b = jnp.roll(sel_a, r // 2)
    a, b = cand_a[sel_a].T, cand_b[sel_b]
    zeros = jnp.zeros(r, jnp.int32)
    fixed = dict(
      kernel=factors.fold(W, a, b, -scale),
      cand_a=cand_a,
      cand_b=cand_b,
      sel_a=sel_a,
      sel_b=sel_b,
      ptr_a=jnp.int32(0),
      ptr_b=jnp.int32(r // 2),
      freeze_a=zeros,
      freeze_b=zeros,
    )
    return Split({'a': a, 'b': b}, fixed)

  def init(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    key_W, key_a = jax.random.split(key)
    return start(key_a, factors.dense_init(key_W, shape).astype(dtype))

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    split = start(key, jnp.asarray(W))
    return split, factors.relative_error(W, materialize(split))

  def materialize(split: Split) -> jax.Array:
    return factors.fold(
      split.fixed['kernel'], split.train['a'], split.train['b'], scale
    )

  def apply(split: Split, x: jax.Array) -> jax.Array:
    f = split.fixed
    hold = lambda w, frozen: jnp.where(frozen, jax.lax.stop_gradient(w), w)
    a = hold(split.train['a'], (f['freeze_a'] > 0)[None])
    b = hold(split.train['b'], (f['freeze_b'] > 0)[:, None])
    return x @ f['kernel'] + (scale * factors.down(x, a)) @ b

  def event(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    wanted = rank * switch_rate(k, horizon) / interval
    more = jax.random.uniform(key) < wanted - jnp.floor(wanted)
    count = jnp.floor(wanted).astype(jnp.int32) + more
    return switch(split, count, scale, freeze, block)

  return Parameterization(
    init=init,
    from_dense=from_dense,
    apply=apply,
    materialize=materialize,
    axes={
      'a': ('in', None),
      'b': (None, 'out'),
      'kernel': ('in', 'out'),
      'cand_a': (None, 'in'),
      'cand_b': (None, 'out'),
      **{f'{n}_{x}': (None,) for n in ('sel', 'freeze') for x in 'ab'},
      **{f'ptr_{x}': () for x in 'ab'},
    },
    events=(Event('switch', event),),
  )


def spreads(n: int, m: int, r: int) -> tuple[float, float]:
  """Standard deviations of a and b for in n and out m; (1/r) ab has (3 n)^-1/2."""
  gain = math.sqrt(1 / 3)
  std_a = (math.sqrt(m) * r / n**1.5) ** 0.25 * math.sqrt(gain)
  return std_a, (r / math.sqrt(n * m)) ** 0.25 * math.sqrt(gain)


def switch_rate(k: jax.Array, horizon: float) -> jax.Array:
  """How frequent exchanges before update k are, next to those of the start."""
  return jnp.maximum(jnp.exp(math.log(0.3) * (k + 1) / horizon), 1e-8)


def switch(
  split: Split, count: jax.Array, scale: float, freeze: int, block: int
) -> tuple[Split, dict]:
  """Exchanges `count` vectors of a and of b, or as many as may be.

  Args:
    split: arrays of one kernel of `switchlora`.
    count: int32, how many of each are wanted, at most `block`.
    scale: s.
    freeze: updates for which their counterparts are frozen.
    block: static, the most that can be asked for.

  Returns:
    The arrays with all counters one update on, and which vectors' moments start anew.
  """
  f, a, b = split.fixed, split.train['a'], split.train['b']
  frozen_a, frozen_b = (jnp.maximum(f[n] - 1, 0) for n in ('freeze_a', 'freeze_b'))
  (c, _), r = f['cand_a'].shape, b.shape[0]
  # Slot i is not exchanged while its counterpart is frozen, nor for a candidate in use.
  room_a = (f['ptr_a'] - (frozen_a > 0).sum() - f['ptr_b']) % r
  room_b = (f['ptr_b'] - (frozen_b > 0).sum() - f['ptr_a']) % r
  count = jnp.minimum(count, jnp.minimum(jnp.minimum(room_a, room_b), c - r))
  in_a = _exchange(a.T, f['cand_a'], f['sel_a'], f['ptr_a'], count, block)
  in_b = _exchange(b, f['cand_b'], f['sel_b'], f['ptr_b'], count, block)
  # No slot is in both, so the rows beside an exchanged one are as they were.
  rows_a = jnp.concatenate([in_a.difference, a.T[in_b.slots].astype(jnp.float32)])
  rows_b = jnp.concatenate([b[in_a.slots].astype(jnp.float32), in_b.difference])
  kernel = f['kernel'].astype(jnp.float32) + scale * mm(rows_a.T, rows_b)
  fixed = dict(
    kernel=kernel.astype(f['kernel'].dtype),
    cand_a=in_a.pool,
    cand_b=in_b.pool,
    sel_a=in_a.selected,
    sel_b=in_b.selected,
    ptr_a=(f['ptr_a'] + count) % r,
    ptr_b=(f['ptr_b'] + count) % r,
    freeze_a=jnp.where(in_b.changed, freeze, frozen_a),
    freeze_b=jnp.where(in_a.changed, freeze, frozen_b),
  )
  touched = {'a': in_b.changed[None], 'b': in_a.changed[:, None]}
  return Split({'a': in_a.rows.T, 'b': in_b.rows}, fixed), touched


class _Exchanged(NamedTuple):
  """One factor as rows (r, n) after an exchange; S is the block.

  Attributes:
    rows: the factor.
    pool: candidates (c, n).
    selected: int32 (r,), which candidate each row is.
    slots: int32 (S,), the rows that may have changed.
    changed: bool (r,), those that have.
    difference: float32 (S, n), old less new; 0 where none was exchanged.
  """

  rows: jax.Array
  pool: jax.Array
  selected: jax.Array
  slots: jax.Array
  changed: jax.Array
  difference: jax.Array


def _exchange(rows, pool, selected, first, count, block) -> _Exchanged:
  """Rows first, first + 1, ... for the candidates that follow the newest one."""
  (r, _), (c, _) = rows.shape, pool.shape
  turn = jnp.arange(block, dtype=jnp.int32)
  slots, live = (first + turn) % r, turn < count
  chosen = (selected[first - 1] + 1 + turn) % c
  old, new = rows[slots], pool[chosen]
  at = jnp.where(live, slots, r)  # indices out of range are dropped
  home = jnp.where(live, selected[slots], c)
  difference = old.astype(jnp.float32) - new.astype(jnp.float32)
  return _Exchanged(
    rows=rows.at[at].set(new, mode='drop'),
    pool=pool.at[home].set(old, mode='drop'),
    selected=selected.at[at].set(chosen, mode='drop'),
    slots=slots,
    changed=jnp.zeros(r, bool).at[at].set(True, mode='drop'),
    difference=jnp.where(live[:, None], difference, 0),
  )
