//! Operators that carry something from one step of a sequence to the next.
use super::view::concat_along;
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    DType, Dim, Op,
    ScalarFn::*,
    attr::{Layout, PadMode, ScatterFn},
};

/// Operands: a cache, new elements along one axis of it, and the position of the first of them for each sample.
pub(crate) fn tensor_scatter(cx: &mut Cx) -> Res<Vec<Val>> {
    let (cache, update) = (cx.arg(0)?, cx.arg(1)?);
    let (own, mut shape) = (cx.shape(cache), cx.shape(update));
    let rank = own.len();
    if rank < 2 || shape.len() != rank {
        return invalid(format!("an update of type {} for {}", cx.ty(update), cx.ty(cache)));
    }
    let axis = cx.axis(cx.int("axis", -2)?, rank)?;
    if axis == 0 {
        return invalid("the first axis is the batch");
    }
    for i in (0..rank).filter(|i| *i != axis) {
        shape[i] = cx.same_extent(&own[i], &shape[i])?;
    }
    let update = cx.with_shape(update, shape.clone())?;
    let mut at = cx.emit(Op::Iota { dtype: DType::I64, shape: shape.clone(), axis }, &[])?;
    if let Some(first) = cx.opt(2) {
        let mut column = vec![Dim::one(); rank];
        column[0] = shape[0].clone();
        let first = cx.cast(first, DType::I64)?;
        let first = cx.reshape(first, column)?;
        at = cx.pointwise(Add, &[at, first])?;
    }
    match cx.text("mode", "linear")?.as_str() {
        "linear" => {}
        "circular" => {
            let most = cx.known_dims(DType::I64, &[], vec![own[axis].clone()]);
            at = cx.pointwise(Mod, &[at, most])?;
        }
        other => return invalid(format!("mode `{other}`")),
    }
    Ok(vec![cx.emit(Op::ScatterElements { axis, f: ScatterFn::Replace }, &[cache, at, update])?])
}

/// A convolution along one axis that sees the past alone. Operands: x `[b, c, t]`, the kernel `[c, 1, k]`, the bias, and the
/// `k - 1` elements before x.
pub(crate) fn causal_conv(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, w) = (cx.arg(0)?, cx.arg(1)?);
    let (shape, kernel) = (cx.shape(x), cx.shape(w));
    if shape.len() != 3 || kernel.len() != 3 || !kernel[1].is(1) {
        return invalid(format!("x is {}, the kernel {}", cx.ty(x), cx.ty(w)));
    }
    let (Some(channels), Some(k)) = (kernel[0].as_const(), kernel[2].as_const()) else {
        return missing(format!("a kernel of type {}", cx.ty(w)));
    };
    if channels < 1 || !(1..=1 << 20).contains(&k) {
        return invalid(format!("a kernel of type {}", cx.ty(w)));
    }
    let channels_of = cx.same_extent(&shape[1], &kernel[0])?;
    let x = cx.with_shape(x, vec![shape[0].clone(), channels_of, shape[2].clone()])?;
    let (seen, lo) = match cx.opt(3) {
        Some(past) => (concat_along(cx, &[past, x], 2)?, 0),
        None => (x, k - 1),
    };
    let conv = |lo, layout| Op::Conv { strides: vec![1], dilations: vec![1], lo: vec![lo], hi: vec![0], groups: channels as usize, layout };
    let mut y = cx.emit(conv(lo, Layout::ChannelsFirst), &[seen, w])?;
    if let Some(bias) = cx.opt(2) {
        let bias = cx.reshape(bias, vec![Dim::one(), kernel[0].clone(), Dim::one()])?;
        y = cx.pointwise(Add, &[y, bias])?;
    }
    match cx.text("activation", "none")?.as_str() {
        "none" => {}
        "silu" | "swish" => {
            let dtype = cx.dtype(y);
            let wide = cx.cast(y, if dtype.bits() < 32 { DType::F32 } else { dtype })?;
            let gate = cx.map(Sigmoid, &[wide])?;
            y = cx.map(Mul, &[wide, gate])?;
            y = cx.cast(y, dtype)?;
        }
        other => return invalid(format!("activation `{other}`")),
    }
    let padded = if lo == 0 {
        seen
    } else {
        let zero = cx.scalar_like(x, 0.0);
        cx.emit(Op::Pad { lo: vec![Dim::ZERO, Dim::ZERO, Dim::from(lo)], hi: vec![Dim::ZERO; 3], mode: PadMode::Constant }, &[x, zero])?
    };
    let state = cx.slice_axis(padded, 2, shape[2].clone(), Dim::from(k - 1))?;
    Ok(vec![y, state])
}
