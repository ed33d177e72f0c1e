#!/usr/bin/env bash
# Where the compiler is: make the folder that scripts/gpu/run.sh needs on the machine with the GPU.
#
#   scripts/gpu/prepare.sh DIR MODELS GOLDEN [MODEL...]
#   scripts/gpu/prepare.sh DIR --nodes SUITE [PLAN...]       the ONNX node tests alone
#
# SUITE is what scripts/fetch_nodes.sh makes, MODELS is what scripts/fetch_models.sh makes, GOLDEN the folder of dev_*.npz. Artifacts are packed with xz.
set -eu
if [ "$2" = --nodes ]; then
  DIR=$1 SUITE=$3; shift 3
  ROOT=$(cd "$(dirname "$0")/../.." && pwd); BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release
  (cd "$ROOT" && cargo build --release -q -p pavage --example pack_nodes && cargo build --release -q -p embed)
  mkdir -p "$DIR"; strip -o "$DIR/nodes" "$BIN/nodes"
  "$BIN/examples/pack_nodes" "$SUITE" "$DIR" sm_90a "$@"
  xz -2 -T0 -f "$DIR/nodes.bin"; du -sh "$DIR"; exit
fi
DIR=$1 MODELS=$2 GOLDEN=$3; shift 3
ALL="digits_mlp efficientnet_lite0 ppocr_cls ppocr_det ppocr_rec magika silero_vad silero_vad_sequence minilm_int8 efficientnet_lite0_qdq efficientnet_lite0_fp16 digits_rf cancer_gb"
ROOT=$(cd "$(dirname "$0")/../.." && pwd); BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release
(cd "$ROOT" && cargo build --release -q -p pavage -p embed && cargo run --release -q -p pavage-codegen --example gpu_kernels -- "$DIR")
mkdir -p "$DIR/artifacts" "$DIR/cases"; rm -f "$DIR"/artifacts/*
strip -o "$DIR/embed" "$BIN/embed"
for m in ${*:-$ALL}; do
  case $m in silero_vad) g=dev_silero;; silero_vad_sequence) g=dev_silero_seq;; *) g=dev_$m;; esac
  "$BIN/pavage" compile "$MODELS/$m.onnx" --target sm_90a -o "$DIR/artifacts/$m.pav"
  xz -1 -T0 "$DIR/artifacts/$m.pav"; cp "$GOLDEN/$g.npz" "$DIR/cases/$m.npz"
done
mkdir -p "$DIR/onnx" "$DIR/ops"; "${PYTHON:-python3}" "$ROOT/scripts/gpu/make_onnx.py" "$DIR/onnx"
for f in "$DIR"/onnx/*.onnx; do "$BIN/pavage" compile "$f" --target sm_90a -o "$DIR/ops/$(basename "$f" .onnx).pav"; done
du -sh "$DIR"
