"""Low-rank training in JAX: one flat public list, grouped by family."""

# Weights in 8 bits.
from lrjax import int8_weights

# Bases: how a subspace is found.
from lrjax.bases import (
  columns,
  dct,
  eigh,
  entries,
  gaussian,
  random_orthogonal,
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
from lrjax.optimizers.apollo import (
  apollo,
  apollo_mini,
  scale_by_apollo,
  scale_by_apollo_mini,
)
from lrjax.optimizers.dct_adamw import dct_adamw, scale_by_dct_adamw
from lrjax.optimizers.dion import dion, scale_by_dion
from lrjax.optimizers.fira import fira, scale_by_fira
from lrjax.optimizers.frugal import frugal, scale_by_frugal
from lrjax.optimizers.galore import galore, scale_by_galore
from lrjax.optimizers.galore_8bit import galore_8bit, scale_by_galore_8bit
from lrjax.optimizers.ldadam import ldadam, scale_by_ldadam
from lrjax.optimizers.owlore import (
  outlier_ratio,
  outlier_scores,
  owlore,
  scale_by_owlore,
)
from lrjax.optimizers.q_galore import q_galore, scale_by_q_galore
from lrjax.optimizers.trion import scale_by_trion, trion

# Orthogonal factors.
from lrjax.orthogonalize import newton_schulz, polar

# The remaining parts of the loop.
from lrjax.refreshes import every, lazy
from lrjax.residuals import drop, error_feedback, scale_full, state_free
from lrjax.sampling import sampled_layers

# The remaining parts of the loop.
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
  'apollo',
  'apollo_mini',
  'bias_corrected',
  'cast',
  'columns',
  'coverage',
  'dct',
  'dct_adamw',
  'diagnostics',
  'dion',
  'drop',
  'dynamic8',
  'eigh',
  'eight_bit',
  'entries',
  'error_feedback',
  'every',
  'factored_rms',
  'fira',
  'frugal',
  'galore',
  'galore_8bit',
  'gaussian',
  'health',
  'hidden_kernels',
  'int8',
  'int8_weights',
  'keep',
  'lazy',
  'ldadam',
  'low_rank',
  'newton_schulz',
  'on_matrices',
  'outlier_ratio',
  'outlier_scores',
  'owlore',
  'polar',
  'projection_aware',
  'q_galore',
  'random_orthogonal',
  'randomized_svd',
  'reset',
  'rotate_abs',
  'rotate_square',
  'sampled_layers',
  'scale_by_apollo',
  'scale_by_apollo_mini',
  'scale_by_dct_adamw',
  'scale_by_dion',
  'scale_by_fira',
  'scale_by_frugal',
  'scale_by_galore',
  'scale_by_galore_8bit',
  'scale_by_ldadam',
  'scale_by_owlore',
  'scale_by_q_galore',
  'scale_by_trion',
  'scale_full',
  'state_free',
  'state_specs',
  'stored_as',
  'subspace_iteration',
  'svd',
  'trion',
  'two_sided',
]
