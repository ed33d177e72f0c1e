#!/usr/bin/env bash
# Writes ONNX's node tests into a folder (scripts/dump_node_tests.py): 1884 of them, from the onnx wheel, pinned by hash.
#   PY=venv/bin/python scripts/fetch_nodes.sh FOLDER
# PY is a Python with pip whose environment may be installed into. Nothing is done when the tests are there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "${1:-target/nodes}")
py=${PY:-python3}
expected=1884

[ "$(find "$out" -mindepth 2 -maxdepth 2 -name model.onnx 2>/dev/null | wc -l)" -eq "$expected" ] && exit 0
echo "Writing ONNX's node tests ..." >&2
"$py" -m pip install -q --no-deps --only-binary=:all: --require-hashes -r "$here/requirements-nodes.txt"
rm -rf "$out.part" "$out"
"$py" "$here/dump_node_tests.py" "$out.part" >&2
mv "$out.part" "$out"
found=$(find "$out" -mindepth 2 -maxdepth 2 -name model.onnx | wc -l)
[ "$found" -eq "$expected" ] || { echo "$found tests, not $expected" >&2; exit 1; }
