#!/usr/bin/env bash
# Generates the gRPC stubs from protos/ into OUT/protos (default: beside the .proto files). They import each other by the name that
# they are installed under, prefillshare.protos.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
.venv/bin/python -m grpc_tools.protoc -Iprefillshare/protos=protos --python_out="$fresh" --pyi_out="$fresh" \
    --grpc_python_out="$fresh" $(find protos -name '*.proto')
mkdir -p "${1:-.}/protos"
cp -r "$fresh/prefillshare/protos/." "${1:-.}/protos"
