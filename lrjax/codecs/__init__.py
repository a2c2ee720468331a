"""How arrays are stored: pairs of encode and decode."""

from lrjax.codecs.affine import affine
from lrjax.codecs.dynamic import dynamic8
from lrjax.codecs.linear import cast, int8

__all__ = ['affine', 'cast', 'dynamic8', 'int8']
