#!/usr/bin/env bash
# FP8 against bf16: the same model, text, seed and steps, one after the other, then their table.
#   bash runs/fp8_compare.sh
#   FP8_EMULATE=1 bash runs/fp8_compare.sh       where there are no FP8 units: the same numbers, slowly
# FP8_FLAGS replaces the stable preset; FP8_BACKEND and FP8_RECIPE choose the layers. SEEDS, OUT and KEEP_CHECKPOINTS: see
# compare in _lib.sh. Other variables, and arguments, as for speedrun_small.sh. FP8_VARIANTS: what to run, as
# fp8_backend_compare.sh and fpi_debug.sh do.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
setup
device_profile
prepare_data
: "${FP8_VARIANTS:=fp8 baseline}"
FP8_FLAGS="${FP8_FLAGS---fp8-skip-lm-head --fp8-skip-attn-qk --fp8-min-dim=256 --fp8-no-allow-in-graph}"

for name in $FP8_VARIANTS; do
    ARGS=() backend="${FP8_BACKEND:-custom}" flags="$FP8_FLAGS"
    case "$name" in
        baseline) variant baseline; continue ;;
        custom) backend=custom ;;
        torchao) backend=torchao flags="${flags//--fp8-no-allow-in-graph/}" ;;  # the custom backend's
    esac
    switch fp8 1; switch fp8-emulate "${FP8_EMULATE-}"
    flag fp8-backend "$backend"; flag fp8-recipe "${FP8_RECIPE:-tensorwise}"; words "$flags"
    [[ $name != debug ]] || words "--no-compile --fp8-debug"
    variant "$name"
done
USE_FP8=0 FP8_BACKEND='' FP8_RECIPE='' FP8_EMULATE=''
compare "variant use_fp8=fp8:.0f fp8_backend fp8_recipe exit_code status elapsed_sec=train_time_sec:.0f \
    max_tok_per_sec=tok_per_sec_max:.0f avg_tok_per_sec=tok_per_sec_avg:.2f final_loss:.6f min_val_bpb:.6f \
    peak_vram_mib=peak_mem_mib:.2f fp8_layers" "$@"
