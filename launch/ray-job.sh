#!/usr/bin/env bash
# Quantizes on a running Ray cluster, and shows the log until the job ends:
#
#     export RAY_ADDRESS=http://HEAD:8265
#     launch/ray-job.sh MODEL OUTPUT [OPTIONS OF awqdist quantize]
#
# The job runs in the folder that this is called from, so that relative paths mean what they say. The cluster must see
# that folder; where it does not (submitting from a laptop), `cd /` first and give absolute paths of the cluster.
set -euo pipefail
output=$(realpath --canonicalize-missing --no-symlinks "${2:?give MODEL and OUTPUT}")
exec ray job submit -- env --chdir="$PWD" awqdist quantize "$1" "$output" "${@:3}" --backend ray --ray-address auto
