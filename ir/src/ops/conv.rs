//! Convolution and its gradient by the input.
use super::{demand, length_is, number, rank_is, result, same_dtype};
use crate::{
    DType, Dim, Tensor, TensorType,
    attr::Layout,
    op::{EvalArgs, TypeArgs},
};

/// Where an image's channel and first spatial axis stand.
pub(super) fn image_axes(rank: usize, layout: Layout) -> (usize, usize) {
    match layout {
        Layout::ChannelsFirst => (1, 2),
        Layout::ChannelsLast => (rank - 1, 1),
    }
}

/// Elements that a kernel of `kernel` elements spans.
pub(super) fn span(kernel: &Dim, dilation: usize) -> Dim {
    (kernel.clone() - Dim::one()) * Dim::from(dilation) + Dim::one()
}

/// Fails unless windows over `spatial` axes are described by one positive entry each.
pub(super) fn check_windows(spatial: usize, strides: &[usize], dilations: &[usize], lo: &[i64], hi: &[i64]) -> Result<(), String> {
    length_is("strides", strides.len(), spatial)?;
    length_is("dilations", dilations.len(), spatial)?;
    length_is("lo", lo.len(), spatial)?;
    length_is("hi", hi.len(), spatial)?;
    for (what, v) in strides.iter().map(|v| ("stride", *v)).chain(dilations.iter().map(|v| ("dilation", *v))) {
        demand((1..=LIMIT as usize).contains(&v), || format!("{what} {v} is not in 1..={LIMIT}"))?;
    }
    for v in lo.iter().chain(hi) {
        demand((-LIMIT..=LIMIT).contains(v), || format!("padding {v} is beyond {LIMIT}"))?;
    }
    Ok(())
}

/// The largest stride, dilation and padding, so that extents computed with them do not overflow.
pub(super) const LIMIT: i64 = 1 << 31;

/// Result dtype: that of the operands, `i32` for narrower integers.
fn out_dtype(dtype: DType) -> DType {
    if dtype.is_int() && dtype.bits() < 32 { DType::I32 } else { dtype }
}

fn divides(groups: usize, what: &str, channels: &Dim) -> Result<(), String> {
    match channels.as_const() {
        Some(c) => demand(c.rem_euclid(groups as i64) == 0, || format!("{c} {what} channels do not split into {groups} groups")),
        None => Ok(()),
    }
}

fn check(x: &TensorType, w: &TensorType, groups: usize) -> Result<usize, String> {
    number("x", x)?;
    same_dtype(x, w)?;
    demand(x.rank() >= 3, || format!("x must have a batch, a channel and spatial axes, got {x}"))?;
    rank_is("w", w, x.rank())?;
    demand((1..=LIMIT as usize).contains(&groups), || format!("{groups} groups"))?;
    Ok(x.rank() - 2)
}

pub(crate) fn infer(
    args: TypeArgs,
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    hi: &[i64],
    groups: &usize,
    layout: &Layout,
) -> Result<Vec<TensorType>, String> {
    let (x, w) = (args.types[0], args.types[1]);
    let spatial = check(x, w, *groups)?;
    check_windows(spatial, strides, dilations, lo, hi)?;
    let (channel, first) = image_axes(x.rank(), *layout);
    let channels = &x.shape[channel];
    let expected = w.shape[1].clone() * Dim::from(*groups);
    demand(*channels == expected, || format!("x has {channels} channels, w takes {expected} ({} in each of {groups} groups)", w.shape[1]))?;
    divides(*groups, "output", &w.shape[0])?;
    let mut shape = x.shape.clone();
    shape[channel] = w.shape[0].clone();
    for i in 0..spatial {
        let padded = x.shape[first + i].clone() + Dim::from(lo[i]) + Dim::from(hi[i]);
        let span = span(&w.shape[2 + i], dilations[i]);
        let room = padded.clone() - span.clone();
        demand(room.as_const().is_none_or(|v| v >= 0), || format!("spatial axis {i}: the kernel spans {span}, the padded input has {padded}"))?;
        shape[first + i] = room.div(&Dim::from(strides[i])) + Dim::one();
    }
    Ok(vec![result(out_dtype(x.dtype), shape)?])
}

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn infer_transpose(
    args: TypeArgs,
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    hi: &[i64],
    extra: &[usize],
    groups: &usize,
    layout: &Layout,
) -> Result<Vec<TensorType>, String> {
    let (x, w) = (args.types[0], args.types[1]);
    let spatial = check(x, w, *groups)?;
    check_windows(spatial, strides, dilations, lo, hi)?;
    length_is("extra", extra.len(), spatial)?;
    demand(extra.iter().all(|e| *e <= LIMIT as usize), || format!("extra {extra:?} is beyond {LIMIT}"))?;
    let (channel, first) = image_axes(x.rank(), *layout);
    demand(x.shape[channel] == w.shape[0], || format!("x has {} channels, w takes {}", x.shape[channel], w.shape[0]))?;
    divides(*groups, "input", &w.shape[0])?;
    let mut shape = x.shape.clone();
    shape[channel] = w.shape[1].clone() * Dim::from(*groups);
    for i in 0..spatial {
        let spread = (x.shape[first + i].clone() - Dim::one()) * Dim::from(strides[i]) + span(&w.shape[2 + i], dilations[i]);
        shape[first + i] = spread + Dim::from(extra[i]) - Dim::from(lo[i]) - Dim::from(hi[i]);
    }
    Ok(vec![result(out_dtype(x.dtype), shape)?])
}

pub(crate) fn eval(
    _args: EvalArgs,
    _strides: &[usize],
    _dilations: &[usize],
    _lo: &[i64],
    _hi: &[i64],
    _groups: &usize,
    _layout: &Layout,
) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn eval_transpose(
    _args: EvalArgs,
    _strides: &[usize],
    _dilations: &[usize],
    _lo: &[i64],
    _hi: &[i64],
    _extra: &[usize],
    _groups: &usize,
    _layout: &Layout,
) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
