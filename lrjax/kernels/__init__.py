"""Hot operations as kernels: an XLA definition, a TPU and a GPU form of each."""

from lrjax.kernels.adam_8bit import adam_8bit
from lrjax.kernels.column_scores import column_scores
from lrjax.kernels.lift_and_add import lift_and_add
from lrjax.kernels.lift_and_apply import lift_and_apply
from lrjax.kernels.low_rank_adam import low_rank_adam
from lrjax.kernels.project import project
from lrjax.kernels.sparse_plus_low_rank import sparse_plus_low_rank_matmul

__all__ = [
  'adam_8bit',
  'column_scores',
  'lift_and_add',
  'lift_and_apply',
  'low_rank_adam',
  'project',
  'sparse_plus_low_rank_matmul',
]
