"""How a subspace is found: each basis is a `lrjax.types.Basis`."""

from lrjax.bases.columns import columns, entries
from lrjax.bases.dct import dct
from lrjax.bases.gaussian import gaussian
from lrjax.bases.grassmann import grassmann
from lrjax.bases.heaviest import heaviest
from lrjax.bases.orthonormal import eigh, randomized_svd, subspace_iteration, svd
from lrjax.bases.random_orthogonal import random_orthogonal
from lrjax.bases.stored import stored_as
from lrjax.bases.switched import switched
from lrjax.bases.two_sided import two_sided

NAMES = dict(
  columns=columns,
  entries=entries,
  svd=svd,
  eigh=eigh,
  gaussian=gaussian,
  random_orthogonal=random_orthogonal,
  randomized_svd=randomized_svd,
  subspace_iteration=subspace_iteration,
  dct=dct,
  heaviest=heaviest,
)

__all__ = [
  'NAMES',
  'columns',
  'dct',
  'eigh',
  'entries',
  'gaussian',
  'grassmann',
  'heaviest',
  'random_orthogonal',
  'randomized_svd',
  'stored_as',
  'subspace_iteration',
  'svd',
  'switched',
  'two_sided',
]
