# What every runner shares: strict mode, set-up, the device, flags, and commands that are shown before they run.
# Sourced, not executed:   source "$(dirname "$0")/_lib.sh"; setup; run "$PYTHON" -m scripts.base_train --depth=4
# Written for bash 3.2 too (macOS): no associative arrays, no "${empty[@]}" under set -u.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export NANOCHAT_CWD="${NANOCHAT_CWD:-$PWD}"  # relative paths are meant from there, not from the root (nanochat/cli/paths.py)
[[ ${PYTHON-} != */* || $PYTHON == /* ]] || PYTHON="$NANOCHAT_CWD/$PYTHON"
cd "$ROOT"

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

quoted() {  # words as they could be typed again, on one line
    local word line='' quote="'" escaped="'\\''"
    for word in "$@"; do
        case "$word" in '' | *[!a-zA-Z0-9_./:=,+@%-]*) word="'${word//$quote/$escaped}'" ;; esac
        line+=" $word"
    done
    printf "%s\n" "${line# }"
}

# Show a command as it could be typed again, then run it. If it fails, the runner stops with its exit status.
run() {
    local status=0
    echo "+ $(quoted "$@")"
    "$@" || status=$?
    [[ $status == 0 ]] || { printf 'error: exit status %s from %s\n' "$status" "${*:1:3}" >&2; exit "$status"; }
}

base_dir() { "$PYTHON" -m nanochat.cli.paths; }  # where runs, text and the lab's folders lie

# --- device ---------------------------------------------------------------------------------------------------------

count_gpus() {
    case "${CUDA_VISIBLE_DEVICES-all}" in '' | -1) echo 0; return ;; esac  # hidden on purpose
    { nvidia-smi -L 2> /dev/null || true; } | grep -c '^GPU' || true
}
has_gpu() { [[ $(count_gpus) != 0 ]]; }
detect_device() {
    if has_gpu; then echo cuda; elif [[ $(uname -sm) == 'Darwin arm64' ]]; then echo mps; else echo cpu; fi
}

# --- base_train's flags from the environment, collected in ARGS; an empty or unset variable leaves its flag out -----

ARGS=()
flag() { [[ -z ${2-} ]] || ARGS+=("--$1=$2"); }     # flag depth "$DEPTH"  -> --depth=4
switch() { [[ ${2:-0} != 1 ]] || ARGS+=("--$1"); }  # switch fp8 1         -> --fp8
words() {                                           # split at white space; no globbing, quotes mean nothing
    local list=()
    read -r -d '' -a list <<< "${1-}" || true
    [[ ${#list[@]} == 0 ]] || ARGS+=("${list[@]}")
}

# The sizes of a run, each only where the environment has not set it.
profile() {
    : "${DEPTH:=$1}" "${HEAD_DIM:=$2}" "${WINDOW_PATTERN:=$3}" "${MAX_SEQ_LEN:=$4}" "${VOCAB_SIZE:=$5}"
    : "${DEVICE_BATCH_SIZE:=$6}" "${TOTAL_BATCH_SIZE:=$7}" "${NUM_ITERATIONS:=$8}"
    : "${EVAL_EVERY:=$9}" "${EVAL_TOKENS:=${10}}" "${MAX_CHARS:=${11}}" "${WARMUP_STEPS:=${12}}" "${LR_MULTIPLIER:=${13}}"
    : "${MODEL_TAG:=d$DEPTH}"
}

# The profile of the device: a few minutes on one GPU, about five on a CPU.
device_profile() {
    DEVICE_TYPE="${DEVICE_TYPE:-$(detect_device)}"
    # Runs this short want higher rates than the law for full horizons gives: x4 measured best of 1, 4, 10 (dev/LOG.md).
    case "$DEVICE_TYPE" in  # depth head-dim window T vocab rows batch steps eval-every eval-tokens max-chars warm-up LR
        cuda) profile 12 128 L 2048 32768 8 131072 500 100 524288 -1 40 1 ;;
        mps) profile 6 64 L 512 8192 16 16384 400 100 131072 100000000 20 4 ;;
        cpu) profile 4 64 L 512 4096 8 4096 320 80 32768 40000000 20 4; : "${CHUNKED_CE:=1}" ;;  # measured to pay on CPUs
        *) die "DEVICE_TYPE=$DEVICE_TYPE: choose cuda, mps or cpu, or leave it out" ;;
    esac
}

prepare_data() {  # PREPARE_DATA=0 leaves it out
    [[ ${PREPARE_DATA:-1} == 1 ]] || return 0
    say "text -> tokenizer -> tokens"
    DATA="${DATA:-python}"
    run "$PYTHON" -m scripts.tok_train --data="$DATA" --max-chars="$MAX_CHARS" --vocab-size="$VOCAB_SIZE"
    run "$PYTHON" -m nanochat.dataset --data="$DATA" --max-chars="$MAX_CHARS" ${VAL_DATA:+"--val-data=$VAL_DATA"}
}

base_train_flags() {
    ARGS=()
    flag run "${WANDB_RUN-}"; flag model-tag "$MODEL_TAG"; flag device-type "$DEVICE_TYPE"; flag seed "${SEED-}"
    flag data "${DATA-}"; flag val-data "${VAL_DATA-}"; flag max-chars "$MAX_CHARS"; flag vocab-size "$VOCAB_SIZE"
    flag depth "$DEPTH"; flag head-dim "$HEAD_DIM"; flag window-pattern "$WINDOW_PATTERN"
    flag max-seq-len "$MAX_SEQ_LEN"
    flag device-batch-size "$DEVICE_BATCH_SIZE"; flag total-batch-size "$TOTAL_BATCH_SIZE"
    flag num-iterations "$NUM_ITERATIONS"; flag warmup-steps "$WARMUP_STEPS"; flag lr-multiplier "$LR_MULTIPLIER"
    flag eval-every "$EVAL_EVERY"; flag eval-tokens "$EVAL_TOKENS"
    flag core-metric-every -1; flag sample-every -1  # CORE needs a download; samples come after training
    feature_flags
    words "${BASE_TRAIN_EXTRA_ARGS-}"
}

# The optimizations' flags: none is passed unless asked for, so the plain recipe stays plain.
feature_flags() {
    local name dashed
    switch chunked-ce "${CHUNKED_CE-}"
    flag block-update-schedule "${BLOCK_UPDATE_SCHEDULE-}"
    flag static-active-layers "${STATIC_ACTIVE_LAYERS-}"
    for name in $(compgen -v DYN_ || true); do  # DYN_PROBE_EVERY=40 -> --dyn-probe-every=40
        dashed="$(printf '%s' "$name" | tr 'A-Z_' 'a-z-')"
        case "$name" in
            DYN_ADAPT_BUDGET | DYN_REQUIRE_STABLE) switch "$dashed" "${!name}" ;;
            *) flag "$dashed" "${!name}" ;;
        esac
    done
    if [[ ${USE_FP8:-0} == 1 ]]; then
        switch fp8 1; switch fp8-emulate "${FP8_EMULATE-}"
        flag fp8-backend "${FP8_BACKEND-}"; flag fp8-recipe "${FP8_RECIPE-}"
    elif [[ -n ${FP8_BACKEND-}${FP8_RECIPE-}${FP8_EMULATE-} ]]; then
        echo "note: FP8_* is set, but without USE_FP8=1 this run trains without FP8" >&2
    fi
}

# PROCESSES of a run, one per GPU: NPROC_PER_NODE.
count_processes() {
    local gpus
    gpus="$(count_gpus)"
    PROCESSES="${NPROC_PER_NODE:-1}"
    [[ -n ${NPROC_PER_NODE-} || $gpus -lt 2 ]] || echo "note: this uses 1 of $gpus GPUs; NPROC_PER_NODE=$gpus uses all"
    [[ $DEVICE_TYPE != cuda || $PROCESSES -le $gpus ]] || die "NPROC_PER_NODE=$PROCESSES, but there are $gpus GPUs here"
}

launch() {  # module [arguments]
    count_processes
    if [[ $PROCESSES == 1 ]]; then run "$PYTHON" -m "$@"; return; fi
    run "$PYTHON" -m nanochat.runtime.launch --standalone --nproc_per_node="$PROCESSES" -m "$@"
}

# What a run left: its numbers as a table, its files.
show_results() {  # name of the run
    local file folder columns="status steps_done tokens_seen train_time_sec tok_per_sec_avg final_train_loss min_val_bpb peak_mem_mib"
    folder="$(base_dir)/base_checkpoints/$1"
    say "the run: $folder"
    "$PYTHON" -c 'import sys; from pathlib import Path; from nanochat.lab.rows import read_result, table_of
print(table_of(sys.argv[1], [read_result(Path(sys.argv[2]))]))' "$columns" "$folder/result.json"
    for file in "$folder"/loss.png "$folder"/result.json "$folder"/metrics.jsonl; do [[ ! -f $file ]] || echo "$file"; done
}

# --- comparisons: runs of `lab run`, which starts the variants, keeps a row of each whatever its end, and prints a table --

VARIANTS=()
variant() {  # name, and its flags in ARGS
    VARIANTS+=(--variant "$1=$([[ ${#ARGS[@]} == 0 ]] || quoted "${ARGS[@]}")")
}

# Every run has the flags of the environment and the caller's arguments; a variant's own come behind them.
# SEEDS="1 2": several, a row per run, with its seed. OUT: folder of the experiment; that of an earlier call is gone on with.
# KEEP_CHECKPOINTS=1 keeps the checkpoints of runs that ended well; SHOW_OUTPUT=1 shows what the runs print; MATCH=time: all
# take the time of the first.
compare() {  # "columns" [arguments of base_train]
    local columns seeds="${SEEDS:-${SEED:-42}}" baseline MODEL_TAG='' SEED=''
    columns="$(tr -s ' ' <<< "$1")"
    [[ $seeds != *' '* ]] || columns+=" seed"
    shift
    base_train_flags
    ARGS+=("$@")
    baseline="$(quoted "${ARGS[@]}")"
    : "${OUT:=$(base_dir)/lab/$(basename "$0" .sh)-$(date +%Y%m%d-%H%M%S)}"
    count_processes
    ARGS=()
    flag match "${MATCH-}"; switch show-output "${SHOW_OUTPUT-}"; switch keep-checkpoints "${KEEP_CHECKPOINTS-}"
    [[ $PROCESSES == 1 ]] || flag nproc-per-node "$PROCESSES"
    words "--seeds $seeds"
    say "compare on $DEVICE_TYPE, d$DEPTH (stopped half-way, the same command with OUT=$(quoted "$OUT") goes on)"
    echo "elapsed_sec is time spent training: compilation and evaluation are not in it"
    run "$PYTHON" -m scripts.lab run --profile= --baseline="$baseline" "${VARIANTS[@]}" --columns="$columns" --out="$OUT" \
        "${ARGS[@]}"
}

# --- set-up ---------------------------------------------------------------------------------------------------------

VENV=.venv
STAMP=$VENV/.nanochat-setup
EXTRAS=dev  # the runners want matplotlib, the tests the rest: one set, so that either command serves both

# Make .venv once and leave its interpreter in $PYTHON; instant from then on. The stamp says what was installed: when
# pyproject.toml (or the folder) changes, it is installed over; what an interrupted set-up left is thrown away.
# SKIP_SETUP=1 takes the interpreter at hand: $PYTHON, else the active environment, else a finished .venv, else python3.
setup() {
    if [[ ${SKIP_SETUP:-0} == 1 ]]; then interpreter_at_hand; return; fi
    local wanted found='' other
    wanted="$ROOT [$EXTRAS] $(cksum < pyproject.toml)"
    [[ ! -f $STAMP ]] || found="$(cat "$STAMP")"
    if [[ $found != "$wanted" || ! -x $VENV/bin/python ]]; then
        case "$found" in
            '') ;;  # no .venv, or one that somebody else made: kept
            unfinished*)
                other="${found#unfinished }"
                [[ $other == $$ ]] || ! kill -0 "$other" 2> /dev/null \
                    || die "process $other is setting up $VENV: wait for it. (If it is something else, remove $VENV.)"
                rm -rf "$VENV" || die "cannot clear $VENV: wait for what is still writing there, then try again" ;;
            *) [[ -x $VENV/bin/python ]] || rm -rf "$VENV" ;;
        esac
        install
        printf '%s\n' "$wanted" > "$STAMP"
    fi
    PYTHON=$VENV/bin/python
}

interpreter_at_hand() {
    if [[ -z ${PYTHON-} ]]; then
        PYTHON=python3
        command -v python3 > /dev/null || PYTHON=python
        [[ -n ${VIRTUAL_ENV-}${CONDA_PREFIX-} || ! -f $STAMP || ! -x $VENV/bin/python ]] || PYTHON=$VENV/bin/python
    fi
    command -v "$PYTHON" > /dev/null \
        || die "SKIP_SETUP=1, but there is no interpreter '$PYTHON': set PYTHON to one that has torch"
}

# uv takes torch from PyTorch's own index, in the build that fits the GPU. Where that index cannot be reached pip does
# it, which also follows the machine's pip configuration.
install() {
    local started=$SECONDS python pip index=https://download.pytorch.org/whl/cpu reachable=1
    say "set-up: installing into $VENV, once (about as long as downloading torch takes)"
    [[ $(uname -s) != Linux ]] || can_reach "$index/torch/" || reachable=0
    if [[ $reachable == 1 ]] && command -v uv > /dev/null; then
        make_venv uv venv --quiet --allow-existing ${PYTHON:+"--python=$PYTHON"}
        run uv pip install --torch-backend=auto --python "$VENV/bin/python" -e ".[$EXTRAS]"
    else
        python="$(find_python)"
        make_venv "$python" -m venv
        "$VENV/bin/python" -m pip --version > /dev/null 2>&1 || run "$VENV/bin/python" -m ensurepip
        pip=("$VENV/bin/python" -m pip install --disable-pip-version-check)
        [[ -t 1 ]] || pip+=(--quiet)
        if [[ $(uname -s) == Linux ]] && ! has_gpu; then  # PyPI's torch is the CUDA build; 2.x+cpu outranks 2.x
            if [[ $reachable == 1 ]]; then
                pip+=(--extra-index-url "$index")
            else
                echo "note: $index is out of reach: pip takes the torch that its own sources have (PyPI's is gigabytes)"
            fi
        fi
        run "${pip[@]}" -e ".[$EXTRAS]"
    fi
    echo "set-up took $((SECONDS - started)) s"
}

# "$@ .venv" unless there is one already. The stamp says "unfinished", and by which process, until setup has finished.
make_venv() {
    local there=0
    [[ ! -x $VENV/bin/python ]] || there=1
    mkdir -p "$VENV"
    echo "unfinished $$" > "$STAMP"
    [[ $there == 1 ]] || run "$@" "$VENV"
}

find_python() {
    local candidate seen=''
    for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11 python3.10 python3.14}; do
        command -v "$candidate" > /dev/null || continue
        seen="$seen $("$candidate" --version 2>&1 || true),"
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || continue
        "$candidate" -c 'import venv, ensurepip' 2> /dev/null \
            || die "$candidate lacks the venv module that set-up needs. Debian/Ubuntu: sudo apt install python3-venv"
        echo "$candidate"
        return
    done
    die "set-up needs Python 3.10 or newer (found:${seen:- none,} no more). Debian/Ubuntu: sudo apt install python3 \
python3-venv; macOS: brew install python; or set PYTHON to the interpreter to use"
}

can_reach() {  # url, within 5 s, through the proxy if there is one
    local tool
    if command -v curl > /dev/null; then curl -sfI -m 5 -o /dev/null "$1"; return; fi
    for tool in python3 python; do
        if command -v "$tool" > /dev/null; then
            "$tool" -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)" "$1" 2> /dev/null
            return
        fi
    done
    return 1
}
