#!/usr/bin/env bash
# Full training against dynamic suffix training: the same model, text and seed, one after the other, then their table.
#   FULL_NUM_ITERATIONS=520 DYNAMIC_NUM_ITERATIONS=650 bash runs/dynamic_suffix_compare.sh
# EQUAL_TIME=1 finds the second number with a pilot. USE_FP8_COMPARE=1 FP8_BACKEND_COMPARE=custom: both train with FP8.
# Other variables, and arguments, as for speedrun_small.sh.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
setup
device_profile
prepare_data
: "${FULL_NUM_ITERATIONS:=$NUM_ITERATIONS}" "${DYNAMIC_NUM_ITERATIONS:=$NUM_ITERATIONS}" "${PILOT_NUM_ITERATIONS:=60}"
USE_FP8="${USE_FP8_COMPARE:-${USE_FP8-}}" FP8_BACKEND="${FP8_BACKEND_COMPARE:-${FP8_BACKEND-}}"
TAG="$MODEL_TAG"

average_rate() { show_table tok_per_sec_avg:.2f "$(run_folder "$1")" '' | tail -n 1; }
finish() {
    local status=$? layers="active_layers_mean:.2f active_layers_range" memory="peak_vram_mib=peak_mem_mib:.2f"
    local rates="max_tok_per_sec=tok_per_sec_max:.0f avg_tok_per_sec=tok_per_sec_avg:.2f"
    show_variants "variant schedule num_iterations elapsed_sec=train_time_sec:.0f $rates final_loss:.6f min_val_bpb:.6f \
        avg_step_peak_vram_mib=avg_step_peak_mem_mib:.2f $memory $layers exit_code=exit_status status"
    exit $((status ? status : FAILED))
}
trap finish EXIT

try_variant full full_update "$FULL_NUM_ITERATIONS" "$@"
if [[ ${EQUAL_TIME:-0} == 1 ]]; then
    [[ $FAILED == 0 ]] || die "EQUAL_TIME=1 takes its measure from the full run, which failed: dynamic is not trained"
    # the pilot warms up for the same share of its steps, or it would be slower than the run it stands for
    (DYN_WARMUP_STEPS=$((${DYN_WARMUP_STEPS:-25} * PILOT_NUM_ITERATIONS / FULL_NUM_ITERATIONS))
        train_variant pilot dynamic_suffix "$PILOT_NUM_ITERATIONS" "$@")
    full="$(average_rate full)" pilot="$(average_rate pilot)"
    DYNAMIC_NUM_ITERATIONS="$(awk "BEGIN { printf \"%.0f\", $FULL_NUM_ITERATIONS * $pilot / $full }")"
    say "equal time: $FULL_NUM_ITERATIONS steps * $pilot / $full tokens per second = $DYNAMIC_NUM_ITERATIONS steps"
fi
try_variant dynamic dynamic_suffix "$DYNAMIC_NUM_ITERATIONS" "$@"
