"""Low-rank training in JAX: one flat public list, grouped by family."""

# Bases: how a subspace is found.
from lrjax.bases import (
  eigh,
  gaussian,
  grassmann,
  random_orthogonal,
  randomized_svd,
  stored_as,
  subspace_iteration,
  svd,
  switched,
  two_sided,
)

# Codecs: how arrays are stored.
from lrjax.codecs import cast, int8

# What an optimizer does and how it fares.
from lrjax.inspection import coverage, diagnostics, health

# Updates inside the backward pass.
from lrjax.layerwise import Parts, layerwise

# The loop and the lift.
from lrjax.low_rank import bias_corrected, low_rank
from lrjax.matrices import on_matrices

# Inner optimizers.
from lrjax.moments import adam, factored_rms

# Optimizers.
from lrjax.optimizers.galore import galore, scale_by_galore
from lrjax.optimizers.golore import golore, scale_by_golore
from lrjax.optimizers.online_subspace_descent import (
  online_subspace_descent,
  scale_by_online_subspace_descent,
)
from lrjax.optimizers.subtrack import scale_by_subtrack, subtrack

# The remaining parts of the loop.
from lrjax.refreshes import every
from lrjax.residuals import drop, error_feedback, scale_full
from lrjax.sharding import state_specs
from lrjax.transports import (
  keep,
  projection_aware,
  reset,
  rotate_abs,
  rotate_first,
  rotate_square,
)

# The values parts exchange.
from lrjax.types import (
  Basis,
  Change,
  Codec,
  MatrixTransform,
  Parameterization,
  Refresh,
  Residual,
  Split,
  View,
)
from lrjax.views import hidden_kernels

__version__ = '0.1.0'

__all__ = [
  'Basis',
  'Change',
  'Codec',
  'MatrixTransform',
  'Parameterization',
  'Parts',
  'Refresh',
  'Residual',
  'Split',
  'View',
  'adam',
  'bias_corrected',
  'cast',
  'coverage',
  'diagnostics',
  'drop',
  'eigh',
  'error_feedback',
  'every',
  'factored_rms',
  'galore',
  'gaussian',
  'golore',
  'grassmann',
  'health',
  'hidden_kernels',
  'int8',
  'keep',
  'layerwise',
  'low_rank',
  'on_matrices',
  'online_subspace_descent',
  'projection_aware',
  'random_orthogonal',
  'randomized_svd',
  'reset',
  'rotate_abs',
  'rotate_first',
  'rotate_square',
  'scale_by_galore',
  'scale_by_golore',
  'scale_by_online_subspace_descent',
  'scale_by_subtrack',
  'scale_full',
  'state_specs',
  'stored_as',
  'subspace_iteration',
  'subtrack',
  'svd',
  'switched',
  'two_sided',
]
