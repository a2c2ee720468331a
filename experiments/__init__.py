"""Experiments that compare low-rank methods on real text."""

import os

# With several threads OpenBLAS, which decomposes matrices on a CPU, spins for a core that
# XLA's own threads hold: an SVD of 0.04 s was seen to take 15 s beside two busy processes.
# One thread was as fast on idle cores. It is read when numpy or jax is first imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
