#!/usr/bin/env bash
# Set-up, then ruff and mypy; what they look at is said in pyproject.toml. Arguments go to ruff:   bash runs/lint.sh --fix
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
setup
run "$PYTHON" -m ruff check "$@"
run "$PYTHON" -m mypy
