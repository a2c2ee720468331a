"""Hot operations as kernels: an XLA definition, a TPU and a GPU form of each."""

from lrjax.kernels.project import project

__all__ = ['project']
