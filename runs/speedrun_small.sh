#!/usr/bin/env bash
# Text -> tokenizer -> a small GPT -> evaluation -> samples, in one command. Capitals are environment variables, and
# arguments go to scripts.base_train:   DEPTH=6 DATA=~/texts bash runs/speedrun_small.sh --max-train-seconds=600
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
setup
DEVICE_TYPE="${DEVICE_TYPE:-$(detect_device)}"
# Runs this short want higher rates than the law for full horizons gives: x4 measured best of 1, 4, 10 (dev/LOG.md).
case "$DEVICE_TYPE" in  # depth head-dim window T vocab rows batch steps eval-every eval-tokens max-chars warm-up LR
    cuda) profile 12 128 L 2048 32768 8 131072 500 100 524288 -1 40 1 ;;
    mps) profile 6 64 L 512 8192 16 16384 400 100 131072 100000000 20 4 ;;
    cpu) profile 4 64 L 512 4096 8 4096 320 80 32768 40000000 20 4 ;;
    *) die "DEVICE_TYPE=$DEVICE_TYPE: choose cuda, mps or cpu, or leave it out" ;;
esac

if [[ ${PREPARE_DATA:-1} == 1 ]]; then
    say "text -> tokenizer -> tokens"
    DATA="${DATA:-python}"
    run "$PYTHON" -m scripts.tok_train --data="$DATA" --max-chars="$MAX_CHARS" --vocab-size="$VOCAB_SIZE"
    run "$PYTHON" -m nanochat.dataset --data="$DATA" --max-chars="$MAX_CHARS" ${VAL_DATA:+"--val-data=$VAL_DATA"}
fi
say "train d$DEPTH for $NUM_ITERATIONS steps on $DEVICE_TYPE"
base_train_flags
launch scripts.base_train "${ARGS[@]}" "$@"
say "evaluate, then write"
run "$PYTHON" -m scripts.base_eval --eval bpb,sample --model-tag="$MODEL_TAG" --device-type="$DEVICE_TYPE"
run "$PYTHON" -m scripts.sample --model-tag="$MODEL_TAG" --device-type="$DEVICE_TYPE" --temperature=0.7 \
    -p "${PROMPT:-def __init__(self}"
say "the run: $NANOCHAT_BASE_DIR/base_checkpoints/$MODEL_TAG"
show_results "$NANOCHAT_BASE_DIR/base_checkpoints/$MODEL_TAG"
