"""The batteries that every method of its kind must pass; use them on your own.

Transformations: `lrjax.testing.CHECKS`. Parameterizations:
`lrjax.testing.parameterizations.CHECKS`.
"""

from lrjax.testing.hlo import collectives as collectives
from lrjax.testing.transforms import CHECKS as CHECKS
from lrjax.testing.transforms import SHAPES as SHAPES
from lrjax.testing.transforms import SPECS as SPECS
from lrjax.testing.transforms import example as example
from lrjax.testing.transforms import shards_like_one_device as shards_like_one_device
from lrjax.testing.transforms import trajectory as trajectory
