#!/usr/bin/env bash
# Fails when the generated stubs do not match the .proto files they are made from.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
requirements/make_protos.sh "$fresh"
for stub in $(cd "$fresh" && find protos -type f); do
    cmp -s "$fresh/$stub" "$stub" || { echo "error: $stub does not match its .proto file: run make protos" >&2; exit 1; }
done
echo "Generated stubs match the .proto files."
