"""Trains the demo model: a small CNN on the scikit-learn digits, written as ONNX.

    python scripts/train_digits.py          # needs numpy, scikit-learn, onnx

Writes examples/models/digits.onnx (pictures [n, 1, 8, 8] in 0..1 -> logits [n, 10]) and
examples/models/digits_test.npz (`image16` in sixteenths, `label`): the 450 pictures that it was not trained on.
Plain numpy: convolutions by im2col, Adam, cross entropy. The same versions give the same weights.
"""

import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HERE = pathlib.Path(__file__).resolve().parent.parent / "examples" / "models"
C1, C2, HIDDEN, EPOCHS, BATCH = 16, 32, 64, 60, 64


def im2col(x):
    """[n, c, h, w] -> [n, h, w, c * 9], zero padded by 1."""
    n, c, h, w = x.shape
    p = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    cols = np.stack([p[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=2)
    return cols.transpose(0, 3, 4, 1, 2).reshape(n, h, w, c * 9)


def col2im(d, c):
    """The transpose of im2col."""
    n, h, w, _ = d.shape
    d = d.reshape(n, h, w, c, 9).transpose(0, 3, 4, 1, 2)
    p = np.zeros((n, c, h + 2, w + 2), d.dtype)
    for k in range(9):
        p[:, :, k // 3 : k // 3 + h, k % 3 : k % 3 + w] += d[:, :, k]
    return p[:, :, 1:-1, 1:-1]


def conv(x, w, b):
    cols = im2col(x)
    return (cols @ w.reshape(w.shape[0], -1).T + b).transpose(0, 3, 1, 2), cols


def conv_grad(d, cols, w):
    d = d.transpose(0, 2, 3, 1)
    flat = d.reshape(-1, d.shape[-1])
    dw = (flat.T @ cols.reshape(-1, cols.shape[-1])).reshape(w.shape)
    return col2im(d @ w.reshape(w.shape[0], -1), w.shape[1]), dw, flat.sum(0)


def pool(x):
    """2x2 maximum, and where it was."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
    return blocks.max(-1), blocks.argmax(-1)


def pool_grad(d, where):
    n, c, h, w = d.shape
    blocks = (np.arange(4) == where[..., None]) * d[..., None]
    return blocks.reshape(n, c, h, w, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h * 2, w * 2)


def step(p, x, y):
    """Loss gradient of one batch."""
    a1, cols1 = conv(x, p["conv1.weight"], p["conv1.bias"])
    a2, cols2 = conv(np.maximum(a1, 0), p["conv2.weight"], p["conv2.bias"])
    pooled, where = pool(np.maximum(a2, 0))
    a3, cols3 = conv(pooled, p["conv3.weight"], p["conv3.bias"])
    flat = np.maximum(a3, 0).reshape(len(x), -1)
    a4 = flat @ p["fc1.weight"].T + p["fc1.bias"]
    hidden = np.maximum(a4, 0)
    logits = hidden @ p["fc2.weight"].T + p["fc2.bias"]
    prob = np.exp(logits - logits.max(1, keepdims=True))
    prob /= prob.sum(1, keepdims=True)
    d = (prob - np.eye(10, dtype=x.dtype)[y]) / len(x)
    g = {"fc2.weight": d.T @ hidden, "fc2.bias": d.sum(0)}
    d = (d @ p["fc2.weight"]) * (a4 > 0)
    g["fc1.weight"], g["fc1.bias"] = d.T @ flat, d.sum(0)
    d = (d @ p["fc1.weight"]).reshape(a3.shape) * (a3 > 0)
    d, g["conv3.weight"], g["conv3.bias"] = conv_grad(d, cols3, p["conv3.weight"])
    d = pool_grad(d, where) * (a2 > 0)
    d, g["conv2.weight"], g["conv2.bias"] = conv_grad(d, cols2, p["conv2.weight"])
    d = d * (a1 > 0)
    _, g["conv1.weight"], g["conv1.bias"] = conv_grad(d, cols1, p["conv1.weight"])
    return g


def predict(p, x):
    a, _ = conv(x, p["conv1.weight"], p["conv1.bias"])
    a, _ = conv(np.maximum(a, 0), p["conv2.weight"], p["conv2.bias"])
    a, _ = pool(np.maximum(a, 0))
    a, _ = conv(a, p["conv3.weight"], p["conv3.bias"])
    hidden = np.maximum(np.maximum(a, 0).reshape(len(x), -1) @ p["fc1.weight"].T + p["fc1.bias"], 0)
    return hidden @ p["fc2.weight"].T + p["fc2.bias"]


def shifted(x, rng):
    """Each picture moved by up to one pixel: more pictures for free."""
    p = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    dx, dy = rng.integers(0, 3, len(x)), rng.integers(0, 3, len(x))
    return np.stack([q[:, i : i + 8, j : j + 8] for q, i, j in zip(p, dx, dy)])


def train(x, y):
    rng = np.random.default_rng(7)
    shapes = {
        "conv1": (C1, 1, 3, 3),
        "conv2": (C2, C1, 3, 3),
        "conv3": (C2, C2, 3, 3),
        "fc1": (HIDDEN, C2 * 16),
        "fc2": (10, HIDDEN),
    }
    p = {}
    for name, shape in shapes.items():
        scale = np.sqrt(2 / np.prod(shape[1:]))
        p[name + ".weight"] = (rng.standard_normal(shape) * scale).astype(np.float32)
        p[name + ".bias"] = np.zeros(shape[0], np.float32)
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(q) for k, q in p.items()}
    t = 0
    for epoch in range(EPOCHS):
        rate = 2e-3 * (1 + np.cos(np.pi * epoch / EPOCHS)) / 2
        order = rng.permutation(len(x))
        for at in range(0, len(x), BATCH):
            pick = order[at : at + BATCH]
            g = step(p, shifted(x[pick], rng), y[pick])
            t += 1
            for k in p:
                m[k] = 0.9 * m[k] + 0.1 * g[k]
                v[k] = 0.999 * v[k] + 0.001 * g[k] ** 2
                fast = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
                p[k] = (p[k] - rate * (fast + 1e-2 * p[k])).astype(np.float32)
    return p


def export(p, path):
    def conv_node(n, x):
        return helper.make_node(
            "Conv",
            [x, f"conv{n}.weight", f"conv{n}.bias"],
            [f"conv{n}"],
            name=f"conv{n}",
            kernel_shape=[3, 3],
            pads=[1, 1, 1, 1],
        )

    def relu(x):
        return helper.make_node("Relu", [x], [x + "_relu"], name=x + "_relu")

    nodes = [
        conv_node(1, "image"),
        relu("conv1"),
        conv_node(2, "conv1_relu"),
        relu("conv2"),
        helper.make_node("MaxPool", ["conv2_relu"], ["pool"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        conv_node(3, "pool"),
        relu("conv3"),
        helper.make_node("Flatten", ["conv3_relu"], ["flat"], name="flat", axis=1),
        helper.make_node("Gemm", ["flat", "fc1.weight", "fc1.bias"], ["fc1"], name="fc1", transB=1),
        relu("fc1"),
        helper.make_node("Gemm", ["fc1_relu", "fc2.weight", "fc2.bias"], ["logits"], name="fc2", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(w, name) for name, w in p.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="train_digits"
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def main():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=450, random_state=0, stratify=y)
    p = train(x_train, y_train)
    logits = predict(p, x_test)
    print(f"accuracy on {len(y_test)} held-out pictures: {(logits.argmax(1) == y_test).mean():.4f}")
    HERE.mkdir(parents=True, exist_ok=True)
    export(p, HERE / "digits.onnx")
    # Sixteenths, exact in 8 bits, keep the file small.
    np.savez_compressed(
        HERE / "digits_test.npz", image16=np.round(x_test * 16).astype(np.uint8), label=y_test.astype(np.uint8)
    )


if __name__ == "__main__":
    main()
