"""Hot operations as kernels: an XLA definition, a TPU and a GPU form of each."""

from lrjax.kernels.adam_8bit import adam_8bit
from lrjax.kernels.column_scores import column_scores
from lrjax.kernels.project import project
from lrjax.kernels.scaled_residual import scaled_residual
from lrjax.kernels.signed_residual import signed_residual
from lrjax.kernels.sparse_plus_low_rank import sparse_plus_low_rank_matmul

__all__ = [
  'adam_8bit',
  'column_scores',
  'project',
  'scaled_residual',
  'signed_residual',
  'sparse_plus_low_rank_matmul',
]
