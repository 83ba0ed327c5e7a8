#!/usr/bin/env bash
# FP8 against bf16: the same model, text, seed and steps, one after the other, then a table.
#   bash runs/fp8_compare.sh
#   FP8_EMULATE=1 bash runs/fp8_compare.sh       without FP8 units: the same numbers, slowly; on a CPU for 40 steps
# FP8_FLAGS replaces the stable preset; FP8_BACKEND and FP8_RECIPE choose the layers. FP8_VARIANTS: what to run, as in
# fp8_backend_compare.sh and fpi_debug.sh. SEEDS, OUT and KEEP_CHECKPOINTS: see `compare` in _lib.sh. Other variables, and
# arguments, as for speedrun_small.sh.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
given="${PROFILE-}"
choose_profile cpu-d4
if [[ $DEVICE_TYPE == cpu && ${FP8_EMULATE:-0} == 1 && -z $given ]]; then  # it shows numbers and no speed: three minutes are enough
    : "${NUM_ITERATIONS:=40}" "${MAX_CHARS:=8000000}"
    max_chars=$MAX_CHARS
fi
: "${FP8_VARIANTS:=fp8 baseline}"
FP8_FLAGS="${FP8_FLAGS---fp8-skip-lm-head --fp8-skip-attn-qk --fp8-min-dim=256 --fp8-no-allow-in-graph}"

say "text -> tokenizer -> tokens"
prepare scripts.tok_train --data="$data" --max-chars="$max_chars" --vocab-size="$vocab_size"
prepare nanochat.dataset --data="$data" --max-chars="$max_chars" ${VAL_DATA:+"--val-data=$VAL_DATA"}

for name in $FP8_VARIANTS; do
    backend="${FP8_BACKEND:-custom}" flags="$FP8_FLAGS"
    case "$name" in
        baseline) variant baseline; continue ;;
        custom) backend=custom ;;
        torchao) backend=torchao flags="${flags//--fp8-no-allow-in-graph/}" ;;  # a flag of the custom backend
        debug) flags+=" --no-compile --fp8-debug" ;;
    esac
    ARGS=(); fp8_flags "$backend" "${FP8_RECIPE:-tensorwise}"; words "$flags"
    variant "$name" "${ARGS[@]}"
done
USE_FP8=0 FP8_BACKEND='' FP8_RECIPE='' FP8_EMULATE=''  # for the flags that all variants share
compare "variant use_fp8=fp8:.0f fp8_backend fp8_recipe exit_code status elapsed_sec=train_time_sec:.0f \
    max_tok_per_sec=tok_per_sec_max:.0f avg_tok_per_sec=tok_per_sec_avg:.2f final_loss:.6f min_val_bpb:.6f \
    peak_vram_mib=peak_mem_mib:.2f fp8_layers" "$@"
