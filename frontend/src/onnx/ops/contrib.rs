//! Operators of com.microsoft that onnxruntime's optimizers and exporters write: fused forms of plain ones.
use super::{activation, linear, norm};
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, ScalarFn::*};

/// Add an operand, if it is given.
fn plus(cx: &mut Cx, x: Val, operand: usize) -> Res<Val> {
    match cx.opt(operand) {
        Some(v) => cx.pointwise(Add, &[x, v]),
        None => Ok(x),
    }
}

/// Gelu by the error function, with a bias before it if operand 1 is given.
pub(crate) fn gelu(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let x = plus(cx, x, 1)?;
    Ok(vec![activation::widely(cx, x, |cx, x| activation::gelu_erf(cx, x))?])
}

/// Gelu by tanh, with a bias before it if operand 1 is given.
pub(crate) fn fast_gelu(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let x = plus(cx, x, 1)?;
    Ok(vec![activation::widely(cx, x, |cx, x| activation::gelu_tanh(cx, x))?])
}

pub(crate) fn quick_gelu(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, alpha) = (cx.arg(0)?, cx.float("alpha", f64::from(1.702f32))?);
    Ok(vec![activation::widely(cx, x, |cx, x| activation::swish_of(cx, x, alpha))?])
}

/// Which statistic a layer is normalised by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    Deviation,
    RootMeanSquare,
}

/// `norm(x + skip + bias)`. Operands: x, skip, scale, then a shift for [`By::Deviation`], then the bias. Results: y, the mean, the
/// reciprocal deviation, the sum.
pub(crate) fn skip_norm(cx: &mut Cx, by: By) -> Res<Vec<Val>> {
    let (x, skip, scale) = (cx.arg(0)?, cx.arg(1)?, cx.arg(2)?);
    let dtype = cx.dtype(x);
    let shape = cx.shape(x);
    let Some(last) = shape.len().checked_sub(1) else { return invalid("a layer without axes") };
    let work = if dtype.bits() < 32 { DType::F32 } else { dtype };
    let (x, skip) = (cx.cast(x, work)?, cx.cast(skip, work)?);
    // What is added broadcasts to x, never the other way.
    let skip = cx.broadcast_to(skip, &shape)?;
    let mut sum = cx.map(Add, &[x, skip])?;
    let (shift, bias) = if by == By::Deviation { (cx.opt(3), cx.opt(4)) } else { (None, cx.opt(3)) };
    if let Some(bias) = bias {
        let bias = cx.cast(bias, work)?;
        sum = cx.pointwise(Add, &[sum, bias])?;
    }
    let epsilon = cx.float("epsilon", 1e-12)?;
    let (mut y, mean, inverse) = match by {
        By::Deviation => {
            let [y, mean, inverse] = norm::standardize(cx, sum, &[last], epsilon)?;
            (y, mean, inverse)
        }
        By::RootMeanSquare => {
            let [y, inverse] = norm::by_root_mean_square(cx, sum, &[last], epsilon)?;
            (y, inverse, inverse)
        }
    };
    if by == By::RootMeanSquare && cx.wants(1) {
        return missing("the mean of a layer that is not centred");
    }
    for (v, f) in [(Some(scale), Mul), (shift, Add)] {
        if let Some(v) = v {
            let v = cx.cast(v, work)?;
            y = cx.pointwise(f, &[y, v])?;
        }
    }
    Ok(vec![cx.cast(y, dtype)?, mean, inverse, cx.cast(sum, dtype)?])
}

/// `alpha * a b`, either transposed in its last two axes first.
pub(crate) fn fused_matmul(cx: &mut Cx) -> Res<Vec<Val>> {
    if cx.flag("transBatchA", false)? || cx.flag("transBatchB", false)? {
        return missing("transposed batch axes");
    }
    let turn = |cx: &mut Cx, v: Val, name: &str| -> Res<Val> {
        let rank = cx.rank(v);
        if rank < 2 || !cx.flag(name, false)? {
            return Ok(v);
        }
        let mut perm: Vec<usize> = (0..rank).collect();
        perm.swap(rank - 1, rank - 2);
        cx.transpose(v, &perm)
    };
    let (a, b) = (cx.arg(0)?, cx.arg(1)?);
    let (a, b) = (turn(cx, a, "transA")?, turn(cx, b, "transB")?);
    let dtype = cx.dtype(a);
    let y = linear::matmul(cx, a, b, dtype)?;
    let alpha = cx.float("alpha", 1.0)?;
    Ok(vec![if alpha == 1.0 { y } else { cx.with_number(Mul, y, alpha)? }])
}
