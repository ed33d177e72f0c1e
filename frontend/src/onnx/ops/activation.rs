//! Activation functions, spelled in scalar functions.
use crate::onnx::{
    build::{Builder, Res, Val, invalid},
    cx::Cx,
};
use pavage_ir::{
    DType,
    ScalarFn::{self, *},
};

pub(crate) fn relu(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    Ok(vec![cx.with_number(Max, x, 0.0)?])
}

/// A composite over floats: narrow ones are computed in f32 and rounded once.
pub(crate) fn composite(cx: &mut Cx, f: fn(&mut Cx, Val) -> Res<Val>) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    Ok(vec![widely(cx, x, f)?])
}

/// A composite of one value: narrow floats are computed in f32 and rounded once.
pub(crate) fn widely(cx: &mut Cx, x: Val, f: impl FnOnce(&mut Cx, Val) -> Res<Val>) -> Res<Val> {
    let dtype = cx.dtype(x);
    let wide = cx.cast(x, if dtype.is_float() && dtype.bits() < 32 { DType::F32 } else { dtype })?;
    let y = f(cx, wide)?;
    cx.cast(y, dtype)
}

/// `x` where the test against `bound` holds, else `other`.
fn where_x(b: &mut Builder, test: ScalarFn, x: Val, bound: f64, other: Val) -> Res<Val> {
    let test = b.with_number(test, x, bound)?;
    b.pointwise(Select, &[test, x, other])
}

pub(crate) fn leaky_relu(cx: &mut Cx, x: Val) -> Res<Val> {
    let alpha = cx.float("alpha", 0.01)?;
    let below = cx.with_number(Mul, x, alpha)?;
    where_x(cx, Ge, x, 0.0, below)
}

pub(crate) fn prelu(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, slope) = (cx.arg(0)?, cx.arg(1)?);
    let below = cx.pointwise(Mul, &[x, slope])?;
    Ok(vec![where_x(cx, Ge, x, 0.0, below)?])
}

/// `scale * (e^x - 1)`.
fn expm1(b: &mut Builder, x: Val, scale: f64) -> Res<Val> {
    let e = b.map(Exp, &[x])?;
    let e = b.with_number(Sub, e, 1.0)?;
    b.with_number(Mul, e, scale)
}

pub(crate) fn elu(cx: &mut Cx, x: Val) -> Res<Val> {
    let alpha = cx.float("alpha", 1.0)?;
    let below = expm1(cx, x, alpha)?;
    where_x(cx, Ge, x, 0.0, below)
}

pub(crate) fn selu(cx: &mut Cx, x: Val) -> Res<Val> {
    let (alpha, gamma) = (cx.float("alpha", 1.673_263_192_176_818_8)?, cx.float("gamma", 1.050_701_022_148_132_3)?);
    let below = expm1(cx, x, alpha)?;
    let y = where_x(cx, Gt, x, 0.0, below)?;
    cx.with_number(Mul, y, gamma)
}

pub(crate) fn celu(cx: &mut Cx, x: Val) -> Res<Val> {
    let alpha = cx.float("alpha", 1.0)?;
    let scaled = cx.with_number(Div, x, alpha)?;
    let below = expm1(cx, scaled, alpha)?;
    where_x(cx, Ge, x, 0.0, below)
}

pub(crate) fn thresholded_relu(cx: &mut Cx, x: Val) -> Res<Val> {
    let alpha = cx.float("alpha", 1.0)?;
    let zero = cx.scalar_like(x, 0.0);
    where_x(cx, Gt, x, alpha, zero)
}

/// `max(0, min(1, alpha * x + beta))`.
fn hard(b: &mut Builder, x: Val, alpha: f64, beta: f64) -> Res<Val> {
    let y = b.with_number(Mul, x, alpha)?;
    let y = b.with_number(Add, y, beta)?;
    let y = b.with_number(Max, y, 0.0)?;
    b.with_number(Min, y, 1.0)
}

pub(crate) fn hard_sigmoid(cx: &mut Cx, x: Val) -> Res<Val> {
    let (alpha, beta) = (cx.float("alpha", f64::from(0.2f32))?, cx.float("beta", 0.5)?);
    hard(cx, x, alpha, beta)
}

pub(crate) fn hard_swish(cx: &mut Cx, x: Val) -> Res<Val> {
    // The sixth is an attribute of ONNX's own expansion: an f32.
    let gate = hard(cx, x, f64::from(1.0f32 / 6.0), 0.5)?;
    cx.map(Mul, &[x, gate])
}

pub(crate) fn mish(cx: &mut Cx, x: Val) -> Res<Val> {
    let t = cx.map(Softplus, &[x])?;
    let t = cx.map(Tanh, &[t])?;
    cx.map(Mul, &[x, t])
}

pub(crate) fn swish(cx: &mut Cx, x: Val) -> Res<Val> {
    let alpha = cx.float("alpha", 1.0)?;
    swish_of(cx, x, alpha)
}

/// `x * sigmoid(alpha x)`.
pub(crate) fn swish_of(b: &mut Builder, x: Val, alpha: f64) -> Res<Val> {
    let scaled = if alpha == 1.0 { x } else { b.with_number(Mul, x, alpha)? };
    let gate = b.map(Sigmoid, &[scaled])?;
    b.map(Mul, &[x, gate])
}

pub(crate) fn gelu(cx: &mut Cx, x: Val) -> Res<Val> {
    if cx.text("approximate", "none")? == "tanh" { gelu_tanh(cx, x) } else { gelu_erf(cx, x) }
}

pub(crate) fn gelu_erf(b: &mut Builder, x: Val) -> Res<Val> {
    let scaled = b.with_number(Mul, x, std::f64::consts::FRAC_1_SQRT_2)?;
    let inner = b.map(Erf, &[scaled])?;
    half_gated(b, x, inner)
}

/// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
pub(crate) fn gelu_tanh(b: &mut Builder, x: Val) -> Res<Val> {
    let square = b.map(Mul, &[x, x])?;
    let cube = b.map(Mul, &[square, x])?;
    let cube = b.with_number(Mul, cube, 0.044_715)?;
    let sum = b.map(Add, &[x, cube])?;
    let scaled = b.with_number(Mul, sum, (2.0 / std::f64::consts::PI).sqrt())?;
    let inner = b.map(Tanh, &[scaled])?;
    half_gated(b, x, inner)
}

fn half_gated(b: &mut Builder, x: Val, inner: Val) -> Res<Val> {
    let gate = b.with_number(Add, inner, 1.0)?;
    let half = b.with_number(Mul, x, 0.5)?;
    b.map(Mul, &[half, gate])
}

pub(crate) fn softsign(cx: &mut Cx, x: Val) -> Res<Val> {
    let size = cx.map(Abs, &[x])?;
    let below = cx.with_number(Add, size, 1.0)?;
    cx.map(Div, &[x, below])
}

pub(crate) fn shrink(cx: &mut Cx, x: Val) -> Res<Val> {
    let (bias, lambda) = (cx.float("bias", 0.0)?, cx.float("lambd", 0.5)?);
    let zero = cx.scalar_like(x, 0.0);
    let (up, down) = (cx.with_number(Add, x, bias)?, cx.with_number(Sub, x, bias)?);
    let (low, high) = (cx.with_number(Lt, x, -lambda)?, cx.with_number(Gt, x, lambda)?);
    let inner = cx.pointwise(Select, &[high, down, zero])?;
    cx.pointwise(Select, &[low, up, inner])
}

/// `swish(gate) * x`.
pub(crate) fn swiglu(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(1)?;
    if cx.ty(x) != cx.ty(cx.arg(0)?) {
        return invalid(format!("a gate of type {} for {}", cx.ty(cx.arg(0)?), cx.ty(x)));
    }
    let gate = composite(cx, swish)?;
    Ok(vec![cx.map(Mul, &[gate[0], x])?])
}
