#!/usr/bin/env bash
# A first day on a GPU: three commands of at most nine minutes each, the most decisive fact first.
#   bash dev/bench/on_gpu.sh numbers [FOLDER]     is what it computes right?
#   bash dev/bench/on_gpu.sh steps [FOLDER]       how fast is a step, and where is its time lost?
#   bash dev/bench/on_gpu.sh runs [FOLDER]        do whole runs work?
# Each goes on where it was stopped. --help explains them; dev/GPU_DAY.md says what to do with the results. Without a package
# index: SKIP_SETUP=1, which takes the Python of the active environment.
case "${1-}" in '' | -h | --help) SKIP_SETUP=1 ;; esac  # help needs no packages, and must install none
source "$(dirname "${BASH_SOURCE[0]}")/../../runs/setup.sh"
exec "$PYTHON" -m dev.bench.on_gpu "$@"
