#!/usr/bin/env bash
# This repository's FP8 layers against torchao's, and bf16: one after the other, then a table.
#   bash runs/fp8_backend_compare.sh             needs torchao: pip install torchao
# Variables and arguments as for fp8_compare.sh.
FP8_VARIANTS="${FP8_VARIANTS:-custom torchao baseline}"
source "$(dirname "${BASH_SOURCE[0]}")/fp8_compare.sh"
