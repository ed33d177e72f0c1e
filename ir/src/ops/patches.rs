//! The windows of a convolution laid out as rows of a matrix.
use super::{
    conv::{LIMIT, check_windows, span},
    demand,
    elements::{fits, move_element, out, raw, strides as steps},
    float, length_is, result,
};
use crate::{
    Dim, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer(
    args: TypeArgs,
    kernel: &[usize],
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    hi: &[i64],
    width: &usize,
) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    float("x", x)?;
    demand(x.dtype.bits() >= 16, || format!("x must have 16 bits an element at least, got {x}"))?;
    demand(x.rank() >= 3, || format!("x must have a batch, spatial axes and channels, got {x}"))?;
    let spatial = x.rank() - 2;
    length_is("kernel", kernel.len(), spatial)?;
    check_windows(spatial, strides, dilations, lo, hi)?;
    demand(kernel.iter().all(|k| (1..=LIMIT as usize).contains(k)), || format!("kernel {kernel:?} is not in 1..={LIMIT}"))?;
    let channels =
        x.shape[x.rank() - 1].as_const().and_then(|c| usize::try_from(c).ok()).ok_or_else(|| format!("the number of channels of {x} is not known"))?;
    let taps = kernel.iter().try_fold(channels, |n, k| n.checked_mul(*k));
    demand(taps.is_some_and(|n| n <= *width && *width <= LIMIT as usize), || format!("{kernel:?} windows of {channels} channels do not fit into {width}"))?;
    let mut shape = x.shape.clone();
    shape[spatial + 1] = Dim::from(*width);
    for i in 0..spatial {
        let padded = x.shape[1 + i].clone() + Dim::from(lo[i]) + Dim::from(hi[i]);
        let span = span(&Dim::from(kernel[i]), dilations[i]);
        let room = padded.clone() - span.clone();
        demand(room.as_const().is_none_or(|v| v >= 0), || format!("spatial axis {i}: the window spans {span}, the padded input has {padded}"))?;
        shape[1 + i] = room.div(&Dim::from(strides[i])) + Dim::one();
    }
    Ok(vec![result(x.dtype, shape)?])
}

pub(crate) fn eval(
    args: EvalArgs,
    kernel: &[usize],
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    _hi: &[i64],
    width: &usize,
) -> Result<Vec<Tensor>, String> {
    let (x, (dtype, shape)) = (args.tensors[0], out(&args, 0)?);
    let spatial = kernel.len();
    let (from, channels) = (steps(x.shape()), x.shape()[spatial + 1]);
    let mut bytes = vec![0u8; dtype.bytes(fits(dtype, &shape)?)];
    let place = |at: usize, extents: &[usize]| -> Vec<usize> { extents.iter().zip(steps(extents)).map(|(n, s)| at / s % n).collect() };
    let taps: usize = kernel.iter().product();
    for window in 0..shape[..=spatial].iter().product() {
        let row = place(window, &shape[..=spatial]);
        for tap in 0..taps {
            let inside = place(tap, kernel).into_iter().enumerate().map(|(i, k)| {
                let at = row[1 + i] as i128 * strides[i] as i128 + k as i128 * dilations[i] as i128 - i128::from(lo[i]);
                usize::try_from(at).ok().filter(|at| *at < x.shape()[1 + i]).map(|at| at * from[1 + i])
            });
            let Some(at) = inside.sum::<Option<usize>>() else { continue };
            for c in 0..channels {
                move_element(&mut bytes, window * width + tap * channels + c, x.bytes(), row[0] * from[0] + at + c, dtype);
            }
        }
    }
    Ok(vec![raw(dtype, shape, bytes)?])
}
