"""Low-rank training in JAX: one flat public list, grouped by family."""

# Layers of hyperbolic space; weights in 8 bits; truncation of dense weights.
from lrjax import hyperbolic, int8_weights, rank_truncation

# Sums over micro-batches.
from lrjax.accumulation import accumulate_sketches

# Bases: how a subspace is found.
from lrjax.bases import (
  columns,
  dct,
  eigh,
  entries,
  gaussian,
  grassmann,
  heaviest,
  random_orthogonal,
  randomized_svd,
  stored_as,
  subspace_iteration,
  svd,
  switched,
  two_sided,
)

# Orthogonal factors.
from lrjax.bases.qr import cholesky_qr, householder_qr

# Codecs: how arrays are stored.
from lrjax.codecs import affine, cast, dynamic8, int8

# Inner optimizers.
from lrjax.dividing import divided
from lrjax.eight_bit import eight_bit

# Weights and state in one step.
from lrjax.in_place import in_place

# What an optimizer does and how it fares.
from lrjax.inspection import coverage, diagnostics, health

# Updates inside the backward pass.
from lrjax.layerwise import Parts, layerwise

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
from lrjax.optimizers.dion2 import dion2, scale_by_dion2
from lrjax.optimizers.fira import fira, scale_by_fira
from lrjax.optimizers.flora import flora, scale_by_flora
from lrjax.optimizers.frugal import frugal, scale_by_frugal
from lrjax.optimizers.galore import galore, scale_by_galore
from lrjax.optimizers.galore_8bit import galore_8bit, scale_by_galore_8bit
from lrjax.optimizers.golore import golore, scale_by_golore
from lrjax.optimizers.ldadam import ldadam, scale_by_ldadam
from lrjax.optimizers.online_subspace_descent import (
  online_subspace_descent,
  scale_by_online_subspace_descent,
)
from lrjax.optimizers.owlore import (
  outlier_ratio,
  outlier_scores,
  owlore,
  scale_by_owlore,
)
from lrjax.optimizers.q_galore import q_galore, scale_by_q_galore
from lrjax.optimizers.subtrack import scale_by_subtrack, subtrack
from lrjax.optimizers.trion import scale_by_trion, trion

# Widths of a model's kernels.
from lrjax.ordered_dropout import full_width, sample_widths
from lrjax.orthogonalize import newton_schulz, polar

# Parameterizations: how a kernel is stored and applied.
from lrjax.parameterizations.cola import cola
from lrjax.parameterizations.dense import dense
from lrjax.parameterizations.dsformer import dsformer, strip_latent
from lrjax.parameterizations.factorized import factorized
from lrjax.parameterizations.householder import householder, householder_orthogonal
from lrjax.parameterizations.lost import lost
from lrjax.parameterizations.maestro import compact, hierarchical_group_lasso, maestro
from lrjax.parameterizations.monarch import monarch
from lrjax.parameterizations.relora import relora
from lrjax.parameterizations.self_guided import self_guided, strip_guide
from lrjax.parameterizations.sltrain import sltrain
from lrjax.parameterizations.snnk import bundle, snnk, solve_last_layer
from lrjax.parameterizations.sst import sst
from lrjax.parameterizations.switchlora import switchlora
from lrjax.parameterizations.trp import trp
from lrjax.penalties import add_penalty, frobenius, frobenius_decay

# Gradients projected where they arise.
from lrjax.probes import Probed
from lrjax.projected import projectable, projected_value_and_grad, wants_gradient

# The remaining parts of the loop.
from lrjax.refreshes import every, lazy
from lrjax.residuals import drop, error_feedback, scale_full, state_free

# Kernels of other shapes.
from lrjax.resizing import resize

# State spaces.
from lrjax.s4d import s4d_convolve, s4d_init, s4d_kernel, s4d_labels, s4d_scan, s4d_step
from lrjax.sampling import sampled_layers
from lrjax.schedules import with_restarts
from lrjax.sharding import state_specs
from lrjax.sketching import sketched_refresh
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
  Event,
  Lifted,
  MatrixTransform,
  Parameterization,
  Projected,
  Refresh,
  Residual,
  Split,
  View,
)

# Adam for factors.
from lrjax.vector_adam import scale_by_vector_adam, vector_adam
from lrjax.views import hidden_kernels

# Parameterized kernels of a whole model.
from lrjax.weights import Weights, convert, due_events, export, run_events, step_events

__version__ = '0.1.0'

__all__ = [
  'Basis',
  'Change',
  'Codec',
  'Event',
  'Lifted',
  'MatrixTransform',
  'Parameterization',
  'Parts',
  'Probed',
  'Projected',
  'Refresh',
  'Residual',
  'Split',
  'View',
  'Weights',
  'accumulate_sketches',
  'adam',
  'add_penalty',
  'affine',
  'apollo',
  'apollo_mini',
  'bias_corrected',
  'bundle',
  'cast',
  'cholesky_qr',
  'cola',
  'columns',
  'compact',
  'convert',
  'coverage',
  'dct',
  'dct_adamw',
  'dense',
  'diagnostics',
  'dion',
  'dion2',
  'divided',
  'drop',
  'dsformer',
  'due_events',
  'dynamic8',
  'eigh',
  'eight_bit',
  'entries',
  'error_feedback',
  'every',
  'export',
  'factored_rms',
  'factorized',
  'fira',
  'flora',
  'frobenius',
  'frobenius_decay',
  'frugal',
  'full_width',
  'galore',
  'galore_8bit',
  'gaussian',
  'golore',
  'grassmann',
  'health',
  'heaviest',
  'hidden_kernels',
  'hierarchical_group_lasso',
  'householder',
  'householder_orthogonal',
  'householder_qr',
  'hyperbolic',
  'in_place',
  'int8',
  'int8_weights',
  'keep',
  'layerwise',
  'lazy',
  'ldadam',
  'lost',
  'low_rank',
  'maestro',
  'monarch',
  'newton_schulz',
  'on_matrices',
  'online_subspace_descent',
  'outlier_ratio',
  'outlier_scores',
  'owlore',
  'polar',
  'projectable',
  'projected_value_and_grad',
  'projection_aware',
  'q_galore',
  'random_orthogonal',
  'randomized_svd',
  'rank_truncation',
  'relora',
  'reset',
  'resize',
  'rotate_abs',
  'rotate_first',
  'rotate_square',
  'run_events',
  's4d_convolve',
  's4d_init',
  's4d_kernel',
  's4d_labels',
  's4d_scan',
  's4d_step',
  'sample_widths',
  'sampled_layers',
  'scale_by_apollo',
  'scale_by_apollo_mini',
  'scale_by_dct_adamw',
  'scale_by_dion',
  'scale_by_dion2',
  'scale_by_fira',
  'scale_by_flora',
  'scale_by_frugal',
  'scale_by_galore',
  'scale_by_galore_8bit',
  'scale_by_golore',
  'scale_by_ldadam',
  'scale_by_online_subspace_descent',
  'scale_by_owlore',
  'scale_by_q_galore',
  'scale_by_subtrack',
  'scale_by_trion',
  'scale_by_vector_adam',
  'scale_full',
  'self_guided',
  'sketched_refresh',
  'sltrain',
  'snnk',
  'solve_last_layer',
  'sst',
  'state_free',
  'state_specs',
  'step_events',
  'stored_as',
  'strip_guide',
  'strip_latent',
  'subspace_iteration',
  'subtrack',
  'svd',
  'switched',
  'switchlora',
  'trion',
  'trp',
  'two_sided',
  'vector_adam',
  'wants_gradient',
  'with_restarts',
]
