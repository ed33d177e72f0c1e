//! Pooling over sliding windows.
use super::{
    conv::{LIMIT, check_windows, image_axes, span},
    demand,
    elements::{Num, around, fits, out, store},
    float, length_is, number,
    reduce::least,
    result,
};
use crate::{
    DType, Dim, Tensor, TensorType,
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
        PoolFn::Max | PoolFn::Sum => number("x", x)?,
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
    args: EvalArgs,
    f: &PoolFn,
    kernel: &[usize],
    strides: &[usize],
    dilations: &[usize],
    lo: &[i64],
    hi: &[i64],
    _ceil: &bool,
    layout: &Layout,
) -> Result<Vec<Tensor>, String> {
    let (_, first) = image_axes(args.tensors[0].shape().len(), *layout);
    let windows: Vec<Windows> = (0..kernel.len())
        .map(|i| Windows { axis: first + i, kernel: kernel[i] as i64, stride: strides[i] as i64, dilation: dilations[i] as i64, lo: lo[i], hi: hi[i] })
        .collect();
    if args.tensors[0].dtype().is_float() { pool::<f64>(&args, *f, &windows) } else { pool::<i128>(&args, *f, &windows) }
}

/// Windows along one axis.
struct Windows {
    axis: usize,
    kernel: i64,
    stride: i64,
    dilation: i64,
    lo: i64,
    hi: i64,
}

impl Windows {
    /// Positions of window `o` that lie in `from..to`, by number.
    fn inside(&self, o: usize, from: i64, to: i64) -> std::ops::Range<i64> {
        let (start, step) = (self.start(o), self.dilation);
        let first = if start < from { (from - start + step - 1) / step } else { 0 };
        let end = if start < to { (to - 1 - start) / step + 1 } else { 0 };
        first..end.min(self.kernel)
    }

    fn start(&self, o: usize) -> i64 {
        (o as i64).saturating_mul(self.stride) - self.lo
    }

    /// Elements of an axis of extent `n` that window `o` sees.
    fn elements(&self, o: usize, n: usize) -> impl Iterator<Item = usize> + use<> {
        let (start, step) = (self.start(o), self.dilation);
        self.inside(o, 0, n as i64).map(move |k| (start + k * step) as usize)
    }

    /// How many elements the mean of window `o` divides by.
    fn count(&self, o: usize, n: usize, f: PoolFn) -> f64 {
        let n = n as i64;
        let seen = if f == PoolFn::MeanPadded { self.inside(o, -self.lo, n + self.hi) } else { self.inside(o, 0, n) };
        (seen.end - seen.start).max(0) as f64
    }
}

/// Every mode is separable: one axis after another, in full precision.
fn pool<T: Num>(args: &EvalArgs, f: PoolFn, windows: &[Windows]) -> Result<Vec<Tensor>, String> {
    let (x, (dtype, shape)) = (args.tensors[0], out(args, 0)?);
    let (mut values, mut now) = (T::load(x), x.shape().to_vec());
    for w in windows {
        let (outer, n, inner) = around(&now, w.axis);
        now[w.axis] = shape[w.axis];
        let start = if f == PoolFn::Max { T::from_scalar(least(dtype)) } else { T::ZERO };
        let mut next = vec![start; fits(DType::F64, &now)?];
        for (o, i) in (0..outer).flat_map(|o| (0..shape[w.axis]).map(move |i| (o, i))) {
            let to = &mut next[(o * shape[w.axis] + i) * inner..][..inner];
            for at in w.elements(i, n) {
                let from = &values[(o * n + at) * inner..][..inner];
                to.iter_mut().zip(from).for_each(|(to, from)| *to = if f == PoolFn::Max { to.larger(*from) } else { to.add(*from) });
            }
        }
        values = next;
    }
    if matches!(f, PoolFn::Max | PoolFn::Sum) {
        return Ok(vec![store(dtype, shape, &values)?]);
    }
    // How many elements each window sees is a product over the axes too.
    let mut counts = vec![1.0; values.len()];
    for w in windows {
        let (_, n, inner) = around(&shape, w.axis);
        let seen: Vec<f64> = (0..n).map(|i| w.count(i, x.shape()[w.axis], f)).collect();
        counts.iter_mut().enumerate().for_each(|(p, c)| *c *= seen[p / inner % n]);
    }
    let means: Vec<f64> = values.iter().zip(&counts).map(|(v, c)| if *c == 0.0 { 0.0 } else { v.scalar().f() / c }).collect();
    Ok(vec![store(dtype, shape, &means)?])
}
