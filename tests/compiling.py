"""Flags of XLA for processes that compile much and compute little."""

import importlib.metadata

QUICK = ['--xla_backend_optimization_level=0']
# Half the time to compile; newer releases no longer have the other emitters.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  QUICK.append('--xla_cpu_use_fusion_emitters=false')
