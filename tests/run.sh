#!/usr/bin/env bash
# The whole test suite in its own environments.   ./tests/run.sh [pytest arguments]
# With arguments only what they ask for runs, in the first environment. Without, every file runs, two at a time
# (TEST_PROCESSES), the ten slowest tests are listed, and two more environments are made, for what must not lie in the
# first one: Apache Beam, which holds other packages back, and the TPU compiler (no TPU is needed). Their folders: VENV
# (.venv), BEAM_VENV (.venv-beam), TPU_VENV (.venv-tpu). PYTHON as in launch/setup.sh. Tests that need what this machine
# lacks are skipped and say what they need.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh" test
cd "$root"
python=${VENV:-$root/.venv}/bin/python
if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi
"$python" -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --durations=10

version=$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
if [ -f "constraints-beam-py$version.txt" ]; then
    beam=${BEAM_VENV:-$root/.venv-beam}
    VENV=$beam "$root/launch/setup.sh" beam,pytest
    "$beam/bin/python" -m pytest tests/test_beam.py
else
    echo "run: tests/test_beam.py did not run: Apache Beam's versions are pinned for Python 3.11, this is $version"
fi

if [ "$(uname -sm)" = "Linux x86_64" ]; then
    tpu=${TPU_VENV:-$root/.venv-tpu}
    VENV=$tpu "$root/launch/setup.sh" tpu,pytest
    "$tpu/bin/python" -m pytest -m tpu_compiler tests/test_compile_check.py
else
    echo "run: the tests marked tpu_compiler did not run: libtpu is for Linux on x86_64, this is $(uname -sm)"
fi
