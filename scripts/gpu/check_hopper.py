"""Run generated Hopper kernels on a GPU: results against PyTorch, times against cuBLAS and cuDNN.

usage: check_hopper.py FOLDER [gemm|flash|all]

FOLDER holds kernels.json and the PTX files it names (`cargo run -p pavage-codegen --example gpu_kernels -- FOLDER`).
Needs PyTorch with CUDA and cuda-python. Every kernel runs in a child process with a time limit, so that a hang in one
costs the others nothing. Peer and kernel are timed alternately on the same data; figures are medians.
"""
import ctypes
import json
import os
import signal
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from cuda.bindings import driver as cu

FOLDER = sys.argv[1]
WHAT = sys.argv[2] if len(sys.argv) > 2 else "all"
DT = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def ck(r):
    assert r[0] == cu.CUresult.CUDA_SUCCESS, r[0]
    return r[1] if len(r) == 2 else r[1:]


MODULES = {}


def load(k):
    if k["ptx"] not in MODULES:
        torch.zeros(1, device="cuda")
        text = open(f"{FOLDER}/{k['ptx']}", "rb").read() + b"\0"
        size = 1 << 16
        log, err = bytearray(size), bytearray(size)
        opts = [cu.CUjit_option.CU_JIT_INFO_LOG_BUFFER, cu.CUjit_option.CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
                cu.CUjit_option.CU_JIT_ERROR_LOG_BUFFER, cu.CUjit_option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
                cu.CUjit_option.CU_JIT_LOG_VERBOSE]
        t0 = time.time()
        r = cu.cuModuleLoadDataEx(text, len(opts), opts, [log, size, err, size, 1])
        said = lambda b: bytes(b).split(b"\0")[0].decode(errors="replace")
        notes = [l for l in said(log).splitlines() if "C75" in l or "spill" in l and " 0 bytes spill" not in l]
        print(f"  jit {k['ptx']}: {time.time() - t0:.2f} s {notes}", flush=True)
        if r[0] != cu.CUresult.CUDA_SUCCESS:
            print("  JIT ERROR", r[0], said(err)[:2000], flush=True)
            raise SystemExit(1)
        MODULES[k["ptx"]] = r[1]
    f = ck(cu.cuModuleGetFunction(MODULES[k["ptx"]], k["name"].encode()))
    ck(cu.cuFuncSetAttribute(f, cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, k["smem"]))
    return f


TM = {torch.bfloat16: cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, torch.float16: cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}
SW = {0: cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE, 128: cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B}


def evaluate(text, dims):
    return eval(text, {"__builtins__": {}}, {f"d{i}": v for i, v in enumerate(dims)})


class Launch:
    """One kernel with its arguments bound."""

    def __init__(self, k, tensors, dims, grid):
        self.f, self.k, self.grid = load(k), k, grid
        args = [ctypes.c_void_p(t.data_ptr()) for t in tensors] + [ctypes.c_int64(d) for d in dims]
        self.keep = [tensors, args]
        ptrs = [ctypes.addressof(a) for a in args]
        for m in k["maps"]:
            t = tensors[m["arg"]]
            size = t.element_size()
            ds = [evaluate(d, dims) for d in m["dims"]]
            st = [evaluate(d, dims) * size for d in m["strides"]]
            tm = ck(cu.cuTensorMapEncodeTiled(TM[t.dtype], len(ds), t.data_ptr() + evaluate(m["offset"], dims) * size, [cu.cuuint64_t(x) for x in ds], [cu.cuuint64_t(x) for x in st],
                                              [cu.cuuint32_t(x) for x in m["box"]], [cu.cuuint32_t(1)] * len(ds), cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                                              SW[m["swizzle"]], cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                              cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
            self.keep.append(tm)
            ptrs.append(int(tm.getPtr()))
        self.arr = (ctypes.c_void_p * len(ptrs))(*ptrs)

    def __call__(self):
        st = torch.cuda.current_stream().cuda_stream
        ck(cu.cuLaunchKernel(self.f, *self.grid, self.k["threads"], 1, 1, self.k["smem"], st, ctypes.addressof(self.arr), 0))


def compare(ours, peer, n=40):
    """Median milliseconds of both, run alternately."""
    evs = []
    for rep in range(n + 8):
        e = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        e[0].record(); ours(); e[1].record(); peer(); e[2].record()
        if rep >= 8:
            evs.append(e)
    torch.cuda.synchronize()
    return statistics.median(e[0].elapsed_time(e[1]) for e in evs), statistics.median(e[1].elapsed_time(e[2]) for e in evs)


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def describe(o, r):
    """Where a wrong result is wrong: a coarse map of tiles."""
    bad = ((o.double() - r.double()).abs() > 0.05 * r.double().abs().max()) | o.isnan()
    if bad.dim() > 2:
        bad = bad.reshape(-1, bad.shape[-1])
    idx = bad.nonzero()
    if len(idx) == 0:
        return "no large errors"
    tiles = {}
    for i, j in idx[:20000].tolist():
        tiles[(i // 64, j // 64)] = tiles.get((i // 64, j // 64), 0) + 1
    return f"{len(idx)} large errors of {bad.numel()}, nan {o.isnan().sum().item()}, zero {(o == 0).sum().item()}; first {idx[:6].tolist()}; 64x64 tiles (first 12) {list(tiles.items())[:12]}; got {o.reshape(-1)[:6].tolist()} want {r.reshape(-1)[:6].tolist()}"


SMS = 132


def gemm_operands(k, m, n, kk, l):
    dt, out = DT[k["dtype"]], DT[k["out"]]
    lead = (l,) if k["batched"] else ()
    a = torch.randn(*lead, m, kk, device="cuda", dtype=dt)
    b = torch.randn(*lead, *((kk, n) if k["rhs"] == "kn" else (n, kk)), device="cuda", dtype=dt)
    c = torch.full((*lead, m, n), float("nan"), device="cuda", dtype=out)
    bt = b if k["rhs"] == "kn" else b.transpose(-1, -2)
    tensors = [a, b, c]
    bias = resid = None
    if k["epilogue"] != "none":
        bias = torch.randn(n, device="cuda", dtype=dt)
        tensors = [a, b, bias, c]
        if k["epilogue"] == "bias_gelu_add":
            resid = torch.randn(*lead, m, n, device="cuda", dtype=dt)
            tensors = [a, b, bias, resid, c]
    sizes = {"m": m, "n": n, "k": kk, "l": l}
    return a, bt, c, bias, resid, tensors, [sizes[p] for p in k["params"]]


def gemm(k):
    torch.manual_seed(1)
    f = load(k)
    def grid_of(m, n):
        if "tile" in k:
            return (-(-m // k["tile"][0]) * -(-n // k["tile"][1]), 1, 1)
        return (SMS // k["cluster"] * k["cluster"], 1, 1)

    worst = 0
    for (m, n, kk, l) in k["check"]:
        a, bt, c, bias, resid, tensors, dims = gemm_operands(k, m, n, kk, l)
        ref = a.double() @ bt.double()
        if bias is not None:
            ref = F.gelu(ref + bias.double())
            if resid is not None:
                ref = ref + resid.double()
        go = Launch(k, tensors, dims, grid_of(m, n))
        go(); torch.cuda.synchronize()
        first = c.clone()
        c.fill_(float("nan")); go(); torch.cuda.synchronize()
        lib = (a @ bt).to(c.dtype)
        e, el = rel(c, ref), rel(lib, a.double() @ bt.double())
        worst = max(worst, e)
        ok = e < (6e-3 if k["dtype"] == "bf16" else 1e-3) and torch.equal(first, c)
        print(f"{'ok   ' if ok else 'WRONG'} {k['name']} m{m} n{n} k{kk} l{l} err {e:.2e} (library {el:.2e}) repeatable {torch.equal(first, c)}", flush=True)
        if not ok:
            print("   ", describe(c, ref.to(torch.float32)), flush=True)
            return
    for (m, n, kk, l) in k["time"]:
        a, bt, c, bias, resid, tensors, dims = gemm_operands(k, m, n, kk, l)
        go = Launch(k, tensors, dims, grid_of(m, n))
        out = torch.empty_like(c, dtype=a.dtype)
        if bias is None:
            peer = lambda: torch.matmul(a, bt, out=out)
        else:
            # What a library without this fusion does; torch.compile is measured elsewhere.
            peer = lambda: (torch.matmul(a, bt, out=out), F.gelu(out.add_(bias)))
        t, p = compare(go, peer)
        fl = 2e-9 * m * n * kk * l
        print(f"TIME {k['name']} m{m} n{n} k{kk} l{l}: ours {fl / t:.0f} library {fl / p:.0f} TFLOP/s ratio {p / t:.3f}", flush=True)


def attention_ref(q, k, v, causal, dt):
    o = torch.empty(q.shape, dtype=dt, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            s = (q[b, h].to(dt) @ k[b, h].to(dt).T) / q.shape[-1] ** 0.5
            if causal:
                s.masked_fill_(torch.ones(s.shape, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
            o[b, h] = torch.softmax(s, -1) @ v[b, h].to(dt)
    return o


def flash(k):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    torch.manual_seed(2)
    dt, d, causal = DT[k["dtype"]], k["d"], k["causal"]
    load(k)

    def launch(q, kk, v, o):
        bsz, h, s, _ = q.shape
        tiles = -(-s // k["bm"]) * bsz * h
        return Launch(k, [q, kk, v, o], [bsz * h, s, kk.shape[2]], (min(SMS, tiles), 1, 1))

    for (bsz, h, s, stress) in k["check"]:
        q, kk, v = [torch.randn(bsz, h, s, d, device="cuda", dtype=dt) for _ in range(3)]
        if stress:
            q = (q * 4).contiguous()
            kk = (kk * torch.linspace(4, 0.1, s, device="cuda")[:, None]).to(dt)
        r = attention_ref(q, kk, v, causal, torch.float64)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            lib = rel(F.scaled_dot_product_attention(q, kk, v, is_causal=causal), r)
        res = []
        for _ in range(2):
            o = torch.full_like(q, float("nan"))
            launch(q, kk, v, o)(); torch.cuda.synchronize()
            res.append(o)
        e = rel(res[0], r)
        ok = e < 1e-2 and torch.equal(*res)
        print(f"{'ok   ' if ok else 'WRONG'} {k['name']} b{bsz} h{h} s{s}{' stress' if stress else ''} err {e:.2e} (library {lib:.2e}) repeatable {torch.equal(*res)}", flush=True)
        if not ok:
            print("   ", describe(res[0], r.float()), flush=True)
            return
    for (bsz, h, s, _) in k["time"]:
        q, kk, v = [torch.randn(bsz, h, s, d, device="cuda", dtype=dt) for _ in range(3)]
        o = torch.full_like(q, float("nan"))
        go = launch(q, kk, v, o)

        def peer():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                F.scaled_dot_product_attention(q, kk, v, is_causal=causal)

        go(); torch.cuda.synchronize()
        t, p = compare(go, peer)
        fl = 4e-9 * bsz * h * s * s * d / (2 if causal else 1)
        print(f"TIME {k['name']} b{bsz} h{h} s{s}: ours {fl / t:.0f} cuDNN {fl / p:.0f} TFLOP/s ratio {p / t:.3f}", flush=True)


def child(fn, k, limit):
    sys.stdout.flush()
    t0, pid = time.time(), os.fork()
    if pid == 0:
        try:
            fn(k)
        except BaseException as ex:
            print("FAIL", k["name"], repr(ex)[:500], flush=True)
        os._exit(0)
    while time.time() - t0 < limit:
        p, _ = os.waitpid(pid, os.WNOHANG)
        if p:
            print(f"-- {k['name']} {time.time() - t0:.1f} s", flush=True)
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(f"HANG? killed after {limit} s: {k['name']}", flush=True)


if __name__ == "__main__":
    for k in json.load(open(f"{FOLDER}/kernels.json")):
        if WHAT in ("all", k["kind"], k["name"]):
            child({"gemm": gemm, "flash": flash}[k["kind"]], k, k.get("limit", 60))
