#!/usr/bin/env bash
# Everything that is written for GPUs: tests, then layers, then steps, then runs. A failure stops nothing; a table at the end has
# the exit status of each, and the script's own is 1 if any failed. Logs and JSON go to a folder.
#   bash dev/bench/on_gpu.sh [FOLDER]            FOLDER defaults to /tmp/nanochat_gpu
#   ONLY='tests fp8_layers' bash dev/bench/on_gpu.sh
# About an hour on one H100 or H200; LIMIT seconds (1200) for each line. torchao is compared where it is installed.
source "$(dirname "${BASH_SOURCE[0]}")/../../runs/setup.sh"
RESULTS="${1:-/tmp/nanochat_gpu}"
[[ $RESULTS == /* ]] || RESULTS="$NANOCHAT_CWD/$RESULTS"
mkdir -p "$RESULTS"
unset OUT  # each of the comparisons below has its own folder
export SKIP_SETUP=1 PYTHON NANOCHAT_BASE_DIR="$RESULTS/base" NUM_ITERATIONS="${NUM_ITERATIONS:-200}"
TABLE=("name status seconds") failed=0

try() {  # name command...
    local name="$1" status=0 begun=$SECONDS
    shift
    [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
    say "$name"; printf '+'; printf ' %q' "$@"; printf '\n'
    timeout "${LIMIT:-1200}" "$@" 2>&1 | tee "$RESULTS/$name.log" || status=${PIPESTATUS[0]} failed=1
    TABLE+=("$name $status $((SECONDS - begun))")
}

if "$PYTHON" -c 'import torchao' 2> /dev/null; then variants='custom torchao baseline'; else variants='custom baseline'; fi
try tests "$PYTHON" -m pytest tests/test_fp8.py tests/test_flash_attention.py tests/kernels tests/test_optim.py tests/test_gpt.py
try fp8_layers "$PYTHON" -m dev.bench.fp8_linear --preset gpu-d12 gpu-d20 gpu-d24 gpu-d26 --modes eager compiled --json-out "$RESULTS/fp8_layers.json"
try step_d12 "$PYTHON" -m dev.bench.train_step --preset gpu-d12 --variants compiled parts --with=--chunked-ce \
    --with='--chunked-ce --fused-rmsnorm' --with='--chunked-ce --deferred-loss-logging' --with='--chunked-ce --cast-once' \
    --with='--chunked-ce --recompute-activations' --json-out "$RESULTS/step_d12.json"
try step_d24 "$PYTHON" -m dev.bench.train_step --preset gpu-d24 --with=--chunked-ce --json-out "$RESULTS/step_d24.json"
try fp8_debug bash runs/fpi_debug.sh
try fp8_d12 env FP8_VARIANTS="$variants" bash runs/fp8_compare.sh
try fp8_d12_auto env FP8_FLAGS=--fp8-policy=auto bash runs/fp8_compare.sh
try fp8_d20 env DEPTH=20 FP8_FLAGS= FP8_VARIANTS="$variants" bash runs/fp8_compare.sh
try fp8_d26 env DEPTH=26 FP8_FLAGS= NUM_ITERATIONS=60 FP8_VARIANTS="$variants" bash runs/fp8_compare.sh
try suffix_d12 bash runs/dynamic_suffix_compare.sh
try suffix_fp8_d12 env USE_FP8_COMPARE=1 bash runs/dynamic_suffix_compare.sh

say "results in $RESULTS"
printf '%s\n' "${TABLE[@]}" | column -t
exit $failed
