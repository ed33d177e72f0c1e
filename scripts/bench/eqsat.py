"""What the search is worth on this machine: the e-graph's plan and those it has to beat, from the same kernels and costs.

    python3 scripts/bench/eqsat.py PAVAGE MODELS GOLDEN [JSON]

Arms: unfused (one kernel an op), greedy (a destructive fuser), random (the best of 1,000 random choices from the
e-graph), beam (32 states at a class), fused (the frontier DP). Each is timed in turn with the fused plan on the same data, one thread;
what is printed is the time relative to the fused plan of the same pair. Search time is what planning adds to the time of
printing the unfused program.
"""
import ast
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zipfile

ARMS = ["unfused", "greedy", "random", "beam", "fused"]
NAMES = "ppocr_det ppocr_rec ppocr_cls magika silero_vad silero_vad_sequence minilm_int8 efficientnet_lite0 efficientnet_lite0_qdq efficientnet_lite0_fp16 digits_rf digits_mlp cancer_gb".split()
pavage, models, golden = sys.argv[1:4]


def run(*args):
    done = subprocess.run([pavage, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    return done.stdout


def shapes(case):
    """Sizes of a case's inputs, for --shape."""
    given = []
    with zipfile.ZipFile(case) as arrays:
        for name in arrays.namelist():
            with arrays.open(name) as array:
                version = array.read(8)[6]
                header = array.read(int.from_bytes(array.read(2 if version == 1 else 4), "little"))
            shape = ast.literal_eval(header.decode())["shape"]
            if name.startswith("in:") and shape:
                given += ["--shape", f"{name[3:-4]}={'x'.join(map(str, shape))}"]
    return given


rows = []
with tempfile.TemporaryDirectory() as folder:
    for name in os.environ.get("NAMES", " ".join(NAMES)).split():
        case = os.path.join(golden, {"silero_vad": "dev_silero", "silero_vad_sequence": "dev_silero_seq"}.get(name, f"dev_{name}") + ".npz")
        model, artifact = f"{models}/{name}.onnx", os.path.join(folder, "m.pav")
        fixed = shapes(case) if not name.startswith("silero") else []
        try:
            run("compile", model, *fixed, "--plans", ",".join(ARMS), "-o", artifact)
            seconds = {}
            for arm in ARMS:
                start = time.monotonic()
                run("compile", model, *fixed, "--plans", arm, "--emit", "ir", "-o", os.path.join(folder, "m.ir"))
                seconds[arm] = time.monotonic() - start
            for arm in ARMS:
                kernels = json.loads(run("explain", artifact, "--plan", arm, "--json"))
                pair = json.loads(run("bench", artifact, "--case", case, "--threads", "1", "--ab", f"fused,{arm}" if arm != "fused" else "fused,unfused", "--duration", "1", "--json"))
                fused, other = [p["min_ms"] for p in pair["plans"]]
                rows.append(dict(
                    model=name, arm=arm, kernels=len(kernels), predicted_us=sum(k["why"]["total_ns"] for k in kernels) / 1e3,
                    ms=fused if arm == "fused" else other, relative=1.0 if arm == "fused" else other / fused, search_s=max(0.0, seconds[arm] - seconds["unfused"]),
                ))
                r = rows[-1]
                print(f"{name:24s} {arm:8s} {r['kernels']:4d} kernels  predicted {r['predicted_us']:10.1f} us  {r['ms']:9.3f} ms  {r['relative']:5.2f} of fused  search {r['search_s']:5.2f} s", flush=True)
        except RuntimeError as e:
            print(name, "failed:", e)
for arm in ARMS:
    ratios = [r["relative"] for r in rows if r["arm"] == arm]
    if ratios:
        print(f"{arm:8s} geomean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f} of fused's time over {len(ratios)} models")
if len(sys.argv) > 4:
    json.dump(rows, open(sys.argv[4], "w"), indent=0)
