#!/usr/bin/env bash
# Set-up, then the tests:   bash runs/test.sh -k tokenizer -x
# With pytest-xdist, which set-up installs: a process for each core, at most 8; -n0 for one.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
! "$PYTHON" -c 'import xdist' 2> /dev/null || set -- --numprocesses=auto --maxprocesses=8 --dist=loadfile "$@"
run "$PYTHON" -m pytest "$@"
