//! Random numbers and graphs for tests, the same on every machine.
#![allow(dead_code, unreachable_pub)] // Each test file uses its own part.
use pavage_ir::{DType, Dim, Graph, Op, Scalar, Tensor, TensorType, Value, op::TABLE};

/// A small generator (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub fn range(&mut self, lo: i64, hi: i64) -> i64 {
        lo + self.below((hi - lo + 1) as usize) as i64
    }
    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

pub fn tensor(rng: &mut Rng, dtype: DType, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    let values: Vec<Scalar> = (0..n).map(|_| if dtype.is_float() { Scalar::F(rng.unit() * 4.0 - 2.0) } else { Scalar::I(rng.range(-4, 6).into()) }).collect();
    Tensor::from_scalars(dtype, shape, values)
}

/// A random op of the table with random attributes, often absurd ones.
pub fn op(rng: &mut Rng) -> Op {
    loop {
        let info = rng.pick(&TABLE.iter().collect::<Vec<_>>());
        let attrs: Vec<String> = info.attrs.iter().map(|(name, ty)| format!("{name}={}", attr(rng, ty))).collect();
        let text = format!("{}[{}]", info.mnemonic, attrs.join(","));
        let sym = |name: &str| Some(pavage_ir::Sym { name: name.into(), min: 0, max: None });
        if let Ok(op) = Op::parse(&text, &sym) {
            return op;
        }
    }
}

fn attr(rng: &mut Rng, ty: &str) -> String {
    let ty = ty.replace(' ', "");
    if let Some(item) = ty.strip_prefix("Vec<").and_then(|t| t.strip_suffix('>')) {
        let n = rng.below(4);
        return format!("[{}]", (0..n).map(|_| attr(rng, item)).collect::<Vec<_>>().join(","));
    }
    match ty.as_str() {
        "usize" => rng.pick(&["0", "1", "2", "3", "5", "4294967296", "9223372036854775807", "18446744073709551615", "1", "1", "2"]).into(),
        "i64" => rng.pick(&["0", "1", "2", "-1", "-3", "9223372036854775807", "-9223372036854775808", "1", "0"]).into(),
        "bool" => rng.pick(&["true", "false"]).into(),
        "Dim" => rng.pick(&["0", "1", "2", "3", "4", "-1", "6", "9223372036854775807", "4294967296", "n", "div(n,2)", "2*n-1", "2", "3"]).into(),
        "Sizes" => attr(rng, "Vec<Sym>"),
        "Sym" => rng.pick(&["s", "t"]).into(),
        "DType" => rng.pick(DType::ALL).name().into(),
        "Real" => rng.pick(&["0.0", "1.0", "0.5", "2.0", "-1.0", "nan", "inf", "1e300", "1e-300", "1.5"]).into(),
        "ReduceFn" => rng.pick(&["sum", "prod", "max", "min"]).into(),
        "ScatterFn" => rng.pick(&["replace", "add", "mul", "max", "min"]).into(),
        "PoolFn" => rng.pick(&["max", "mean", "mean_padded"]).into(),
        "Layout" => rng.pick(&["nchw", "nhwc"]).into(),
        "PadMode" => rng.pick(&["constant", "edge", "reflect", "wrap"]).into(),
        "ResizeMode" => rng.pick(&["nearest", "linear", "cubic"]).into(),
        "CoordMode" => rng.pick(&["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize"]).into(),
        "NearestMode" => rng.pick(&["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]).into(),
        "Direction" => rng.pick(&["forward", "reverse", "bidirectional"]).into(),
        "Activation" => rng
            .pick(&["sigmoid", "tanh", "relu", "softsign", "softplus", "hard_sigmoid(0.2,0.5)", "affine(2.0,-0.5)", "elu(1.5)", "scaled_tanh(0.5,2.0)"])
            .into(),
        "Aggregate" => rng.pick(&["sum", "mean", "min", "max"]).into(),
        other => panic!("no random {other}"),
    }
}

/// A random well-typed graph over an input `x: f32[n,4]` and a constant.
pub fn graph(rng: &mut Rng) -> Graph {
    let mut g = Graph::new("main");
    let x = g.input("x", TensorType { dtype: DType::F32, shape: vec![Dim::sym("n"), Dim::from(4usize)] });
    let shape = [rng.below(30) + 1, 4];
    let c = g.constant(tensor(rng, DType::F32, &shape));
    let mut values: Vec<Value> = vec![x, c];
    for k in 0..12 {
        let v = rng.pick(&values);
        let ty = g.ty(v).clone();
        let axes = ty.rank();
        let sizes = |shape: &[Dim]| shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(",");
        let text = match rng.below(8) {
            0 => rng.pick(&["neg", "tanh", "sigmoid", "abs"]).to_string(),
            1 => format!("transpose[perm=[{}]]", (0..axes).rev().map(|i| i.to_string()).collect::<Vec<_>>().join(",")),
            2 => format!("reduce[f=max,axes=[{}]]", rng.below(axes)),
            3 => format!("concat[axis={}]", rng.below(axes)),
            4 => format!("topk[axis={},k=1,largest=true]", rng.below(axes)),
            5 => format!("reshape[shape=[{}]]", ty.count()),
            6 => format!("broadcast[shape=[{}]]", sizes(&ty.shape)),
            _ => "add".into(),
        };
        let sym = |name: &str| Some(pavage_ir::Sym { name: name.into(), min: 1, max: None });
        let op = Op::parse(&text, &sym).expect("an op");
        let operands = if matches!(text.as_str(), "add") || text.starts_with("concat") { vec![v, v] } else { vec![v] };
        let node = g.add_with(op, &operands, vec![]).expect("well typed");
        if rng.below(3) == 0 {
            g.set_source(node, vec![format!("node {k}"), "a \"quoted\" name".into()]);
        }
        values.push(node.into());
    }
    for (i, v) in values.iter().enumerate().skip(values.len() - 3) {
        g.output(format!("out {i}"), *v);
    }
    g
}
