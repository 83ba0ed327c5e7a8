#!/usr/bin/env bash
# Set-up, then the tests:   bash runs/test.sh -k tokenizer -x
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
setup
run "$PYTHON" -m pytest "$@"
