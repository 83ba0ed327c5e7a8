# What the runners share: strict mode, commands that are shown before they run, the device, the profile and its overrides.
# Sourced by setup.sh, which the runners source. For bash 3.2 too (macOS): no associative arrays, no "${empty[@]}" under set -u.
set -euo pipefail

# --help or -h: what stands at the head of the runner, before anything is installed or started.
for word in ${1+"$@"}; do
    case "$word" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
done

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export NANOCHAT_CWD="${NANOCHAT_CWD:-$PWD}"  # the user's folder, which relative paths start from (nanochat/cli/paths.py)
[[ ${PYTHON-} != */* || $PYTHON == /* ]] || PYTHON="$NANOCHAT_CWD/$PYTHON"
cd "$ROOT"

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

quoted() {  # the words on one line, quoted for a shell
    local word line='' quote="'" escaped="'\\''"
    for word in "$@"; do
        case "$word" in '' | *[!a-zA-Z0-9_./:=,+@%-]*) word="'${word//$quote/$escaped}'" ;; esac
        line+=" $word"
    done
    printf "%s\n" "${line# }"
}

# Show a command, then run it. If it fails, the runner stops with its exit status.
run() {
    local status=0
    echo "+ $(quoted "$@")"
    "$@" || status=$?
    [[ $status == 0 ]] || { printf 'error: exit status %s from %s\n' "$status" "${*:1:3}" >&2; exit "$status"; }
}

base_dir() { "$PYTHON" -m nanochat.cli.paths; }  # of runs, text and the lab

# --- device ---------------------------------------------------------------------------------------------------------

count_gpus() {
    case "${CUDA_VISIBLE_DEVICES-all}" in '' | -1) echo 0; return ;; esac  # hidden on purpose
    { nvidia-smi -L 2> /dev/null || true; } | grep -c '^GPU' || true
}
has_gpu() { [[ $(count_gpus) != 0 ]]; }
detect_device() {
    if has_gpu; then echo cuda; elif [[ $(uname -sm) == 'Darwin arm64' ]]; then echo mps; else echo cpu; fi
}

# --- the profile: a file of flags in configs/, and environment variables that override it -----------------------------

# PROFILE names the file; by default the device decides, with $1 for a CPU. Sets CONFIG, its path, and what the runners need.
choose_profile() {
    DEVICE_TYPE="${DEVICE_TYPE:-$(detect_device)}"
    case "$DEVICE_TYPE" in
        cuda) : "${PROFILE:=gpu-d12}" ;;
        mps) : "${PROFILE:=mps-d6}" ;;
        cpu) : "${PROFILE:=${1:-cpu-d2}}" "${CHUNKED_CE:=1}" ;;  # measured to pay on CPUs
        *) die "DEVICE_TYPE=$DEVICE_TYPE: choose cuda, mps or cpu, or leave it out" ;;
    esac
    CONFIG="$ROOT/configs/$PROFILE.flags"
    depth="${DEPTH:-$(config_value depth)}"
    data="${DATA:-$(config_value data)}"
    max_chars="${MAX_CHARS:-$(config_value max-chars)}"
    vocab_size="${VOCAB_SIZE:-$(config_value vocab-size)}"
    : "${data:=python}" "${max_chars:=-1}" "${vocab_size:=32768}"  # base_train's defaults, where the profile has no value
    model_tag="${MODEL_TAG:-d$depth}"
    count_processes
    [[ ${NNODES:-1} == 1 ]] || : "${PREPARE_DATA:=0}"  # base_train does so once, where the machines share the base directory
    [[ ${NNODES:-1} == 1 || -n ${RDZV_ENDPOINT-} ]] \
        || die "NNODES=$NNODES: set RDZV_ENDPOINT=HOST:PORT, one of the machines as all can reach it"
}
config_value() { "$PYTHON" -m nanochat.cli.flag_files "$CONFIG" "$1"; }

ARGS=()
flag() { [[ -z ${2-} ]] || ARGS+=("--$1=$2"); }     # flag depth "$DEPTH"  -> --depth=4, or nothing if it is empty
switch() { [[ ${2:-0} != 1 ]] || ARGS+=("--$1"); }  # switch fp8 1         -> --fp8
words() {                                           # split at white space; no globbing, quotes mean nothing
    local list=()
    read -r -d '' -a list <<< "${1-}" || true
    [[ ${#list[@]} == 0 ]] || ARGS+=("${list[@]}")
}

# base_train's flags from environment variables, in ARGS: DEPTH=6 -> --depth=6. Behind @$CONFIG they override it.
# Optimizations have no flag here unless they are asked for.
overrides() {
    local name
    ARGS=("--device-type=$DEVICE_TYPE")
    flag run "${WANDB_RUN-}"
    for name in SEED DATA VAL_DATA MAX_CHARS VOCAB_SIZE DEPTH HEAD_DIM WINDOW_PATTERN MAX_SEQ_LEN DEVICE_BATCH_SIZE \
        TOTAL_BATCH_SIZE NUM_ITERATIONS WARMUP_STEPS LR_MULTIPLIER EVAL_EVERY EVAL_TOKENS BLOCK_UPDATE_SCHEDULE \
        STATIC_ACTIVE_LAYERS; do
        flag "$(flag_name "$name")" "${!name-}"
    done
    dyn_flags
    switch chunked-ce "${CHUNKED_CE-}"
    if [[ ${USE_FP8:-0} == 1 ]]; then
        fp8_flags "${FP8_BACKEND-}" "${FP8_RECIPE-}"
    elif [[ -n ${FP8_BACKEND-}${FP8_RECIPE-}${FP8_EMULATE-} ]]; then
        echo "note: FP8_* is set, but without USE_FP8=1 this run trains without FP8" >&2
    fi
    words "${BASE_TRAIN_EXTRA_ARGS-}"
}
flag_name() { printf '%s' "$1" | tr 'A-Z_' 'a-z-'; }
dyn_flags() {
    local name
    for name in ${!DYN_@}; do
        case "$name" in
            DYN_ADAPT_BUDGET | DYN_REQUIRE_STABLE) switch "$(flag_name "$name")" "${!name}" ;;
            *) flag "$(flag_name "$name")" "${!name}" ;;
        esac
    done
}
fp8_flags() {  # backend recipe
    switch fp8 1; switch fp8-emulate "${FP8_EMULATE-}"; flag fp8-backend "$1"; flag fp8-recipe "$2"
}

# --- starting runs ----------------------------------------------------------------------------------------------------

prepare() {  # module [arguments]
    if [[ ${PREPARE_DATA:-1} == 1 ]]; then run "$PYTHON" -m "$@"; else echo "PREPARE_DATA=$PREPARE_DATA: without $1"; fi
}

# NPROC_PER_NODE: processes of a run on this machine, one for each GPU.
count_processes() {
    local gpus
    gpus="$(count_gpus)"
    PROCESSES="${NPROC_PER_NODE:-1}"
    [[ -n ${NPROC_PER_NODE-} || $gpus -lt 2 ]] || echo "note: this uses 1 of $gpus GPUs; NPROC_PER_NODE=$gpus uses all"
    [[ $DEVICE_TYPE != cuda || $PROCESSES -le $gpus ]] || die "NPROC_PER_NODE=$PROCESSES, but there are $gpus GPUs here"
}

# NNODES: machines; the same command is started on each, with RDZV_ENDPOINT=HOST:PORT of one of them, and RDZV_ID=NAME where several
# runs meet there. MAX_RESTARTS: how often all processes are started again, from the last checkpoint, when one is lost.
launch() {  # module [arguments]
    local launcher=(--standalone)
    if [[ $PROCESSES == 1 && ${NNODES:-1} == 1 ]]; then run "$PYTHON" -m "$@"; return; fi
    if [[ ${NNODES:-1} != 1 ]]; then
        launcher=("--nnodes=$NNODES" --rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT" "--rdzv-id=${RDZV_ID:-nanochat}")
    fi
    [[ -z ${MAX_RESTARTS-} ]] || launcher+=("--max-restarts=$MAX_RESTARTS")
    run "$PYTHON" -m nanochat.runtime.launch "${launcher[@]}" --nproc_per_node="$PROCESSES" -m "$@"
}

# The results of a run as a table, and its files.
show_results() {  # name of the run
    local file folder columns="status steps_done tokens_seen train_time_sec tok_per_sec_avg final_train_loss min_val_bpb peak_mem_mib"
    folder="$(base_dir)/base_checkpoints/$1"
    say "the run: $folder"
    "$PYTHON" -c 'import sys; from pathlib import Path; from nanochat.lab.rows import read_result, table_of
print(table_of(sys.argv[1], [read_result(Path(sys.argv[2]))]))' "$columns" "$folder/result.json"
    for file in "$folder"/report.html "$folder"/loss.png "$folder"/result.json; do [[ ! -f $file ]] || echo "$file"; done
}

# --- comparisons: `lab run` starts the variants, keeps a row of each even if it fails, and prints a table -----------------

VARIANTS=()
variant() {  # name [flags]
    local name="$1"
    shift
    VARIANTS+=(--variant "$name=$([[ $# == 0 ]] || quoted "$@")")
}

# Every run has the profile, the overrides and the caller's arguments; the variant's flags come behind them.
# SEEDS="1 2": a run and a row for each seed. OUT: folder of the experiment; with the folder of an earlier call, that one is
# continued. KEEP_CHECKPOINTS=1 keeps the checkpoints of successful runs; SHOW_OUTPUT=1 shows the output of the runs;
# MATCH=time: all variants take the time of the first; GPUS="0 1 2 3": runs side by side, one on each of these.
compare() {  # "columns" [arguments of base_train]
    local columns seeds="${SEEDS:-${SEED:-42}}" baseline SEED=''
    columns="$(tr -s ' ' <<< "$1")"
    [[ $seeds != *' '* ]] || columns+=" seed"
    shift
    overrides
    baseline="$(quoted "@$CONFIG" "${ARGS[@]}" "$@")"
    : "${OUT:=$(base_dir)/lab/$(basename "$0" .sh)-$(date +%Y%m%d-%H%M%S)}"
    ARGS=()
    flag match "${MATCH-}"; switch show-output "${SHOW_OUTPUT-}"; switch keep-checkpoints "${KEEP_CHECKPOINTS-}"
    [[ $PROCESSES == 1 ]] || flag nproc-per-node "$PROCESSES"
    [[ -z ${GPUS-} ]] || words "--gpus $GPUS"
    words "--seeds $seeds"
    say "compare on $DEVICE_TYPE, d$depth (if interrupted, the same command with OUT=$(quoted "$OUT") continues)"
    echo "elapsed_sec is training time: without compilation and evaluation"
    run "$PYTHON" -m scripts.lab run --profile= --baseline="$baseline" "${VARIANTS[@]}" --columns="$columns" --out="$OUT" \
        "${ARGS[@]}"
}
