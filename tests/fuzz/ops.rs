//! Random nodes: one function a family of operators. Each adds a node that fits the values there are, or does nothing.
use super::{
    graph::{Attr, Gen, Val},
    layers::{grid_sample, recurrent},
};
use pavage::ir::{DType, Scalar, Tensor};

/// The families; those named twice come up twice as often.
pub(crate) const OPS: &[fn(&mut Gen) -> Option<()>] = &[
    unary,
    unary,
    rounding,
    arithmetic,
    arithmetic,
    divide,
    compare,
    logic,
    select,
    cast,
    transpose,
    reshape,
    squeeze,
    flatten,
    concat,
    slice,
    slice,
    pad,
    tile,
    expand,
    gather,
    gather_elements,
    split,
    reduce,
    reduce,
    arg,
    cumsum,
    softmax,
    matmul,
    gemm,
    conv,
    conv,
    conv_transpose,
    pool,
    global_pool,
    batch_norm,
    layer_norm,
    instance_norm,
    depth_to_space,
    trilu,
    resize,
    quantize,
    scatter,
    top_k,
    clip,
    one_hot,
    einsum,
    recurrent,
    grid_sample,
];

/// What is computed with rounding.
pub(crate) fn rounded(x: &Val, most: f64) -> Val {
    Val { bits: None, most, least: -most, ..x.clone() }
}

fn smooth(v: &Val) -> bool {
    v.float() && v.most <= 64.0
}

fn axis(g: &mut Gen, x: &Val) -> (usize, i64) {
    let axis = g.rng.below(x.rank());
    let written = if g.rng.one_in(2) { axis as i64 } else { axis as i64 - x.rank() as i64 };
    (axis, written)
}

fn unary(g: &mut Gen) -> Option<()> {
    let simple = ["Abs", "Neg", "Relu", "LeakyRelu"];
    let bounded = ["Sigmoid", "Tanh", "Erf", "Sin", "Cos", "Atan", "Softsign", "HardSigmoid"];
    let linear = ["Softplus", "Elu", "Selu", "HardSwish", "Celu", "Mish", "Gelu", "ThresholdedRelu", "PRelu"];
    match g.rng.below(4) {
        0 => {
            let x = g.val(|v| v.float() || v.wide_int())?;
            let op = g.rng.pick(&simple[..if x.float() { 4 } else { 2 }]);
            let least = if op == "Neg" || op == "LeakyRelu" { -x.most } else { x.least.max(0.0) };
            let bits = if op == "LeakyRelu" { x.bits.map(|b| b + 3) } else { x.bits };
            let attrs: &[(&str, Attr)] = if op == "LeakyRelu" { &[("alpha", Attr::Float(0.125))] } else { &[] };
            g.emit(op, &[&x.name], attrs, Val { least, bits, ..x.clone() }).map(drop)
        }
        1 => {
            let x = g.val(smooth)?;
            let op = g.rng.pick(&bounded);
            g.emit(op, &[&x.name], &[], rounded(&x, 1.6)).map(drop)
        }
        2 => {
            let x = g.val(smooth)?;
            let op = g.rng.pick(&linear);
            if (op == "HardSwish" && g.opset < 14)
                || (op == "Mish" && g.opset < 18)
                || (op == "Gelu" && g.opset < 20)
                || (op == "Celu" && x.dtype != DType::F32)
                || (op == "ThresholdedRelu" && !x.exact())
            {
                return None;
            }
            if op == "PRelu" {
                let slope = g.constant(x.dtype, &[1], false);
                return g.emit(op, &[&x.name, &slope.name], &[], rounded(&x, x.most * 4.0)).map(drop);
            }
            g.emit(op, &[&x.name], &[], rounded(&x, x.most * 1.8 + 2.0)).map(drop)
        }
        _ => {
            let op = g.rng.pick(&["Exp", "Sqrt", "Log", "Reciprocal"]);
            if op == "Exp" {
                let x = g.val(|v| v.float() && v.most <= 4.0)?;
                return g.emit(op, &[&x.name], &[], Val { least: (-x.most).exp(), ..rounded(&x, x.most.exp()) }).map(drop);
            }
            let x = g.val(|v| v.float() && v.positive())?;
            g.emit(op, &[&x.name], &[], rounded(&x, x.most.max(1.0 / x.least).max(4.0))).map(drop)
        }
    }
}

fn rounding(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.float() && v.exact())?;
    let op = g.rng.pick(&["Floor", "Ceil", "Round", "Sign"]);
    g.emit(op, &[&x.name], &[], Val { bits: Some(0), most: x.most + 1.0, least: -x.most - 1.0, ..x.clone() }).map(drop)
}

fn arithmetic(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.dtype != DType::Bool)?;
    let op = g.rng.pick(&["Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean"]);
    let bytes = matches!(x.dtype, DType::I8 | DType::U8);
    if (matches!(op, "Sum" | "Mean") && !x.float()) || (bytes && g.opset < 14 && !matches!(op, "Max" | "Min")) {
        return None;
    }
    let (y, shape) = g.partner(&x, x.dtype, false);
    let bits = x.bits.zip(y.bits);
    let (most, least, bits) = match op {
        "Mul" => (x.most * y.most, if x.least > 0.0 && y.least > 0.0 { x.least * y.least } else { -x.most * y.most }, bits.map(|(a, b)| a + b)),
        "Max" | "Min" => (x.most.max(y.most), x.least.min(y.least), bits.map(|(a, b)| a.max(b))),
        "Sub" => (x.most + y.most, -x.most - y.most, bits.map(|(a, b)| a.max(b))),
        "Mean" => (x.most.max(y.most), x.least.min(y.least), bits.map(|(a, b)| a.max(b) + 1)),
        _ => (x.most + y.most, x.least + y.least, bits.map(|(a, b)| a.max(b))),
    };
    let (a, b) = if g.rng.one_in(2) { (&x.name, &y.name) } else { (&y.name, &x.name) };
    let mut out = Val { shape, most, least, bits, ..x.clone() };
    if bytes {
        // They wrap.
        (out.most, out.least) = (256.0, -256.0);
    }
    g.emit(op, &[a, b], &[], out).map(drop)
}

fn divide(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.float() || v.wide_int())?;
    let op = if x.float() { "Div" } else { g.rng.pick(&["Div", "Mod"]) };
    let (y, shape) = g.partner(&x, x.dtype, true);
    let bits = if x.float() { None } else { Some(0) };
    // A quotient of integers is the same everywhere where it is exact in sign: below 0 it is not asked for.
    if !x.float() && op == "Div" && x.least < 0.0 {
        return None;
    }
    let most = if op == "Mod" { y.most } else { x.most / y.least.min(1.0) };
    g.emit(op, &[&x.name, &y.name], &[], Val { shape, bits, most, least: if x.least >= 0.0 { 0.0 } else { -most }, ..x.clone() }).map(drop)
}

fn compare(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.exact() && v.dtype != DType::Bool)?;
    let mut ops = vec!["Equal", "Less", "Greater"];
    if g.opset >= 16 {
        ops.extend(["LessOrEqual", "GreaterOrEqual"]);
    }
    let op = g.rng.pick(&ops);
    let (y, shape) = g.partner(&x, x.dtype, false);
    if !y.exact() {
        return None;
    }
    g.emit(op, &[&x.name, &y.name], &[], Val { dtype: DType::Bool, shape, bits: Some(0), most: 1.0, least: 0.0, name: String::new() }).map(drop)
}

fn logic(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.dtype == DType::Bool)?;
    if g.rng.one_in(3) {
        return g.emit("Not", &[&x.name], &[], x.clone()).map(drop);
    }
    let (y, shape) = g.partner(&x, DType::Bool, false);
    let op = g.rng.pick(&["And", "Or", "Xor"]);
    g.emit(op, &[&x.name, &y.name], &[], Val { shape, ..x.clone() }).map(drop)
}

fn select(g: &mut Gen) -> Option<()> {
    let c = g.val(|v| v.dtype == DType::Bool)?;
    let x = g.val(|v| v.dtype != DType::Bool && super::graph::broadcast(&v.shape, &c.shape).is_some())?;
    let shape = super::graph::broadcast(&x.shape, &c.shape)?;
    let y = g.constant(x.dtype, &[], false);
    let bits = x.bits.zip(y.bits).map(|(a, b)| a.max(b));
    let out = Val { shape, bits, most: x.most.max(y.most), least: x.least.min(y.least), ..x.clone() };
    g.emit("Where", &[&c.name, &x.name, &y.name], &[], out).map(drop)
}

fn cast(g: &mut Gen) -> Option<()> {
    let x = g.val(|_| true)?;
    let to = g.rng.pick(&[DType::F32, DType::F16, DType::F64, DType::I32, DType::I64, DType::Bool, DType::U8, DType::I8]);
    let (least, most) = match to {
        DType::U8 => (0.0, 255.0),
        DType::I8 => (-128.0, 127.0),
        _ => (-2e3, 2e3),
    };
    // What a type cannot hold, and what is near a jump, may become anything.
    if to == x.dtype || (!to.is_float() && !x.exact()) || (to != DType::Bool && (x.most > most || x.least < least)) {
        return None;
    }
    let bits = if to.is_float() { x.bits } else { Some(0) };
    let out =
        Val { dtype: to, bits, most: if to == DType::Bool { 1.0 } else { x.most }, least: if to.is_float() { x.least } else { x.least.min(0.0) }, ..x.clone() };
    g.emit("Cast", &[&x.name], &[("to", Attr::Int(super::graph::code(to)))], out).map(drop)
}

fn transpose(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 2)?;
    let mut perm: Vec<i64> = (0..x.rank() as i64).collect();
    for i in (1..perm.len()).rev() {
        perm.swap(i, g.rng.below(i + 1));
    }
    let shape = perm.iter().map(|p| x.shape[*p as usize]).collect();
    g.emit("Transpose", &[&x.name], &[("perm", Attr::Ints(&perm))], Val { shape, ..x.clone() }).map(drop)
}

fn reshape(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.count() > 1)?;
    let mut rest = x.count();
    let mut shape: Vec<usize> = vec![];
    while rest > 1 && shape.len() < 3 {
        let factors: Vec<usize> = (1..=rest).filter(|f| rest.is_multiple_of(*f)).collect();
        let f = g.rng.pick(&factors);
        shape.push(f);
        rest /= f;
    }
    shape.push(rest);
    let mut written: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
    if g.rng.one_in(2) {
        let i = g.rng.below(shape.len());
        written[i] = -1;
    } else if shape[0] == x.shape[0] {
        written[0] = 0;
    }
    let to = g.ints(&written);
    g.emit("Reshape", &[&x.name, &to], &[], Val { shape, ..x.clone() }).map(drop)
}

fn squeeze(g: &mut Gen) -> Option<()> {
    if g.rng.one_in(2) {
        let x = g.val(|v| v.shape.contains(&1))?;
        let ones: Vec<usize> = (0..x.rank()).filter(|i| x.shape[*i] == 1).collect();
        let at = g.rng.pick(&ones);
        let axes = g.ints(&[at as i64]);
        let mut shape = x.shape.clone();
        shape.remove(at);
        return g.emit("Squeeze", &[&x.name, &axes], &[], Val { shape, ..x.clone() }).map(drop);
    }
    let x = g.val(|_| true)?;
    let at = g.rng.below(x.rank() + 1);
    let axes = g.ints(&[at as i64]);
    let mut shape = x.shape.clone();
    shape.insert(at, 1);
    g.emit("Unsqueeze", &[&x.name, &axes], &[], Val { shape, ..x.clone() }).map(drop)
}

fn flatten(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1)?;
    let at = g.rng.below(x.rank() + 1);
    let shape = vec![x.shape[..at].iter().product(), x.shape[at..].iter().product()];
    g.emit("Flatten", &[&x.name], &[("axis", Attr::Int(at as i64))], Val { shape, ..x.clone() }).map(drop)
}

fn concat(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1)?;
    let (at, written) = axis(g, &x);
    let fits = |v: &Val| v.dtype == x.dtype && v.rank() == x.rank() && (0..x.rank()).all(|i| i == at || v.shape[i] == x.shape[i]);
    let y = g.val(fits)?;
    let mut shape = x.shape.clone();
    shape[at] += y.shape[at];
    let bits = x.bits.zip(y.bits).map(|(a, b)| a.max(b));
    let out = Val { shape, bits, most: x.most.max(y.most), least: x.least.min(y.least), ..x.clone() };
    g.emit("Concat", &[&x.name, &y.name], &[("axis", Attr::Int(written))], out).map(drop)
}

fn slice(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1)?;
    let (at, written) = axis(g, &x);
    let n = x.shape[at] as i64;
    let step: i64 = g.rng.pick(&[1, 1, 1, 2, 3, -1, -2]);
    let (start, end) = if step > 0 {
        let start = g.rng.int(0, n - 1);
        (start, g.rng.int(start + 1, n))
    } else {
        let start = g.rng.int(0, n - 1);
        (start, g.rng.int(-1, start - 1))
    };
    let count = ((end - start).abs() + step.abs() - 1) / step.abs();
    // Ends beyond the tensor are cut; negative numbers count from the end.
    let start_written = if g.rng.one_in(3) { start - n } else { start };
    let end_written = match end {
        -1 => i64::MIN + 1,
        e if e == n && g.rng.one_in(2) => i64::MAX,
        e if e < n && g.rng.one_in(3) => e - n,
        e => e,
    };
    let ports = [g.ints(&[start_written]), g.ints(&[end_written]), g.ints(&[written]), g.ints(&[step])];
    let mut shape = x.shape.clone();
    shape[at] = count as usize;
    g.emit("Slice", &[&x.name, &ports[0], &ports[1], &ports[2], &ports[3]], &[], Val { shape, ..x.clone() }).map(drop)
}

fn pad(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1 && v.dtype != DType::Bool)?;
    let mode = g.rng.pick(&["constant", "constant", "reflect", "edge"]);
    let mut pads = vec![0i64; 2 * x.rank()];
    for (i, p) in pads.iter_mut().enumerate() {
        let most = if mode == "reflect" { x.shape[i % x.rank()] as i64 - 1 } else { 2 };
        *p = g.rng.int(0, most.min(2));
        // A negative pad takes elements away.
        if mode == "constant" && x.shape[i % x.rank()] > 3 && g.rng.one_in(8) {
            *p = -1;
        }
    }
    let shape = (0..x.rank()).map(|i| (x.shape[i] as i64 + pads[i] + pads[i + x.rank()]) as usize).collect();
    let pads = g.ints(&pads);
    let value = g.constant(x.dtype, &[], false);
    let bits = x.bits.map(|b| b.max(2));
    let out = Val { shape, bits, most: x.most.max(value.most), least: x.least.min(value.least), ..x.clone() };
    let mut ports = vec![x.name.as_str(), &pads];
    if mode == "constant" {
        ports.push(&value.name);
    }
    g.emit("Pad", &ports, &[("mode", Attr::Text(mode))], out).map(drop)
}

fn tile(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1)?;
    let times: Vec<i64> = (0..x.rank()).map(|_| g.rng.pick(&[1, 1, 2, 3])).collect();
    let shape = x.shape.iter().zip(&times).map(|(d, t)| d * *t as usize).collect();
    let times = g.ints(&times);
    g.emit("Tile", &[&x.name, &times], &[], Val { shape, ..x.clone() }).map(drop)
}

fn expand(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() < 4)?;
    let mut shape: Vec<usize> = x.shape.iter().map(|d| if *d == 1 { g.rng.pick(&[1, 2, 3]) } else { *d }).collect();
    if g.rng.one_in(2) {
        shape.insert(0, g.rng.pick(&[1, 2, 3]));
    }
    let written: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
    let to = g.ints(&written);
    g.emit("Expand", &[&x.name, &to], &[], Val { shape, ..x.clone() }).map(drop)
}

/// Indices into an axis of `n`.
fn indices(g: &mut Gen, shape: &[usize], n: usize, negative: bool) -> String {
    let count = shape.iter().product();
    let lo = if negative { -(n as i64) } else { 0 };
    let values: Vec<i64> = (0..count).map(|_| g.rng.int(lo, n as i64 - 1)).collect();
    g.initializer(&Tensor::from_i64(shape.to_vec(), &values))
}

fn gather(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1)?;
    let (at, written) = axis(g, &x);
    let index: Vec<usize> = g.rng.pick(&[vec![], vec![3], vec![2, 2]]);
    let name = indices(g, &index, x.shape[at], true);
    let shape = [&x.shape[..at], &index, &x.shape[at + 1..]].concat();
    g.emit("Gather", &[&x.name, &name], &[("axis", Attr::Int(written))], Val { shape, ..x.clone() }).map(drop)
}

fn gather_elements(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1)?;
    let (at, written) = axis(g, &x);
    let mut shape = x.shape.clone();
    shape[at] = g.rng.int(1, 4) as usize;
    let name = indices(g, &shape, x.shape[at], true);
    g.emit("GatherElements", &[&x.name, &name], &[("axis", Attr::Int(written))], Val { shape, ..x.clone() }).map(drop)
}

fn scatter(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1)?;
    let (at, written) = axis(g, &x);
    // Each element is written once: a permutation along the axis.
    let n = x.shape[at];
    let mut order: Vec<i64> = (0..n as i64).collect();
    for i in (1..n).rev() {
        order.swap(i, g.rng.below(i + 1));
    }
    let inner: usize = x.shape[at + 1..].iter().product();
    let values: Vec<i64> = (0..x.count()).map(|i| order[i / inner.max(1) % n]).collect();
    let index = g.initializer(&Tensor::from_i64(x.shape.clone(), &values));
    let updates = g.val(|v| v.dtype == x.dtype && v.shape == x.shape)?;
    let bits = x.bits.zip(updates.bits).map(|(a, b)| a.max(b));
    let out = Val { bits, most: x.most.max(updates.most), least: x.least.min(updates.least), ..x.clone() };
    g.emit("ScatterElements", &[&x.name, &index, &updates.name], &[("axis", Attr::Int(written))], out).map(drop)
}

fn split(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.shape.iter().any(|d| *d > 1))?;
    let wide: Vec<usize> = (0..x.rank()).filter(|i| x.shape[*i] > 1).collect();
    let at = g.rng.pick(&wide);
    let first = g.rng.int(1, x.shape[at] as i64 - 1);
    let sizes = g.ints(&[first, x.shape[at] as i64 - first]);
    let part = |n: usize| {
        let mut shape = x.shape.clone();
        shape[at] = n;
        Val { shape, ..x.clone() }
    };
    let a = g.output(part(first as usize));
    let b = g.output(part(x.shape[at] - first as usize));
    g.push("Split", &[&x.name, &sizes], &[&a.name, &b.name], &[("axis", Attr::Int(at as i64))]);
    Some(())
}

fn reduce(g: &mut Gen) -> Option<()> {
    let op = g.rng.pick(&[
        "ReduceSum",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceMean",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceSumSquare",
    ]);
    let integers = matches!(op, "ReduceSum" | "ReduceMax" | "ReduceMin");
    let x = g.val(|v| v.rank() >= 1 && (v.float() || (integers && v.wide_int())))?;
    let axes: Vec<usize> = (0..x.rank()).filter(|_| g.rng.one_in(2)).collect();
    if axes.is_empty() {
        return None;
    }
    let keep = g.rng.one_in(2);
    let n = axes.iter().map(|a| x.shape[*a]).product::<usize>() as f64;
    let shape = (0..x.rank()).filter_map(|i| if axes.contains(&i) { keep.then_some(1) } else { Some(x.shape[i]) }).collect();
    let out = match op {
        "ReduceMax" | "ReduceMin" => Val { shape, ..x.clone() },
        "ReduceSum" => Val { shape, most: x.most * n, least: x.least * n, ..x.clone() },
        "ReduceL1" => Val { shape, most: x.most * n, least: 0.0, ..x.clone() },
        "ReduceSumSquare" => Val { shape, most: x.most * x.most * n, least: 0.0, bits: x.bits.map(|b| 2 * b), ..x.clone() },
        "ReduceMean" => Val { shape, bits: None, ..x.clone() },
        "ReduceProd" if n <= 4.0 => Val { shape, bits: None, most: x.most.max(1.0).powf(n), least: -x.most.max(1.0).powf(n), ..x.clone() },
        "ReduceL2" if x.exact() => Val { shape, bits: None, most: x.most * n, least: 0.0, ..x.clone() },
        "ReduceLogSumExp" if x.most <= 8.0 => Val { shape, bits: None, most: x.most + n.ln(), least: x.least, ..x.clone() },
        _ => return None,
    };
    let written: Vec<i64> = axes.iter().map(|a| if g.rng.one_in(3) { *a as i64 - x.rank() as i64 } else { *a as i64 }).collect();
    let keepdims = ("keepdims", Attr::Int(i64::from(keep)));
    if g.opset >= 18 || op == "ReduceSum" {
        let name = g.ints(&written);
        return g.emit(op, &[&x.name, &name], &[keepdims], out).map(drop);
    }
    g.emit(op, &[&x.name], &[("axes", Attr::Ints(&written)), keepdims], out).map(drop)
}

fn arg(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1 && v.exact() && (v.float() || v.wide_int()))?;
    let (at, written) = axis(g, &x);
    let (keep, last) = (g.rng.one_in(2), g.rng.one_in(2));
    let mut shape = x.shape.clone();
    let most = shape[at] as f64;
    if keep {
        shape[at] = 1
    } else {
        shape.remove(at);
    }
    let attrs = [("axis", Attr::Int(written)), ("keepdims", Attr::Int(keep.into())), ("select_last_index", Attr::Int(last.into()))];
    let op = g.rng.pick(&["ArgMax", "ArgMin"]);
    g.emit(op, &[&x.name], &attrs, Val { dtype: DType::I64, shape, bits: Some(0), most, least: 0.0, name: String::new() }).map(drop)
}

fn cumsum(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1 && matches!(v.dtype, DType::F32 | DType::F64 | DType::I32 | DType::I64))?;
    let (at, written) = axis(g, &x);
    let name = g.initializer(&Tensor::scalar(DType::I64, Scalar::I(written.into())));
    let n = x.shape[at] as f64;
    let (exclusive, reverse) = (g.rng.one_in(3), g.rng.one_in(3));
    let attrs = [("exclusive", Attr::Int(exclusive.into())), ("reverse", Attr::Int(reverse.into()))];
    let (most, least) = (x.most * n, if x.least >= 0.0 { 0.0 } else { -x.most * n });
    g.emit("CumSum", &[&x.name, &name], &attrs, Val { most, least, ..x.clone() }).map(drop)
}

fn softmax(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1 && v.float() && v.most <= 64.0)?;
    let (at, written) = axis(g, &x);
    let op = g.rng.pick(&["Softmax", "LogSoftmax"]);
    let most = if op == "Softmax" { 1.0 } else { 2.0 * x.most + (x.shape[at] as f64).ln() };
    g.emit(op, &[&x.name], &[("axis", Attr::Int(written))], rounded(&x, most)).map(drop)
}

fn product(x: &Val, y: &Val, depth: usize, shape: Vec<usize>) -> Val {
    let most = x.most * y.most * depth as f64;
    Val { shape, bits: x.bits.zip(y.bits).map(|(a, b)| a + b), most, least: -most, ..x.clone() }
}

fn matmul(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1 && matches!(v.dtype, DType::F32 | DType::F64 | DType::F16 | DType::I32 | DType::I64))?;
    let k = x.shape[x.rank() - 1];
    let n = g.rng.pick(&[1, 2, 3, 5, 8, 9]);
    let fits = |v: &Val| v.dtype == x.dtype && v.rank() == 2 && v.shape[0] == k;
    let y = match g.val(fits) {
        Some(y) if g.rng.one_in(2) => y,
        _ if x.rank() > 2 && g.rng.one_in(2) => {
            let shape = [&x.shape[..x.rank() - 2], &[k, n]].concat();
            g.constant(x.dtype, &shape, false)
        }
        _ => g.constant(x.dtype, &[k, n], false),
    };
    let shape = [&x.shape[..x.rank() - 1], &[y.shape[y.rank() - 1]]].concat();
    g.emit("MatMul", &[&x.name, &y.name], &[], product(&x, &y, k, shape)).map(drop)
}

fn gemm(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() == 2 && v.float())?;
    let (ta, tb) = (g.rng.one_in(2), g.rng.one_in(2));
    let (m, k) = if ta { (x.shape[1], x.shape[0]) } else { (x.shape[0], x.shape[1]) };
    let n = g.rng.pick(&[1, 3, 4, 8]);
    let y = g.constant(x.dtype, &if tb { [n, k] } else { [k, n] }, false);
    let bias: Vec<usize> = g.rng.pick(&[vec![], vec![n], vec![1, n], vec![m, 1], vec![m, n]]);
    let c = g.constant(x.dtype, &bias, false);
    let mut out = product(&x, &y, k, vec![m, n]);
    out.most = out.most * 2.0 + 2.0;
    out.least = -out.most;
    out.bits = out.bits.map(|b| b + 4);
    let attrs = [("transA", Attr::Int(ta.into())), ("transB", Attr::Int(tb.into())), ("alpha", Attr::Float(1.5)), ("beta", Attr::Float(0.5))];
    if g.rng.one_in(4) {
        return g.emit("Gemm", &[&x.name, &y.name], &attrs[..3], out).map(drop);
    }
    g.emit("Gemm", &[&x.name, &y.name, &c.name], &attrs, out).map(drop)
}

/// Knobs of a window on one axis of `n`: kernel, stride, dilation, pads, and the size of the result.
fn window(g: &mut Gen, n: usize, dilates: bool) -> Option<[usize; 6]> {
    let (k, s) = (g.rng.pick(&[1, 2, 3]), g.rng.pick(&[1, 1, 2]));
    let d = if dilates { g.rng.pick(&[1, 1, 2]) } else { 1 };
    let (lo, hi) = (g.rng.below(k), g.rng.below(k));
    let span = (k - 1) * d + 1;
    let out = (n + lo + hi).checked_sub(span)? / s + 1;
    Some([k, s, d, lo, hi, out])
}

/// Windows on all axes behind the channels: kernel, strides, dilations, pads as written, output sizes.
fn windows(g: &mut Gen, x: &Val, dilates: bool) -> Option<([Vec<i64>; 4], Vec<usize>)> {
    let all = x.shape[2..].iter().map(|n| window(g, *n, dilates)).collect::<Option<Vec<_>>>()?;
    let column = |i: usize| all.iter().map(|w| w[i] as i64).collect::<Vec<i64>>();
    Some(([column(0), column(1), column(2), [column(3), column(4)].concat()], all.iter().map(|w| w[5]).collect()))
}

fn image(v: &Val) -> bool {
    matches!(v.rank(), 3 | 4) && matches!(v.dtype, DType::F32 | DType::F16 | DType::F64)
}

fn conv(g: &mut Gen) -> Option<()> {
    let x = g.val(image)?;
    let c = x.shape[1];
    let groups = g.rng.pick(&[1, 1, c]);
    let m = groups * g.rng.pick(&[1, 2, 3, 8]);
    let ([kernel, strides, dilations, pads], sizes) = windows(g, &x, true)?;
    let taps: Vec<usize> = kernel.iter().map(|k| *k as usize).collect();
    let w = g.constant(x.dtype, &[&[m, c / groups], taps.as_slice()].concat(), false);
    let b = g.constant(x.dtype, &[m], false);
    let depth = c / groups * taps.iter().product::<usize>();
    let mut out = product(&x, &w, depth, [&[x.shape[0], m], sizes.as_slice()].concat());
    out.most += 4.0;
    out.least = -out.most;
    let attrs = [
        ("kernel_shape", Attr::Ints(&kernel)),
        ("strides", Attr::Ints(&strides)),
        ("dilations", Attr::Ints(&dilations)),
        ("pads", Attr::Ints(&pads)),
        ("group", Attr::Int(groups as i64)),
    ];
    let ports: &[&str] = if g.rng.one_in(3) { &[&x.name, &w.name] } else { &[&x.name, &w.name, &b.name] };
    g.emit("Conv", ports, &attrs, out).map(drop)
}

fn conv_transpose(g: &mut Gen) -> Option<()> {
    let x = g.val(image)?;
    let (c, m) = (x.shape[1], g.rng.pick(&[1, 2, 3]));
    let mut kernel = vec![];
    let mut strides = vec![];
    let mut sizes = vec![];
    for n in &x.shape[2..] {
        let (k, s) = (g.rng.pick(&[1, 2, 3]), g.rng.pick(&[1, 2]));
        kernel.push(k as i64);
        strides.push(s as i64);
        sizes.push((n - 1) * s + k);
    }
    let taps: Vec<usize> = kernel.iter().map(|k| *k as usize).collect();
    let w = g.constant(x.dtype, &[&[c, m], taps.as_slice()].concat(), false);
    let out = product(&x, &w, c * taps.iter().product::<usize>(), [&[x.shape[0], m], sizes.as_slice()].concat());
    g.emit("ConvTranspose", &[&x.name, &w.name], &[("kernel_shape", Attr::Ints(&kernel)), ("strides", Attr::Ints(&strides))], out).map(drop)
}

fn pool(g: &mut Gen) -> Option<()> {
    let x = g.val(image)?;
    let op = g.rng.pick(&["MaxPool", "AveragePool"]);
    let ([kernel, strides, dilations, pads], sizes) = windows(g, &x, op == "MaxPool")?;
    // Windows that lie in the padding alone have no largest element.
    if dilations.iter().any(|d| *d > 1) && pads.iter().any(|p| *p > 0) {
        return None;
    }
    let shape = [&x.shape[..2], sizes.as_slice()].concat();
    let attrs = [("kernel_shape", Attr::Ints(&kernel)), ("strides", Attr::Ints(&strides)), ("pads", Attr::Ints(&pads)), ("dilations", Attr::Ints(&dilations))];
    if op == "MaxPool" {
        return g.emit(op, &[&x.name], &attrs, Val { shape, ..x.clone() }).map(drop);
    }
    let include = ("count_include_pad", Attr::Int(g.rng.int(0, 1)));
    let out = Val { shape, ..rounded(&x, x.most) };
    let [kernel, strides, pads, _] = attrs;
    g.emit(op, &[&x.name], &[kernel, strides, pads, include], out).map(drop)
}

fn global_pool(g: &mut Gen) -> Option<()> {
    let x = g.val(image)?;
    let op = g.rng.pick(&["GlobalAveragePool", "GlobalMaxPool"]);
    let shape = (0..x.rank()).map(|i| if i < 2 { x.shape[i] } else { 1 }).collect();
    let out = if op == "GlobalMaxPool" { x.clone() } else { rounded(&x, x.most) };
    g.emit(op, &[&x.name], &[], Val { shape, ..out }).map(drop)
}

fn batch_norm(g: &mut Gen) -> Option<()> {
    let x = g.val(image)?;
    let c = [x.shape[1]];
    let [scale, bias, mean] = [0; 3].map(|_| g.constant(x.dtype, &c, false).name);
    let variance = g.constant(x.dtype, &c, true).name;
    let out = rounded(&x, (x.most + 4.0) * 6.0 + 4.0);
    g.emit("BatchNormalization", &[&x.name, &scale, &bias, &mean, &variance], &[("epsilon", Attr::Float(1e-3))], out).map(drop)
}

fn layer_norm(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1 && v.exact() && matches!(v.dtype, DType::F32 | DType::F64))?;
    if g.opset < 17 {
        return None;
    }
    let (at, written) = axis(g, &x);
    let scale = g.constant(x.dtype, &x.shape[at..], false);
    let bias = g.constant(x.dtype, &x.shape[at..], false);
    let out = rounded(&x, 4.0 * (x.count() as f64).sqrt() + 4.0);
    g.emit("LayerNormalization", &[&x.name, &scale.name, &bias.name], &[("axis", Attr::Int(written)), ("epsilon", Attr::Float(1e-2))], out).map(drop)
}

fn instance_norm(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| image(v) && v.exact() && v.dtype != DType::F16)?;
    let c = [x.shape[1]];
    let scale = g.constant(x.dtype, &c, false);
    let bias = g.constant(x.dtype, &c, false);
    let out = rounded(&x, 4.0 * (x.count() as f64).sqrt() + 4.0);
    g.emit("InstanceNormalization", &[&x.name, &scale.name, &bias.name], &[("epsilon", Attr::Float(1e-2))], out).map(drop)
}

fn depth_to_space(g: &mut Gen) -> Option<()> {
    if g.rng.one_in(2) {
        let x = g.val(|v| v.rank() == 4 && v.shape[1].is_multiple_of(4))?;
        let mode = g.rng.pick(&["DCR", "CRD"]);
        let shape = vec![x.shape[0], x.shape[1] / 4, x.shape[2] * 2, x.shape[3] * 2];
        return g.emit("DepthToSpace", &[&x.name], &[("blocksize", Attr::Int(2)), ("mode", Attr::Text(mode))], Val { shape, ..x.clone() }).map(drop);
    }
    let x = g.val(|v| v.rank() == 4 && v.shape[2].is_multiple_of(2) && v.shape[3].is_multiple_of(2))?;
    let shape = vec![x.shape[0], x.shape[1] * 4, x.shape[2] / 2, x.shape[3] / 2];
    g.emit("SpaceToDepth", &[&x.name], &[("blocksize", Attr::Int(2))], Val { shape, ..x.clone() }).map(drop)
}

fn trilu(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 2 && v.dtype != DType::Bool)?;
    if g.opset < 14 {
        return None;
    }
    let k = g.rng.int(-2, 2);
    let k = g.initializer(&Tensor::scalar(DType::I64, Scalar::I(k.into())));
    let upper = g.rng.int(0, 1);
    g.emit("Trilu", &[&x.name, &k], &[("upper", Attr::Int(upper))], Val { least: x.least.min(0.0), ..x.clone() }).map(drop)
}

fn resize(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() == 4 && v.dtype == DType::F32)?;
    let mode = g.rng.pick(&["nearest", "linear"]);
    let coordinates = g.rng.pick(&["half_pixel", "asymmetric", "align_corners"]);
    let shape: Vec<usize> = (0..4).map(|i| if i < 2 { x.shape[i] } else { x.shape[i] * g.rng.pick(&[1, 2, 3]) }).collect();
    let sizes: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
    let sizes = g.ints(&sizes);
    let mut attrs = vec![("mode", Attr::Text(mode)), ("coordinate_transformation_mode", Attr::Text(coordinates))];
    if mode == "nearest" {
        attrs.push(("nearest_mode", Attr::Text("floor")));
    }
    // Where a coordinate falls on a jump, rounding decides.
    if mode == "nearest" && coordinates != "asymmetric" {
        return None;
    }
    let out = if mode == "nearest" { x.clone() } else { rounded(&x, x.most) };
    g.emit("Resize", &[&x.name, "", "", &sizes], &attrs, Val { shape, ..out }).map(drop)
}

fn quantize(g: &mut Gen) -> Option<()> {
    if g.rng.one_in(2) {
        let x = g.val(|v| matches!(v.dtype, DType::I8 | DType::U8))?;
        let scale = g.initializer(&Tensor::from_f32(vec![], &[0.25]));
        let zero = g.constant(x.dtype, &[], false);
        let most = (x.most + 9.0) * 0.25;
        let out = Val { dtype: DType::F32, bits: Some(2), most, least: -most, ..x.clone() };
        return g.emit("DequantizeLinear", &[&x.name, &scale, &zero.name], &[], out).map(drop);
    }
    let x = g.val(|v| v.exact() && v.dtype == DType::F32)?;
    let scale = g.initializer(&Tensor::from_f32(vec![], &[0.5]));
    let to = g.rng.pick(&[DType::I8, DType::U8]);
    let zero = g.constant(to, &[], false);
    let (least, most) = if to == DType::I8 { (-128.0, 128.0) } else { (0.0, 255.0) };
    g.emit("QuantizeLinear", &[&x.name, &scale, &zero.name], &[], Val { dtype: to, bits: Some(0), most, least, ..x.clone() }).map(drop)
}

fn top_k(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() >= 1 && v.exact() && (v.float() || v.wide_int()))?;
    let (at, written) = axis(g, &x);
    let k = g.rng.int(1, x.shape[at] as i64);
    let name = g.ints(&[k]);
    let mut shape = x.shape.clone();
    let most = shape[at] as f64;
    shape[at] = k as usize;
    let largest = g.rng.int(0, 1);
    let values = g.output(Val { shape: shape.clone(), ..x.clone() });
    let places = g.output(Val { dtype: DType::I64, shape, bits: Some(0), most, least: 0.0, name: String::new() });
    g.push("TopK", &[&x.name, &name], &[&values.name, &places.name], &[("axis", Attr::Int(written)), ("largest", Attr::Int(largest))]);
    Some(())
}

fn clip(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.float() || v.wide_int())?;
    let bound = |n: f64| if x.float() { Scalar::F(n) } else { Scalar::I(n as i128) };
    let lo = g.initializer(&Tensor::scalar(x.dtype, bound(-2.0)));
    let hi = g.initializer(&Tensor::scalar(x.dtype, bound(3.0)));
    let out = Val { most: x.most.min(3.0), least: x.least.clamp(-2.0, 3.0), ..x.clone() };
    match g.rng.below(3) {
        0 => g.emit("Clip", &[&x.name, &lo, &hi], &[], out).map(drop),
        1 => g.emit("Clip", &[&x.name, "", &hi], &[], Val { most: x.most.max(3.0), least: x.least.min(3.0), ..x.clone() }).map(drop),
        _ => g.emit("Clip", &[&x.name, &lo], &[], Val { most: x.most.max(2.0), ..out }).map(drop),
    }
}

fn one_hot(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.wide_int() && (1..=3).contains(&v.rank()))?;
    let depth = g.rng.int(2, 6);
    let depth_name = g.ints(&[depth]);
    let values = g.initializer(&Tensor::from_f32(vec![2], &[-0.5, 2.0]));
    let at = g.rng.below(x.rank() + 1);
    let mut shape = x.shape.clone();
    shape.insert(at, depth as usize);
    let out = Val { dtype: DType::F32, shape, bits: Some(1), most: 2.0, least: -0.5, name: String::new() };
    g.emit("OneHot", &[&x.name, &depth_name, &values], &[("axis", Attr::Int(at as i64))], out).map(drop)
}

fn einsum(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() == 3 && matches!(v.dtype, DType::F32 | DType::F64))?;
    let [b, i, j] = [x.shape[0], x.shape[1], x.shape[2]];
    let k = g.rng.pick(&[1, 2, 5]);
    let (equation, other, shape, depth) = match g.rng.below(4) {
        0 => ("bij,bjk->bik", vec![b, j, k], vec![b, i, k], j),
        1 => ("bij,kj->bki", vec![k, j], vec![b, k, i], j),
        2 => ("bij,ik->bjk", vec![i, k], vec![b, j, k], i),
        _ => ("bij,bij->b", vec![b, i, j], vec![b], i * j),
    };
    let y = g.constant(x.dtype, &other, false);
    g.emit("Einsum", &[&x.name, &y.name], &[("equation", Attr::Text(equation))], product(&x, &y, depth, shape)).map(drop)
}
