#!/usr/bin/env bash
# Text -> tokenizer -> a small GPT -> evaluation -> samples, in one command. Capitals are environment variables, and
# arguments go to scripts.base_train:   DEPTH=6 DATA=~/texts bash runs/speedrun_small.sh --max-train-seconds=600
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
setup
device_profile
prepare_data
say "train d$DEPTH for $NUM_ITERATIONS steps on $DEVICE_TYPE"
base_train_flags
launch scripts.base_train "${ARGS[@]}" "$@"
say "evaluate, then write"
run "$PYTHON" -m scripts.base_eval --eval bpb,sample --model-tag="$MODEL_TAG" --device-type="$DEVICE_TYPE"
run "$PYTHON" -m scripts.sample --model-tag="$MODEL_TAG" --device-type="$DEVICE_TYPE" --temperature=0.7 \
    --prompt="${PROMPT:-def __init__(self}"
show_results "$MODEL_TAG"
