//! Operators, one small model each, against results computed here or known by hand.
mod common;
use common::*;
use onnx_protobuf::{FunctionProto, NodeProto, OperatorSetIdProto};
use pavage_frontend::onnx::{self, Options};
use pavage_ir::{DType, Op, Tensor};

/// Outputs of one node over f32 inputs of these shapes, all named.
fn one(opset: i64, node: NodeProto, inputs: &[(&[usize], Vec<f32>)]) -> Tensor {
    let declared = node.input.iter().zip(inputs).map(|(n, (shape, _))| value(n, F32, shape.iter().map(|d| Is(*d as i64)).collect())).collect();
    let out = node.output[0].clone();
    let m = model(opset, graph(vec![node], declared, &[&out], vec![]));
    let tensors: Vec<Tensor> = inputs.iter().map(|(shape, v)| Tensor::from_f32(*shape, v)).collect();
    run(&m, &tensors).remove(0)
}

#[track_caller]
fn close(got: &Tensor, want: &[f64]) {
    let got = got.to_f64();
    assert_eq!(got.len(), want.len());
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= 1e-5 + 1e-5 * b.abs(), "element {i}: {a}, should be {b}");
    }
}

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|v| f64::from(*v)).collect()
}

type Case = (NodeProto, fn(f64) -> f64);

#[test]
fn activations() {
    let x = noise(64, 1);
    let cases: Vec<Case> = vec![
        (node("Relu", &["x"], &["y"]), |x| x.max(0.0)),
        (node("LeakyRelu", &["x"], &["y"]).float("alpha", 0.25), |x| if x < 0.0 { 0.25 * x } else { x }),
        (node("Elu", &["x"], &["y"]).float("alpha", 2.0), |x| if x < 0.0 { 2.0 * (x.exp() - 1.0) } else { x }),
        (node("Celu", &["x"], &["y"]).float("alpha", 2.0), |x| x.max(0.0) + (2.0 * ((x / 2.0).exp() - 1.0)).min(0.0)),
        (node("Selu", &["x"], &["y"]), |x| 1.0507009873554805 * if x > 0.0 { x } else { 1.6732632423543772 * (x.exp() - 1.0) }),
        (node("HardSigmoid", &["x"], &["y"]), |x| (0.2 * x + 0.5).clamp(0.0, 1.0)),
        (node("HardSwish", &["x"], &["y"]), |x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)),
        (node("Softplus", &["x"], &["y"]), |x| (1.0 + x.exp()).ln()),
        (node("Softsign", &["x"], &["y"]), |x| x / (1.0 + x.abs())),
        (node("Mish", &["x"], &["y"]), |x| x * (1.0 + x.exp()).ln().tanh()),
        (node("Swish", &["x"], &["y"]).float("alpha", 1.5), |x| x / (1.0 + (-1.5 * x).exp())),
        (node("Gelu", &["x"], &["y"]).text("approximate", "tanh"), |x| 0.5 * x * (1.0 + (0.7978845608028654 * (x + 0.044715 * x.powi(3))).tanh())),
        (node("ThresholdedRelu", &["x"], &["y"]).float("alpha", 0.5), |x| if x > 0.5 { x } else { 0.0 }),
        (node("Shrink", &["x"], &["y"]).float("bias", 0.25).float("lambd", 0.5), |x| {
            if x < -0.5 {
                x + 0.25
            } else if x > 0.5 {
                x - 0.25
            } else {
                0.0
            }
        }),
        (node("Reciprocal", &["x"], &["y"]), |x| 1.0 / x),
        (node("Clip", &["x"], &["y"]), |x| x),
    ];
    for (node, f) in cases {
        println!("{}", node.op_type);
        close(&one(24, node, &[(&[4, 16], x.clone())]), &wide(&x).into_iter().map(f).collect::<Vec<_>>());
    }
}

#[test]
fn broadcasting_is_multidirectional() {
    let (a, b) = (noise(6, 2), noise(12, 3));
    let got = one(17, node("Sub", &["a", "b"], &["y"]), &[(&[2, 3, 1], a.clone()), (&[3, 4], b.clone())]);
    let want: Vec<f64> = (0..24).map(|i| f64::from(a[i / 4] - b[i % 12])).collect();
    assert_eq!(got.shape(), [2, 3, 4]);
    close(&got, &want);
}

#[test]
fn integer_division_and_modulus() {
    let both = |op: &str, fmod: Option<i64>| {
        let n = node(op, &["a", "b"], &["y"]);
        let n = if let Some(v) = fmod { n.int("fmod", v) } else { n };
        let m = model(17, graph(vec![n], vec![value("a", I64, vec![Is(4)]), value("b", I64, vec![Is(4)])], &["y"], vec![]));
        run(&m, &[Tensor::from_i64([4], &[7, -7, 7, -7]), Tensor::from_i64([4], &[2, 2, -2, -2])])[0].to_i64()
    };
    assert_eq!(both("Div", None), [3, -3, -3, 3]);
    assert_eq!(both("Mod", None), [1, 1, -1, -1]);
    assert_eq!(both("Mod", Some(1)), [1, -1, 1, -1]);
}

#[test]
fn softmax_before_operator_set_13_flattens() {
    let x = noise(24, 4);
    let softmax = |groups: usize| {
        let each = 24 / groups;
        let mut want = vec![0.0; 24];
        for g in 0..groups {
            let part = &wide(&x)[g * each..(g + 1) * each];
            let sum: f64 = part.iter().map(|v| v.exp()).sum();
            part.iter().enumerate().for_each(|(i, v)| want[g * each + i] = v.exp() / sum);
        }
        want
    };
    close(&one(11, node("Softmax", &["x"], &["y"]), &[(&[2, 3, 4], x.clone())]), &softmax(2));
    close(&one(13, node("Softmax", &["x"], &["y"]), &[(&[2, 3, 4], x.clone())]), &softmax(6));
    let logs: Vec<f64> = softmax(6).iter().map(|v| v.ln()).collect();
    close(&one(13, node("LogSoftmax", &["x"], &["y"]), &[(&[2, 3, 4], x.clone())]), &logs);
}

#[test]
fn normalisations() {
    let x = noise(48, 5);
    let (scale, bias) = (noise(4, 6), noise(4, 7));
    // x is [2, 4, 6].
    let per = |rows: &dyn Fn(usize) -> usize, c: &dyn Fn(usize) -> usize| -> Vec<f64> {
        let x = wide(&x);
        let groups = (0..48).map(rows).max().unwrap() + 1;
        let members = |g: usize| (0..48).filter(move |i| rows(*i) == g);
        let mut out = vec![0.0; 48];
        for g in 0..groups {
            let n = members(g).count() as f64;
            let mean = members(g).map(|i| x[i]).sum::<f64>() / n;
            let var = members(g).map(|i| (x[i] - mean).powi(2)).sum::<f64>() / n;
            members(g).for_each(|i| out[i] = (x[i] - mean) / (var + 1e-5).sqrt() * f64::from(scale[c(i)]) + f64::from(bias[c(i)]));
        }
        out
    };
    let channel = |i: usize| i / 6 % 4;
    let args = |x: Vec<f32>| [(&[2usize, 4, 6][..], x), (&[4][..], scale.clone()), (&[4][..], bias.clone())];
    close(&one(22, node("InstanceNormalization", &["x", "s", "b"], &["y"]), &args(x.clone())), &per(&|i| i / 6, &channel));
    close(&one(21, node("GroupNormalization", &["x", "s", "b"], &["y"]).int("num_groups", 2), &args(x.clone())), &per(&|i| i / 12, &channel));
    let last = [(&[3usize, 4, 4][..], x.clone()), (&[4][..], scale.clone()), (&[4][..], bias.clone())];
    close(&one(17, node("LayerNormalization", &["x", "s", "b"], &["y"]), &last), &per(&|i| i / 4, &|i| i % 4));
    // Inference: statistics are operands.
    let (mean, var) = (noise(4, 8), noise(4, 9).iter().map(|v| v * v + 0.1).collect::<Vec<_>>());
    let mut all = args(x.clone()).to_vec();
    all.extend([(&[4][..], mean.clone()), (&[4][..], var.clone())]);
    let want: Vec<f64> = (0..48)
        .map(|i| {
            let c = channel(i);
            (f64::from(x[i]) - f64::from(mean[c])) / (f64::from(var[c]) + 1e-5).sqrt() * f64::from(scale[c]) + f64::from(bias[c])
        })
        .collect();
    close(&one(15, node("BatchNormalization", &["x", "s", "b", "m", "v"], &["y"]), &all), &want);
}

#[test]
fn reductions() {
    let x = noise(24, 10);
    let rows = |f: &dyn Fn(&[f64]) -> f64| -> Vec<f64> { wide(&x).chunks(4).map(f).collect() };
    let case = |op: &str| {
        one(
            13,
            if op == "ReduceSum" { node(op, &["x"], &["y"]).int("keepdims", 0) } else { node(op, &["x"], &["y"]).ints("axes", &[-1]).int("keepdims", 0) },
            &[(&[2, 3, 4], x.clone())],
        )
    };
    close(&case("ReduceMean"), &rows(&|r| r.iter().sum::<f64>() / 4.0));
    close(&case("ReduceMax"), &rows(&|r| r.iter().copied().fold(f64::MIN, f64::max)));
    close(&case("ReduceProd"), &rows(&|r| r.iter().product()));
    close(&case("ReduceL1"), &rows(&|r| r.iter().map(|v| v.abs()).sum()));
    close(&case("ReduceL2"), &rows(&|r| r.iter().map(|v| v * v).sum::<f64>().sqrt()));
    close(&case("ReduceLogSumExp"), &rows(&|r| r.iter().map(|v| v.exp()).sum::<f64>().ln()));
    close(&case("ReduceSumSquare"), &rows(&|r| r.iter().map(|v| v * v).sum()));
    let total = case("ReduceSum");
    assert!(total.shape().is_empty());
    close(&total, &[wide(&x).iter().sum()]);
    let kept = one(13, node("ReduceMin", &["x"], &["y"]).ints("axes", &[0, 2]), &[(&[2, 3, 4], x.clone())]);
    assert_eq!(kept.shape(), [1, 3, 1]);
}

#[test]
fn products() {
    // A batch of vectors and one of matrices, broadcast.
    let (a, b) = (noise(12, 11), noise(40, 12));
    let got = one(13, node("MatMul", &["a", "b"], &["y"]), &[(&[3, 1, 4], a.clone()), (&[2, 1, 4, 5][..], b.clone())]);
    assert_eq!(got.shape(), [2, 3, 1, 5]);
    let want: Vec<f64> = (0..30).map(|i| (0..4).map(|k| f64::from(a[i / 5 % 3 * 4 + k]) * f64::from(b[i / 15 * 20 + k * 5 + i % 5])).sum()).collect();
    close(&got, &want);
    let dot = one(13, node("MatMul", &["a", "b"], &["y"]), &[(&[12], a.clone()), (&[12], b[..12].to_vec())]);
    assert!(dot.shape().is_empty());
    let (b, c) = (noise(20, 13), noise(5, 14));
    let gemm = node("Gemm", &["a", "b", "c"], &["y"]).int("transA", 1).int("transB", 1).float("alpha", 0.5).float("beta", 2.0);
    let got = one(13, gemm, &[(&[4, 3], a.clone()), (&[5, 4], b.clone()), (&[5], c.clone())]);
    let want: Vec<f64> =
        (0..15).map(|i| 0.5 * (0..4).map(|k| f64::from(a[k * 3 + i / 5]) * f64::from(b[i % 5 * 4 + k])).sum::<f64>() + 2.0 * f64::from(c[i % 5])).collect();
    close(&got, &want);
}

#[test]
fn padding_that_the_output_size_decides() {
    // SAME over a known extent, and over one that is not: equal results.
    let (x, w) = (noise(14, 15), noise(6, 16));
    let conv = |auto: &str| node("Conv", &["x", "w"], &["y"]).text("auto_pad", auto).ints("strides", &[2]);
    for auto in ["SAME_UPPER", "SAME_LOWER"] {
        let known = one(11, conv(auto), &[(&[1, 2, 7], x.clone()), (&[1, 2, 3], w.clone())]);
        assert_eq!(known.shape(), [1, 1, 4]);
        let m = model(11, graph(vec![conv(auto)], vec![value("x", F32, vec![Is(1), Is(2), Free])], &["y"], vec![floats("w", &[1, 2, 3], &w)]));
        let symbolic = run(&m, &[Tensor::from_f32([1, 2, 7], &x)]).remove(0);
        assert_eq!(known, symbolic);
    }
}

#[test]
fn quantisation_rounds_to_even_and_saturates() {
    let nodes = vec![node("QuantizeLinear", &["x", "s", "z"], &["q"]), node("DequantizeLinear", &["q", "s", "z"], &["y"])];
    let zero = onnx_protobuf::TensorProto { name: "z".into(), data_type: 2, int32_data: vec![128], ..Default::default() };
    let m = model(13, graph(nodes, vec![value("x", F32, vec![Is(6)])], &["q", "y"], vec![floats("s", &[], &[0.5]), zero]));
    let out = run(&m, &[Tensor::from_f32([6], &[0.25, 0.75, -0.25, 1000.0, -1000.0, 1.0])]);
    assert_eq!(out[0].dtype(), DType::U8);
    assert_eq!(out[0].to_i64(), [128, 130, 128, 255, 0, 130]);
    assert_eq!(out[1].to_f64(), [0.0, 1.0, 0.0, 63.5, -64.0, 1.0]);
    // Blocks of two along the last axis.
    let node = node("DequantizeLinear", &["q", "s"], &["y"]).int("axis", 1).int("block_size", 2);
    let q = onnx_protobuf::TensorProto { name: "q".into(), data_type: 3, dims: vec![2, 4], int32_data: vec![1, 2, 3, 4, -1, -2, -3, -4], ..Default::default() };
    let m = model(21, graph(vec![node], vec![], &["y"], vec![q, floats("s", &[2, 2], &[1.0, 10.0, 0.5, 2.0])]));
    assert_eq!(run(&m, &[])[0].to_f64(), [1.0, 2.0, 30.0, 40.0, -0.5, -1.0, -6.0, -8.0]);
}

#[test]
fn sizes_are_followed_through_arithmetic() {
    // Flatten by hand, as exporters write it: Shape, Gather, Unsqueeze, Concat, Reshape.
    let nodes = vec![
        node("Shape", &["x"], &["s"]),
        node("Gather", &["s", "zero"], &["n"]).int("axis", 0),
        node("Gather", &["s", "two"], &["w"]).int("axis", 0),
        node("Mul", &["w", "three"], &["rest"]),
        node("Unsqueeze", &["n", "axes"], &["n1"]),
        node("Unsqueeze", &["rest", "axes"], &["r1"]),
        node("Concat", &["n1", "r1"], &["target"]).int("axis", 0),
        node("Reshape", &["x", "target"], &["y"]),
        node("Shape", &["y"], &["sizes"]),
    ];
    let inits = vec![ints("zero", &[], &[0]), ints("two", &[], &[2]), ints("three", &[], &[3]), ints("axes", &[1], &[0])];
    let m = model(17, graph(nodes, vec![value("x", F32, vec![Named("batch"), Is(3), Named("width")])], &["y", "sizes"], inits));
    let imported = import(&m).unwrap().graph;
    let y = imported.ty(imported.outputs[0].value);
    assert_eq!(y.to_string(), "f32[batch,3*width]");
    let ops: Vec<String> = imported.schedule().iter().filter_map(|id| imported.op(*id).map(|op| op.to_string())).collect();
    assert_eq!(ops, ["reshape[shape=[batch,3*width]]", "dims[values=[batch,3*width]]"]);
    let out = run(&m, &[Tensor::from_f32([2, 3, 4], &noise(24, 17))]);
    assert_eq!(out[1].to_i64(), [2, 12]);
}

#[test]
fn slices_count_from_the_end_and_backwards() {
    let slice = |x: &[f32], start: i64, end: i64, step: i64, extent| {
        let inits = vec![ints("s", &[1], &[start]), ints("e", &[1], &[end]), ints("a", &[1], &[0]), ints("t", &[1], &[step])];
        let m = model(13, graph(vec![node("Slice", &["x", "s", "e", "a", "t"], &["y"])], vec![value("x", F32, vec![extent])], &["y"], inits));
        run(&m, &[Tensor::from_f32([x.len()], x)]).remove(0).to_f64()
    };
    let x: Vec<f32> = (0..7).map(|v| v as f32).collect();
    for (start, end, step) in [(0, i64::MAX, 1), (-3, -1, 1), (1, 6, 2), (-1, i64::MIN, -1), (5, 1, -2), (4, 2, 1), (-100, 100, 3), (10, -10, -3)] {
        // Python's rule, spelled out.
        let clamp = |v: i64, lo: i64, hi: i64| if v < 0 { v.saturating_add(7).clamp(lo, hi) } else { v.clamp(lo, hi) };
        let (first, last) = if step > 0 { (clamp(start, 0, 7), clamp(end, 0, 7)) } else { (clamp(start, 0, 6), clamp(end, -1, 6)) };
        let want: Vec<f64> = (0..).map(|i| first + i * step).take_while(|v| if step > 0 { *v < last } else { *v > last }).map(|v| v as f64).collect();
        assert_eq!(slice(&x, start, end, step, Is(7)), want, "{start}:{end}:{step}");
        assert_eq!(slice(&x, start, end, step, Free), want, "{start}:{end}:{step} of an unknown extent");
    }
}

#[test]
fn slices_whose_bounds_are_data() {
    let inits = vec![ints("a", &[1], &[0])];
    let inputs = vec![value("x", F32, vec![Free]), value("s", I64, vec![Is(1)]), value("e", I64, vec![Is(1)])];
    let m = model(13, graph(vec![node("Slice", &["x", "s", "e", "a"], &["y"])], inputs, &["y"], inits));
    let x: Vec<f32> = (0..5).map(|v| v as f32).collect();
    let at = |s: i64, e: i64| run(&m, &[Tensor::from_f32([5], &x), Tensor::from_i64([1], &[s]), Tensor::from_i64([1], &[e])]).remove(0).to_f64();
    assert_eq!(at(1, 3), [1.0, 2.0]);
    assert_eq!(at(-2, i64::MAX), [3.0, 4.0]);
    assert_eq!(at(3, 1), [0.0; 0]);
}

#[test]
fn ranges_by_data() {
    let m = model(13, graph(vec![node("Range", &["a", "b", "c"], &["y"])], ["a", "b", "c"].map(|n| value(n, F32, vec![])).to_vec(), &["y"], vec![]));
    let scalar = |v: f32| Tensor::from_f32([], &[v]);
    assert_eq!(run(&m, &[scalar(1.0), scalar(4.5), scalar(1.5)])[0].to_f64(), [1.0, 2.5, 4.0]);
    assert_eq!(run(&m, &[scalar(1.0), scalar(-2.0), scalar(-2.0)])[0].to_f64(), [1.0, -1.0]);
}

#[test]
fn sizes_named_twice_become_one() {
    let inputs = vec![value("a", F32, vec![Named("n"), Is(2)]), value("b", F32, vec![Named("m"), Is(2)])];
    let m = model(13, graph(vec![node("Add", &["a", "b"], &["y"])], inputs, &["y"], vec![]));
    let imported = import(&m).unwrap();
    assert_eq!(imported.graph.symbols().len(), 1);
    assert!(imported.notes[0].contains("takes `"), "{:?}", imported.notes);
    let two = |n: usize| Tensor::from_f32([n, 2], &noise(2 * n, 18));
    assert_eq!(run(&m, &[two(3), two(3)])[0].shape(), [3, 2]);
    assert!(pavage_ir::eval::eval(&imported.graph, &[two(3), two(1)]).is_err());
}

#[test]
fn pyramids_need_multiples_of_their_stride() {
    // Down by two and up again, added: only even extents fit.
    let pool = node("MaxPool", &["x"], &["d"]).ints("kernel_shape", &[3]).ints("strides", &[2]).ints("pads", &[1, 1]);
    let up = node("Resize", &["d", "", "s"], &["u"]).text("mode", "nearest").text("coordinate_transformation_mode", "asymmetric").text("nearest_mode", "floor");
    let nodes = vec![pool, up, node("Add", &["x", "u"], &["y"])];
    let m = model(13, graph(nodes, vec![value("x", F32, vec![Is(1), Is(1), Named("w")])], &["y"], vec![floats("s", &[3], &[1.0, 1.0, 2.0])]));
    let imported = import(&m).unwrap();
    assert_eq!(imported.graph[imported.graph.inputs()[0]].types[0].to_string(), "f32[1,1,2*w_by2]");
    assert_eq!(run(&m, &[Tensor::from_f32([1, 1, 6], &noise(6, 19))])[0].shape(), [1, 1, 6]);
}

#[test]
fn branches() {
    let branch = |name: &str, op: &str| graph(vec![node(op, &["x", "k"], &[name])], vec![], &[name], vec![]);
    let choose = |cond: &str| node("If", &[cond], &["y"]).graph("then_branch", branch("a", "Add")).graph("else_branch", branch("b", "Mul"));
    let x = || value("x", F32, vec![Named("n")]);
    let k = || floats("k", &[], &[3.0]);
    let data = Tensor::from_f32([2], &[1.0, -4.0]);
    // Decided by data.
    let m = model(17, graph(vec![choose("c")], vec![x(), value("c", BOOL, vec![])], &["y"], vec![k()]));
    let flag = |v: bool| Tensor::new(DType::Bool, [], vec![u8::from(v)]).unwrap();
    assert_eq!(run(&m, &[data.clone(), flag(true)])[0].to_f64(), [4.0, -1.0]);
    assert_eq!(run(&m, &[data.clone(), flag(false)])[0].to_f64(), [3.0, -12.0]);
    // Decided at import: no `if` is left.
    let nodes = vec![node("Shape", &["x"], &["s"]), node("Size", &["s"], &["r"]), node("Equal", &["r", "one"], &["c"]), choose("c")];
    let m = model(17, graph(nodes, vec![x()], &["y"], vec![k(), ints("one", &[], &[1])]));
    let imported = import(&m).unwrap().graph;
    assert!(!imported.nodes().iter().any(|id| matches!(imported.op(*id), Some(Op::If { .. }))));
    assert_eq!(run(&m, &[data])[0].to_f64(), [4.0, -1.0]);
}

#[test]
fn loops_and_scans() {
    // sum = 0; 4 times: sum = sum + x, collect.
    let body = graph(
        vec![node("Add", &["s", "x"], &["t"]), node("Identity", &["c"], &["d"]), node("Identity", &["t"], &["u"])],
        vec![value("i", I64, vec![]), value("c", BOOL, vec![]), value("s", F32, vec![Is(2)])],
        &["d", "t", "u"],
        vec![],
    );
    let m = model(
        17,
        graph(
            vec![node("Loop", &["trip", "", "zero"], &["last", "all"]).graph("body", body)],
            vec![value("x", F32, vec![Is(2)])],
            &["last", "all"],
            vec![ints("trip", &[], &[4]), floats("zero", &[2], &[0.0, 0.0])],
        ),
    );
    let out = run(&m, &[Tensor::from_f32([2], &[1.0, -0.5])]);
    assert_eq!(out[0].to_f64(), [4.0, -2.0]);
    assert_eq!(out[1].shape(), [4, 2]);
    assert_eq!(out[1].to_f64(), [1.0, -0.5, 2.0, -1.0, 3.0, -1.5, 4.0, -2.0]);
    // Running sums along the second axis, from its end.
    let body = graph(
        vec![node("Add", &["s", "x"], &["t"]), node("Identity", &["t"], &["u"])],
        vec![value("s", F32, vec![Is(2)]), value("x", F32, vec![Is(2)])],
        &["t", "u"],
        vec![],
    );
    let scan = node("Scan", &["zero", "x"], &["last", "all"])
        .int("num_scan_inputs", 1)
        .ints("scan_input_axes", &[1])
        .ints("scan_input_directions", &[1])
        .graph("body", body);
    let m = model(17, graph(vec![scan], vec![value("x", F32, vec![Is(2), Is(3)])], &["last", "all"], vec![floats("zero", &[2], &[0.0, 0.0])]));
    let out = run(&m, &[Tensor::from_f32([2, 3], &[1.0, 2.0, 3.0, 10.0, 20.0, 30.0])]);
    assert_eq!(out[0].to_f64(), [6.0, 60.0]);
    assert_eq!(out[1].to_f64(), [3.0, 30.0, 5.0, 50.0, 6.0, 60.0]);
}

#[test]
fn functions_are_inlined_with_their_attributes() {
    let mut call = node("twice", &["x"], &["y"]).float("gain", 0.5);
    call.domain = "f".into();
    let mut m = model(17, graph(vec![call], vec![value("x", F32, vec![Is(2)])], &["y"], vec![]));
    m.functions = vec![FunctionProto {
        name: "twice".into(),
        domain: "f".into(),
        input: vec!["a".into(), "absent".into()],
        output: vec!["z".into()],
        attribute: vec!["gain".into()],
        node: vec![node("LeakyRelu", &["a"], &["b"]).refers("alpha", "gain", 1), node("Clip", &["b", "absent"], &["c"]), node("Add", &["c", "c"], &["z"])],
        opset_import: vec![OperatorSetIdProto { version: 17, ..Default::default() }],
        ..Default::default()
    }];
    let imported = import(&m).unwrap().graph;
    let sources: Vec<&str> = imported.schedule().iter().flat_map(|id| &imported[*id].source).map(String::as_str).collect();
    assert!(sources.contains(&"twice_y/Add_z"), "{sources:?}");
    assert_eq!(run(&m, &[Tensor::from_f32([2], &[1.0, -4.0])])[0].to_f64(), [2.0, -4.0]);
}

#[test]
fn nodes_come_in_any_order() {
    let nodes = vec![node("Neg", &["b"], &["y"]), node("Exp", &["a"], &["b"]), node("Abs", &["x"], &["a"])];
    let m = model(17, graph(nodes, vec![value("x", F32, vec![Is(1)])], &["y"], vec![]));
    close(&run(&m, &[Tensor::from_f32([1], &[-2.0])])[0], &[-(2f64.exp())]);
}

#[test]
fn constants_in_every_form() {
    for (node, want) in [
        (node("Constant", &[], &["c"]).float("value_float", 1.5), vec![1.5]),
        (node("Constant", &[], &["c"]).floats("value_floats", &[1.5, 2.5]), vec![1.5, 2.5]),
        (node("Constant", &[], &["c"]).int("value_int", 7), vec![7.0]),
        (node("Constant", &[], &["c"]).ints("value_ints", &[7, -8]), vec![7.0, -8.0]),
        (node("Constant", &[], &["c"]).tensor("value", floats("", &[2], &[0.5, -0.5])), vec![0.5, -0.5]),
    ] {
        let cast = common::node("Cast", &["c"], &["y"]).int("to", 1);
        assert_eq!(run(&model(17, graph(vec![node, cast], vec![], &["y"], vec![])), &[])[0].to_f64(), want);
    }
    // Every dtype that is kept in `int32_data`.
    for (code, dtype, data, want) in [
        (2, DType::U8, vec![200, 3], [200.0, 3.0]),
        (3, DType::I8, vec![-100, 3], [-100.0, 3.0]),
        (5, DType::I16, vec![-30000, 3], [-30000.0, 3.0]),
        (9, DType::Bool, vec![0, 1], [0.0, 1.0]),
        (10, DType::F16, vec![0x3c00, 0xc000], [1.0, -2.0]),
        (16, DType::BF16, vec![0x3f80, 0xc000], [1.0, -2.0]),
        (17, DType::F8E4M3, vec![0x38, 0xc0], [1.0, -2.0]),
        (22, DType::I4, vec![0x2f], [-1.0, 2.0]),
    ] {
        let t = onnx_protobuf::TensorProto { name: "c".into(), data_type: code, dims: vec![2], int32_data: data, ..Default::default() };
        let out = run(&model(21, graph(vec![common::node("Identity", &["c"], &["y"])], vec![], &["y"], vec![t])), &[]);
        assert_eq!((out[0].dtype(), out[0].to_f64().as_slice()), (dtype, &want[..]));
    }
}

#[test]
fn initializers_stay_in_the_file() {
    let w = noise(1 << 16, 20);
    let m = model(17, graph(vec![node("Add", &["x", "w"], &["y"])], vec![value("x", F32, vec![Is(1 << 16)])], &["y"], vec![floats("w", &[1 << 16], &w)]));
    let path = std::env::temp_dir().join(format!("pavage-mapped-{}.onnx", std::process::id()));
    std::fs::write(&path, bytes(&m)).unwrap();
    let imported = onnx::load(&path, &Options::default()).unwrap().graph;
    std::fs::remove_file(&path).unwrap();
    let constant = imported.nodes().into_iter().find_map(|id| imported.as_const(id.into()).cloned()).unwrap();
    assert!(constant.is_mapped());
    assert_eq!(constant, Tensor::from_f32([1 << 16], &w));
}

#[test]
fn strings_are_left_out_with_a_note() {
    let mut labels = node("TreeEnsembleClassifier", &["x"], &["label", "scores"])
        .ints("nodes_treeids", &[0, 0, 0])
        .ints("nodes_nodeids", &[0, 1, 2])
        .ints("nodes_featureids", &[0, 0, 0])
        .strings("nodes_modes", &["BRANCH_LEQ", "LEAF", "LEAF"])
        .floats("nodes_values", &[0.5, 0.0, 0.0])
        .ints("nodes_truenodeids", &[1, 0, 0])
        .ints("nodes_falsenodeids", &[2, 0, 0])
        .ints("class_treeids", &[0, 0, 0, 0])
        .ints("class_nodeids", &[1, 1, 2, 2])
        .ints("class_ids", &[0, 2, 1, 2])
        .floats("class_weights", &[0.75, 0.25, 0.5, 0.5])
        .strings("classlabels_strings", &["a", "b", "c"]);
    labels.domain = "ai.onnx.ml".into();
    let mut zip = node("ZipMap", &["scores"], &["map"]);
    zip.domain = "ai.onnx.ml".into();
    let m = model(17, graph(vec![labels, zip], vec![value("x", F32, vec![Free, Is(1)])], &["label", "map"], vec![]));
    let imported = import(&m).unwrap();
    assert_eq!(imported.graph.outputs.len(), 1);
    assert!(imported.notes.iter().any(|n| n.contains("`label`")) && imported.notes.iter().any(|n| n.contains("ZipMap")), "{:?}", imported.notes);
    let out = run(&m, &[Tensor::from_f32([2, 1], &[0.25, 0.75])]);
    assert_eq!(out[0].to_f64(), [0.75, 0.0, 0.25, 0.0, 0.5, 0.5]);
}

#[test]
fn sizes_that_must_be_equal_are_told() {
    // Pairs of rows: only even extents divide.
    let m = model(13, graph(vec![node("Reshape", &["x", "s"], &["y"])], vec![value("x", F32, vec![Named("n")])], &["y"], vec![ints("s", &[2], &[-1, 2])]));
    let imported = import(&m).unwrap();
    let told: Vec<String> = imported.requirements.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["the model needs mod(n,2) to equal 0"]);
    assert_eq!(run(&m, &[Tensor::from_f32([6], &noise(6, 21))])[0].shape(), [3, 2]);
    assert!(pavage_ir::eval::eval(&imported.graph, &[Tensor::from_f32([5], &noise(5, 22))]).is_err());
}

#[test]
fn the_run_says_whether_an_extent_is_1_and_broadcasts() {
    let rest = || node("Slice", &["x", "from", "to", "axis"], &["rest"]);
    let bounds = || vec![ints("from", &[1], &[1]), ints("to", &[1], &[i64::MAX]), ints("axis", &[1], &[0])];
    let x = || vec![value("x", F32, vec![Named("n"), Is(3)])];
    // All rows but the first, and a table of seven.
    let mut known = bounds();
    known.push(floats("table", &[7, 3], &noise(21, 30)));
    let m = model(17, graph(vec![rest(), node("Add", &["rest", "table"], &["y"])], x(), &["y"], known));
    let imported = import(&m).unwrap();
    assert_eq!(imported.requirements.iter().map(ToString::to_string).collect::<Vec<_>>(), ["the model needs n-1 to be 1 or 7"]);
    for n in [2, 8] {
        let rows = noise(3 * n, 31);
        let want: Vec<f64> = (0..21).map(|i| f64::from(rows[if n == 2 { 3 + i % 3 } else { 3 + i }]) + f64::from(noise(21, 30)[i])).collect();
        close(&run(&m, &[Tensor::from_f32([n, 3], &rows)])[0], &want);
    }
    // All rows but the first, and all rows: right only where one is left.
    let m = model(17, graph(vec![rest(), node("Sub", &["x", "rest"], &["y"])], x(), &["y"], bounds()));
    assert_eq!(import(&m).unwrap().requirements[0].to_string(), "the model needs n-1 to be 1 or n");
    let rows = noise(6, 32);
    let want: Vec<f64> = (0..6).map(|i| f64::from(rows[i]) - f64::from(rows[3 + i % 3])).collect();
    close(&run(&m, &[Tensor::from_f32([2, 3], &rows)])[0], &want);
}

#[test]
fn recurrent_layers_take_every_activation_with_its_parameters() {
    type Function = fn(f64, f64, f64) -> f64;
    let cases: [(&str, &[f32], &[f32], Function); 11] = [
        ("Relu", &[], &[], |x, _, _| x.max(0.0)),
        ("Tanh", &[], &[], |x, _, _| x.tanh()),
        ("Sigmoid", &[], &[], |x, _, _| 1.0 / (1.0 + (-x).exp())),
        ("Softsign", &[], &[], |x, _, _| x / (1.0 + x.abs())),
        ("Softplus", &[], &[], |x, _, _| (1.0 + x.exp()).ln()),
        ("Affine", &[0.5], &[0.25], |x, a, b| a * x + b),
        ("LeakyRelu", &[0.125], &[], |x, a, _| if x >= 0.0 { x } else { a * x }),
        ("ThresholdedRelu", &[0.5], &[], |x, a, _| if x >= a { x } else { 0.0 }),
        ("ScaledTanh", &[0.75], &[1.5], |x, a, b| a * (b * x).tanh()),
        ("HardSigmoid", &[0.25], &[0.375], |x, a, b| (a * x + b).clamp(0.0, 1.0)),
        ("Elu", &[1.5], &[], |x, a, _| if x >= 0.0 { x } else { a * (x.exp() - 1.0) }),
    ];
    // One hidden unit, one input, three steps.
    let (x, w, r) = (noise(3, 40), noise(1, 41), noise(1, 42));
    for (name, alpha, beta, f) in cases {
        println!("{name}");
        let layer = node("RNN", &["x", "w", "r"], &["y"]).int("hidden_size", 1).strings("activations", &[name]);
        let layer = if alpha.is_empty() { layer } else { layer.floats("activation_alpha", alpha) };
        let layer = if beta.is_empty() { layer } else { layer.floats("activation_beta", beta) };
        let got = one(14, layer, &[(&[3, 1, 1], x.clone()), (&[1, 1, 1], w.clone()), (&[1, 1, 1], r.clone())]);
        let [a, b] = [alpha, beta].map(|v| v.first().map_or(0.0, |v| f64::from(*v)));
        let mut h = 0.0;
        let want: Vec<f64> = wide(&x)
            .into_iter()
            .map(|x| {
                h = f(f64::from(w[0]) * x + f64::from(r[0]) * h, a, b);
                h
            })
            .collect();
        close(&got, &want);
    }
}

#[test]
fn an_optional_without_its_value_is_refused() {
    let mut ty = onnx_protobuf::TypeProto::new();
    let tensor = value("x", F32, vec![Is(3)]).type_;
    ty.set_optional_type(onnx_protobuf::type_proto::Optional { elem_type: tensor, ..Default::default() });
    let x = onnx_protobuf::ValueInfoProto { name: "x".into(), type_: Some(ty).into(), ..Default::default() };
    let m = model(18, graph(vec![node("OptionalGetElement", &["x"], &["y"])], vec![x], &["y"], vec![]));
    let graph = import(&m).unwrap().graph;
    let given = Tensor::from_f32([3], &noise(3, 50));
    let eval = |present: bool| pavage_ir::eval::eval(&graph, &[Tensor::scalar(DType::Bool, pavage_ir::Scalar::B(present)), given.clone()]);
    assert_eq!(eval(true).unwrap()[0], given);
    assert!(eval(false).is_err());
}

#[test]
fn weights_and_lengths_say_the_sizes_of_a_recurrent_layer() {
    let layer = node("RNN", &["x", "w", "r", "", "lens"], &["", "h"]).int("hidden_size", 1);
    let x = value("x", F32, vec![Named("steps"), Named("batch"), Named("features")]);
    let lens = onnx_protobuf::TensorProto { name: "lens".into(), dims: vec![2], data_type: 6, int32_data: vec![1, 2], ..Default::default() };
    let (w, r) = (noise(3, 60), noise(1, 61));
    let m = model(14, graph(vec![layer], vec![x], &["h"], vec![floats("w", &[1, 1, 3], &w), floats("r", &[1, 1, 1], &r), lens]));
    let x = noise(12, 62);
    let step = |t: usize, n: usize, h: f64| ((0..3).map(|i| f64::from(w[i] * x[(t * 2 + n) * 3 + i])).sum::<f64>() + f64::from(r[0]) * h).tanh();
    close(&run(&m, &[Tensor::from_f32([2, 2, 3], &x)])[0], &[step(0, 0, 0.0), step(1, 1, step(0, 1, 0.0))]);
}

#[test]
fn each_pixel_of_a_cubic_sample_beyond_the_edge_is_the_edges() {
    let x = noise(4, 70);
    // A sample 0.3 pixels before the first of four, by either way to count: three of its pixels are the first.
    let far = -0.75 * 1.3f64.powi(3) + 3.75 * 1.3f64.powi(2) - 6.0 * 1.3 + 3.0;
    for (corners, at) in [(1, -1.2), (0, -0.9)] {
        let n = node("GridSample", &["x", "grid"], &["y"]).text("mode", "cubic").text("padding_mode", "border").int("align_corners", corners);
        let got = one(20, n, &[(&[1, 1, 1, 4], x.clone()), (&[1, 1, 1, 2], vec![at, 0.0])]);
        close(&got, &[f64::from(x[0]) * (1.0 - far) + f64::from(x[1]) * far]);
    }
}
