#!/usr/bin/env bash
# This repository's FP8 layers against torchao's, and bf16: one after the other, then their table.
#   bash runs/fp8_backend_compare.sh             torchao has to be installed: pip install torchao
# Variables and arguments as for fp8_compare.sh.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
FP8_VARIANTS="${FP8_VARIANTS:-custom torchao baseline}"
source runs/fp8_compare.sh
