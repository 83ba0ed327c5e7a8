#!/usr/bin/env bash
# Set-up, then ruff and mypy; pyproject.toml says what they check. Arguments go to ruff:   bash runs/lint.sh --fix
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run "$PYTHON" -m ruff check "$@"
run "$PYTHON" -m mypy
