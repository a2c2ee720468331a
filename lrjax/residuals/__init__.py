"""What becomes of the part of a gradient that the subspace misses."""

from lrjax.residuals.plain import drop, error_feedback
from lrjax.residuals.scaled import fira, scale_full

__all__ = ['drop', 'error_feedback', 'fira', 'scale_full']
