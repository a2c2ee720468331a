"""What becomes of the part of a gradient that the subspace misses."""

from lrjax.residuals.plain import drop, error_feedback

__all__ = ['drop', 'error_feedback']
