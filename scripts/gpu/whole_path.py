"""Artifacts of make_onnx.py's files, run by the runtime on a GPU: checked against f32/f64 references on random data and timed in turn with
PyTorch (cuBLAS, cuDNN attention) on the same shapes. Kernel times by CUDA events on both sides.

    python3 scripts/gpu/whole_path.py DIR        DIR/embed, DIR/ops/*.pav
"""
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import torch

DIR = sys.argv[1]
ROUNDS = 3


def events(fn, n=30):
    for _ in range(5):
        fn()
    times = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); fn(); b.record(); torch.cuda.synchronize(); times.append(a.elapsed_time(b) * 1e3)
    return statistics.median(times)


def case(name):
    sizes = [int(v) for v in name.rsplit("_", 1)[1].split("x")]
    gen = torch.Generator("cuda").manual_seed(sum(sizes))
    rand = lambda *s: torch.randn(*s, generator=gen, device="cuda").half()
    if name.startswith(("attention", "causal")):
        (b, s, d), causal = sizes, name.startswith("causal")
        q, k, v = rand(b, s, d), rand(b, s, d), rand(b, s, d)
        hidden = torch.ones(s, s, dtype=torch.bool, device="cuda").triu(1) if causal else torch.zeros(1, 1, dtype=torch.bool, device="cuda")
        score = lambda i: (q[i].double() @ k[i].double().T / d**0.5).masked_fill(hidden, -torch.inf)
        want = torch.cat([torch.softmax(score(i), -1) @ v[i].double() for i in range(b)]).reshape(b, s, d)
        heads = [x.unsqueeze(0) for x in (q, k, v)]

        def peer():
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal)
        feeds = {"q": q, "k": k, "v": v}
        if causal and "parts" not in name:
            feeds, want = {n: x.unsqueeze(0) for n, x in feeds.items()}, want.unsqueeze(0)
        return feeds, want, peer, "cuDNN", 4 * b * s * s * d // (2 if causal else 1)
    m, n, k = sizes
    if name.startswith(("bytes", "qdq")):
        # Exact; the weights are make_onnx.py's.
        w = torch.from_numpy(np.random.RandomState(m + n + k).randint(-127, 128, size=(k, n)).astype(np.int8)).cuda()
        a = torch.randint(-128, 128, (m, k), generator=gen, device="cuda").to(torch.int8)
        turned = w.T.contiguous().T
        peer = (lambda: torch._int_mm(a, turned)) if n % 8 == k % 8 == 0 else (lambda: a.float() @ w.float())
        if name.startswith("bytes"):
            return {"a": a}, (a.double() @ w.double()).int(), peer, "_int_mm", 2 * m * n * k
        a8 = (a.int() + 128).to(torch.uint8)
        want = (torch.round((a8.double() - 119) @ w.double() / 2048) + 119).clamp(0, 255)
        return {"a": a8}, want.to(torch.uint8), peer, "_int_mm", 2 * m * n * k
    a, b = rand(m, k), rand(k, n)
    if name.startswith("linear_gelu"):
        a, b = a * 0.2, b * 0.2
        bias = rand(n)
        want = torch.nn.functional.gelu(a.double() @ b.double() + bias.double())
        return {"a": a, "b": b, "bias": bias}, want, lambda: torch.nn.functional.gelu(torch.addmm(bias, a, b)), "cuBLAS+gelu", 2 * m * n * k
    return {"a": a, "b": b}, a.double() @ b.double(), lambda: a @ b, "cuBLAS", 2 * m * n * k


rows = []
for path in sorted(glob.glob(f"{DIR}/ops/*.pav")):
    name = os.path.basename(path)[:-4]
    try:
        feeds, want, peer, library, flops = case(name)
        npz = tempfile.mktemp(suffix=".npz")
        np.savez(npz, **{f"in:{k}": v.cpu().numpy() for k, v in feeds.items()}, **{"out:y": (want.float() if want.is_floating_point() else want).cpu().numpy()})
        scale = want.double().abs().max().item()
        ours, theirs = [], []
        for _ in range(ROUNDS):
            run = subprocess.run([f"{DIR}/embed", path, npz, "cuda:0", "fused", "10"], capture_output=True, text=True, timeout=120)
            if run.returncode:
                raise RuntimeError(run.stderr[-500:])
            report = json.loads(run.stdout)
            ours.append(sum(report["launch_us"].values())); theirs.append(events(peer))
        got = report["outputs"]["y"]
        row = dict(name=name, kernels=report["kernels"], launches=list(report["launch_us"]), rel_err=got["max_abs"] / scale, ours_us=statistics.median(ours),
                   peer=library, peer_us=statistics.median(theirs), tflops=flops / statistics.median(ours) / 1e6)
        row["ratio"] = row["peer_us"] / row["ours_us"]; os.remove(npz)
        print(f"{name:28s} kernels {row['kernels']} err/max {row['rel_err']:.1e} ours {row['ours_us']:9.1f} us  {library} {row['peer_us']:9.1f} us  ratio {row['ratio']:.3f}  {row['tflops']:.0f} TFLOP/s", flush=True)
    except Exception as e:
        row = dict(name=name, error=str(e)[:600]); print(f"{name:28s} ERROR {row['error']}", flush=True)
    rows.append(row)
json.dump(rows, open(os.path.join(os.environ.get("OUT", DIR), "whole_path.json"), "w"), indent=0)
