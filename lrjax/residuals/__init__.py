"""What becomes of the part of a gradient that the subspace misses."""

from lrjax.residuals.plain import STATE_FREE, drop, error_feedback, state_free
from lrjax.residuals.scaled import fira, scale_full

__all__ = ['STATE_FREE', 'drop', 'error_feedback', 'fira', 'scale_full', 'state_free']
