#!/usr/bin/env bash
# One process of a run, to be started on every host (or for every GPU of a cluster):
#   RUNS=/shared/runs experiments/launch/host.sh --preset galore_60m --mesh.fsdp 32
#
# RUNS         directory of all runs, on storage that every host sees at this path
# COORDINATOR  host:port of process 0, with PROCESSES and PROCESS (from 0); left out on
#              Cloud TPU and under SLURM, where jax finds the others by itself
# PYTHON       interpreter, default python3
set -euo pipefail
RUNS=${RUNS:?a directory that every host sees, RUNS=/shared/runs}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -n ${COORDINATOR:-} ]]; then
  peers=(--coordinator "$COORDINATOR"
    --processes "${PROCESSES:?how many processes there are, beside COORDINATOR}"
    --process "${PROCESS:?the number of this one, from 0, beside COORDINATOR}")
else
  peers=(--coordinator auto)
fi
exec "${PYTHON:-python3}" -m experiments.train "${peers[@]}" --runs "$RUNS" "$@"
