#!/usr/bin/env bash
# Quantizes with one worker on every GPU of this machine, without Ray:
#
#     launch/torchrun.sh MODEL OUTPUT [OPTIONS OF awqdist quantize]
#
# Several machines: the same on each of them, after `export NNODES=2 HEAD=NAME_OF_THE_FIRST:29500`.
# Without GPUs: `export NPROC=2` says how many workers a machine gets.
set -euo pipefail
exec torchrun --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC:-gpu}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-id awqdist --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" -m awqdist quantize "$@"
