#!/usr/bin/env bash
# The robustness gate: baseline against candidate at several depths, under the same conditions. A candidate is promoted only if
# the gain holds at each depth.
#   CANDIDATE="--warmdown-shape=cosine" bash runs/miniseries.sh
# PROFILE: a name in configs/ or a file of flags, for every run; BASELINE: more flags; DEPTHS, SEEDS, MAX_SEEDS, MATCH, OUT;
# NPROC_PER_NODE: processes of a run, one for each GPU; GPUS="0 1 2 3": runs side by side, one on each of these.
# Arguments go to `lab miniseries`. results.csv in its folder has the columns of the public miniseries, then variant and seed.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[[ -n ${CANDIDATE-} ]] || die 'CANDIDATE="FLAGS" says what is compared with the baseline'
if has_gpu; then : "${PROFILE:=lab-gpu}" "${DEPTHS:=6 8 12}"; else : "${PROFILE:=lab-cpu}" "${DEPTHS:=2 4 6}"; fi
flag match "${MATCH-}"; flag max-seeds "${MAX_SEEDS-}"; flag out "${OUT-}"
flag nproc-per-node "${NPROC_PER_NODE-}"
[[ -z ${GPUS-} ]] || words "--gpus $GPUS"
words "--depths $DEPTHS --seeds ${SEEDS:-1 2}"
run "$PYTHON" -m scripts.lab miniseries --profile="$PROFILE" --candidate="$CANDIDATE" --baseline="${BASELINE-}" "${ARGS[@]}" "$@"
