#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process, parameters and states divided:
#   experiments/launch/gpu_node.sh --preset galore_60m --model.dtype bfloat16
#
# GPUS    how many, default all that nvidia-smi lists
# PYTHON  interpreter, default python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -z ${GPUS:-} ]]; then
  command -v nvidia-smi > /dev/null ||
    { echo "$0: nvidia-smi is not on PATH; say how many GPUs: GPUS=8" >&2; exit 1; }
  GPUS=$(nvidia-smi --list-gpus | wc -l)
fi
[[ $GPUS =~ ^[1-9][0-9]*$ ]] ||
  { echo "$0: GPUS must be a number from 1, got '$GPUS'" >&2; exit 1; }
exec "${PYTHON:-python3}" -m experiments.train --mesh.fsdp "$GPUS" "$@"
