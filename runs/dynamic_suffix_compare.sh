#!/usr/bin/env bash
# Full training against dynamic suffix training: the same model, text and seed, one after the other, then a table.
#   FULL_NUM_ITERATIONS=520 DYNAMIC_NUM_ITERATIONS=650 bash runs/dynamic_suffix_compare.sh
#   SEEDS="1 2 3" EQUAL_TIME=1 bash runs/dynamic_suffix_compare.sh      finds the second number with a pilot of half the steps
# USE_FP8_COMPARE=1 FP8_BACKEND_COMPARE=custom: both train with FP8. SEEDS, OUT and KEEP_CHECKPOINTS: see `compare` in _lib.sh.
# Other variables, and arguments, as for speedrun_small.sh.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
choose_profile cpu-d4
USE_FP8="${USE_FP8_COMPARE:-${USE_FP8-}}" FP8_BACKEND="${FP8_BACKEND_COMPARE:-${FP8_BACKEND-}}"
if [[ ${EQUAL_TIME:-0} == 1 ]]; then
    MATCH=time NUM_ITERATIONS="${FULL_NUM_ITERATIONS:-${NUM_ITERATIONS-}}" FULL_NUM_ITERATIONS='' DYNAMIC_NUM_ITERATIONS=''
fi

say "text -> tokenizer -> tokens"
prepare scripts.tok_train --data="$data" --max-chars="$max_chars" --vocab-size="$vocab_size"
prepare nanochat.dataset --data="$data" --max-chars="$max_chars" ${VAL_DATA:+"--val-data=$VAL_DATA"}

WHOLE=(--initial-depth=0)  # all blocks from the start, also where the profile begins with fewer
ARGS=("${WHOLE[@]}" --block-update-schedule=full_update); flag num-iterations "${FULL_NUM_ITERATIONS-}"; variant full "${ARGS[@]}"
ARGS=("${WHOLE[@]}" --block-update-schedule=dynamic_suffix); flag num-iterations "${DYNAMIC_NUM_ITERATIONS-}"; dyn_flags; variant dynamic "${ARGS[@]}"
unset BLOCK_UPDATE_SCHEDULE STATIC_ACTIVE_LAYERS ${!DYN_@}  # not among the flags that both variants share
compare "variant schedule=block_update_schedule num_iterations elapsed_sec=train_time_sec:.0f \
    max_tok_per_sec=tok_per_sec_max:.0f avg_tok_per_sec=tok_per_sec_avg:.2f final_loss:.6f min_val_bpb:.6f \
    avg_step_peak_vram_mib=avg_step_peak_mem_mib:.2f peak_vram_mib=peak_mem_mib:.2f active_layers_mean:.2f active_layers_range \
    exit_code status" "$@"
