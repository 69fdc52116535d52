#!/usr/bin/env bash
# Everything that must hold before a commit: format, lint, types, tests. Needs the extra 'dev'.
# Arguments go to pytest; --no-tests leaves the tests out.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff format --check .
ruff check .
pyright
if [[ ${1:-} != --no-tests ]]; then
    pytest "$@"
fi
