"""ONNX files for the whole path on a GPU: products, a linear layer with GELU, attention in its parts, causal attention spelled in two ways, in f16; products
of bytes with constant weights, as i32 and requantised. Sizes fixed.

    python3 scripts/gpu/make_onnx.py OUT
"""
import math
import sys

import numpy as np
import onnx
from onnx import TensorProto as T, helper as h, numpy_helper as nh

OUT = sys.argv[1]


def save(name, nodes, inputs, output, constants=(), opset=17, types=(T.FLOAT16, T.FLOAT16)):
    ports = [h.make_tensor_value_info(n, types[0], s) for n, s in inputs]
    graph = h.make_graph(nodes, name, ports, [h.make_tensor_value_info("y", types[1], output)], [nh.from_array(v, n) for n, v in constants])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=10), f"{OUT}/{name}.onnx")


for m, n, k in [(4096, 4096, 4096), (8192, 8192, 8192), (1000, 1016, 520), (129, 264, 72), (333, 77, 50)]:
    save(f"matmul_{m}x{n}x{k}", [h.make_node("MatMul", ["a", "b"], ["y"])], [("a", [m, k]), ("b", [k, n])], [m, n])

# whole_path.py draws the same weights.
for m, n, k in [(8192, 2048, 2048), (1000, 264, 72), (333, 77, 50)]:
    w = np.random.RandomState(m + n + k).randint(-127, 128, size=(k, n)).astype(np.int8)
    save(f"bytes_{m}x{n}x{k}", [h.make_node("MatMulInteger", ["a", "w"], ["y"])], [("a", [m, k])], [m, n], [("w", w)], types=(T.INT8, T.INT32))
    qdq = [
        h.make_node("DequantizeLinear", ["a", "one", "za"], ["x"]), h.make_node("DequantizeLinear", ["w", "one", "zw"], ["v"]),
        h.make_node("MatMul", ["x", "v"], ["p"]), h.make_node("QuantizeLinear", ["p", "step", "za"], ["y"]),
    ]
    scales = [("one", np.float32(1)), ("step", np.float32(2048)), ("za", np.uint8(119)), ("zw", np.int8(0))]
    save(f"qdq_{m}x{n}x{k}", qdq, [("a", [m, k])], [m, n], [("w", w), *((n, np.array(v)) for n, v in scales)], types=(T.UINT8, T.UINT8))

m, n, k = 4096, 4096, 1024
half, one, root = (np.array(v, np.float16) for v in (0.5, 1.0, 1 / math.sqrt(2)))
gelu = [
    h.make_node("MatMul", ["a", "b"], ["p"]), h.make_node("Add", ["p", "bias"], ["x"]), h.make_node("Mul", ["x", "root"], ["s"]),
    h.make_node("Erf", ["s"], ["e"]), h.make_node("Add", ["e", "one"], ["f"]), h.make_node("Mul", ["x", "f"], ["g"]), h.make_node("Mul", ["g", "half"], ["y"]),
]
save(f"linear_gelu_{m}x{n}x{k}", gelu, [("a", [m, k]), ("b", [k, n]), ("bias", [n])], [m, n], [("half", half), ("one", one), ("root", root)])

for b, s in [(16, 2048), (16, 8192), (3, 200)]:
    d = 128
    nodes = [
        h.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]), h.make_node("MatMul", ["q", "kt"], ["s"]), h.make_node("Mul", ["s", "scale"], ["t"]),
        h.make_node("Softmax", ["t"], ["p"], axis=-1), h.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    save(f"attention_{b}x{s}x{d}", nodes, [("q", [b, s, d]), ("k", [b, s, d]), ("v", [b, s, d])], [b, s, d], [("scale", np.array(1 / math.sqrt(d), np.float16))])

    # A mask that is computed by the operator, and one that is a constant.
    ports = [(n, [1, b, s, d]) for n in "qkv"]
    save(f"causal_{b}x{s}x{d}", [h.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)], ports, [1, b, s, d], opset=23)
    if s <= 2048:
        mask = np.where(np.tril(np.ones((s, s), bool)), 0, -np.inf).astype(np.float16)
        nodes = nodes[:3] + [h.make_node("Add", ["t", "mask"], ["u"]), h.make_node("Softmax", ["u"], ["p"], axis=-1), nodes[4]]
        save(f"causal_parts_{b}x{s}x{d}", nodes, [("q", [b, s, d]), ("k", [b, s, d]), ("v", [b, s, d])], [b, s, d],
             [("scale", np.array(1 / math.sqrt(d), np.float16)), ("mask", mask)])
