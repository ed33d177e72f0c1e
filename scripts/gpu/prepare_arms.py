"""Where the compiler is: make the folder that arms.sh needs on the machine with the GPU.

    cargo build --release --workspace --bins
    python3 scripts/bench/graphs.py GRAPHS --half
    python3 scripts/gpu/prepare_arms.py DIR MODELS tests/golden GRAPHS        # needs numpy, xz; NAMES="magika resnet50" takes these alone

MODELS is what scripts/fetch_models.sh makes, GRAPHS what graphs.py writes (in f16: --half). Artifacts for sm_90a hold the plans unfused, greedy and fused;
weights over 64 KiB are taken out (hollow.py), so that the folder packs to some 55 MB, the compiler included. TUNE names the models that are tuned there.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np

REAL = "ppocr_det ppocr_rec ppocr_cls magika silero_vad silero_vad_sequence minilm_int8 efficientnet_lite0 efficientnet_lite0_qdq efficientnet_lite0_fp16 digits_rf digits_mlp cancer_gb".split()
BUILT = "bert_base vit_b16 resnet50 mobilenetv3 llama_decode_b1 llama_decode_b16 llama_prefill_512 llama_prefill_2048".split()
to, models, golden, graphs = map(pathlib.Path, sys.argv[1:5])
root = pathlib.Path(__file__).resolve().parents[2]
programs = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", root / "target")) / "release"
to.mkdir(parents=True, exist_ok=True)
for program in ("arms", "embed"):
    subprocess.run(["strip", "-o", to / program, programs / program], check=True)
# The compiler itself, for what is measured and tuned there, with the library that a machine may lack.
subprocess.run(["strip", "-o", to / "pavage", programs / "pavage"], check=True)
libraries = subprocess.run(["ldd", programs / "pavage"], check=True, capture_output=True, text=True).stdout
shutil.copy(re.search(r"libffi\S* => (\S+)", libraries)[1], to)
subprocess.run(["xz", "-6", "-T0", "-f", to / "pavage"], check=True)
for name in os.environ.get("TUNE", "digits_mlp magika ppocr_cls").split():
    shutil.copy(models / f"{name}.onnx", to)
for name in os.environ.get("NAMES", " ".join(BUILT + REAL)).split():
    if name in BUILT:
        model, case = graphs / (re.sub("_(b[0-9]+|512|2048)$", "", name) + ".onnx" if name.startswith("llama") else f"{name}.onnx"), graphs / f"{name}.npz"
    else:
        model, case = models / f"{name}.onnx", golden / ({"silero_vad": "dev_silero", "silero_vad_sequence": "dev_silero_seq"}.get(name, f"dev_{name}") + ".npz")
    artifact, packed = to / f"{name}.pav", to / f"{name}.npz"
    shutil.copy(case, packed)
    fixed = [] if name.startswith("silero") else [w for k, v in np.load(case).items() if k.startswith("in:") and v.ndim for w in ("--shape", f"{k[3:]}={'x'.join(map(str, v.shape))}")]
    subprocess.run([programs / "pavage", "compile", model, "--target", "sm_90a", *fixed, "--plans", "unfused,greedy,fused", "-o", artifact], check=True)
    subprocess.run([sys.executable, root / "scripts/gpu/hollow.py", "empty", artifact, packed], check=True)
    subprocess.run(["xz", "-2", "-T0", "-f", artifact], check=True)
