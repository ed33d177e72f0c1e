"""Makes the models that are derived from others, or from data inside wheels.

    python scripts/derive_models.py FOLDER      # needs scripts/requirements-derive.txt

FOLDER holds efficientnet_lite0.pth. Made there: efficientnet_lite0.onnx (its weights as ONNX), _qdq (int8 by static
calibration), _fp16, and digits_rf, digits_mlp, cancer_gb (scikit-learn models by skl2onnx). With the pinned versions
the same bytes come out everywhere.
"""

import os
import pathlib
import sys
import warnings

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import torch_weights

warnings.filterwarnings("ignore")


def efficientnet(pth, out):
    """EfficientNet-Lite0 for ImageNet, opset 13, batch normalisation kept apart."""
    weights = torch_weights.load(pth)
    nodes, initializers = [], {}

    def param(name, value=None):
        value = weights[name] if value is None else value
        initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(op, inputs, **attributes):
        name = f"{op}_{len(nodes) + 1}"
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    param("six", np.array(6, np.float32))
    param("zero", np.array(0, np.float32))

    def conv_bn(x, conv, bn, kernel, stride, groups, size, clip):
        out_size = -(-size // stride)
        pad = max((out_size - 1) * stride + kernel - size, 0)
        pads = [pad // 2, pad // 2, pad - pad // 2, pad - pad // 2]
        x = node("Conv", [x, param(conv)], kernel_shape=[kernel, kernel], strides=[stride, stride], pads=pads, group=groups)
        statistics = [param(bn + part) for part in (".weight", ".bias", ".running_mean", ".running_var")]
        x = node("BatchNormalization", [x, *statistics], epsilon=1e-3)
        return (node("Clip", [x, "zero", "six"]) if clip else x), out_size

    x, size = conv_bn("input", "_conv_stem.weight", "_bn0", 3, 2, 1, 224, True)
    block = 0
    # repeats, kernel, stride, expansion, channels in, channels out
    for repeats, kernel, stride, expansion, c_in, c_out in [
        (1, 3, 1, 1, 32, 16),
        (2, 3, 2, 6, 16, 24),
        (2, 5, 2, 6, 24, 40),
        (3, 3, 2, 6, 40, 80),
        (3, 5, 1, 6, 80, 112),
        (4, 5, 2, 6, 112, 192),
        (1, 3, 1, 6, 192, 320),
    ]:
        for i in range(repeats):
            c, s = (c_in, stride) if i == 0 else (c_out, 1)
            name = f"_blocks.{block}."
            y, y_size = x, size
            if expansion != 1:
                y, y_size = conv_bn(y, name + "_expand_conv.weight", name + "_bn0", 1, 1, 1, y_size, True)
            y, y_size = conv_bn(y, name + "_depthwise_conv.weight", name + "_bn1", kernel, s, c * expansion, y_size, True)
            y, y_size = conv_bn(y, name + "_project_conv.weight", name + "_bn2", 1, 1, 1, y_size, False)
            if s == 1 and c == c_out:
                y = node("Add", [y, x])
            x, size = y, y_size
            block += 1
    x, size = conv_bn(x, "_conv_head.weight", "_bn1", 1, 1, 1, size, True)
    x = node("GlobalAveragePool", [x])
    x = node("Flatten", [x], axis=1)
    nodes.append(helper.make_node("Gemm", [x, param("_fc.weight"), param("_fc.bias")], ["logits"], transB=1, name="fc"))
    graph = helper.make_graph(
        nodes,
        "efficientnet_lite0",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
        list(initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8, producer_name="make_efflite0")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out)


def calibration_crops():
    """Eight crops of every colour picture in scikit-image and scikit-learn, as the model wants them."""
    import skimage
    import sklearn
    from PIL import Image

    sk = pathlib.Path(skimage.__file__).parent / "data"
    names = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "ihc.png", "motorcycle_left.png"]
    pictures = [sk / n for n in names]
    pictures += [pathlib.Path(sklearn.__file__).parent / "datasets" / "images" / n for n in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    crops = []
    for path in pictures:
        image = Image.open(path).convert("RGB")
        for _ in range(8):
            side = int(min(image.size) * rng.uniform(0.5, 1))
            x = rng.integers(0, image.width - side + 1)
            y = rng.integers(0, image.height - side + 1)
            crop = image.crop((x, y, x + side, y + side)).resize((224, 224), Image.BICUBIC)
            crops.append(((np.asarray(crop, np.float32) - 127) / 128).transpose(2, 0, 1)[None])
    return crops


def quantised(source, out):
    """Static QDQ int8, per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Crops(CalibrationDataReader):
        def __init__(self):
            self.crops = iter(calibration_crops())

        def get_next(self):
            crop = next(self.crops, None)
            return None if crop is None else {"input": crop}

    prepared = f"{out}.prepared"
    quant_pre_process(source, prepared)
    quantize_static(
        prepared,
        out,
        Crops(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    os.remove(prepared)


def half(source, out):
    """f16 weights and arithmetic, f32 inputs and outputs."""
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), out)


def classical(folder):
    """Scikit-learn models: a forest, a scaled MLP, boosted trees."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_breast_cancer, load_digits
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    mlp = make_pipeline(StandardScaler(), MLPClassifier((128, 64), random_state=0, max_iter=200))
    for name, data, model in [
        ("digits_rf", load_digits, RandomForestClassifier(50, max_depth=10, random_state=0)),
        ("digits_mlp", load_digits, mlp),
        ("cancer_gb", load_breast_cancer, GradientBoostingClassifier(random_state=0, n_estimators=100)),
    ]:
        x, y = data(return_X_y=True)
        x_train, _, y_train, _ = train_test_split(x.astype("f"), y, random_state=0)
        model.fit(x_train, y_train)
        options = {"zipmap": False}
        onnx.save(to_onnx(model, x_train[:1], options=options, target_opset={"": 17, "ai.onnx.ml": 3}), folder / f"{name}.onnx")


def main():
    folder = pathlib.Path(sys.argv[1])
    base = str(folder / "efficientnet_lite0.onnx")
    efficientnet(folder / "efficientnet_lite0.pth", base)
    quantised(base, str(folder / "efficientnet_lite0_qdq.onnx"))
    half(base, str(folder / "efficientnet_lite0_fp16.onnx"))
    classical(folder)


if __name__ == "__main__":
    main()
