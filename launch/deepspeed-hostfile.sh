#!/usr/bin/env bash
# Quantizes on several machines, without Ray; this machine reaches them by ssh without a password:
#
#     launch/deepspeed-hostfile.sh HOSTFILE MODEL OUTPUT [OPTIONS OF awqdist quantize]
#
# HOSTFILE has a line `NAME slots=NUMBER_OF_GPUS` for every machine. awqdist is at the same path on all of them.
# pdsh starts the ranks (apt install pdsh). Variables that they need, such as HF_HOME, go into ~/.deepspeed_env.
set -euo pipefail
exec deepspeed --hostfile "${1:?give HOSTFILE, MODEL and OUTPUT}" --quiet --no_local_rank --module awqdist quantize "${@:2}"
