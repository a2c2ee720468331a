"""Flax shells over the pure functions: `nnx`, `linen`, and swaps in others' models."""
