//! Pools that say where, and what undoes them: positions of maxima, unpooling, columns back to images.
use super::conv::{Window, max_pool_values, window};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    DType, Dim, Op, ScalarFn,
    attr::{PadMode, ReduceFn, ScatterFn},
};

/// `0, 1, ...` along one axis of a value of `rank` axes, times a number; i64.
fn steps(b: &mut Builder, n: &Dim, axis: usize, rank: usize, step: i64) -> Res<Val> {
    let mut shape = vec![Dim::one(); rank];
    shape[axis] = n.clone();
    let v = b.emit(Op::Iota { dtype: DType::I64, shape, axis }, &[])?;
    if step == 1 { Ok(v) } else { b.with_number(ScalarFn::Mul, v, step as f64) }
}

/// The maxima of windows and the flat positions of the first of each, in the whole of `x`.
pub(crate) fn max_pool_with_positions(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let Some(kernel) = cx.ints_opt("kernel_shape")? else { return invalid("kernel_shape is missing") };
    let Window { kernel, strides, dilations, lo, hi, .. } = window(cx, x, kernel.to_vec(), None)?;
    for i in 0..kernel.len() {
        let reach = (dilations[i] * (kernel[i] - 1) + 1) as i64;
        if lo[i] >= reach || hi[i] >= reach {
            return missing("positions of windows that lie in the padding");
        }
    }
    let values = max_pool_values(cx)?;
    let (shape, out) = (cx.shape(x), cx.shape(values));
    let n = kernel.len();
    // Positions along each axis, `[out..., kernel...]`; a tap in the padding stands for one of its window inside.
    let mut axes = vec![];
    for i in 0..n {
        let start = steps(cx, &out[2 + i], i, 2 * n, strides[i] as i64)?;
        let tap = steps(cx, &Dim::from(kernel[i]), n + i, 2 * n, dilations[i] as i64)?;
        let at = cx.pointwise(ScalarFn::Add, &[start, tap])?;
        let at = cx.with_number(ScalarFn::Sub, at, lo[i] as f64)?;
        let step = dilations[i] as f64;
        let first = cx.with_number(ScalarFn::Mod, at, step)?;
        let last = cx.known_dims(DType::I64, &[], vec![shape[2 + i].clone() - Dim::one()]);
        let beyond = cx.pointwise(ScalarFn::Sub, &[last, at])?;
        let rest = cx.with_number(ScalarFn::Mod, beyond, step)?;
        let end = cx.pointwise(ScalarFn::Sub, &[last, rest])?;
        let (before, after) = (cx.with_number(ScalarFn::Lt, at, 0.0)?, cx.with_number(ScalarFn::Lt, beyond, 0.0)?);
        let at = cx.map(ScalarFn::Select, &[before, first, at])?;
        axes.push(cx.map(ScalarFn::Select, &[after, end, at])?);
    }
    let cell: Vec<Dim> = out[2..].iter().cloned().chain(kernel.iter().map(|k| Dim::from(*k))).collect();
    let windows: Dim = out[2..].iter().cloned().product();
    let taps = Dim::from(kernel.iter().product::<usize>());
    let flat = |cx: &mut Cx, order: &mut dyn Iterator<Item = usize>| {
        // The first axis of the order is the slowest.
        let mut at: Option<Val> = None;
        for i in order {
            at = Some(match at {
                Some(at) => {
                    let extent = cx.known_dims(DType::I64, &[], vec![shape[2 + i].clone()]);
                    let row = cx.pointwise(ScalarFn::Mul, &[at, extent])?;
                    cx.pointwise(ScalarFn::Add, &[row, axes[i]])?
                }
                None => axes[i],
            });
        }
        let Some(at) = at else { return invalid("a pool without spatial axes") };
        let at = cx.broadcast_to(at, &cell)?;
        cx.reshape(at, vec![windows.clone(), taps.clone()])
    };
    let at = flat(cx, &mut (0..n))?;
    let named = if cx.int("storage_order", 0)? == 0 { at } else { flat(cx, &mut (0..n).rev())? };
    let area: Dim = shape[2..].iter().cloned().product();
    let planes = cx.reshape(x, vec![shape[0].clone(), shape[1].clone(), area.clone()])?;
    let seen = cx.emit(Op::Gather { axis: 2 }, &[planes, at])?;
    let best = cx.emit(Op::ArgReduce { f: ReduceFn::Max, axis: 3, last: false }, &[seen])?;
    let named = cx.broadcast_to(named, &[shape[0].clone(), shape[1].clone(), windows, taps])?;
    let found = cx.emit(Op::GatherElements { axis: 3 }, &[named, best])?;
    let found = cx.reshape(found, out.clone())?;
    let rank = out.len();
    let (image, channel) = (steps(cx, &shape[0], 0, rank, 1)?, steps(cx, &shape[1], 1, rank, 1)?);
    let channels = cx.known_dims(DType::I64, &[], vec![shape[1].clone()]);
    let plane = cx.pointwise(ScalarFn::Mul, &[image, channels])?;
    let plane = cx.pointwise(ScalarFn::Add, &[plane, channel])?;
    let area = cx.known_dims(DType::I64, &[], vec![area]);
    let origin = cx.pointwise(ScalarFn::Mul, &[plane, area])?;
    Ok(vec![values, cx.pointwise(ScalarFn::Add, &[found, origin])?])
}

/// Values put back to the positions that a pool found, zeros elsewhere.
pub(crate) fn max_unpool(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, at) = (cx.arg(0)?, cx.arg(1)?);
    let Some(kernel) = cx.ints_opt("kernel_shape")? else { return invalid("kernel_shape is missing") };
    let (n, shape) = (kernel.len(), cx.shape(x));
    if shape.len() != n + 2 || cx.rank(at) != n + 2 {
        return invalid(format!("values of type {} at positions of type {}", cx.ty(x), cx.ty(at)));
    }
    let (strides, pads) = (cx.ints_of("strides", n, 1)?, cx.ints_of("pads", 2 * n, 0)?);
    let mut out = shape[..2].to_vec();
    for i in 0..n {
        out.push((shape[2 + i].clone() - Dim::one()) * Dim::from(strides[i]) + Dim::from(kernel[i] - pads[i] - pads[n + i]));
    }
    let (count, total) = (cx.ty(x).count(), out.iter().cloned().product::<Dim>());
    let (x, at) = (cx.reshape(x, vec![count.clone()])?, cx.reshape(at, vec![count])?);
    let zero = cx.scalar_like(x, 0.0);
    let canvas = cx.broadcast_to(zero, &[total])?;
    let y = cx.emit(Op::ScatterElements { axis: 0, f: ScatterFn::Replace }, &[canvas, at, x])?;
    let mut y = cx.reshape(y, out.clone())?;
    if let Some(target) = cx.opt(2) {
        let name = cx.name.clone();
        let target = cx.sizes(target, &name)?;
        if target.len() != n + 2 {
            return invalid(format!("{} sizes of {}", target.len(), cx.ty(y)));
        }
        let hi: Vec<Dim> = target.iter().zip(&out).map(|(to, from)| to.clone() - from.clone()).collect();
        y = cx.emit(Op::Pad { lo: vec![Dim::ZERO; n + 2], hi, mode: PadMode::Constant }, &[y, zero])?;
        y = cx.with_shape(y, target)?;
    }
    Ok(vec![y])
}

/// Columns of patches added up where they overlap.
pub(crate) fn col2im(cx: &mut Cx) -> Res<Vec<Val>> {
    let [x, image, block] = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    let name = cx.name.clone();
    let (image, block) = (cx.sizes(image, &name)?, cx.sizes(block, &name)?);
    let (n, shape) = (image.len(), cx.shape(x));
    if n == 0 || block.len() != n || shape.len() != 3 {
        return invalid(format!("columns of type {}, {n} extents of images and {} of blocks", cx.ty(x), block.len()));
    }
    let (strides, dilations) = (cx.ints_of("strides", n, 1)?, cx.ints_of("dilations", n, 1)?);
    let pads = cx.ints_of("pads", 2 * n, 0)?;
    if strides.iter().chain(&dilations).any(|v| *v < 1) {
        return invalid(format!("strides {strides:?}, dilations {dilations:?}"));
    }
    let canvas: Vec<Dim> = (0..n).map(|i| image[i].clone() + Dim::from(pads[i] + pads[n + i])).collect();
    let blocks: Vec<Dim> = (0..n)
        .map(|i| {
            let reach = (block[i].clone() - Dim::one()) * Dim::from(dilations[i]) + Dim::one();
            (canvas[i].clone() - reach).div(&Dim::from(strides[i])) + Dim::one()
        })
        .collect();
    let taps: Dim = block.iter().cloned().product();
    let planes = shape[0].clone() * shape[1].div(&taps);
    // Where on the padded image each element of a column goes.
    let mut at: Option<Val> = None;
    for i in 0..n {
        let tap = steps(cx, &block[i], i, 2 * n, dilations[i])?;
        let start = steps(cx, &blocks[i], n + i, 2 * n, strides[i])?;
        let along = cx.pointwise(ScalarFn::Add, &[tap, start])?;
        at = Some(match at {
            Some(at) => {
                let extent = cx.known_dims(DType::I64, &[], vec![canvas[i].clone()]);
                let row = cx.pointwise(ScalarFn::Mul, &[at, extent])?;
                cx.pointwise(ScalarFn::Add, &[row, along])?
            }
            None => along,
        });
    }
    let Some(at) = at else { return invalid("an image without axes") };
    let length = taps.clone() * shape[2].clone();
    let at = cx.broadcast_to(at, &[block.clone(), blocks].concat())?;
    let at = cx.reshape(at, vec![Dim::one(), length.clone()])?;
    let at = cx.broadcast_to(at, &[planes.clone(), length.clone()])?;
    let columns = cx.reshape(x, vec![planes.clone(), length])?;
    let zero = cx.scalar_like(x, 0.0);
    let zeros = cx.broadcast_to(zero, &[planes, canvas.iter().cloned().product()])?;
    let y = cx.emit(Op::ScatterElements { axis: 1, f: ScatterFn::Add }, &[zeros, at, columns])?;
    let lead = [shape[0].clone(), shape[1].div(&taps)];
    let y = cx.reshape(y, [&lead, canvas.as_slice()].concat())?;
    let starts = [0, 0].into_iter().chain(pads[..n].iter().copied()).map(Dim::from).collect();
    let sizes = [&lead, image.as_slice()].concat();
    Ok(vec![cx.emit(Op::Slice { starts, sizes, steps: vec![1; n + 2] }, &[y])?])
}
