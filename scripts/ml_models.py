"""Small models of ai.onnx.ml with inputs and onnxruntime's outputs, for tests/ml.rs.

    python scripts/ml_models.py            # writes tests/golden/ml/*.onnx and *.npz

Most are exports of scikit-learn models; the rest are single operators with the attributes no export has.
Needs numpy, onnx, onnxruntime, scikit-learn and skl2onnx.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, Int64TensorType
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Perceptron, Ridge, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Binarizer, MinMaxScaler, Normalizer, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC, NuSVC, OneClassSVM
from sklearn.tree import DecisionTreeClassifier

OUT = Path(__file__).resolve().parent.parent / "tests/golden/ml"
ML = "ai.onnx.ml"
OPSET = {"": 21, ML: 3}


def save(name, model, inputs, judged=None):
    """The model, its inputs, and what onnxruntime makes of them (or of `judged`); text outputs are left out."""
    model.producer_name, model.producer_version, model.doc_string = "", "", ""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession((judged or model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(None, inputs)
    arrays = {f"in:{k}": v for k, v in inputs.items()}
    for output, value in zip(session.get_outputs(), values):
        assert isinstance(value, np.ndarray), f"{name}: output {output.name} is no tensor"
        if value.dtype != object:
            arrays[f"out:{output.name}"] = value
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.onnx").write_bytes(model.SerializeToString())
    np.savez_compressed(OUT / f"{name}.npz", **arrays)


def data(rng, n, features, classes):
    x = rng.normal(size=(n, features)).astype(np.float32)
    w = rng.normal(size=(features, classes))
    return x, np.argmax(x @ w + rng.normal(size=(n, classes)) * 0.3, axis=1)


def exports(rng):
    x2, y2 = data(rng, 60, 4, 2)
    x3, y3 = data(rng, 60, 4, 3)
    target = (x3[:, 0] * 2 - x3[:, 1] ** 2 + 0.1 * rng.normal(size=60)).astype(np.float32)
    holes = x3.copy()
    holes[rng.random(holes.shape) < 0.2] = np.nan
    new = rng.normal(size=(9, 4)).astype(np.float32)
    new_holes = new.copy()
    new_holes[rng.random(new.shape) < 0.3] = np.nan
    kinds = rng.integers(0, 4, size=(60, 2)).astype(np.int64)
    new_kinds = rng.integers(0, 4, size=(9, 2)).astype(np.int64)

    def classifier(name, model, x, y, at=new, labels=None):
        model.fit(x, y if labels is None else np.array(labels)[y])
        # Probabilities as a tensor, not as maps; margins are none of these.
        options = None if isinstance(model, LinearSVC) else {"zipmap": False}
        onx = to_onnx(model, initial_types=[("x", FloatTensorType([None, x.shape[1]]))], target_opset=OPSET, options=options)
        save(name, onx, {"x": at})

    def plain(name, model, x, y=None, at=new, kind=FloatTensorType):
        model.fit(x, y)
        onx = to_onnx(model, initial_types=[("x", kind([None, x.shape[1]]))], target_opset=OPSET)
        save(name, onx, {"x": at})

    classifier("decision_tree", DecisionTreeClassifier(max_depth=3, random_state=0), x3, y3)
    classifier("random_forest", RandomForestClassifier(4, max_depth=3, random_state=0), x3, y3, labels=[7, 3, 11])
    classifier("gradient_boosting_2", GradientBoostingClassifier(n_estimators=4, max_depth=2, random_state=0), x2, y2)
    classifier("gradient_boosting_3", GradientBoostingClassifier(n_estimators=3, max_depth=2, random_state=0), x3, y3)
    plain("extra_trees", ExtraTreesRegressor(3, max_depth=3, random_state=0), x3, np.stack([target, -target], axis=1))
    plain("boosted_regressor", GradientBoostingRegressor(n_estimators=4, max_depth=2, random_state=0), x3, target)
    classifier("logistic_2", LogisticRegression(), x2, y2, labels=[5, 2])
    classifier("logistic_3", LogisticRegression(), x3, y3)
    classifier("linear_svc", LinearSVC(), x3, y3)
    classifier("perceptron", Perceptron(), x2, y2)
    classifier("sgd_log", SGDClassifier(loss="log_loss", random_state=0), x3, y3)
    plain("ridge", Ridge(), x3, np.stack([target, target * 2 + 1], axis=1))
    for kernel in ["linear", "poly", "rbf", "sigmoid"]:
        classifier(f"svc_{kernel}", SVC(kernel=kernel, coef0=0.5), x3[:24], y3[:24])
    classifier("svc_two", SVC(), x2[:24], y2[:24], labels=[4, 9])
    classifier("svc_probability_2", SVC(probability=True, random_state=0), x2[:30], y2[:30])
    classifier("svc_probability_3", SVC(probability=True, random_state=0), x3[:30], y3[:30])
    classifier("nu_svc", NuSVC(nu=0.3, kernel="poly"), x2[:24], y2[:24])
    plain("svr", SVR(), x3[:24], target[:24])
    plain("one_class", OneClassSVM(nu=0.3), x3[:24])
    plain("scale_normalize", make_pipeline(StandardScaler(), Normalizer("l2"), Binarizer(threshold=0.1)), x3)
    plain("normalize_l1", make_pipeline(MinMaxScaler(), Normalizer("l1")), x3)
    plain("normalize_max", Normalizer("max"), x3)
    plain("impute", SimpleImputer(strategy="mean"), holes, at=new_holes)
    plain("one_hot", OneHotEncoder(handle_unknown="ignore"), kinds, at=new_kinds, kind=Int64TensorType)
    plain("ordinal", OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), kinds, at=new_kinds, kind=Int64TensorType)
    columns = ColumnTransformer([("a", StandardScaler(), [0, 2]), ("b", SimpleImputer(), [1, 3])])
    plain("columns", columns, x3)
    classifier("bayes", GaussianNB(), x3, y3)
    classifier("perceptrons", MLPClassifier((5,), max_iter=30, random_state=0), x3, y3)
    plain("clusters", KMeans(3, n_init=1, random_state=0), x3)
    plain("components", PCA(2, random_state=0), x3)
    # ZipMap is left out by us; onnxruntime's own output would be a list of maps.


def single(name, op, inputs, outputs, version=3, ints=(), **attributes):
    """A model of one operator; outputs are pairs of name and element type."""
    node = helper.make_node(op, list(inputs), [o for o, _ in outputs], domain=ML, **attributes)
    ports = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in inputs.items()]
    results = [helper.make_tensor_value_info(o, t, None) for o, t in outputs]
    graph = helper.make_graph([node], name, ports, results)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(ML, version)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    judged = None
    if op == "TreeEnsemble":
        # onnxruntime numbers LOGISTIC 1 and SOFTMAX 2, ONNX the other way round.
        judged = onnx.ModelProto()
        judged.CopyFrom(model)
        for a in judged.graph.node[0].attribute:
            if a.name == "post_transform":
                a.i = {1: 2, 2: 1}.get(a.i, a.i)
    save(name, model, inputs, judged)


TREE = {
    "nodes_treeids": [0] * 5 + [1] * 3,
    "nodes_nodeids": [0, 1, 2, 3, 4, 0, 1, 2],
    "nodes_featureids": [0, 1, 0, 0, 0, 2, 0, 0],
    "nodes_truenodeids": [1, 3, 0, 0, 0, 1, 0, 0],
    "nodes_falsenodeids": [2, 4, 0, 0, 0, 2, 0, 0],
    "nodes_values": [0.5, -0.25, 0, 0, 0, 1.0, 0, 0],
    "nodes_missing_value_tracks_true": [0, 1, 0, 0, 0, 1, 0, 0],
}


def singles(rng):
    x = np.round(rng.normal(size=(12, 3)) * 4).astype(np.float32) / 4
    x[rng.random(x.shape) < 0.15] = np.nan
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    modes = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"]
    # Every leaf has a weight for every target: what a target without one gets differs between runtimes.
    leaves = [(0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]

    def weights(prefix, targets):
        named = [(tree, node, t) for tree, node in leaves for t in range(targets)]
        values = np.round(rng.normal(size=len(named)) * 8) / 8
        keys = [f"{prefix}_treeids", f"{prefix}_nodeids", f"{prefix}_ids"]
        return {k: list(v) for k, v in zip(keys, zip(*named))} | {f"{prefix}_weights": values.tolist()}

    for i, mode in enumerate(modes):
        aggregate = ["SUM", "AVERAGE", "MIN", "MAX"][i % 4]
        named = [mode, mode, "LEAF", "LEAF", "LEAF", mode, "LEAF", "LEAF"]
        single(f"trees_{mode[7:].lower()}_{aggregate.lower()}", "TreeEnsembleRegressor", {"x": x}, [("y", f32)], nodes_modes=named,
               n_targets=2, aggregate_function=aggregate, base_values=[0.1, -0.2], **TREE, **weights("target", 2))
    named = ["BRANCH_LEQ", "BRANCH_GT", "LEAF", "LEAF", "LEAF", "BRANCH_LT", "LEAF", "LEAF"]
    for transform in ["NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"]:
        single(f"trees_3_{transform.lower()}", "TreeEnsembleClassifier", {"x": x}, [("label", i64), ("scores", f32)], nodes_modes=named,
               classlabels_int64s=[3, 1, 2], post_transform=transform, **TREE, **weights("class", 3))
        for sign, values in [("signed", [0.5, -0.75, 0.25, 1.5, -0.125]), ("positive", [0.5, 0.1, 0.25, 0.45, 0.05])]:
            only = {**weights("class", 1), "class_weights": values}
            single(f"trees_2_{sign}_{transform.lower()}", "TreeEnsembleClassifier", {"x": x}, [("label", i64), ("scores", f32)], nodes_modes=named,
                   classlabels_int64s=[4, 7], post_transform=transform, **TREE, **only)
    for i, wide in enumerate([np.float32, np.float64]):
        newer = {
            "nodes_featureids": [0, 1, 2], "nodes_truenodeids": [1, 0, 1], "nodes_trueleafs": [0, 1, 1], "nodes_falsenodeids": [2, 2, 3],
            "nodes_falseleafs": [0, 1, 1], "leaf_targetids": [0, 1, 0, 1], "tree_roots": [0], "n_targets": 2,
            "nodes_modes": numpy_helper.from_array(np.array([0, 6, 3], np.uint8)),
            "nodes_splits": numpy_helper.from_array(np.array([0.3, 0, -0.7], wide)),
            "membership_values": numpy_helper.from_array(np.array([1, -1, 2, np.nan], wide)),
            "leaf_weights": numpy_helper.from_array(np.array([0.5, -1.25, 2.5, 0.75], wide)),
        }
        known = np.round(np.nan_to_num(x) * 2).astype(wide)
        for transform in ([0, 1, 2] if i == 0 else [0]):
            single(f"trees_newer_{np.dtype(wide).name}_{transform}", "TreeEnsemble", {"x": known},
                   [("y", helper.np_dtype_to_tensor_dtype(np.dtype(wide)))], 5, aggregate_function=1, post_transform=transform, **newer)
    known = np.nan_to_num(x)
    for transform in ["NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO", "PROBIT"]:
        spread = known if transform != "PROBIT" else np.abs(known) / 8
        single(f"linear_{transform.lower()}", "LinearClassifier", {"x": spread}, [("label", i64), ("scores", f32)], coefficients=[0.1, 0.2, 0.1, 0.3, 0.05, 0.1, 0.02, 0.4, 0.1],
               intercepts=[0.05, 0.1, 0.15], classlabels_ints=[2, 0, 5], post_transform=transform)
        if transform in ("NONE", "LOGISTIC"):
            single(f"linear_one_{transform.lower()}", "LinearClassifier", {"x": known}, [("label", i64), ("scores", f32)], coefficients=[0.3, -0.2, 0.1],
                   intercepts=[0.05], classlabels_ints=[2, 5], post_transform=transform)
    single("regressor_softmax", "LinearRegressor", {"x": known}, [("y", f32)], coefficients=[0.3, -0.2, 0.1, 0.5, 0.1, -0.6], intercepts=[0.1, -0.3], targets=2, post_transform="SOFTMAX")
    numbers = rng.integers(0, 6, size=(7, 3)).astype(np.int64)
    single("labels_int_float", "LabelEncoder", {"x": numbers}, [("y", f32)], keys_int64s=[1, 4, 2], values_floats=[0.5, -2.0, 7.25], default_float=-0.5)
    single("labels_int_int", "LabelEncoder", {"x": numbers}, [("y", i64)], keys_int64s=[1, 4, 2], values_int64s=[10, 40, 20], default_int64=-7)
    tensor = numpy_helper.from_array
    single("labels_tensors", "LabelEncoder", {"x": numbers.astype(np.float32)}, [("y", i64)], 4, keys_tensor=tensor(np.array([0, 3, 5], np.float32)),
           values_tensor=tensor(np.array([100, 300, 500], np.int64)), default_tensor=tensor(np.array([-1], np.int64)))
    single("one_hot_int", "OneHotEncoder", {"x": numbers}, [("y", f32)], cats_int64s=[5, 0, 3], zeros=1)
    single("imputer_int", "Imputer", {"x": numbers}, [("y", i64)], imputed_value_int64s=[50, 60, 70], replaced_value_int64=3)
    single("imputer_nan", "Imputer", {"x": x}, [("y", f32)], imputed_value_floats=[9.5], replaced_value_float=float("nan"))
    single("extractor", "ArrayFeatureExtractor", {"x": known, "at": np.array([[2, 0]], np.int64)}, [("y", f32)])
    single("vectorizer", "FeatureVectorizer", {"a": known, "b": known[:, :2] * 2}, [("y", f32)], inputdimensions=[3, 2])
    single("scaler_int", "Scaler", {"x": numbers}, [("y", f32)], offset=[1.0, 2.0, 0.5], scale=[2.0, 0.5, 3.0])


if __name__ == "__main__":
    exports(np.random.default_rng(3))
    singles(np.random.default_rng(4))
    total = sum(f.stat().st_size for f in OUT.iterdir())
    print(f"{len(list(OUT.glob('*.onnx')))} models, {total} bytes in {OUT}")
