"""What a user would pick instead on a CPU, timed on the real models: ONNX Runtime and OpenVINO.

    python3 -m pip install onnxruntime==1.31.1 openvino==2026.4.1 numpy
    python3 scripts/bench/cpu_peers.py MODELS_DIR GOLDEN_DIR [--threads 1,2] [--json FILE] [--ours "CMD with {model} {npz} {threads}"]

MODELS_DIR is what scripts/fetch_models.sh makes, GOLDEN_DIR tests/golden (keys in:NAME, out:NAME).
Peers run in turn, round by round, so a drift of the machine hits all alike; the figure is the median of the rounds' medians.
--ours runs a command that prints its median latency in ms as its last line, in the same rounds.
"""
import argparse, json, os, shlex, statistics, subprocess, time
import numpy as np

CASES = [  # name, model file, golden
    ("ppocr_det 1x3x192x384", "ppocr_det.onnx", "dev_ppocr_det"), ("ppocr_rec", "ppocr_rec.onnx", "dev_ppocr_rec"), ("ppocr_cls", "ppocr_cls.onnx", "dev_ppocr_cls"),
    ("magika", "magika.onnx", "dev_magika"), ("silero_vad step", "silero_vad.onnx", "dev_silero"), ("silero_vad sequence", "silero_vad_sequence.onnx", "dev_silero_seq"),
    ("minilm int8 weights", "minilm_int8.onnx", "dev_minilm_int8"), ("efficientnet_lite0 f32", "efficientnet_lite0.onnx", "dev_efficientnet_lite0"),
    ("efficientnet_lite0 qdq", "efficientnet_lite0_qdq.onnx", "dev_efficientnet_lite0_qdq"), ("efficientnet_lite0 f16", "efficientnet_lite0_fp16.onnx", "dev_efficientnet_lite0_fp16"),
    ("digits random forest b64", "digits_rf.onnx", "dev_digits_rf"), ("digits mlp b64", "digits_mlp.onnx", "dev_digits_mlp"),
]


def med(fn, seconds=0.5):
    fn(); fn(); ts = []; end = time.perf_counter() + seconds
    while len(ts) < 5 or time.perf_counter() < end:
        t = time.perf_counter(); fn(); ts.append(time.perf_counter() - t)
    return statistics.median(ts) * 1e3


def ort_runner(path, feeds, threads):
    import onnxruntime as ort
    so = ort.SessionOptions(); so.intra_op_num_threads = threads; so.inter_op_num_threads = 1
    s = ort.InferenceSession(path, so, providers=["CPUExecutionProvider"])
    return lambda: s.run(None, feeds)


def ov_runner(path, feeds, threads):
    import openvino as ov
    core = ov.Core(); m = core.read_model(path); m.reshape({k: v.shape for k, v in feeds.items()})
    c = core.compile_model(m, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})
    r = c.create_infer_request()
    return lambda: r.infer(feeds)


if __name__ == "__main__":
    p = argparse.ArgumentParser(); p.add_argument("models"); p.add_argument("golden"); p.add_argument("--threads", default="1,2"); p.add_argument("--json"); p.add_argument("--ours"); p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args(); rows = []
    for threads in map(int, a.threads.split(",")):
        for name, file, gold in CASES:
            path, npz = os.path.join(a.models, file), os.path.join(a.golden, gold + ".npz")
            if not os.path.exists(path):
                print("missing", path); continue
            feeds = {k[3:]: v for k, v in np.load(npz).items() if k.startswith("in:")}
            run, got = {}, {}
            for peer, make in (("onnxruntime", ort_runner), ("openvino", ov_runner)):
                try:
                    run[peer] = make(path, feeds, threads)
                except Exception as e:
                    print(f"{name}: {peer} cannot: {str(e)[:100]}")
            for _ in range(a.rounds):
                for peer, fn in run.items():
                    got.setdefault(peer, []).append(med(fn))
                if a.ours:
                    out = subprocess.run(shlex.split(a.ours.format(model=path, npz=npz, threads=threads)), capture_output=True, text=True)
                    got.setdefault("ours", []).append(float(out.stdout.split()[-1]) if out.returncode == 0 else float("nan"))
            row = dict(work=name, threads=threads, **{k: round(statistics.median(v), 4) for k, v in got.items()}); rows.append(row)
            print(f"{name:28s} t{threads}  " + "  ".join(f"{k} {v:9.3f} ms" for k, v in row.items() if k not in ("work", "threads")), flush=True)
    if a.json: json.dump(rows, open(a.json, "w"), indent=0)
