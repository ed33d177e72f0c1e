//! Random nodes of layers with weights of their own: recurrences, sampling.
use super::{
    graph::{Attr, Gen, Val},
    ops::rounded,
};
use pavage::ir::{DType, Scalar, Tensor};

/// A constant of small numbers, multiples of `1 / parts`.
fn small(g: &mut Gen, dtype: DType, shape: &[usize], most: i64, parts: f64) -> String {
    let values: Vec<Scalar> = (0..shape.iter().product()).map(|_| Scalar::F(g.rng.int(-most, most) as f64 / parts)).collect();
    g.initializer(&Tensor::from_scalars(dtype, shape.to_vec(), values))
}

/// Activations whose values stay near 0, with how many parameters they take of each kind.
const BOUNDED: &[(&str, usize, usize)] = &[("Sigmoid", 0, 0), ("Tanh", 0, 0), ("Softsign", 0, 0), ("HardSigmoid", 1, 1), ("ScaledTanh", 1, 1)];
/// The others that are continuous.
const OPEN: &[(&str, usize, usize)] = &[("Relu", 0, 0), ("Softplus", 0, 0), ("Affine", 1, 1), ("Elu", 1, 0), ("LeakyRelu", 1, 0)];

pub(crate) fn recurrent(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() == 3 && matches!(v.dtype, DType::F32 | DType::F64) && v.most <= 16.0)?;
    let [t, n, inputs] = [x.shape[0], x.shape[1], x.shape[2]];
    let (op, gates, own) = g.rng.pick(&[("RNN", 1, 1), ("GRU", 3, 2), ("LSTM", 4, 3)]);
    let (direction, d) = g.rng.pick(&[("forward", 1), ("reverse", 1), ("bidirectional", 2)]);
    let h = g.rng.pick(&[1, 2, 5, 8]);
    let w = small(g, x.dtype, &[d, gates * h, inputs], 8, 32.0);
    let r = small(g, x.dtype, &[d, gates * h, h], 8, 32.0);
    let maybe = |g: &mut Gen, shape: &[usize]| if g.rng.one_in(2) { small(g, x.dtype, shape, 8, 8.0) } else { String::new() };
    let b = maybe(g, &[d, 2 * gates * h]);
    let lengths = if g.rng.one_in(3) {
        let lengths: Vec<Scalar> = (0..n).map(|_| Scalar::I(g.rng.int(1, t as i64).into())).collect();
        g.initializer(&Tensor::from_scalars(DType::I32, vec![n], lengths))
    } else {
        String::new()
    };
    let mut ports = vec![x.name.clone(), w, r, b, lengths, maybe(g, &[d, n, h])];
    if op == "LSTM" {
        ports.extend([maybe(g, &[d, n, h]), maybe(g, &[d, 3 * h])]);
    }
    // The last of a cell's activations may be without bounds; gates are not.
    let open = g.rng.one_in(3);
    let (mut names, mut alphas, mut betas) = (vec![], vec![], vec![]);
    for i in 0..own * d {
        let (name, takes_alpha, takes_beta) = g.rng.pick(if open && i % own == own - 1 { OPEN } else { BOUNDED });
        names.push(name);
        alphas.extend((0..takes_alpha).map(|_| g.rng.int(1, 4) as f32 / 4.0));
        betas.extend((0..takes_beta).map(|_| g.rng.int(1, 4) as f32 / 4.0));
    }
    let mut attrs = vec![("hidden_size", Attr::Int(h as i64)), ("direction", Attr::Text(direction))];
    if g.rng.one_in(2) {
        attrs.push(("activations", Attr::Texts(&names)));
        attrs.extend([("activation_alpha", Attr::Floats(&alphas)), ("activation_beta", Attr::Floats(&betas))]);
    }
    if op == "GRU" {
        attrs.push(("linear_before_reset", Attr::Int(g.rng.int(0, 1))));
    }
    if g.rng.one_in(4) {
        attrs.push(("clip", Attr::Float(1.5)));
    }
    let most = if open { 2000.0 } else { 2.0 };
    let y = g.output(Val { shape: vec![t, d, n, h], ..rounded(&x, most) });
    let last = g.output(Val { shape: vec![d, n, h], ..rounded(&x, most) });
    let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
    g.push(op, &ports, &[&y.name, &last.name], &attrs);
    Some(())
}

pub(crate) fn grid_sample(g: &mut Gen) -> Option<()> {
    let x = g.val(|v| v.rank() == 4 && v.dtype == DType::F32)?;
    if g.opset < 16 {
        return None;
    }
    let (h, w) = (g.rng.pick(&[1, 2, 5]), g.rng.pick(&[1, 3, 8]));
    // Not the nearest pixel: there rounding decides.
    let grid = small(g, x.dtype, &[x.shape[0], h, w, 2], 41, 32.1);
    let mode = g.rng.pick(if g.opset < 20 { &["bilinear", "bicubic"] } else { &["linear", "cubic"] });
    let padding = g.rng.pick(&["zeros", "border", "reflection"]);
    let corners = g.rng.int(0, 1);
    let out = Val { shape: vec![x.shape[0], x.shape[1], h, w], ..rounded(&x, x.most * 2.0) };
    let attrs = [("mode", Attr::Text(mode)), ("padding_mode", Attr::Text(padding)), ("align_corners", Attr::Int(corners))];
    g.emit("GridSample", &[&x.name, &grid], &attrs, out).map(drop)
}
