"""Low-rank training in JAX: one flat public list, grouped by family."""

# Weights in 8 bits.
from lrjax import int8_weights

# Bases: how a subspace is found.
from lrjax.bases import (
  eigh,
  randomized_svd,
  stored_as,
  subspace_iteration,
  svd,
  two_sided,
)

# Codecs: how arrays are stored.
from lrjax.codecs import affine, cast, dynamic8, int8

# Inner optimizers.
from lrjax.eight_bit import eight_bit

# What an optimizer does and how it fares.
from lrjax.inspection import coverage, diagnostics, health

# The loop and the lift.
from lrjax.low_rank import bias_corrected, low_rank
from lrjax.matrices import on_matrices
from lrjax.moments import adam, factored_rms

# Optimizers.
from lrjax.optimizers.galore import galore, scale_by_galore
from lrjax.optimizers.galore_8bit import galore_8bit, scale_by_galore_8bit
from lrjax.optimizers.q_galore import q_galore, scale_by_q_galore

# The remaining parts of the loop.
from lrjax.refreshes import every, lazy
from lrjax.residuals import drop, error_feedback
from lrjax.sharding import state_specs
from lrjax.transports import keep, projection_aware, reset, rotate_abs, rotate_square

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
  'Refresh',
  'Residual',
  'Split',
  'View',
  'adam',
  'affine',
  'bias_corrected',
  'cast',
  'coverage',
  'diagnostics',
  'drop',
  'dynamic8',
  'eigh',
  'eight_bit',
  'error_feedback',
  'every',
  'factored_rms',
  'galore',
  'galore_8bit',
  'health',
  'hidden_kernels',
  'int8',
  'int8_weights',
  'keep',
  'lazy',
  'low_rank',
  'on_matrices',
  'projection_aware',
  'q_galore',
  'randomized_svd',
  'reset',
  'rotate_abs',
  'rotate_square',
  'scale_by_galore',
  'scale_by_galore_8bit',
  'scale_by_q_galore',
  'state_specs',
  'stored_as',
  'subspace_iteration',
  'svd',
  'two_sided',
]
