#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, from a machine with gcloud:
#   TPU_NAME=my-slice ZONE=my-zone RUNS=/shared/runs CODE=lrjax \
#     experiments/launch/tpu_pod.sh --preset galore_60m --mesh.fsdp 32
#
# TPU_NAME, ZONE  of the slice; PROJECT, if it is not gcloud's default
# CODE            directory of this repository on the hosts, where
#                 `pip install -e .[tpu,experiments]` was run
# RUNS, PYTHON    see host.sh
set -euo pipefail
TPU_NAME=${TPU_NAME:?name of the TPU slice, TPU_NAME=...}
ZONE=${ZONE:?its zone, ZONE=...}
CODE=${CODE:?directory of this repository on the hosts, CODE=...}
RUNS=${RUNS:?a directory that every host sees, RUNS=/shared/runs}
command -v gcloud > /dev/null || { echo "$0: gcloud is not on PATH" >&2; exit 1; }

project=()
[[ -z ${PROJECT:-} ]] || project=(--project="$PROJECT")
# %q: the words pass through a second shell, on the hosts.
printf -v words '%q ' env "RUNS=$RUNS" "PYTHON=${PYTHON:-python3}" \
  "$CODE/experiments/launch/host.sh" "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" "${project[@]}" \
  --worker=all --command="$words"
