"""Flax shells over the pure functions: `lrjax.modules.nnx`, `lrjax.modules.linen`."""
