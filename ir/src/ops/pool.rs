//! Pooling over sliding windows.
use super::{
    conv::{LIMIT, check_windows, image_axes, span},
    demand, float, length_is, number, result,
};
use crate::{
    Dim, Tensor, TensorType,
    attr::{Layout, PoolFn},
    op::{EvalArgs, TypeArgs},
};

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn infer(
    args: TypeArgs,
    f: &PoolFn,
    kernel: &[usize],
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    hi: &[i64],
    ceil: &bool,
    layout: &Layout,
) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    match f {
        PoolFn::Max => number("x", x)?,
        PoolFn::Mean | PoolFn::MeanPadded => float("x", x)?,
    }
    demand(x.rank() >= 3, || format!("x must have a batch, a channel and spatial axes, got {x}"))?;
    let spatial = x.rank() - 2;
    length_is("kernel", kernel.len(), spatial)?;
    demand(kernel.iter().all(|k| (1..=LIMIT as usize).contains(k)), || format!("kernel {kernel:?} is not in 1..={LIMIT}"))?;
    check_windows(spatial, strides, dilations, lo, hi)?;
    let (_, first) = image_axes(x.rank(), *layout);
    let mut shape = x.shape.clone();
    for i in 0..spatial {
        let (stride, started) = (Dim::from(strides[i]), x.shape[first + i].clone() + Dim::from(lo[i]));
        let padded = started.clone() + Dim::from(hi[i]);
        let span = span(&Dim::from(kernel[i]), dilations[i]);
        let room = padded.clone() - span.clone();
        demand(room.as_const().is_none_or(|v| v >= 0 || *ceil), || format!("spatial axis {i}: the window spans {span}, the padded input has {padded}"))?;
        shape[first + i] = if *ceil {
            // As many windows as start before the padding at the end.
            (room.ceil_div(&stride) + Dim::one()).smaller(&started.ceil_div(&stride))
        } else {
            room.div(&stride) + Dim::one()
        };
    }
    Ok(vec![result(x.dtype, shape)?])
}

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn eval(
    _args: EvalArgs,
    _f: &PoolFn,
    _kernel: &[usize],
    _strides: &[usize],
    _dilations: &[usize],
    _lo: &[i64],
    _hi: &[i64],
    _ceil: &bool,
    _layout: &Layout,
) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
