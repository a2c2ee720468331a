"""Low-rank training in JAX."""
