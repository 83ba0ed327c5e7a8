#!/usr/bin/env bash
# Find where a NaN comes from. Two steps in FP8, uncompiled, with every activation, gradient and scale checked: the first
# module with a NaN or infinity is named. Then two compiled steps, which stop before the optimizer uses a NaN.
#   bash runs/fpi_debug.sh
# Variables and arguments as for fp8_compare.sh. SHOW_OUTPUT=0 keeps the output of the runs in their logs.
FP8_VARIANTS="${FP8_VARIANTS:-debug compiled}"
NUM_ITERATIONS="${NUM_ITERATIONS:-2}" EVAL_TOKENS="${EVAL_TOKENS:-65536}" SHOW_OUTPUT="${SHOW_OUTPUT:-1}"
source "$(dirname "${BASH_SOURCE[0]}")/fp8_compare.sh"
