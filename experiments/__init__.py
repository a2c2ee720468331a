"""Experiments that compare low-rank methods on real text."""
