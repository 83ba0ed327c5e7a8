#!/usr/bin/env bash
# Text -> tokenizer -> a small GPT -> evaluation -> samples, in one command. About three minutes on two cores of a CPU.
#   DEPTH=6 DATA=~/texts bash runs/speedrun_small.sh --max-train-seconds=600
# The numbers are in configs/: cpu-d2, mps-d6 or gpu-d12, by device; PROFILE names another. Environment variables override
# them (see `overrides` in _lib.sh), and arguments go to scripts.base_train, behind everything else.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
choose_profile  # $CONFIG is configs/cpu-d2.flags, or ...

say "text -> tokenizer -> tokens"
prepare scripts.tok_train --data="$data" --max-chars="$max_chars" --vocab-size="$vocab_size"
prepare nanochat.dataset --data="$data" --max-chars="$max_chars" ${VAL_DATA:+"--val-data=$VAL_DATA"}

say "train d$depth on $DEVICE_TYPE"
overrides
launch scripts.base_train "@$CONFIG" --model-tag="$model_tag" "${ARGS[@]}" "$@"

[[ ${NNODES:-1} == 1 ]] || { say "trained on $NNODES machines"; exit 0; }  # each runs this: one evaluates, by hand
say "evaluate, then write"
launch scripts.base_eval --eval=bpb,sample --model-tag="$model_tag" --device-type="$DEVICE_TYPE"
run "$PYTHON" -m scripts.sample --model-tag="$model_tag" --device-type="$DEVICE_TYPE" --temperature=0.7 \
    --prompt="${PROMPT:-def __init__(self}"
show_results "$model_tag"
