"""Builds the graphs of well-known models with random weights: what `./x bench eqsat` runs besides the real ones.

    python scripts/bench/graphs.py FOLDER [NAME ...] [--check] [--half]      # needs numpy and onnx; --check needs onnxruntime

Written: NAME.onnx, its weights NAME.data, and for each case CASE.npz with inputs (keys in:NAME). With --check the npz
also has what onnxruntime gives (keys out:NAME). The spelling is that of PyTorch's exporters: norms, rotary embeddings and
attention from their parts, BatchNorm behind its convolution. Weights are drawn from a fixed seed, scaled so that activations keep their
size; only times and plans mean anything. With --half, inputs, weights and activations are float16; norms and rotary angles are computed in
float32, as PyTorch does.

bert_base (12 layers, 128 tokens), resnet50, mobilenetv3 (large), vit_b16 (12 layers, 197 tokens) have the widths and depths of
the models they are named after; embeddings are cut to 1,000 rows. The Llama-shaped decoder has 4 layers of width 1024 (16 heads, 4 of keys
and values, 2816 wide inside, vocabulary 4096), so that a CPU runs it: llama_decode reads 511 cached positions. deep is BERT of 110 narrow layers,
more than 5,000 nodes: what planning takes.
"""
import pathlib
import sys
import zlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F32, I64 = TensorProto.FLOAT, TensorProto.INT64


class Builder:
    """A graph op by op; what is not float32 is said."""

    def __init__(self, name, half=False):
        self.name, self.nodes, self.initializers, self.inputs, self.outputs = name, [], {}, [], []
        self.half, self.dtype, self.element = half, np.float16 if half else np.float32, TensorProto.FLOAT16 if half else F32

    def input(self, name, shape, dtype=None):
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.element, shape))
        return name

    def output(self, value, name, shape):
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, self.element, shape))

    def wide(self, x):
        """In float32."""
        return self.op("Cast", x, to=F32) if self.half else x

    def narrow(self, x):
        """In the dtype of activations."""
        return self.op("Cast", x, to=self.element) if self.half else x

    def op(self, op, *inputs, outputs=1, **attributes):
        name = f"{op}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, **attributes))
        return name if outputs == 1 else names

    def array(self, name, value):
        self.initializers.setdefault(name, numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def const(self, value, dtype=None):
        value = np.array(value, dtype or self.dtype)
        return self.array(f"const_{zlib.crc32(value.tobytes() + str((value.dtype, value.shape)).encode()):08x}", value)

    def ints(self, *values):
        return self.const(values, np.int64)

    def weight(self, name, *shape, fan_in=None):
        random = np.random.default_rng(zlib.crc32(name.encode()))
        scale = 1 / np.sqrt(fan_in or shape[0])
        return self.array(name, (random.standard_normal(shape, np.float32) * np.float32(scale)).astype(self.dtype))

    def near_one(self, name, *shape):
        random = np.random.default_rng(zlib.crc32(name.encode()))
        return self.array(name, (1 + 0.1 * random.standard_normal(shape, np.float32)).astype(self.dtype))

    def save(self, folder):
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="pavage graphs.py")
        model.ir_version = 8
        (folder / f"{self.name}.data").unlink(missing_ok=True)
        onnx.save_model(model, folder / f"{self.name}.onnx", save_as_external_data=True, location=f"{self.name}.data", size_threshold=4096)

    # What transformers are made of.

    def linear(self, x, name, n_in, n_out, bias=True):
        y = self.op("MatMul", x, self.weight(name, n_in, n_out))
        return self.op("Add", self.weight(f"{name}.bias", n_out, fan_in=100), y) if bias else y

    def layer_norm(self, x, name, width):
        x = self.wide(x)
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1]))
        var = self.op("ReduceMean", self.op("Pow", centred, self.const(2.0, np.float32)), axes=[-1])
        unit = self.narrow(self.op("Div", centred, self.op("Sqrt", self.op("Add", var, self.const(1e-12, np.float32)))))
        return self.op("Add", self.op("Mul", unit, self.near_one(f"{name}.weight", width)), self.weight(f"{name}.bias", width, fan_in=100))

    def rms_norm(self, x, name, width):
        x = self.wide(x)
        square = self.op("ReduceMean", self.op("Pow", x, self.const(2.0, np.float32)), axes=[-1])
        unit = self.narrow(self.op("Mul", x, self.op("Reciprocal", self.op("Sqrt", self.op("Add", square, self.const(1e-5, np.float32))))))
        return self.op("Mul", self.near_one(f"{name}.weight", width), unit)

    def gelu(self, x):
        y = self.op("Add", self.op("Erf", self.op("Div", x, self.const(np.sqrt(2)))), self.const(1.0))
        return self.op("Mul", self.op("Mul", x, y), self.const(0.5))

    def heads(self, x, batch, tokens, heads, depth, perm):
        return self.op("Transpose", self.op("Reshape", x, self.ints(batch, tokens, heads, depth)), perm=perm)

    def attend(self, q, keys, v, depth, mask=None):
        scores = self.op("Div", self.op("MatMul", q, keys), self.const(np.sqrt(depth)))
        scores = scores if mask is None else self.op("Add", scores, mask)
        return self.op("Transpose", self.op("MatMul", self.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])

    # What convolutional networks are made of.

    def conv_bn(self, x, name, c_in, c_out, kernel, stride=1, groups=1):
        w = self.weight(f"{name}.conv", c_out, c_in // groups, kernel, kernel, fan_in=kernel * kernel * c_in / groups / 2)
        x = self.op("Conv", x, w, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4, group=groups)
        rest = [self.weight(f"{name}.{part}", c_out, fan_in=100) for part in ("bias", "mean")]
        return self.op("BatchNormalization", x, self.near_one(f"{name}.scale", c_out), *rest, self.near_one(f"{name}.var", c_out), epsilon=1e-5)

    def classify(self, x, c_in, classes):
        x = self.op("Flatten", self.op("GlobalAveragePool", x), axis=1)
        return self.op("Gemm", x, self.weight("fc", classes, c_in, fan_in=c_in), self.weight("fc.bias", classes, fan_in=100), transB=1)


def encoder_layer(b, x, at, tokens, width, heads, norm):
    """A layer of BERT (norm="after") or of a vision transformer ("before")."""
    depth = width // heads
    normed = b.layer_norm(x, f"{at}.norm1", width) if norm == "before" else x
    q, k, v = (b.linear(normed, f"{at}.{part}", width, width) for part in "qkv")
    q, v = (b.heads(y, 1, tokens, heads, depth, [0, 2, 1, 3]) for y in (q, v))
    keys = b.heads(k, 1, tokens, heads, depth, [0, 2, 3, 1])
    return q, keys, v, depth


def encoder(b, x, layers, tokens, width, heads, norm, mask=None):
    for layer in range(layers):
        at = f"layer{layer}"
        q, keys, v, depth = encoder_layer(b, x, at, tokens, width, heads, norm)
        y = b.op("Reshape", b.attend(q, keys, v, depth, mask), b.ints(1, tokens, width))
        x = b.op("Add", b.linear(y, f"{at}.out", width, width), x)
        x = b.layer_norm(x, f"{at}.norm1", width) if norm == "after" else x
        y = b.layer_norm(x, f"{at}.norm2", width) if norm == "before" else x
        y = b.linear(b.gelu(b.linear(y, f"{at}.up", width, 4 * width)), f"{at}.down", 4 * width, width)
        x = b.op("Add", y, x)
        x = b.layer_norm(x, f"{at}.norm2", width) if norm == "after" else x
    return x


def bert_base(half, tokens=128, layers=12, width=768, heads=12, name="bert_base"):
    b = Builder(name, half)
    ids, keep = b.input("input_ids", [1, tokens], I64), b.input("attention_mask", [1, tokens], I64)
    kind = b.input("token_type_ids", [1, tokens], I64)
    word = b.op("Gather", b.weight("words", 1000, width, fan_in=1), ids)
    x = b.op("Add", b.op("Add", word, b.op("Gather", b.weight("kinds", 2, width, fan_in=1), kind)), b.weight("positions", 1, tokens, width, fan_in=1))
    x = b.layer_norm(x, "embeddings", width)
    off = b.op("Sub", b.const(1.0), b.op("Cast", b.op("Unsqueeze", keep, b.ints(1, 2)), to=b.element))
    mask = b.op("Mul", off, b.const(np.finfo(b.dtype).min))
    x = encoder(b, x, layers, tokens, width, heads, "after", mask)
    b.output(x, "last_hidden_state", [1, tokens, width])
    pooled = b.op("Tanh", b.linear(b.op("Gather", x, b.const(0, np.int64), axis=1), "pooler", width, width))
    b.output(pooled, "pooler_output", [1, width])
    return b


def vit_b16(half, size=224, patch=16, layers=12, width=768, heads=12):
    b = Builder("vit_b16", half)
    side = size // patch
    image = b.input("image", [1, 3, size, size])
    w = b.weight("patch", width, 3, patch, patch, fan_in=3 * patch * patch)
    x = b.op("Conv", image, w, b.weight("patch.bias", width, fan_in=100), kernel_shape=[patch] * 2, strides=[patch] * 2)
    x = b.op("Transpose", b.op("Reshape", x, b.ints(1, width, side * side)), perm=[0, 2, 1])
    tokens = side * side + 1
    x = b.op("Concat", b.weight("class", 1, 1, width), x, axis=1)
    x = b.op("Add", x, b.weight("positions", 1, tokens, width, fan_in=100))
    x = b.layer_norm(encoder(b, x, layers, tokens, width, heads, "before"), "norm", width)
    first = b.op("Gather", x, b.const(0, np.int64), axis=1)
    b.output(b.linear(first, "head", width, 1000), "logits", [1, 1000])
    return b


def resnet50(half):
    b = Builder("resnet50", half)
    x = b.op("Relu", b.conv_bn(b.input("image", [1, 3, 224, 224]), "stem", 3, 64, 7, 2))
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    c_in = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            at, stride = f"stage{stage}.{block}", 2 if block == 0 and stage > 0 else 1
            y = b.op("Relu", b.conv_bn(x, f"{at}.1", c_in, width, 1))
            y = b.op("Relu", b.conv_bn(y, f"{at}.2", width, width, 3, stride))
            y = b.conv_bn(y, f"{at}.3", width, 4 * width, 1)
            x = b.conv_bn(x, f"{at}.skip", c_in, 4 * width, 1, stride) if block == 0 else x
            x = b.op("Relu", b.op("Add", y, x))
            c_in = 4 * width
    b.output(b.classify(x, c_in, 1000), "logits", [1, 1000])
    return b


def mobilenetv3(half):
    """MobileNetV3-Large."""
    b = Builder("mobilenetv3", half)

    def act(x, kind):
        return x if kind is None else b.op({"relu": "Relu", "hswish": "HardSwish"}[kind], x)

    def squeeze(x, at, c):
        inner = -(-c // 4 // 8) * 8
        y = b.op("GlobalAveragePool", x)
        for part, n_in, n_out in (("reduce", c, inner), ("expand", inner, c)):
            y = b.op("Conv", y, b.weight(f"{at}.{part}", n_out, n_in, 1, 1, fan_in=n_in), b.weight(f"{at}.{part}.bias", n_out, fan_in=100))
            y = b.op("Relu", y) if part == "reduce" else b.op("HardSigmoid", y, alpha=1 / 6, beta=0.5)
        return b.op("Mul", y, x)

    x = act(b.conv_bn(b.input("image", [1, 3, 224, 224]), "stem", 3, 16, 3, 2), "hswish")
    c_in = 16
    # kernel, expanded channels, channels out, squeeze and excite, activation, stride
    table = [
        (3, 16, 16, False, "relu", 1), (3, 64, 24, False, "relu", 2), (3, 72, 24, False, "relu", 1), (5, 72, 40, True, "relu", 2),
        (5, 120, 40, True, "relu", 1), (5, 120, 40, True, "relu", 1), (3, 240, 80, False, "hswish", 2), (3, 200, 80, False, "hswish", 1),
        (3, 184, 80, False, "hswish", 1), (3, 184, 80, False, "hswish", 1), (3, 480, 112, True, "hswish", 1), (3, 672, 112, True, "hswish", 1),
        (5, 672, 160, True, "hswish", 2), (5, 960, 160, True, "hswish", 1), (5, 960, 160, True, "hswish", 1),
    ]  # fmt: skip
    for i, (kernel, wide, c_out, excite, kind, stride) in enumerate(table):
        at, y = f"block{i}", x
        if wide != c_in:
            y = act(b.conv_bn(y, f"{at}.expand", c_in, wide, 1), kind)
        y = act(b.conv_bn(y, f"{at}.depthwise", wide, wide, kernel, stride, wide), kind)
        y = squeeze(y, at, wide) if excite else y
        y = b.conv_bn(y, f"{at}.project", wide, c_out, 1)
        x = b.op("Add", x, y) if stride == 1 and c_in == c_out else y
        c_in = c_out
    x = act(b.conv_bn(x, "last", c_in, 960, 1), "hswish")
    x = b.op("Flatten", b.op("GlobalAveragePool", x), axis=1)
    x = b.op("HardSwish", b.op("Gemm", x, b.weight("head", 960, 1280), b.weight("head.bias", 1280, fan_in=100)))
    b.output(b.op("Gemm", x, b.weight("classes", 1280, 1000), b.weight("classes.bias", 1000, fan_in=100)), "logits", [1, 1000])
    return b


LAYERS, WIDTH, HEADS, KV_HEADS, INNER, WORDS, PAST = 4, 1024, 16, 4, 2816, 4096, 511
DEPTH = WIDTH // HEADS


def llama(name, past, half):
    """A decoder as Llama's: rotary embedding, grouped queries, RMS norms, SwiGLU. With `past`, keys and values of earlier positions are inputs."""
    b = Builder(name, half)
    tokens = 1 if past else "tokens"
    ids, positions = b.input("input_ids", ["batch", tokens], I64), b.input("position_ids", ["batch", tokens], I64)
    x = b.op("Gather", b.weight("words", WORDS, WIDTH, fan_in=1), ids)
    # Angles of the rotary embedding: [batch, 1, tokens, depth].
    frequency = b.array("inv_freq", (10000.0 ** (-np.arange(0, DEPTH, 2, dtype=np.float32) / DEPTH)).reshape(1, 1, -1).astype(np.float32))
    angle = b.op("Mul", b.op("Unsqueeze", b.op("Cast", positions, to=F32), b.ints(2)), frequency)
    angle = b.op("Unsqueeze", b.op("Concat", angle, angle, axis=2), b.ints(1))
    cos, sin = b.narrow(b.op("Cos", angle)), b.narrow(b.op("Sin", angle))

    def rotate(y):
        half = DEPTH // 2
        low, high = (b.op("Slice", y, b.ints(lo), b.ints(hi), b.ints(3)) for lo, hi in ((0, half), (half, DEPTH)))
        turned = b.op("Concat", b.op("Neg", high), low, axis=3)
        return b.op("Add", b.op("Mul", y, cos), b.op("Mul", turned, sin))

    mask = None
    if not past:
        rows, columns = b.op("Unsqueeze", positions, b.ints(1, 3)), b.op("Unsqueeze", positions, b.ints(1, 2))
        mask = b.op("Where", b.op("LessOrEqual", columns, rows), b.const(0.0), b.const(np.finfo(b.dtype).min))
    for layer in range(LAYERS):
        at = f"layer{layer}"
        y = b.rms_norm(x, f"{at}.norm1", WIDTH)
        q, k, v = (b.linear(y, f"{at}.{part}", WIDTH, n * DEPTH, bias=False) for part, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
        q, k, v = (b.op("Transpose", b.op("Reshape", y, b.ints(0, 0, n, DEPTH)), perm=[0, 2, 1, 3]) for y, n in ((q, HEADS), (k, KV_HEADS), (v, KV_HEADS)))
        q, k = rotate(q), rotate(k)
        if past:
            k, v = (b.op("Concat", b.input(f"past_{part}{layer}", ["batch", KV_HEADS, "past", DEPTH]), y, axis=2) for part, y in (("k", k), ("v", v)))
            for part, y in (("k", k), ("v", v)):
                b.output(y, f"present_{part}{layer}", ["batch", KV_HEADS, None, DEPTH])
        # Each head of keys and values serves several of queries.
        k, v = (b.op("Expand", b.op("Unsqueeze", y, b.ints(2)), b.ints(1, 1, HEADS // KV_HEADS, 1, 1)) for y in (k, v))
        # The number of positions is not among the first sizes that Reshape can copy, so it is put there.
        k, v = (b.op("Reshape", y, b.op("Concat", b.op("Shape", y, start=0, end=1), b.ints(HEADS), b.op("Shape", y, start=3, end=5), axis=0)) for y in (k, v))
        y = b.attend(q, b.op("Transpose", k, perm=[0, 1, 3, 2]), v, DEPTH, mask)
        x = b.op("Add", x, b.linear(b.op("Reshape", y, b.ints(0, 0, WIDTH)), f"{at}.o", WIDTH, WIDTH, bias=False))
        y = b.rms_norm(x, f"{at}.norm2", WIDTH)
        gate, up = (b.linear(y, f"{at}.{part}", WIDTH, INNER, bias=False) for part in ("gate", "up"))
        y = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
        x = b.op("Add", x, b.linear(y, f"{at}.down", INNER, WIDTH, bias=False))
    x = b.rms_norm(x, "norm", WIDTH)
    b.output(b.linear(x, "logits_w", WIDTH, WORDS, bias=False), "logits", ["batch", tokens, WORDS])
    return b


MODELS = {
    "bert_base": bert_base,
    "resnet50": resnet50,
    "mobilenetv3": mobilenetv3,
    "vit_b16": vit_b16,
    "llama_decode": lambda half: llama("llama_decode", True, half),
    "llama_prefill": lambda half: llama("llama_prefill", False, half),
    "deep": lambda half: bert_base(half, tokens=32, layers=110, width=64, heads=2, name="deep"),
}
# A case, its model, its sizes.
CASES = {
    "bert_base": ("bert_base", {}),
    "resnet50": ("resnet50", {}),
    "mobilenetv3": ("mobilenetv3", {}),
    "vit_b16": ("vit_b16", {}),
    "llama_decode_b1": ("llama_decode", {"batch": 1, "past": PAST}),
    "llama_decode_b16": ("llama_decode", {"batch": 16, "past": PAST}),
    "llama_prefill_512": ("llama_prefill", {"batch": 1, "tokens": 512}),
    "llama_prefill_2048": ("llama_prefill", {"batch": 1, "tokens": 2048}),
    "deep": ("deep", {}),
}


def inputs(model, sizes):
    """Inputs of a case, from a fixed seed."""
    random, arrays = np.random.default_rng(1), {}
    for port in model.graph.input:
        shape = [d.dim_value or sizes[d.dim_param] for d in port.type.tensor_type.shape.dim]
        if port.type.tensor_type.elem_type in (F32, TensorProto.FLOAT16):
            arrays[port.name] = random.standard_normal(shape, np.float32).astype(helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type))
        elif port.name == "position_ids":
            arrays[port.name] = np.broadcast_to(np.arange(shape[1]) + sizes.get("past", 0), shape).astype(np.int64)
        elif port.name == "attention_mask":
            arrays[port.name] = (np.arange(shape[1]) < shape[1] - 8).astype(np.int64)[None]
        else:
            arrays[port.name] = random.integers(0, 2 if port.name == "token_type_ids" else 1000, shape)
    return arrays


def main():
    folder, *names = [a for a in sys.argv[1:] if not a.startswith("--")]
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for case, (name, sizes) in CASES.items():
        if names and case not in names:
            continue
        path = folder / f"{name}.onnx"
        if not path.exists():
            MODELS[name]("--half" in sys.argv).save(folder)
        arrays = inputs(onnx.load(path, load_external_data=False), sizes)
        saved = {f"in:{k}": v for k, v in arrays.items()}
        if "--check" in sys.argv:
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            saved |= {f"out:{o.name}": v for o, v in zip(session.get_outputs(), session.run(None, arrays))}
        np.savez(folder / f"{case}.npz", **saved)
        print(case, flush=True)


if __name__ == "__main__":
    main()
