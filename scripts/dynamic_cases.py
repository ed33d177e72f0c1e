"""Small models whose axes, bounds, counts and results depend on data, for tests/dynamic.rs.

    python3 scripts/dynamic_cases.py tests/dynamic
"""
import sys

import onnx
from onnx import TensorProto as T
from onnx import helper as h

FOLDER = sys.argv[1]


def value(name, dtype, shape):
    return h.make_tensor_value_info(name, dtype, shape)


def save(name, nodes, inputs, outputs, opset=18):
    graph = h.make_graph(nodes, name, inputs, outputs)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=9, producer_name="dynamic_cases")
    onnx.save(model, f"{FOLDER}/{name}.onnx")


F, I, B = T.FLOAT, T.INT64, T.BOOL
x = value("x", F, ["n", 3, "m"])
for keep in (0, 1):
    for count in (1, 2):
        node = h.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keep)
        save(f"reduce_{count}_{'keep' if keep else 'drop'}", [node], [x, value("axes", I, [count])], [value("y", F, None)])
bounds = [value(name, I, [2]) for name in ("starts", "ends", "axes", "steps")]
save("slice", [h.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"])], [x, *bounds], [value("y", F, None)])
save("pad", [h.make_node("Pad", ["x", "pads", "", "axes"], ["y"])], [x, value("pads", I, [4]), value("axes", I, [2])], [value("y", F, None)])
save("cumsum", [h.make_node("CumSum", ["x", "axis"], ["y"])], [x, value("axis", I, [])], [value("y", F, None)])
save("resize", [h.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear")], [x, value("scales", F, [3])], [value("y", F, None)])
save("unique", [h.make_node("Unique", ["k"], ["y", "first", "inverse", "counts"])], [value("k", I, ["n"])], [value(o, I, None) for o in ("y", "first", "inverse", "counts")])
nms = h.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "score"], ["y"])
save("nms", [nms], [value("boxes", F, ["b", "n", 4]), value("scores", F, ["b", 2, "n"]), value("most", I, []), value("iou", F, []), value("score", F, [])], [value("y", I, None)])

# A value that grows with every iteration, and the slices that were added.
body = h.make_graph(
    [h.make_node("Identity", ["go"], ["go_"]), h.make_node("Concat", ["a", "x"], ["a_"], axis=0), h.make_node("Identity", ["x"], ["s"])],
    "body", [value("i", I, []), value("go", B, []), value("a", F, None)], [value("go_", B, []), value("a_", F, None), value("s", F, None)])
save("grow", [h.make_node("Loop", ["trip", "", "x"], ["y", "all"], body=body)], [value("trip", I, []), value("x", F, ["n"])], [value("y", F, None), value("all", F, None)])

# Branches of different shapes.
yes = h.make_graph([h.make_node("Concat", ["x", "x"], ["t"], axis=0)], "yes", [], [value("t", F, None)])
no = h.make_graph([h.make_node("Compress", ["x", "keep"], ["e"], axis=0)], "no", [], [value("e", F, None)])
save("branch", [h.make_node("If", ["c"], ["y"], then_branch=yes, else_branch=no)], [value("c", B, []), value("keep", B, ["n"]), value("x", F, ["n"])], [value("y", F, None)])

# Apart, each part doubled, together again; and one part by its place.
double = h.make_graph([h.make_node("Add", ["p", "p"], ["q"])], "double", [value("p", F, None)], [value("q", F, None)])
save("parts", [
    h.make_node("SplitToSequence", ["x", "each"], ["parts"], axis=1),
    h.make_node("SequenceMap", ["parts"], ["doubled"], body=double),
    h.make_node("ConcatFromSequence", ["doubled"], ["y"], axis=1),
    h.make_node("SequenceAt", ["doubled", "at"], ["one"]),
    h.make_node("SequenceErase", ["doubled", "at"], ["others"]),
    h.make_node("SequenceLength", ["others"], ["left"]),
], [value("x", F, ["n", "m"]), value("each", I, []), value("at", I, [])], [value("y", F, None), value("one", F, None), value("left", I, [])])
