#!/usr/bin/env bash
# The whole test suite in its own environment.   ./tests/run.sh [pytest arguments]
# PYTHON and VENV as in launch/setup.sh. Tests that need what this machine lacks are skipped and say what they need.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh" test
cd "$root"
exec "${VENV:-$root/.venv}/bin/python" -m pytest "$@"
