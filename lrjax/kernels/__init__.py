"""Hot operations as kernels: an XLA definition, a TPU and a GPU form of each."""

from lrjax.kernels.lift_and_apply import lift_and_apply
from lrjax.kernels.low_rank_adam import low_rank_adam
from lrjax.kernels.project import project

__all__ = ['lift_and_apply', 'low_rank_adam', 'project']
