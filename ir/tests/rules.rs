//! Type rules: what they say, and that neither they nor evaluators ever panic.
mod common;
use common::Rng;
use pavage_ir::{
    DType, Dim, Op, Scalar, ScalarFn, Tensor, TensorType, op,
    op::{EvalArgs, TypeArgs},
    text,
};

/// What `op` gives for inputs of these types: its result types, or its objection.
fn infer(inputs: &str, op: &str) -> String {
    let names: Vec<String> = (0..inputs.matches(':').count()).map(|i| format!("%x{i}")).collect();
    let source = format!("graph @g({inputs}) where n in 1.., m in 1.. {{\n  %0 = {op} {} : f32[]\n  return %0 as \"y\"\n}}", names.join(", "));
    match text::parse(&source, &|_| None) {
        Ok(_) => "f32[]".into(),
        Err(e) => e.reason.strip_prefix("declared f32[], inferred ").unwrap_or(&e.reason).to_string(),
    }
}

#[test]
fn rules_name_both_sides() {
    let conv = |lo: &str| format!("conv[strides=[2,2],dilations=[1,1],lo={lo},hi=[1,1],groups=1,layout=nchw]");
    let pool = "pool[f=max,kernel=[2],strides=[2],dilations=[1],lo=[0],hi=[0],ceil=true,layout=nchw]";
    let cases: &[(&str, &str, &str)] = &[
        ("%x0: f32[2,4], %x1: f32[2,3]", "add", "`add`: axis 1: extents differ: 4 and 3"),
        ("%x0: f32[2,4], %x1: f32[2]", "add", "`add`: ranks differ: 2 and 1"),
        ("%x0: f32[n], %x1: f32[m]", "add", "`add`: axis 0: extents differ: n and m"),
        ("%x0: f32[2], %x1: i64[2]", "add", "`add`: operand dtypes differ: f32 and i64"),
        ("%x0: f32[2*n+n], %x1: f32[3*n]", "lt", "bool[3*n]"),
        ("%x0: f32[3]", "broadcast[shape=[5]]", "`broadcast`: axis 0 has extent 3, cannot become 5"),
        ("%x0: f32[1,n]", "broadcast[shape=[m,n]]", "f32[m,n]"),
        ("%x0: f32[2,3]", "reshape[shape=[4]]", "`reshape`: element counts differ: f32[2,3] has 6, f32[4] has 4"),
        ("%x0: f32[n,3]", "reshape[shape=[3*n]]", "f32[3*n]"),
        ("%x0: f32[2,3]", "transpose[perm=[1,1]]", "`transpose`: [1, 1] is not an order of the 2 axes of f32[2,3]"),
        ("%x0: f32[5]", "slice[starts=[3],sizes=[3],steps=[1]]", "`slice`: axis 0: elements 3 to 5 leave the extent 5"),
        ("%x0: f32[5]", "slice[starts=[4],sizes=[3],steps=[-2]]", "f32[3]"),
        ("%x0: f32[2,n], %x1: f32[3,n]", "concat[axis=0]", "f32[5,n]"),
        ("%x0: f32[2,3], %x1: f32[4,5]", "matmul[out=f32]", "`matmul`: inner extents differ: 3 in f32[2,3] and 4 in f32[4,5]"),
        ("%x0: f16[n,3], %x1: f16[3,5]", "matmul[out=f32]", "f32[n,5]"),
        ("%x0: f32[n,3,224,224], %x1: f32[64,3,7,7]", &conv("[3,3]"), "f32[n,64,111,111]"),
        ("%x0: f32[n,3,m,224], %x1: f32[64,3,7,7]", &conv("[3,3]"), "f32[n,64,div(m+1,2)-1,111]"),
        ("%x0: f32[1,4,9,9], %x1: f32[8,3,3,3]", &conv("[1,1]"), "`conv`: x has 4 channels, w takes 3 (3 in each of 1 groups)"),
        ("%x0: f32[1,1,5]", pool, "f32[1,1,3]"),
        ("%x0: f32[1,1,4]", pool, "f32[1,1,2]"),
        ("%x0: f32[4,n], %x1: i64[2,3]", "gather[axis=0]", "f32[2,3,n]"),
        ("%x0: f32[4,5,6], %x1: i64[4,7,1]", "gather_nd[batch=1]", "f32[4,7,6]"),
        ("%x0: f32[4]", "topk[axis=0,k=5,largest=true]", "`topk`: axis 0 has extent 4, cannot give 5 elements"),
        ("%x0: f32[4]", "reduce[f=sum,axes=[1]]", "`reduce`: axis 1 is not an axis of f32[4]"),
    ];
    for (inputs, op, expected) in cases {
        assert_eq!(infer(inputs, op), *expected, "{op} of {inputs}");
    }
}

fn random_type(rng: &mut Rng) -> TensorType {
    let dtype = if rng.below(3) > 0 { DType::F32 } else { rng.pick(DType::ALL) };
    let dim = |rng: &mut Rng| match rng.below(40) {
        0 => Dim::from(i64::MAX),
        1 => Dim::from(1i64 << 32),
        2 => Dim::from(-2i64),
        3 => Dim::sym("n"),
        4 => Dim::ZERO,
        _ => Dim::from(rng.below(4) + 1),
    };
    let rank = rng.below(5);
    TensorType { dtype, shape: (0..rank).map(|_| dim(rng)).collect() }
}

fn random_op(rng: &mut Rng) -> Op {
    if rng.below(8) == 0 { Op::Map(rng.pick(ScalarFn::ALL)) } else { common::op(rng) }
}

#[test]
fn rules_and_evaluators_do_not_panic() {
    let mut rng = Rng(7);
    let mut evaluated = std::collections::BTreeMap::new();
    for _ in 0..400_000 {
        let op = random_op(&mut rng);
        let names = op.operand_names();
        let shared = random_type(&mut rng);
        let n = if rng.below(10) == 0 { rng.below(4) } else { names.len() };
        let types: Vec<TensorType> = (0..n)
            .map(|i| match (rng.below(6), names.get(i)) {
                (0, _) => random_type(&mut rng),
                (_, Some(&("value" | "trip" | "cond"))) => TensorType::new(shared.dtype, [0usize; 0]),
                (_, Some(&"indices")) => random_type(&mut rng).with_dtype(DType::I64),
                _ => shared.clone(),
            })
            .collect();
        let refs: Vec<&TensorType> = types.iter().collect();
        let inferred = op.infer(TypeArgs { types: &refs, bodies: &[] });
        let count = |s: &[usize]| s.iter().fold(1usize, |n, d| n.saturating_mul((*d).max(1)));
        let small = |t: &TensorType| t.const_shape().filter(|s| count(s) < 10_000);
        let Some(shapes) = types.iter().map(small).collect::<Option<Vec<_>>>() else { continue };
        let tensors: Vec<Tensor> = types.iter().zip(shapes).map(|(t, s)| common::tensor(&mut rng, t.dtype, &s)).collect();
        let refs: Vec<&Tensor> = tensors.iter().collect();
        if inferred.as_ref().is_ok_and(|r| r.iter().any(|t| t.const_shape().is_some_and(|s| count(&s) > 1 << 20))) {
            continue;
        }
        let got = op.eval(EvalArgs { tensors: &refs, bodies: &[], results: &[] });
        if let (Ok(values), Ok(types)) = (&got, &inferred) {
            *evaluated.entry(op.mnemonic()).or_insert(0) += 1;
            assert_eq!(values.len(), types.len(), "{op}");
            for (v, t) in values.iter().zip(types).filter(|(_, t)| t.const_shape().is_some()) {
                assert_eq!(v.ty(), *t, "{op} of {:?}", tensors);
            }
        }
        assert!(inferred.is_ok() || got.is_err(), "{op}: no type, but a value");
    }
    assert!(evaluated.len() > 60, "few ops were evaluated: {evaluated:?}");
}

#[test]
fn windows_do_not_panic() {
    let mut rng = Rng(9);
    let mut evaluated = std::collections::BTreeMap::new();
    for _ in 0..60_000 {
        let spatial = rng.below(2) + 1;
        let mut list = |from: &[i64]| (0..spatial).map(|_| rng.pick(from).to_string()).collect::<Vec<_>>().join(",");
        let sizes = [1, 1, 2, 3, 4, 1 << 31, (1 << 31) + 1, 0];
        let pads = [0, 0, 1, 2, -1, -5, 1 << 31, 9];
        let (strides, dilations, kernel, lo, hi) = (list(&sizes), list(&sizes), list(&sizes), list(&pads), list(&pads));
        let extra = list(&[0, 1, 3]);
        let windows = format!("strides=[{strides}],dilations=[{dilations}],lo=[{lo}],hi=[{hi}]");
        let layout = rng.pick(&["nchw", "nhwc"]);
        let groups = rng.below(3);
        let ceil = rng.below(2) == 1;
        let mode = rng.pick(&["max", "mean", "mean_padded"]);
        let rank = spatial + 2;
        let scale = rng.pick(&["1.0", "0.5", "3.7", "1e-300", "1e300", "0.001"]);
        let filter = rng.pick(&["nearest", "linear", "cubic"]);
        let coord = rng.pick(&["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]);
        let out: Vec<String> = (0..rank).map(|_| rng.below(5).to_string()).collect();
        let text = match rng.below(4) {
            0 => format!("conv[{windows},groups={groups},layout={layout}]"),
            1 => format!("conv_transpose[{windows},extra=[{extra}],groups={groups},layout={layout}]"),
            2 => format!("pool[f={mode},kernel=[{kernel}],{windows},ceil={ceil},layout={layout}]"),
            _ => format!(
                "resize[mode={filter},coord={coord},nearest=floor,sizes=[{}],scales=[{}],cubic_a=-0.75,outside=0.0,antialias={ceil},exclude={ceil}]",
                out.join(","),
                vec![scale; rank].join(",")
            ),
        };
        let op = Op::parse(&text, &|_| None).expect("an op");
        let dtype = rng.pick(&[DType::F32, DType::I8, DType::F32]);
        let mut shape = |least: usize| (0..rank).map(|_| least + rng.below(4)).collect::<Vec<_>>();
        let (x, w) = (shape(0), shape(1));
        let operands = [common::tensor(&mut rng, dtype, &x), common::tensor(&mut rng, dtype, &w)];
        let tensors: Vec<&Tensor> = operands.iter().take(op.operand_names().len().min(if text.starts_with("conv") { 2 } else { 1 })).collect();
        let types: Vec<TensorType> = tensors.iter().map(|t| t.ty()).collect();
        let inferred = op.infer(TypeArgs { types: &types.iter().collect::<Vec<_>>(), bodies: &[] });
        let big = |t: &TensorType| t.const_shape().is_some_and(|s| s.iter().fold(1usize, |n, d| n.saturating_mul((*d).max(1))) > 1 << 16);
        if inferred.as_ref().is_ok_and(|r| r.iter().any(big)) {
            continue;
        }
        if let Ok(values) = op.eval(EvalArgs { tensors: &tensors, bodies: &[], results: &[] }) {
            *evaluated.entry(op.mnemonic()).or_insert(0) += 1;
            assert_eq!(Ok(vec![values[0].ty()]), inferred, "{op}");
        }
    }
    assert!(evaluated.len() == 4 && evaluated.values().all(|n| *n > 100), "{evaluated:?}");
}

#[test]
fn recurrences_and_trees_reject_wrong_values_quietly() {
    let ints = |v: &[i64]| Tensor::from_i64([v.len()], v);
    let floats = |v: &[f32]| Tensor::from_f32([v.len()], v);
    // A tree whose only branch leads back to itself.
    let x = Tensor::from_f32([1, 1], &[0.5]);
    let operands = [x, ints(&[0]), ints(&[0]), floats(&[1.0]), ints(&[0]), ints(&[0]), ints(&[0]), ints(&[0]), ints(&[0]), floats(&[1.0])];
    let op = Op::parse("tree_ensemble[targets=1,aggregate=sum]", &|_| None).expect("an op");
    let error = op.eval(EvalArgs { tensors: &operands.iter().collect::<Vec<_>>(), bodies: &[], results: &[] }).unwrap_err();
    assert_eq!(error.to_string(), "`tree_ensemble`: the tree at node 0 has a cycle");
    let op = Op::parse("gather[axis=0]", &|_| None).expect("an op");
    let (data, at) = (floats(&[1.0, 2.0]), ints(&[2]));
    let error = op.eval(EvalArgs { tensors: &[&data, &at], bodies: &[], results: &[] }).unwrap_err();
    assert_eq!(error.to_string(), "`gather`: index 2 is out of range for extent 2");
}

#[test]
fn pointwise_agrees_with_the_scalar_table() {
    let mut rng = Rng(3);
    for f in ScalarFn::ALL {
        for dtype in DType::ALL {
            let dtypes: Vec<DType> = (0..f.arity()).map(|i| if *f == ScalarFn::Select && i == 0 { DType::Bool } else { *dtype }).collect();
            let tensors: Vec<Tensor> = dtypes.iter().map(|d| common::tensor(&mut rng, *d, &[7])).collect();
            let refs: Vec<&Tensor> = tensors.iter().collect();
            let Ok(got) = Op::Map(*f).eval(EvalArgs { tensors: &refs, bodies: &[], results: &[] }) else { continue };
            for i in 0..7 {
                let args: Vec<Scalar> = tensors.iter().map(|t| t.get(i)).collect();
                let expected = f.eval(*dtype, &args).cast(got[0].dtype());
                let (a, b) = (got[0].get(i), expected);
                assert!(a == b || a.f().is_nan() && b.f().is_nan(), "{f} of {args:?}: {a:?}, {b:?}");
            }
        }
    }
}

#[test]
fn the_op_reference_is_current() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("OPS.md");
    let current = op::reference();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &current).expect("OPS.md is writable");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == current, "ir/OPS.md is out of date: run the tests with BLESS=1");
}
