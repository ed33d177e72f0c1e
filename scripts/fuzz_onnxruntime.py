#!/usr/bin/env python3
"""Compares what the fuzzer kept with onnxruntime.

    PAVAGE_FUZZ_OUT=FOLDER cargo test --test fuzz && python scripts/fuzz_onnxruntime.py FOLDER

Needs numpy, onnx and onnxruntime. Graphs that onnxruntime has no kernels for are counted and left out.
"""
import collections
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper


def values(folder, what, names):
    return {name: numpy_helper.to_array(onnx.load_tensor(folder / f"{what}_{i}.pb")) for i, name in enumerate(names)}


def difference(folder):
    """What differs, or nothing; raises where onnxruntime does not run the graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    data = folder / "test_data_set_0"
    inputs = values(data, "input", [p.name for p in session.get_inputs()])
    outputs = [p.name for p in session.get_outputs()]
    slack = json.loads((folder / "meta.json").read_text())["atol"]
    ours = values(data, "output", outputs)
    for name, theirs in zip(outputs, session.run(outputs, inputs)):
        if theirs.dtype != ours[name].dtype or theirs.shape != ours[name].shape:
            return f"{name}: {theirs.dtype}{theirs.shape}, ours {ours[name].dtype}{ours[name].shape}"
        a, b = theirs.astype(np.float64), ours[name].astype(np.float64)
        allowed = slack if np.issubdtype(theirs.dtype, np.floating) else 0
        with np.errstate(invalid="ignore"):
            far = ~((a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= allowed))
        if far.any():
            i = tuple(int(n[0]) for n in np.nonzero(far)) if far.ndim else ()
            return f"{name}{list(i)}: {a[i]}, ours {b[i]}; {int(far.sum())} of {far.size} differ"
    return None


def main():
    right, differ, not_run = 0, [], collections.Counter()
    for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if (p / "model.onnx").exists()):
        try:
            found = difference(folder)
        except Exception as e:  # onnxruntime's errors have no common class
            missing = re.search(r"find an implementation for (\w+)", str(e))
            not_run[f"no kernel for {missing[1]} of such types" if missing else str(e)[:200]] += 1
            continue
        if found is None:
            right += 1
        else:
            ops = [n.op_type for n in onnx.load(folder / "model.onnx").graph.node]
            differ.append(f"{folder.name} ({' '.join(ops)}): {found}")
    print("\n".join(differ))
    for why, n in not_run.most_common():
        print(f"not run {n} times: {why}")
    print(f"onnxruntime: {right} agree, {len(differ)} differ, {sum(not_run.values())} not run")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
