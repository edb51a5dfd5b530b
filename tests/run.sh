#!/usr/bin/env bash
# The whole test suite in its own environments.   ./tests/run.sh [pytest arguments]
# PYTHON and VENV as in launch/setup.sh; BEAM_VENV: the folder of the second environment (.venv-beam), which Apache Beam needs for itself.
# With arguments only what they ask for runs, in the first one. Tests that need what this machine lacks are skipped and say what they need.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh" test
cd "$root"
"${VENV:-$root/.venv}/bin/python" -m pytest "$@"
[ $# -eq 0 ] || exit 0
version=$("${VENV:-$root/.venv}/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
if [ ! -f "constraints-beam-py$version.txt" ]; then
    echo "run: tests/test_beam.py did not run: Apache Beam's versions are pinned for Python 3.11, this is $version"; exit 0
fi
beam=${BEAM_VENV:-$root/.venv-beam}
VENV=$beam "$root/launch/setup.sh" beam,beam-test
"$beam/bin/python" -m pytest tests/test_beam.py
