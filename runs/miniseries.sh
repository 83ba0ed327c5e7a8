#!/usr/bin/env bash
# The robustness gate: baseline against candidate over depths, matched conditions; promoted only if the gain holds at each.
#   CANDIDATE="--warmdown-shape=cosine" bash runs/miniseries.sh
# PROFILE: flags of every run (cpu-smoke, cpu, d12, gpu, or a file); BASELINE: more; DEPTHS, SEEDS, MAX_SEEDS, MATCH, OUT.
# Arguments go to `lab miniseries`. results.csv in its folder has the columns of the public miniseries, then variant and seed.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
setup
if has_gpu; then : "${PROFILE:=gpu}" "${DEPTHS:=6 8 12}"; else : "${PROFILE:=cpu}" "${DEPTHS:=2 4 6}"; fi
[[ -n ${CANDIDATE-} ]] || die 'CANDIDATE="FLAGS" says what is compared with the baseline'
ARGS=(--profile "$PROFILE" --candidate="$CANDIDATE" --baseline="${BASELINE-}")
flag match "${MATCH-}"; flag max-seeds "${MAX_SEEDS-}"; flag out "${OUT-}"
words "--depths $DEPTHS --seeds ${SEEDS:-1 2}"
run "$PYTHON" -m scripts.lab miniseries "${ARGS[@]}" "$@"
