#!/usr/bin/env bash
# Gets a headless Chromium (100 MB) for the tests of the page at /ui, unless there is one. `make test` calls it; nothing else needs
# it. Which one the tests take: tests/chromium.py.
set -euo pipefail
cd "$(dirname "$0")/.."

LOG=.venv/chromium.log
. requirements/apt.sh

[ -z "${PREFILLSHARE_CHROMIUM:-}" ] || exit 0
for name in chromium-headless-shell chromium chromium-browser google-chrome; do
    ! command -v "$name" >/dev/null || exit 0
done
: >"$LOG"
echo "Installing a headless Chromium for the tests of the page at /ui"
apt chromium-headless-shell chromium ||
    echo "  note: none can be had ($LOG); the tests that need it fail (PREFILLSHARE_CHROMIUM=off leaves them out)"
