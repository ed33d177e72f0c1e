"""Convolutions one by one on a GPU: the direct kernel (plan greedy) and what the search takes in its place (plan fused), checked against PyTorch.

    python3 scripts/gpu/convs.py DIR [f16|f32] [BATCH]        DIR: what prepare_arms.py made (pavage.xz, arms); needs numpy, onnx, torch

The shapes are those of ResNet-50. A model has four copies of a convolution with bias and ReLU over images and weights of their own, so that one graph
launch, some 8 us of which are not its kernels', starts four of them. Printed are microseconds of one, its kernels and the largest error of each plan.
"""
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

folder = pathlib.Path(sys.argv[1]).resolve()
dtype, batch = (sys.argv[2:] + ["f16"])[0], int((sys.argv[3:] + ["1"])[0])
COPIES, LAUNCH_US = 4, 8.0
# Image, channels, filters, window, stride.
SHAPES = [(56, 64, 256, 1, 1), (56, 256, 64, 1, 1), (28, 512, 128, 1, 1), (28, 128, 512, 1, 1), (14, 1024, 256, 1, 1), (14, 256, 1024, 1, 1), (7, 2048, 512, 1, 1),
          (7, 512, 2048, 1, 1), (56, 64, 64, 3, 1), (28, 128, 128, 3, 1), (14, 256, 256, 3, 1), (7, 512, 512, 3, 1), (14, 512, 512, 3, 2), (224, 3, 64, 7, 2)]
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
work = pathlib.Path(os.environ.get("OUT", folder / "out")) / "convs"
work.mkdir(parents=True, exist_ok=True)
if (folder / "pavage.xz").exists():
    subprocess.run(["xz", "-dkf", folder / "pavage.xz"], check=True)
    (folder / "pavage").chmod(0o755)


def write(shape):
    """The model and its case, with PyTorch's results in f32."""
    size, channels, filters, k, stride = shape
    name = f"{dtype}_b{batch}_{size}_{channels}_{filters}_{k}x{k}s{stride}"
    random, of = np.random.default_rng(1), np.float16 if dtype == "f16" else np.float32
    element, out, feeds, b = helper.np_dtype_to_tensor_dtype(np.dtype(of)), (size + k // 2 * 2 - k) // stride + 1, {}, []
    ins, outs, weights = [], [], []
    for i in range(COPIES):
        w = (random.standard_normal((filters, channels, k, k)) * (2 / (channels * k * k)) ** 0.5).astype(of)
        bias, x = random.standard_normal(filters).astype(of), random.standard_normal((batch, size, size, channels)).astype(of)
        weights += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
        b += [helper.make_node("Transpose", [f"x{i}"], [f"t{i}"], perm=[0, 3, 1, 2]),
              helper.make_node("Conv", [f"t{i}", f"w{i}", f"b{i}"], [f"c{i}"], strides=[stride] * 2, pads=[k // 2] * 4, kernel_shape=[k, k]),
              helper.make_node("Relu", [f"c{i}"], [f"r{i}"]), helper.make_node("Transpose", [f"r{i}"], [f"y{i}"], perm=[0, 2, 3, 1])]
        ins.append(helper.make_tensor_value_info(f"x{i}", element, x.shape))
        outs.append(helper.make_tensor_value_info(f"y{i}", element, [batch, out, out, filters]))
        tensors = [torch.tensor(v).cuda().float() for v in (x.transpose(0, 3, 1, 2), w, bias)]
        want = torch.relu(torch.nn.functional.conv2d(*tensors, stride=stride, padding=k // 2))
        feeds |= {f"in:x{i}": x, f"out:y{i}": want.permute(0, 2, 3, 1).contiguous().cpu().numpy()}
    graph = helper.make_graph(b, "convolutions", ins, outs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), work / f"{name}.onnx")
    np.savez(work / f"{name}.npz", **feeds)
    return name


def compiled(name):
    run = subprocess.run([folder / "pavage", "compile", work / f"{name}.onnx", "--target", "sm_90a", "--plans", "greedy,fused", "-o", work / f"{name}.pav"],
                         env={**os.environ, "LD_LIBRARY_PATH": str(folder)}, capture_output=True, text=True)
    return run.stderr if run.returncode else None


names = [write(shape) for shape in SHAPES]
with concurrent.futures.ThreadPoolExecutor() as pool:
    for name, failed in zip(names, pool.map(compiled, names)):
        if failed:
            sys.exit(f"{name}: {failed}")
for name in names:
    model, case = work / f"{name}.pav", work / f"{name}.npz"
    timed = subprocess.run([folder / "arms", model, case, "cuda:0", "greedy,fused", "30"], capture_output=True, text=True)
    if timed.returncode:
        sys.exit(f"{name}: {timed.stderr}")
    row = f"{name:32s}"
    for plan in json.loads(timed.stdout)["plans"]:
        checked = subprocess.run([folder / "embed", model, case, "cuda:0", plan["plan"], "1"], capture_output=True, text=True)
        error = max(v["max_abs"] for v in json.loads(checked.stdout)["outputs"].values()) if checked.returncode == 0 else float("nan")
        kernels = sorted({kernel for kernel, _ in plan["launch_us"]})
        row += f"  {plan['plan']} {(plan['median_us'] - LAUNCH_US) / COPIES:6.1f} us, error {error:.0e} ({' '.join(kernels)})"
    print(row, flush=True)
