//! Normalisations and softmax.
use super::reduce::{drop_axes, mean, reduce};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, ScalarFn::*, attr::ReduceFn};

/// A vector along one axis of a value of `rank` axes.
fn along(b: &mut Builder, v: Val, axis: usize, rank: usize) -> Res<Val> {
    let mut shape = vec![Dim::one(); rank];
    shape[axis] = b.ty(v).count();
    b.reshape(v, shape)
}

/// `x * scale + bias` with both along `axis`.
fn affine(b: &mut Builder, x: Val, scale: Option<Val>, bias: Option<Val>, axis: usize) -> Res<Val> {
    let rank = b.rank(x);
    let mut y = x;
    for (v, f) in [(scale, Mul), (bias, Add)] {
        if let Some(v) = v {
            let v = along(b, v, axis, rank)?;
            y = b.pointwise(f, &[y, v])?;
        }
    }
    Ok(y)
}

/// One multiply and one add a channel, so that they fold into a convolution before them.
pub(crate) fn batch(cx: &mut Cx) -> Res<Vec<Val>> {
    let training = cx.flag("training_mode", false)?;
    if (1..5).any(|i| cx.wants(i)) && (!training || cx.since < 14) {
        return missing("training mode");
    }
    if cx.since < 9 && !cx.flag("spatial", true)? {
        return missing("statistics per element (`spatial=0`)");
    }
    let x = cx.arg(0)?;
    let [scale, bias, m, var] = [cx.arg(1)?, cx.arg(2)?, cx.arg(3)?, cx.arg(4)?];
    let dtype = cx.dtype(x);
    if cx.rank(x) < 2 {
        return invalid(format!("input of type {}", cx.ty(x)));
    }
    // Statistics are combined in f32 at least.
    let wide = |cx: &mut Cx, v: Val| cx.cast(v, if dtype == DType::F64 { DType::F64 } else { DType::F32 });
    let [scale, bias, mut m, mut var] = [wide(cx, scale)?, wide(cx, bias)?, wide(cx, m)?, wide(cx, var)?];
    let mut running = vec![];
    if training {
        let x = wide(cx, x)?;
        let own = batch_statistics(cx, x)?;
        let momentum = cx.float("momentum", f64::from(0.9f32))?;
        for (given, own, i) in [(m, own[0], 3), (var, own[1], 4)] {
            let kept = cx.with_number(Mul, given, momentum)?;
            let new = cx.with_number(Mul, own, 1.0 - momentum)?;
            let v = cx.pointwise(Add, &[kept, new])?;
            let like = cx.arg(i)?;
            let like = cx.dtype(like);
            running.push(cx.cast(v, like)?);
        }
        [m, var] = own;
    }
    let epsilon = cx.float("epsilon", 1e-5)?;
    let var = cx.with_number(Add, var, epsilon)?;
    let deviation = cx.map(Sqrt, &[var])?;
    let factor = cx.map(Div, &[scale, deviation])?;
    let shift = cx.map(Mul, &[m, factor])?;
    let shift = cx.map(Sub, &[bias, shift])?;
    // Narrow floats are rounded once, at the end.
    let work = cx.dtype(factor);
    let x = cx.cast(x, work)?;
    let y = affine(cx, x, Some(factor), Some(shift), 1)?;
    let y = cx.cast(y, dtype)?;
    Ok([vec![y], running].concat())
}

/// Mean and variance of each channel, vectors.
fn batch_statistics(b: &mut Builder, x: Val) -> Res<[Val; 2]> {
    let axes: Vec<usize> = (0..b.rank(x)).filter(|i| *i != 1).collect();
    let m = mean(b, x, &axes)?;
    let d = b.pointwise(Sub, &[x, m])?;
    let square = b.map(Mul, &[d, d])?;
    let var = mean(b, square, &axes)?;
    Ok([drop_axes(b, m, &axes)?, drop_axes(b, var, &axes)?])
}

/// `(x - mean) / sqrt(variance + epsilon)` over axes: the result, the mean and the reciprocal deviation.
pub(crate) fn standardize(b: &mut Builder, x: Val, axes: &[usize], epsilon: f64) -> Res<[Val; 3]> {
    let m = mean(b, x, axes)?;
    let d = b.pointwise(Sub, &[x, m])?;
    let square = b.map(Mul, &[d, d])?;
    let var = mean(b, square, axes)?;
    let var = b.with_number(Add, var, epsilon)?;
    let inv = b.map(Rsqrt, &[var])?;
    Ok([b.pointwise(Mul, &[d, inv])?, m, inv])
}

/// Statistics in f32 for narrower floats.
fn stash(cx: &Cx, x: Val) -> Res<DType> {
    let dtype = cx.dtype(x);
    Ok(if dtype.bits() < 32 && cx.int("stash_type", 1)? == 1 { DType::F32 } else { dtype })
}

pub(crate) fn layer(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let dtype = cx.dtype(x);
    let axis = cx.axis(cx.int("axis", -1)?, cx.rank(x))?;
    let axes: Vec<usize> = (axis..cx.rank(x)).collect();
    let epsilon = cx.float("epsilon", 1e-5)?;
    let work = stash(cx, x)?;
    let wide = cx.cast(x, work)?;
    let [y, m, inv] = standardize(cx, wide, &axes, epsilon)?;
    let mut y = cx.cast(y, dtype)?;
    for (i, f) in [(1, Mul), (2, Add)] {
        if let Some(v) = cx.opt(i) {
            let v = cx.cast(v, dtype)?;
            y = cx.pointwise(f, &[y, v])?;
        }
    }
    Ok(vec![y, m, inv])
}

pub(crate) fn rms(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let dtype = cx.dtype(x);
    let axis = cx.axis(cx.int("axis", -1)?, cx.rank(x))?;
    let axes: Vec<usize> = (axis..cx.rank(x)).collect();
    let epsilon = cx.float("epsilon", 1e-5)?;
    let work = stash(cx, x)?;
    let wide = cx.cast(x, work)?;
    let [y, inv] = by_root_mean_square(cx, wide, &axes, epsilon)?;
    let y = cx.cast(y, dtype)?;
    let scale = cx.arg(1)?;
    let scale = cx.cast(scale, dtype)?;
    Ok(vec![cx.pointwise(Mul, &[y, scale])?, inv])
}

/// `x / sqrt(mean(x^2) + epsilon)` over axes: the result, and what x is multiplied by.
pub(crate) fn by_root_mean_square(b: &mut Builder, x: Val, axes: &[usize], epsilon: f64) -> Res<[Val; 2]> {
    let square = b.map(Mul, &[x, x])?;
    let m = mean(b, square, axes)?;
    let m = b.with_number(Add, m, epsilon)?;
    let inv = b.map(Rsqrt, &[m])?;
    Ok([b.pointwise(Mul, &[x, inv])?, inv])
}

pub(crate) fn instance(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    if cx.rank(x) < 3 {
        return invalid(format!("input of type {}", cx.ty(x)));
    }
    let axes: Vec<usize> = (2..cx.rank(x)).collect();
    let epsilon = cx.float("epsilon", 1e-5)?;
    let [y, ..] = standardize(cx, x, &axes, epsilon)?;
    let (scale, bias) = (cx.arg(1)?, cx.arg(2)?);
    Ok(vec![affine(cx, y, Some(scale), Some(bias), 1)?])
}

pub(crate) fn group(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let (dtype, shape) = (cx.dtype(x), cx.shape(x));
    let groups = cx.int("num_groups", 0)?;
    if shape.len() < 2 || groups < 1 {
        return invalid(format!("{groups} groups of {}", cx.ty(x)));
    }
    let each = shape[1].div(&Dim::from(groups));
    let rest: Dim = shape[2..].iter().cloned().product();
    let work = stash(cx, x)?;
    let wide = cx.cast(x, work)?;
    let split = cx.reshape(wide, vec![shape[0].clone(), Dim::from(groups), each.clone() * rest])?;
    let epsilon = cx.float("epsilon", 1e-5)?;
    let [y, ..] = standardize(cx, split, &[2], epsilon)?;
    let (scale, bias) = (cx.arg(1)?, cx.arg(2)?);
    if cx.since < 21 {
        // One scale and bias a group.
        let y = cx.cast(y, dtype)?;
        let y = affine(cx, y, Some(scale), Some(bias), 1)?;
        return Ok(vec![cx.reshape(y, shape)?]);
    }
    let y = cx.reshape(y, shape)?;
    let y = cx.cast(y, dtype)?;
    Ok(vec![affine(cx, y, Some(scale), Some(bias), 1)?])
}

pub(crate) fn mean_variance(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axes = cx.ints_opt("axes")?.unwrap_or(&[0, 2, 3]);
    let axes = cx.axes(axes, cx.rank(x))?;
    let m = mean(cx, x, &axes)?;
    let d = cx.pointwise(Sub, &[x, m])?;
    let square = cx.map(Mul, &[d, d])?;
    let var = mean(cx, square, &axes)?;
    let deviation = cx.map(Sqrt, &[var])?;
    let deviation = cx.with_number(Add, deviation, 1e-9)?;
    Ok(vec![cx.pointwise(Div, &[d, deviation])?])
}

pub(crate) fn lp(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axis = cx.axis(cx.int("axis", -1)?, cx.rank(x))?;
    let norm = match cx.int("p", 2)? {
        1 => {
            let a = cx.map(Abs, &[x])?;
            reduce(cx, ReduceFn::Sum, a, &[axis])?
        }
        2 => {
            let square = cx.map(Mul, &[x, x])?;
            let sum = reduce(cx, ReduceFn::Sum, square, &[axis])?;
            cx.map(Sqrt, &[sum])?
        }
        p => return invalid(format!("p is {p}")),
    };
    // A zero vector stays zero.
    let zero = cx.with_number(Eq, norm, 0.0)?;
    let one = cx.scalar_like(x, 1.0);
    let norm = cx.pointwise(Select, &[zero, one, norm])?;
    Ok(vec![cx.pointwise(Div, &[x, norm])?])
}

/// The axes that softmax normalises over: all from `axis` on before operator set 13, one since.
fn softmax_axes(cx: &Cx, x: Val) -> Res<Vec<usize>> {
    let rank = cx.rank(x);
    if rank == 0 {
        return Ok(vec![]);
    }
    if cx.since < 13 { Ok((cx.axis(cx.int("axis", 1)?, rank + 1)?..rank).collect()) } else { Ok(vec![cx.axis(cx.int("axis", -1)?, rank)?]) }
}

/// `e^(x - max x) / sum` over axes.
pub(crate) fn softmax_over(b: &mut Builder, x: Val, axes: &[usize]) -> Res<Val> {
    let top = reduce(b, ReduceFn::Max, x, axes)?;
    let shifted = b.pointwise(Sub, &[x, top])?;
    let e = b.map(Exp, &[shifted])?;
    let sum = reduce(b, ReduceFn::Sum, e, axes)?;
    b.pointwise(Div, &[e, sum])
}

pub(crate) fn softmax(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axes = softmax_axes(cx, x)?;
    Ok(vec![softmax_over(cx, x, &axes)?])
}

/// `x - max x - log(sum of e^(x - max x))` over axes.
pub(crate) fn log_softmax_over(b: &mut Builder, x: Val, axes: &[usize]) -> Res<Val> {
    let top = reduce(b, ReduceFn::Max, x, axes)?;
    let shifted = b.pointwise(Sub, &[x, top])?;
    let e = b.map(Exp, &[shifted])?;
    let sum = reduce(b, ReduceFn::Sum, e, axes)?;
    let log = b.map(Log, &[sum])?;
    b.pointwise(Sub, &[shifted, log])
}

pub(crate) fn log_softmax(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axes = softmax_axes(cx, x)?;
    Ok(vec![log_softmax_over(cx, x, &axes)?])
}

/// 1 at the first maximum, 0 elsewhere.
pub(crate) fn hardmax(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let (dtype, shape) = (cx.dtype(x), cx.shape(x));
    let axes = softmax_axes(cx, x)?;
    let Some(&first) = axes.first() else { return missing("Hardmax of a scalar") };
    // Several axes are one, flattened.
    let rest: Dim = shape[first..first + axes.len()].iter().cloned().product();
    let mut flat = shape[..first].to_vec();
    flat.push(rest);
    flat.extend_from_slice(&shape[first + axes.len()..]);
    let y = cx.reshape(x, flat.clone())?;
    let best = cx.emit(Op::ArgReduce { f: ReduceFn::Max, axis: first, last: false }, &[y])?;
    let at = cx.emit(Op::Iota { dtype: DType::I64, shape: flat, axis: first }, &[])?;
    let hit = cx.pointwise(Eq, &[at, best])?;
    let hit = cx.cast(hit, dtype)?;
    Ok(vec![cx.reshape(hit, shape)?])
}
