#!/usr/bin/env bash
# Where does the NaN come from? Two steps in FP8, uncompiled, with every activation, gradient and scale checked: the first
# module with a NaN or infinity is named. Then two steps compiled, which are stopped before the optimizer takes a NaN.
#   bash runs/fpi_debug.sh
# Variables and arguments as for fp8_compare.sh. SHOW_OUTPUT=0 keeps what the runs print in their logs.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
FP8_VARIANTS="${FP8_VARIANTS:-debug compiled}"
: "${NUM_ITERATIONS:=2}" "${EVAL_TOKENS:=65536}" "${SHOW_OUTPUT:=1}"
source runs/fp8_compare.sh
