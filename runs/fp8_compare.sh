#!/usr/bin/env bash
# FP8 against bf16: the same model, text, seed and steps, one after the other, then their table.
#   bash runs/fp8_compare.sh
#   FP8_EMULATE=1 bash runs/fp8_compare.sh       where there are no FP8 units: the same numbers, slowly
# FP8_FLAGS replaces the stable preset; FP8_BACKEND and FP8_RECIPE choose the layers. Other variables, and arguments, as for
# speedrun_small.sh. FP8_VARIANTS: what to run, as fp8_backend_compare.sh and fpi_debug.sh do.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
setup
device_profile
prepare_data
: "${FP8_BACKEND:=custom}" "${FP8_RECIPE:=tensorwise}" "${BLOCK_UPDATE_SCHEDULE:=full_update}"
: "${FP8_VARIANTS:=fp8 baseline}"
FP8_FLAGS="${FP8_FLAGS---fp8-skip-lm-head --fp8-skip-attn-qk --fp8-min-dim=256 --fp8-no-allow-in-graph}"
TAG="$MODEL_TAG"

try_fp8() {  # name backend [arguments of base_train]; the backend "none" is bf16
    local name="$1" use=1 backend="$2" recipe="$FP8_RECIPE" emulate="${FP8_EMULATE-}" flags="$FP8_FLAGS"
    shift 2
    case "$backend" in
        none) use=0 backend='' recipe='' emulate='' flags='' ;;
        torchao) flags="${flags//--fp8-no-allow-in-graph/}" ;;  # the custom backend's
    esac
    USE_FP8=$use FP8_BACKEND=$backend FP8_RECIPE=$recipe FP8_EMULATE=$emulate \
        BASE_TRAIN_EXTRA_ARGS="$flags ${BASE_TRAIN_EXTRA_ARGS-}" \
        try_variant "$name" "$BLOCK_UPDATE_SCHEDULE" "$NUM_ITERATIONS" "$@"
    ROWS[${#ROWS[@]}-1]+=" use_fp8=$use${backend:+ fp8_backend=$backend}${recipe:+ fp8_recipe=$recipe}"
}
finish() {
    local status=$? rates="max_tok_per_sec=tok_per_sec_max:.0f avg_tok_per_sec=tok_per_sec_avg:.2f"
    show_variants "variant use_fp8 fp8_backend fp8_recipe exit_code=exit_status status elapsed_sec=train_time_sec:.0f $rates \
        final_loss:.6f min_val_bpb:.6f peak_vram_mib=peak_mem_mib:.2f fp8_layers"
    exit $((status ? status : FAILED))
}
trap finish EXIT

for variant in $FP8_VARIANTS; do
    case "$variant" in
        baseline) try_fp8 baseline none "$@" ;;
        custom | torchao) try_fp8 "$variant" "$variant" "$@" ;;
        debug) try_fp8 debug "$FP8_BACKEND" --no-compile --fp8-debug "$@" ;;
        *) try_fp8 "$variant" "$FP8_BACKEND" "$@" ;;
    esac
done
