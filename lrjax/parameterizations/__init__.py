"""Weights as values: how one kernel is stored and applied."""

from lrjax.parameterizations.dense import dense as dense
