//! Losses: negative log likelihood and cross entropy.
use super::{norm, reduce};
use crate::onnx::{
    build::{Res, Val, invalid},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, ScalarFn, attr::ReduceFn};

/// Losses of narrow floats are computed in f32.
fn wide(dtype: DType) -> DType {
    if dtype.is_float() && dtype.bits() < 32 { DType::F32 } else { dtype }
}

/// `-weight[target] * log_prob[n, target, d...]`, reduced as the node says; the class axis is the second.
fn negative_log_likelihood(cx: &mut Cx, log_prob: Val, target: Val, weight: Option<Val>) -> Res<Val> {
    let mut shape = cx.shape(log_prob);
    let own = cx.shape(target);
    if shape.len() < 2 || own.len() + 1 != shape.len() || !cx.dtype(target).is_int() {
        return invalid(format!("scores of type {} and targets of type {}", cx.ty(log_prob), cx.ty(target)));
    }
    for (i, d) in own.iter().enumerate() {
        let at = if i == 0 { 0 } else { i + 1 };
        shape[at] = cx.same_extent(&shape[at], d)?;
    }
    let log_prob = cx.with_shape(log_prob, shape.clone())?;
    shape.remove(1);
    let target = cx.with_shape(target, shape.clone())?;
    let dtype = cx.dtype(log_prob);
    let ignored = match cx.int_opt("ignore_index")? {
        Some(index) => Some(cx.with_number(ScalarFn::Eq, target, index as f64)?),
        None => None,
    };
    // An ignored target may name no class at all.
    let class = match ignored {
        Some(hit) => {
            let zero = cx.scalar_like(target, 0.0);
            cx.pointwise(ScalarFn::Select, &[hit, zero, target])?
        }
        None => target,
    };
    let mut column = shape.clone();
    column.insert(1, Dim::one());
    let at = cx.reshape(class, column)?;
    let picked = cx.emit(Op::GatherElements { axis: 1 }, &[log_prob, at])?;
    let picked = cx.reshape(picked, shape.clone())?;
    let mut loss = cx.map(ScalarFn::Neg, &[picked])?;
    let mut factor = match weight {
        Some(weight) => {
            let weight = cx.cast(weight, dtype)?;
            Some(cx.emit(Op::Gather { axis: 0 }, &[weight, class])?)
        }
        None => None,
    };
    if let Some(hit) = ignored {
        let (zero, one) = (cx.scalar(dtype, 0.0), cx.scalar(dtype, 1.0));
        factor = Some(cx.pointwise(ScalarFn::Select, &[hit, zero, factor.unwrap_or(one)])?);
    }
    if let Some(factor) = factor {
        loss = cx.map(ScalarFn::Mul, &[loss, factor])?;
        if let Some(hit) = ignored {
            // Not even an infinite score of an ignored target counts.
            let zero = cx.scalar(dtype, 0.0);
            loss = cx.pointwise(ScalarFn::Select, &[hit, zero, loss])?;
        }
    }
    let axes: Vec<usize> = (0..shape.len()).collect();
    let whole = |cx: &mut Cx, v: Val| {
        let sum = reduce::reduce(cx, ReduceFn::Sum, v, &axes)?;
        reduce::drop_axes(cx, sum, &axes)
    };
    match cx.text("reduction", "mean")?.as_str() {
        "none" => Ok(loss),
        "sum" => whole(cx, loss),
        "mean" => match factor {
            Some(factor) => {
                let (sum, weights) = (whole(cx, loss)?, whole(cx, factor)?);
                cx.map(ScalarFn::Div, &[sum, weights])
            }
            None => {
                let mean = reduce::mean(cx, loss, &axes)?;
                reduce::drop_axes(cx, mean, &axes)
            }
        },
        other => invalid(format!("reduction `{other}`")),
    }
}

pub(crate) fn nll(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, target) = (cx.arg(0)?, cx.arg(1)?);
    let dtype = cx.dtype(x);
    let x = cx.cast(x, wide(dtype))?;
    let weight = cx.opt(2);
    let loss = negative_log_likelihood(cx, x, target, weight)?;
    Ok(vec![cx.cast(loss, dtype)?])
}

/// The loss of a softmax over the second axis, and that softmax's logarithm.
pub(crate) fn softmax_cross_entropy(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, target) = (cx.arg(0)?, cx.arg(1)?);
    if cx.rank(x) < 2 {
        return invalid(format!("scores of type {}", cx.ty(x)));
    }
    let dtype = cx.dtype(x);
    let x = cx.cast(x, wide(dtype))?;
    let log_prob = norm::log_softmax_over(cx, x, &[1])?;
    let weight = cx.opt(2);
    let loss = negative_log_likelihood(cx, log_prob, target, weight)?;
    Ok(vec![cx.cast(loss, dtype)?, cx.cast(log_prob, dtype)?])
}
