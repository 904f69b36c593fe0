#!/usr/bin/env bash
# Makes .venv-examples, the environment of agents' programs, from examples/requirements.lock, and puts prefillshare's client into
# it. `make examples-env` calls it; repeating it is harmless. Needs no .venv; where that has uv, it takes seconds.
#   PYTHON=python3.12 requirements/examples.sh    picks the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

ENV=.venv-examples
LOG=$ENV/install.log
PIP=(--disable-pip-version-check --no-input --progress-bar off)

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} .venv/bin/python python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or 3.12 is needed; name one: make examples-env PYTHON=/path/to/python3.11" >&2
    return 1
}

# Where pip gets packages from, so does uv.
by_uv() {
    [ -x .venv/bin/uv ] || return 1
    local settings
    mapfile -t settings < <("$python" requirements/uv_settings.py)
    env "${settings[@]}" VIRTUAL_ENV="$PWD/$ENV" .venv/bin/uv pip install --no-progress --index-strategy unsafe-best-match "$@"
}

by_pip() { "$ENV/bin/python" -m pip install "${PIP[@]}" "$@"; }

fail() {
    tail -n 25 "$LOG" >&2
    echo "error: $ENV could not be made. The whole log is in $PWD/$LOG" >&2
    exit 1
}

python=$(find_python)
mkdir -p "$ENV"
rm -f "$ENV/.installed"
echo "Setting up $ENV for the examples"
{
    "$python" -m venv "$ENV"
    by_uv --no-deps --require-hashes -r examples/requirements.lock || by_pip --no-deps --require-hashes -r examples/requirements.lock
    by_uv --no-deps -e . || by_pip --no-deps -e .
} >"$LOG" 2>&1 || fail
touch "$ENV/.installed"
echo "Ready: $ENV/bin/python examples/grpc_session.py"
