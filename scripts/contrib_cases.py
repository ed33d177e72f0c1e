"""Writes tests/contrib: one-operator models of com.microsoft, random inputs, and what onnxruntime makes of them.

Each case is NAME.onnx and NAME.npz with `in:` and `out:` entries, which `pavage run NAME.onnx --case NAME.npz` checks.
Needs numpy, onnx and onnxruntime.
"""
import pathlib
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "contrib"
rng = np.random.default_rng(7)
ONLY = sys.argv[1:]


def real(*shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def bytes_(*shape, dtype=np.uint8):
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def case(name, op, inputs, attrs=None, outputs=1, domain="com.microsoft", dims=None, constants=(), packed=None):
    """`inputs` is a list of arrays or None; those whose index is in `constants` become initializers. `dims` maps an
    input's index to the names of its axes, None for axes of a known size. `packed` replaces the inputs in
    the saved model: a form that onnxruntime has on GPUs alone, of the same values."""
    if ONLY and name not in ONLY:
        return
    if packed is not None:
        expected = results(name, op, inputs, attrs, outputs, domain, dims, constants)[1]
        model, _, feeds = results(name, op, packed, attrs, outputs, domain, dims, constants, run=False)
    else:
        model, expected, feeds = results(name, op, inputs, attrs, outputs, domain, dims, constants)
    for info, y in zip(model.graph.output, expected):
        info.CopyFrom(helper.make_tensor_value_info(info.name, helper.np_dtype_to_tensor_dtype(y.dtype), [None] * y.ndim))
        assert y.dtype.kind != "f" or np.isfinite(y).all(), name
    onnx.save(model, OUT / f"{name}.onnx")
    saved = {f"in:{k}": v for k, v in feeds.items()}
    saved |= {f"out:{info.name}": y for info, y in zip(model.graph.output, expected)}
    np.savez_compressed(OUT / f"{name}.npz", **saved)


def results(name, op, inputs, attrs, outputs, domain, dims, constants, run=True):
    """A model, what onnxruntime makes of it, and the inputs."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    while names and not names[-1]:
        names.pop()
    keep = outputs if isinstance(outputs, list) else [True] * outputs
    outs = [f"y{i}" if wanted else "" for i, wanted in enumerate(keep)]
    node = helper.make_node(op, names, outs, domain=domain, name=name, **(attrs or {}))
    graph_inputs, initializers, feeds = [], [], {}
    for i, x in enumerate(inputs):
        if x is None:
            continue
        x = np.asarray(x)
        if i in constants:
            initializers.append(onnx.numpy_helper.from_array(x, f"x{i}"))
            continue
        axes = (dims or {}).get(i, [None] * x.ndim)
        shape = [n if d is None else d for n, d in zip(x.shape, axes)]
        graph_inputs.append(helper.make_tensor_value_info(f"x{i}", helper.np_dtype_to_tensor_dtype(x.dtype), shape))
        feeds[f"x{i}"] = x
    # The element types of outputs follow from the run.
    types = [onnx.ValueInfoProto(name=o) for o in outs if o]
    graph = helper.make_graph([node], name, graph_inputs, types, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
    model.ir_version = 9
    model.producer_name = "pavage contrib cases"
    if not run:
        return model, None, feeds
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return model, session.run(None, feeds), feeds


def norms():
    x, skip, scale, shift, bias = real(2, 3, 16), real(2, 3, 16), real(16), real(16), real(16)
    symbols = {0: ["batch", "sequence", None], 1: ["batch", "sequence", None]}
    case("skip_layer_norm", "SkipLayerNormalization", [x, skip, scale, shift, bias], {"epsilon": 1e-5}, [True, False, False, True], dims=symbols)
    case("skip_layer_norm_no_bias", "SkipLayerNormalization", [x, skip, scale], {"epsilon": 1e-5})
    case("skip_layer_norm_shared_skip", "SkipLayerNormalization", [x, real(1, 3, 16), scale, shift], {"epsilon": 1e-5})
    case("skip_rms_norm", "SkipSimplifiedLayerNormalization", [x, skip, scale, bias], {"epsilon": 1e-6}, [True, False, False, True], dims=symbols)
    case("skip_rms_norm_no_bias", "SkipSimplifiedLayerNormalization", [x, skip, scale], {"epsilon": 1e-6})
    case("rms_norm", "SimplifiedLayerNormalization", [x, scale], {"axis": -1, "epsilon": 1e-6}, domain="", dims={0: ["batch", "sequence", None]})
    case("rms_norm_axis", "SimplifiedLayerNormalization", [x, real(3, 16)], {"axis": 1, "epsilon": 1e-6}, domain="")


def activations():
    x, bias = real(2, 3, 8, scale=2), real(8)
    case("gelu", "Gelu", [x], dims={0: ["batch", None, None]})
    case("bias_gelu", "BiasGelu", [x, bias])
    case("fast_gelu", "FastGelu", [x, bias])
    case("fast_gelu_no_bias", "FastGelu", [x])
    case("quick_gelu", "QuickGelu", [x], {"alpha": 1.5})


def products():
    case("fused_matmul", "FusedMatMul", [real(2, 5, 3), real(2, 7, 5)], {"alpha": 0.5, "transA": 1, "transB": 1})
    case("fused_matmul_plain", "FusedMatMul", [real(4, 6), real(6, 3)], {"alpha": 2.0})
    for bits, zero, name in [(4, None, "matmul_4bits"), (4, "u8", "matmul_4bits_zero"), (4, "f32", "matmul_4bits_float_zero"), (8, "u8", "matmul_8bits_zero")]:
        k, n, block = 40, 6, 16
        blocks = -(-k // block)
        b = bytes_(n, blocks, block * bits // 8)
        zeros = {None: None, "u8": bytes_(n, -(-blocks * bits // 8)), "f32": real(n, blocks, scale=2) + 8}[zero]
        inputs = [real(2, 3, k), b, real(n, blocks, scale=0.1), zeros]
        case(name, "MatMulNBits", inputs, {"K": k, "N": n, "bits": bits, "block_size": block}, constants=(1, 2, 3), dims={0: [None, "rows", None]})
    case("matmul_4bits_run_time", "MatMulNBits", [real(2, 32), bytes_(4, 1, 16), real(4)], {"K": 32, "N": 4, "bits": 4, "block_size": 32})


def attentions():
    # Attention: x, weights, bias, mask, past, added scores.
    b, s, w, h, d = 2, 5, 12, 3, 4
    x, weights, bias = real(b, s, w), real(w, 3 * h * d, scale=0.4), real(3 * h * d)
    base = {"num_heads": h}
    case("attention", "Attention", [x, weights, bias], base, dims={0: ["batch", "sequence", None]})
    case("attention_causal", "Attention", [x, weights, bias], base | {"unidirectional": 1, "scale": 0.3})
    keep = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    case("attention_mask_2d", "Attention", [x, weights, bias, keep], base)
    case("attention_mask_ends", "Attention", [x, weights, bias, np.array([3, 5], np.int32)], base)
    case("attention_mask_ranges", "Attention", [x, weights, bias, np.array([3, 5, 1, 0], np.int32)], base)
    case("attention_mask_3d", "Attention", [x, weights, bias, rng.integers(0, 2, (b, s, s)).astype(np.int32) | np.eye(s, dtype=np.int32)], base)
    case("attention_added", "Attention", [x, weights, bias, None, None, real(1, h, s, s)], base)
    case("attention_past", "Attention", [x, weights, bias, None, real(2, b, h, 3, d)], base | {"unidirectional": 1}, 2)
    case("attention_widths", "Attention", [x, real(w, 12 + 12 + 6, scale=0.4), real(30)], base | {"qkv_hidden_sizes": [12, 12, 6]})

    # MultiHeadAttention: q, k, v, bias, padding, added scores, past keys, past values.
    q, k, v = real(b, s, h * d), real(b, 6, h * d), real(b, 6, h * 2)
    symbols = {0: ["batch", "sequence", None], 1: ["batch", "keys", None], 2: ["batch", "keys", None]}
    case("multi_head", "MultiHeadAttention", [q, k, v], base, dims=symbols)
    case("multi_head_bias", "MultiHeadAttention", [q, k, v, real(h * (2 * d + 2))], base | {"scale": 0.7})
    keep = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], np.int32)
    case("multi_head_padding", "MultiHeadAttention", [q, k, v, None, keep], base)
    case("multi_head_lengths", "MultiHeadAttention", [q, k, v, None, np.array([4, 6], np.int32)], base)
    case("multi_head_added", "MultiHeadAttention", [q, k, v, None, None, real(b, 1, s, 6)], base)
    new = real(b, s, h * d)
    case("multi_head_past", "MultiHeadAttention", [q, new, real(b, s, h * d), None, None, None, real(b, h, 3, d), real(b, h, 3, d)], base | {"unidirectional": 1}, 3)
    case("multi_head_cross", "MultiHeadAttention", [q, real(b, h, 6, d), real(b, h, 6, d)], base)
    values = real(b, 6, h * d)
    heads = [x.reshape(b, -1, h, d) for x in (q, new, new[:, ::-1], k, values)]
    case("multi_head_packed", "MultiHeadAttention", [q, new, new[:, ::-1].copy()], base, packed=[np.stack(heads[:3], 3)])
    case("multi_head_packed_kv", "MultiHeadAttention", [q, k, values], base, packed=[q, np.stack(heads[3:], 3)])

    # RotaryEmbedding: x, positions, cosines, sines.
    angles = np.outer(np.arange(16), 1 / 10 ** (np.arange(4) / 4)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    positions = np.array([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]], np.int64)
    x3, x4 = real(b, s, 3 * 8), real(b, 3, s, 8)
    case("rotary", "RotaryEmbedding", [x3, positions, cos, sin], dims={0: ["batch", "sequence", None], 1: ["batch", "sequence"]})
    case("rotary_interleaved", "RotaryEmbedding", [x4, positions, cos, sin], {"interleaved": 1})
    case("rotary_offset", "RotaryEmbedding", [x4, np.array([2], np.int64), cos, sin])
    case("rotary_part", "RotaryEmbedding", [x3, positions, cos[:, :2], sin[:, :2]], {"rotary_embedding_dim": 4, "num_heads": 3})

    # GroupQueryAttention: q, k, v, past keys, past values, last positions, total, cosines, sines, positions, added scores.
    h, g, d = 4, 2, 16
    angles = np.outer(np.arange(16), 1 / 10 ** (np.arange(d // 2) / 4)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    base = {"num_heads": h, "kv_num_heads": g}

    def total(n):
        return np.array(n, np.int32)

    prompt = [real(b, s, h * d), real(b, s, g * d), real(b, s, g * d), None, None, np.array([s - 1, s - 1], np.int32), total(s)]
    case("group_query_prompt", "GroupQueryAttention", prompt, base, 3, constants=(6,), dims={0: ["batch", None, None], 1: ["batch", None, None], 2: ["batch", None, None], 5: ["batch"]})
    short = prompt[:5] + [np.array([s - 1, 2], np.int32), total(s)]
    case("group_query_prompt_padded", "GroupQueryAttention", short, base, 3, constants=(6,))
    case("group_query_rotary", "GroupQueryAttention", prompt + [cos, sin], base | {"do_rotary": 1}, 3, constants=(6, 7, 8))
    case("group_query_window", "GroupQueryAttention", prompt, base | {"local_window_size": 2, "softcap": 3.0, "scale": 0.5}, 3, constants=(6,))
    case("group_query_packed", "GroupQueryAttention", [real(b, s, (h + 2 * g) * d), None, None, None, None, prompt[5], total(s)], base, 3, constants=(6,))
    past = 6
    one = [real(b, 1, h * d), real(b, 1, g * d), real(b, 1, g * d), real(b, g, past, d), real(b, g, past, d)]
    case("group_query_step", "GroupQueryAttention", one + [np.array([past, past], np.int32), total(past + 1)], base, 3)
    padded = one[:3] + [x * (np.arange(past) < np.array([past, 3])[:, None]).astype(np.float32)[:, None, :, None] for x in one[3:]]
    case("group_query_step_rotary", "GroupQueryAttention", padded + [np.array([past, 3], np.int32), total(past + 1), cos, sin], base | {"do_rotary": 1, "rotary_interleaved": 1}, 3)
    case("group_query_added", "GroupQueryAttention", one + [np.array([past, past], np.int32), total(past + 1), None, None, None, real(b, 1, 1, past + 1)], base, 3)
    alone = [x[:1] for x in one] + [np.array([past], np.int32), total(past + 1)]
    names = {3: [None, None, "past", None], 4: [None, None, "past", None]}
    case("group_query_step_free", "GroupQueryAttention", alone, base, 3, dims=names)


def quantised():
    def number(x, dtype=np.float32):
        return np.array(x, dtype)

    a, b = bytes_(2, 3, 4), bytes_(3, 4)
    pair = [a, number(0.02), number(120, np.uint8), b, number(0.03), number(130, np.uint8), number(0.05), number(128, np.uint8)]
    case("qlinear_add", "QLinearAdd", pair, dims={0: ["batch", None, None]})
    case("qlinear_mul", "QLinearMul", pair)
    case("qlinear_add_i8", "QLinearAdd", [bytes_(2, 4, dtype=np.int8), number(0.02), number(3, np.int8), bytes_(2, 4, dtype=np.int8), number(0.03), number(-5, np.int8), number(0.05), number(-1, np.int8)])
    case("qlinear_sigmoid", "QLinearSigmoid", [a, number(0.05), number(120, np.uint8), number(1 / 256), number(0, np.uint8)], constants=(1, 2, 3, 4))
    case("qlinear_leaky_relu", "QLinearLeakyRelu", [a, number(0.05), number(120, np.uint8), number(0.04), number(90, np.uint8)], {"alpha": 0.2}, constants=(1, 2, 3, 4))
    parts = [number(0.05), number(128, np.uint8), a, number(0.02), number(120, np.uint8), bytes_(2, 5, 4), number(0.07), number(100, np.uint8)]
    case("qlinear_concat", "QLinearConcat", parts, {"axis": 1}, constants=(0, 1, 3, 4, 6, 7))
    image = bytes_(2, 3, 4, 5)
    case("qlinear_mean", "QLinearGlobalAveragePool", [image, number(0.02), number(120, np.uint8), number(0.005), number(128, np.uint8)])
    case("qlinear_mean_last", "QLinearGlobalAveragePool", [image, number(0.02), number(120, np.uint8), number(0.005), number(128, np.uint8)], {"channels_last": 1})
    case("nhwc_max_pool", "NhwcMaxPool", [bytes_(1, 6, 7, 3)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]})
    t, n, i, h = 4, 2, 6, 5
    for name, directions in [("quantised_lstm", 1), ("quantised_lstm_both", 2)]:
        w, r = bytes_(directions, i, 4 * h, dtype=np.int8), bytes_(directions, h, 4 * h, dtype=np.int8)
        zero = np.zeros(directions, np.int8)
        inputs = [real(t, n, i, scale=0.5), w, r, real(directions, 8 * h, scale=0.2), None, None, None, None]
        inputs += [np.full(directions, 0.004, np.float32), zero, np.full(directions, 0.003, np.float32), zero]
        attrs = {"hidden_size": h, "direction": "forward" if directions == 1 else "bidirectional"}
        case(name, "DynamicQuantizeLSTM", inputs, attrs, 3, constants=(1, 2, 3, 8, 9, 10, 11))


OUT.mkdir(exist_ok=True)
for family in [norms, activations, products, attentions, quantised]:
    family()
