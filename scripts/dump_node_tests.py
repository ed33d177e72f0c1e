#!/usr/bin/env python3
"""Writes the node tests of the installed onnx wheel as files: FOLDER/TEST/model.onnx, its tolerances and opsets in
meta.json, and in test_data_set_N the inputs and outputs, a serialized TensorProto, SequenceProto or OptionalProto each.

    python scripts/dump_node_tests.py FOLDER

The wheel builds the tests in memory; some draw random data, from a seed.
"""
import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import numpy as np
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests


def proto(value, port):
    """A value as the protocol buffer that its port's type asks for."""
    if hasattr(value, "SerializeToString"):
        return value
    name, kind = (port.name, port.type.WhichOneof("value")) if port is not None else ("", "tensor_type")
    if kind == "sequence_type":
        return numpy_helper.from_list(value, name)
    if kind == "optional_type":
        return numpy_helper.from_optional(value, name)
    return numpy_helper.from_array(np.asarray(value), name)


def write(test, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(test.model.SerializeToString())
    opset = {entry.domain or "ai.onnx": entry.version for entry in test.model.opset_import}
    (folder / "meta.json").write_text(json.dumps({"rtol": test.rtol, "atol": test.atol, "opset": opset}))
    graph = test.model.graph
    for n, (inputs, outputs) in enumerate(test.data_sets or []):
        data = folder / f"test_data_set_{n}"
        data.mkdir(exist_ok=True)
        for what, values, ports in (("input", inputs, graph.input), ("output", outputs, graph.output)):
            for i, value in enumerate(values):
                port = ports[i] if i < len(ports) else None
                (data / f"{what}_{i}.pb").write_bytes(proto(value, port).SerializeToString())


def main():
    out = Path(sys.argv[1])
    count = 0
    for test in load_model_tests(kind="node"):
        write(test, out / test.name)
        count += 1
    print(f"{count} tests in {out}")


if __name__ == "__main__":
    main()
