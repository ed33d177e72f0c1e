"""What the search is worth on this machine: the e-graph's plan and those it has to beat, from the same kernels and costs.

    python3 scripts/bench/eqsat.py PAVAGE MODELS GOLDEN GRAPHS [JSON]      # NAMES="magika resnet50" takes these alone

MODELS and GOLDEN are the 13 real models and their cases, GRAPHS what graphs.py wrote. Arms: unfused (one kernel an op),
greedy (a destructive fuser), random (the best of 1,000 random choices from the e-graph), beam (32 states at a class), fused (the
frontier DP). One artifact holds all; they are run in turn on the same data, one thread, and medians compared (on a busy machine
the least times say more). Plans that are the same, kernel for kernel, are timed once. Prints markdown.
"""
import ast
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile

ARMS = ["unfused", "greedy", "random", "beam", "fused"]
REAL = "ppocr_det ppocr_rec ppocr_cls magika silero_vad silero_vad_sequence minilm_int8 efficientnet_lite0 efficientnet_lite0_qdq efficientnet_lite0_fp16 digits_rf digits_mlp cancer_gb".split()
BUILT = "bert_base vit_b16 resnet50 mobilenetv3 llama_decode_b1 llama_decode_b16 llama_prefill_512 llama_prefill_2048".split()
pavage, models, golden, graphs = sys.argv[1:5]


def run(*args):
    done = subprocess.run([pavage, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    return done.stdout


def shapes(case):
    """Shapes of a case's inputs, for --shape."""
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


def where(name):
    """Model and case."""
    if name in BUILT:
        return f"{graphs}/{re.sub('_(b[0-9]+|512|2048)$', '', name) if name.startswith('llama') else name}.onnx", f"{graphs}/{name}.npz"
    case = {"silero_vad": "dev_silero", "silero_vad_sequence": "dev_silero_seq"}.get(name, f"dev_{name}")
    return f"{models}/{name}.onnx", os.path.join(golden, case + ".npz")


def measure(name, folder):
    """A row an arm."""
    model, case = where(name)
    fixed = shapes(case) if not name.startswith("silero") else []
    artifact, text = os.path.join(folder, "m.pav"), os.path.join(folder, "m.ir")
    report = json.loads(run("compile", model, *fixed, "--plans", ",".join(ARMS), "-o", artifact, "--json"))
    seconds = {p["plan"]: p["seconds"] for p in report["planning"]}
    run("compile", model, *fixed, "--plans", ",".join(ARMS), "--emit", "ir", "-o", text)
    programs = dict(re.findall(r"^program (\w+)( \{.*?)(?=^program |\Z)", open(text).read(), re.M | re.S))
    first = {arm: next(a for a in reversed(ARMS) if programs[a].split("\n; ")[0].strip() == programs[arm].split("\n; ")[0].strip()) for arm in ARMS}
    timed = sorted(set(first.values()), key=ARMS.index)
    inputs = ["--case" if name in REAL else "--inputs", case]
    bench = json.loads(run("bench", artifact, *inputs, "--threads", "1", "--ab", ",".join(timed), "--duration", os.environ.get("SECONDS_A_MODEL", "4"), "--iterations", "5", "--json"))
    times = {p["plan"]: p for p in bench["plans"]}
    rows = []
    for arm in ARMS:
        kernels = json.loads(run("explain", artifact, "--plan", arm, "--json"))
        predicted = sum(k["launches"] * k["why"]["total_ns"] for k in kernels) / 1e3
        rows.append(dict(model=name, arm=arm, launches=sum(k["launches"] for k in kernels), predicted_us=predicted, ms=times[first[arm]]["p50_ms"], least_ms=times[first[arm]]["min_ms"], same_as=first[arm], search_s=seconds[arm], notes=report["notes"]))
    return rows


def geomean(ratios):
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


rows = {}
print("| model | " + " | ".join(f"{a}: launches, predicted ms, measured ms" for a in ARMS) + " | greedy / fused: medians, least | search s: greedy, random, beam, fused |")
print("|" + "---|" * (len(ARMS) + 3), flush=True)
with tempfile.TemporaryDirectory() as folder:
    for name in os.environ.get("NAMES", " ".join(REAL + BUILT)).split():
        try:
            of = {r["arm"]: r for r in measure(name, folder)}
        except RuntimeError as e:
            print(name, "failed:", e)
            continue
        rows[name] = of
        cells = []
        for arm in ARMS:
            r = of[arm]
            measured = f"{r['ms']:.4g}" if r["same_as"] == arm else f"same plan as {r['same_as']}"
            cells.append(f"{r['launches']}, {r['predicted_us'] / 1e3:.4g}, {measured}")
        search = ", ".join(f"{of[a]['search_s']:.2f}" for a in ARMS[1:])
        print(f"| {name} | " + " | ".join(cells) + f" | {of['greedy']['ms'] / of['fused']['ms']:.3f}, {of['greedy']['least_ms'] / of['fused']['least_ms']:.3f} | {search} |", flush=True)
        for note in of["fused"]["notes"]:
            if "stopped" in note or "kept" in note:
                print(f"{name}: a limit was hit: {note}", file=sys.stderr)
for arm in ARMS[:-1] if rows else []:
    for of_what in ["ms", "least_ms"]:
        ratios = [of[arm][of_what] / of["fused"][of_what] for of in rows.values()]
        how = "medians" if of_what == "ms" else "least times"
        print(f"\n{arm} / fused, {how}: geometric mean {geomean(ratios):.3f} of {len(ratios)}, least {min(ratios):.3f}, most {max(ratios):.3f}")
if len(sys.argv) > 5:
    json.dump([r for of in rows.values() for r in of.values()], open(sys.argv[5], "w"), indent=0)
