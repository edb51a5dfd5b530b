#!/usr/bin/env bash
# Makes the virtual environment and installs this checkout with pinned versions. Called by launch/local.sh,
# launch/worker.sh and tests/run.sh.
#   launch/setup.sh [EXTRAS]     EXTRAS: comma list of pyproject extras (test, torch, tpu, gpu, beam); none by default
# PYTHON: the interpreter to build from (python3). VENV: the environment's folder (.venv in the checkout).
# Apache Beam holds some packages back: with the extra beam the folder is .venv-beam and the versions are those of
# constraints-beam-py311.txt.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-}
python=${PYTHON:-python3}
case ",$extras," in *,beam,*) beam=-beam ;; *) beam= ;; esac
venv=${VENV:-$root/.venv$beam}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "setup: cannot run '$python'; set PYTHON to a Python 3.11, 3.12 or 3.13" >&2; exit 78; }
case "$version" in
    3.11) constraints=$root/constraints-py311.txt ;;
    3.12|3.13) constraints=$root/constraints-py312.txt ;;
    *) echo "setup: $python is Python $version; skysense_jax needs 3.11, 3.12 or 3.13 (set PYTHON)" >&2; exit 78 ;;
esac
if [ -n "$beam" ]; then
    constraints=$root/constraints-beam-py${version/./}.txt
    [ -f "$constraints" ] || {
        echo "setup: the extra beam has pinned versions for Python 3.11 only, $python is $version (set PYTHON)" >&2
        exit 78; }
fi

if [ -x "$venv/bin/python" ]; then
    have=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$have" != "$version" ]; then
        echo "setup: $venv holds Python $have but $python is $version; remove the folder or set VENV to another one" >&2
        exit 78
    fi
else
    echo "setup: making $venv with Python $version"
    "$python" -m venv "$venv"
fi

# One stamp per set of extras; it changes with everything that decides what gets installed.
digest='import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
want=$(cat "$root/pyproject.toml" "$root/setup.py" "$constraints" | "$venv/bin/python" -c "$digest")
stamp=$venv/.installed-${extras:-base}
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
    echo "setup: installing skysense_jax${extras:+[$extras]} and its pinned dependencies (a few minutes the first time)"
    (cd "$root" && "$venv/bin/python" -m pip install --disable-pip-version-check --quiet \
        --constraint "$constraints" --editable ".${extras:+[$extras]}") || {
        echo "setup: the installation failed; the messages above say why" >&2; exit 1; }
    echo "$want" > "$stamp"
fi
echo "setup: ready: $venv (Python $version)"
