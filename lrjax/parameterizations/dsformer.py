"""DSFormer: kernels of a small dense basis times semi-structured sparse codes.

Chand et al., "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight
Factorization", 2023, arXiv 2312.13211. A reconstruction: there is no public code. From
the paper are the form (blocks, a small dense basis, as many codes in each row) and that
the gradient goes straight through the factorizer to a dense latent kernel; which side is
cut into blocks, how the factorizer works and how often it runs are choices of our own.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lrjax.bases.qr import HIGHEST
from lrjax.checks import named, positive_int
from lrjax.parameterizations import factors, sparse_coding
from lrjax.parameterizations.factors import value
from lrjax.parameterizations.sparse_coding import Code, improve
from lrjax.types import Event, Parameterization, Split

Mode = Literal['stf', 'factor']
Blocks = Literal['out', 'in']
Coder = Literal['one_shot', 'omp']


@value
def dsformer(
  atoms: int,
  nnz: int,
  width: int = 64,
  mode: Mode = 'stf',
  blocks: Blocks = 'out',
  coder: Coder = 'one_shot',
  rounds: int = 10,
  refresh_every: int = 1,
  freeze_after: int | None = None,
) -> Parameterization:
  r"""W = [C_1 D_1 ... C_n D_n]: basis D_b (m, w), s numbers in each row of C_b (in, m).

  A reconstruction, see the module. Two modes:

  - `stf`, the straight-through factorizer: a dense latent K is trained, y = x F(K) with
    :math:`\partial L / \partial K := \partial L / \partial F(K)`. F starts from the codes
    and bases of the update before and does a round of alternating least squares;
  - `factor`: the numbers in C (`values`) and D (`basis`) are trained, the places of the
    numbers (`index`) stay.

  A round of F, for each block of K: every row gets the s atoms that `coder` finds if they
  fit it better than those it has, and its numbers by least squares; then D by least
  squares. The error cannot grow. At the start D has the leading right singular vectors of
  the block (rows of it beyond these), and `rounds` rounds use matching pursuit.

  With s = m and one block it is low rank; `lrjax.strip_latent` turns `stf` into `factor`.

  Memory of `factor`: in s out / w + m out weights, as many of each moment, and in s out / w
  indices. Of `stf`: a dense kernel and its moments, and all that besides, so MORE than
  dense training; a round needs in m out / w floats for a moment, and in s^2 out / w.
  Multiplications: in m out for W once a pass and in out a token, as W is formed for each
  product; on dense hardware that is faster than sparse sums. W is not kept for the
  backward pass.

  Choose it to end with a small model, at more memory and time in training: `stf` first,
  then `factor`. It is published for fine-tuning of text encoders, not for training from
  scratch, and claims memory, not speed.

  Args:
    atoms: m, rows of a basis; the paper's compression follows from it and `nnz`.
    nnz: s, numbers in a row of C_b.
    width: w, columns of a block; the last block may be narrower.
    mode: what is trained.
    blocks: which side is cut, `in` for W transposed.
    coder: how a round finds places. `one_shot`: the largest terms of the fit by all
      atoms; `omp`: orthogonal matching pursuit, better and s times the cost.
    rounds: at the start and in `from_dense`.
    refresh_every: updates between rounds in `stf`; 1: in each compiled step.
    freeze_after: updates after which places stay and only numbers and bases are
      refitted, 80 to 90 % of a run; None: never.

  Returns:
    A Parameterization; in `stf` its event is `refactorize`.

  Raises:
    ValueError: for an unknown word, or `nnz` above `atoms` or `width`; at `init` for
      more atoms or a larger width than the kernel has.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> p = dsformer(atoms=4, nnz=2, width=8, mode='factor')
    >>> split = p.init(jax.random.key(0), (12, 16), jnp.float32)
    >>> jax.tree.map(jnp.shape, split.train)
    {'basis': (4, 16), 'values': (2, 12, 2)}
  """
  straight = named('mode', mode, {'stf': True, 'factor': False})
  axes = named('blocks', blocks, _AXES)
  find = named('coder', coder, _CODERS)
  for name, n in (('nnz', nnz), ('atoms', atoms), ('width', width), ('rounds', rounds)):
    positive_int(name, n)
  if nnz > (most := min(atoms, width)):
    raise ValueError(f'nnz must be at most min(atoms, width) = {most}, got {nnz}')
  fit = lambda key, K: sparse_coding.fit(key, K, atoms, nnz, rounds)
  cut = lambda W: _cut(_turn(W, blocks).astype(jnp.float32), width)
  kernel = functools.partial(_kernel, width=width, blocks=blocks)

  def start(key: jax.Array, shape: tuple, dtype: jax.typing.DTypeLike) -> Split:
    drawn, fitted = jax.random.split(key)
    return from_dense(fitted, factors.dense_init(drawn, shape).astype(dtype))[0]

  def from_dense(key: jax.Array, W: jax.Array) -> tuple[Split, jax.Array]:
    _check(atoms, width, blocks, W.shape)
    K = cut(W)
    code = jax.vmap(fit)(jax.random.split(key, len(K)), K)
    split = Split(W, _stored(code, W.shape, blocks))
    error = factors.relative_error(W, kernel(split.fixed, HIGHEST))
    return (split if straight else strip_latent(split)), error

  def refactorize(key: jax.Array, split: Split, k: jax.Array) -> tuple[Split, dict]:
    old = split.fixed
    code = Code(old['index'], old['values'], _cut(old['basis'], width))
    moves = True if freeze_after is None else k < freeze_after
    round_ = lambda K, code: improve(K, code, find(K, code.basis, nnz), moves)
    code = jax.vmap(round_)(cut(split.train), code)
    return split._replace(fixed=_stored(code, split.train.shape, blocks)), {}

  def W_of(split: Split, precision: Any = None) -> jax.Array:
    if not straight:
      return kernel({**split.fixed, **split.train}, precision)
    return _straight_through(split.train, kernel(split.fixed, precision))

  event = Event(
    'refactorize',
    refactorize,
    None if refresh_every == 1 else factors.periodic(refresh_every),
    preserves=False,
  )
  code_axes = {
    'index': (None, axes[0], None),
    'values': (None, axes[0], None),
    'basis': (None, axes[1]),
  }
  return Parameterization(
    init=start,
    from_dense=from_dense,
    # Neither C nor W is kept for the backward pass.
    apply=jax.checkpoint(lambda split, x: x @ W_of(split)),
    materialize=lambda split: W_of(split, HIGHEST),
    axes=code_axes | ({'': ('in', 'out')} if straight else {}),
    events=(event,) if straight else (),
  )


def strip_latent(split: Split) -> Split:
  """Drops the latent kernel of `stf`: the same function, in mode `factor`.

  Args:
    split: of one kernel or of a stack; others come back as they are.

  Returns:
    The Split of `dsformer` with equal arguments and mode `factor`.

  >>> import jax, jax.numpy as jnp
  >>> p = dsformer(atoms=4, nnz=2, width=8)
  >>> split = strip_latent(p.init(jax.random.key(0), (12, 16), jnp.float32))
  >>> sorted(split.train), sorted(split.fixed)
  (['basis', 'values'], ['index'])
  """
  if not {'index', 'values', 'basis'} <= split.fixed.keys():
    return split
  floats = {k: split.fixed[k].astype(split.train.dtype) for k in ('values', 'basis')}
  return Split(floats, {'index': split.fixed['index']})


@jax.custom_jvp
def _straight_through(latent, W):
  """W, with the gradient of `latent`."""
  return W.astype(latent.dtype)


_straight_through.defjvps(lambda t, out, latent, W: t, None)


def _kernel(arrays, precision=None, *, width, blocks):
  """W (in, out) of `index`, `values` and `basis`."""
  D = _cut(arrays['basis'], width)
  scatter = functools.partial(sparse_coding.scatter, atoms=D.shape[1])
  C = jax.vmap(scatter)(arrays['index'], arrays['values'])
  W = jnp.einsum('brm,bmw->rbw', C, D, precision=precision)
  return _turn(W.reshape(len(W), -1)[:, : arrays['basis'].shape[1]], blocks)


def _stored(code, shape, blocks):
  """The arrays of a code whose axes before all others are the blocks."""
  columns = shape[1] if blocks == 'out' else shape[0]
  D = code.basis.swapaxes(0, 1)
  basis = D.reshape(len(D), -1)[:, :columns]
  return {'index': code.index, 'values': code.values, 'basis': basis}


def _cut(W, width):
  """(n, columns) to (blocks, n, width), the last one filled with zeros."""
  n, columns = W.shape
  count = -(-columns // width)
  W = jnp.pad(W, [(0, 0), (0, count * width - columns)])
  return W.reshape(n, count, width).swapaxes(0, 1)


def _turn(W, blocks):
  return W if blocks == 'out' else W.T


def _check(atoms, width, blocks, shape):
  rows, columns = shape if blocks == 'out' else shape[::-1]
  for name, given, most in (('atoms', atoms, rows), ('width', width, columns)):
    if given > most:
      raise ValueError(
        f'{name} must be at most {most} for a kernel of shape {tuple(shape)} in blocks of'
        f' `{blocks}`, got {given}'
      )


_CODERS = {'one_shot': sparse_coding.one_shot, 'omp': sparse_coding.omp}
_AXES = {'out': ('in', 'out'), 'in': ('out', 'in')}
