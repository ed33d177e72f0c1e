"""What fusion buys on this machine: every model's fused and unfused plan, interleaved on the same data, one thread.

    python3 scripts/bench/fusion.py PAVAGE MODELS GOLDEN [JSON]
"""
import json
import os
import subprocess
import sys

pavage, models, golden = sys.argv[1:4]
names = "ppocr_det ppocr_rec ppocr_cls magika silero_vad silero_vad_sequence minilm_int8 efficientnet_lite0 efficientnet_lite0_qdq efficientnet_lite0_fp16 digits_rf digits_mlp cancer_gb".split()
rows = []
for name in names:
    case = {"silero_vad": "dev_silero", "silero_vad_sequence": "dev_silero_seq"}.get(name, f"dev_{name}")
    run = subprocess.run([pavage, "bench", f"{models}/{name}.onnx", "--case", os.path.join(golden, case + ".npz"), "--threads", "1", "--ab", "fused,unfused", "--duration", "2", "--json"], capture_output=True, text=True)
    if run.returncode:
        print(name, "failed:", run.stderr[-300:])
        continue
    report = json.loads(run.stdout)
    plans = {p["plan"]: p for p in report["plans"]}
    row = dict(model=name, fused_ms=plans["fused"]["p50_ms"], unfused_ms=plans["unfused"]["p50_ms"])
    rows.append(row)
    print(f"{name:26s} fused {row['fused_ms']:9.3f} ms  unfused {row['unfused_ms']:9.3f} ms  {row['unfused_ms'] / row['fused_ms']:.2f}x", flush=True)
if len(sys.argv) > 4:
    json.dump(rows, open(sys.argv[4], "w"), indent=0)
