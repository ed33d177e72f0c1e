//! Operators whose results are as long as data says: `Compress`, `Unique`, `NonMaxSuppression`; and `ReverseSequence`.
use super::dynamic::{choose, combine, count_to};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    DType, Dim, Op, Scalar, ScalarFn, Tensor,
    attr::{ReduceFn, ScatterFn},
};

/// Positions of the true elements of a vector, as a vector.
fn positions(b: &mut Builder, holds: Val, name: &str) -> Res<Val> {
    let sym = b.data_symbol(name, None);
    let found = b.emit(Op::NonZero { sym }, &[holds])?;
    let n = b.ty(found).count();
    b.reshape(found, vec![n])
}

fn gather(b: &mut Builder, x: Val, at: Val) -> Res<Val> {
    b.emit(Op::Gather { axis: 0 }, &[x, at])
}

pub(crate) fn compress(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, holds, name) = (cx.arg(0)?, cx.arg(1)?, cx.name.clone());
    let (x, axis) = match cx.int_opt("axis")? {
        Some(axis) => (x, cx.axis(axis, cx.rank(x))?),
        None => {
            let n = cx.ty(x).count();
            (cx.reshape(x, vec![n])?, 0)
        }
    };
    let at = positions(cx, holds, &name)?;
    Ok(vec![cx.emit(Op::Gather { axis }, &[x, at])?])
}

pub(crate) fn reverse_sequence(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, lens) = (cx.arg(0)?, cx.arg(1)?);
    let shape = cx.shape(x);
    let (time, batch) = (cx.axis(cx.int("time_axis", 0)?, shape.len())?, cx.axis(cx.int("batch_axis", 1)?, shape.len())?);
    if time == batch {
        return invalid(format!("axis {time} is both time and batch"));
    }
    let mut along = vec![Dim::one(); shape.len()];
    along[batch] = shape[batch].clone();
    let lens = cx.cast(lens, DType::I64)?;
    let lens = cx.reshape(lens, along)?;
    let at = cx.emit(Op::Iota { dtype: DType::I64, shape: shape.clone(), axis: time }, &[])?;
    let early = cx.pointwise(ScalarFn::Lt, &[at, lens])?;
    let last = cx.with_number(ScalarFn::Sub, lens, 1.0)?;
    let back = cx.pointwise(ScalarFn::Sub, &[last, at])?;
    let at = choose(cx, early, back, at)?;
    Ok(vec![cx.emit(Op::GatherElements { axis: time }, &[x, at])?])
}

/// Rows of at most this many columns are sorted without a loop.
const UNROLLED: i64 = 4;

/// The order that sorts the rows of a matrix, equals by position: by the last column first, as sorting is stable.
fn row_order(cx: &mut Cx, rows: Val) -> Res<Val> {
    let shape = cx.shape(rows);
    let [n, m] = shape.as_slice() else { return invalid(format!("rows of {}", cx.ty(rows))) };
    let (n, m) = (n.clone(), m.clone());
    let count = n.clone() * m.clone();
    let flat = cx.reshape(rows, vec![count])?;
    let width = cx.known_dims(DType::I64, &[], vec![m.clone()]);
    let by = |b: &mut Builder, order: Val, column: Val| -> Res<Val> {
        let at = b.pointwise(ScalarFn::Mul, &[order, width])?;
        let at = b.pointwise(ScalarFn::Add, &[at, column])?;
        let keys = gather(b, flat, at)?;
        let sorted = b.emit_all(Op::TopK { axis: 0, k: n.clone(), largest: false }, &[keys], vec![])?;
        gather(b, order, sorted[1])
    };
    let mut order = count_to(cx, &n)?;
    if let Some(m) = m.as_const().filter(|m| *m <= UNROLLED) {
        for column in (0..m).rev() {
            let column = cx.scalar(DType::I64, column as f64);
            order = by(cx, order, column)?;
        }
        return Ok(order);
    }
    let last = cx.known_dims(DType::I64, &[], vec![m - Dim::one()]);
    let go = cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
    let out = cx.repeat(width, go, &[order], &mut |b, i, carried| {
        let column = b.map(ScalarFn::Sub, &[last, i])?;
        let go = b.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
        Ok(vec![go, by(b, carried[0], column)?])
    })?;
    Ok(out[0])
}

pub(crate) fn unique(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, name) = (cx.arg(0)?, cx.name.clone());
    let (shape, dtype) = (cx.shape(x), cx.dtype(x));
    let axis = match cx.int_opt("axis")? {
        Some(axis) => Some(cx.axis(axis, shape.len())?),
        None => None,
    };
    let x = if dtype == DType::Bool { cx.cast(x, DType::U8)? } else { x };
    // Rows to tell apart: the elements, or the slices along an axis.
    let (rows, rest, perm) = match axis {
        None => {
            let n = cx.ty(x).count();
            (cx.reshape(x, vec![n, Dim::one()])?, vec![], vec![0])
        }
        Some(axis) => {
            let perm: Vec<usize> = std::iter::once(axis).chain((0..shape.len()).filter(|a| *a != axis)).collect();
            let x = cx.transpose(x, &perm)?;
            let rest = cx.shape(x)[1..].to_vec();
            let m: Dim = rest.iter().cloned().product();
            (cx.reshape(x, vec![shape[axis].clone(), m])?, rest, perm)
        }
    };
    let n = cx.shape(rows)[0].clone();
    let order = row_order(cx, rows)?;
    let sorted = gather(cx, rows, order)?;
    // A row starts a group where it differs from the one before it.
    let at = count_to(cx, &n)?;
    let before = cx.with_number(ScalarFn::Sub, at, 1.0)?;
    let before = cx.with_number(ScalarFn::Max, before, 0.0)?;
    let previous = gather(cx, sorted, before)?;
    let differs = cx.map(ScalarFn::Ne, &[sorted, previous])?;
    let differs = cx.cast(differs, DType::U8)?;
    let differs = combine(cx, ReduceFn::Max, differs, 1)?;
    let differs = cx.cast(differs, DType::Bool)?;
    let first = cx.with_number(ScalarFn::Eq, at, 0.0)?;
    let starts_here = cx.map(ScalarFn::Or, &[first, differs])?;
    let starts = positions(cx, starts_here, &name)?;
    let found = cx.shape(starts)[0].clone();
    let mut y = gather(cx, sorted, starts)?;
    let mut indices = gather(cx, order, starts)?;
    let end = cx.known_dims(DType::I64, &[1], vec![n.clone()]);
    let bounds = cx.emit(Op::Concat { axis: 0 }, &[starts, end])?;
    let next = cx.slice_axis(bounds, 0, Dim::one(), found.clone())?;
    let mut counts = cx.map(ScalarFn::Sub, &[next, starts])?;
    let group = cx.cast(starts_here, DType::I64)?;
    let group = cx.emit(Op::Cumulative { f: ReduceFn::Sum, axis: 0, exclusive: false, reverse: false }, &[group])?;
    let group = cx.with_number(ScalarFn::Sub, group, 1.0)?;
    let scatter = |b: &mut Builder, n: &Dim, at: Val, v: Val| -> Res<Val> {
        let zero = b.scalar(DType::I64, 0.0);
        let zeros = b.broadcast_to(zero, std::slice::from_ref(n))?;
        b.emit(Op::ScatterElements { axis: 0, f: ScatterFn::Replace }, &[zeros, at, v])
    };
    let mut inverse = scatter(cx, &n, order, group)?;
    if !cx.flag("sorted", true)? {
        let by_first = cx.emit_all(Op::TopK { axis: 0, k: found.clone(), largest: false }, &[indices], vec![])?;
        indices = by_first[0];
        y = gather(cx, y, by_first[1])?;
        counts = gather(cx, counts, by_first[1])?;
        let rank = count_to(cx, &found)?;
        let rank = scatter(cx, &found, by_first[1], rank)?;
        inverse = gather(cx, rank, inverse)?;
    }
    let mut full = vec![found];
    full.extend(rest);
    let y = cx.reshape(y, full)?;
    let mut back = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(to, from)| back[*from] = to);
    let y = cx.transpose(y, &back)?;
    Ok(vec![cx.cast(y, dtype)?, indices, inverse, counts])
}

/// The corners of boxes: low and high along both axes, and the area; each of the shape of `boxes` without its last axis.
fn corners(cx: &mut Cx, boxes: Val, centers: bool) -> Res<Vec<Val>> {
    let rank = cx.rank(boxes);
    let mut parts = vec![];
    for i in 0..4i64 {
        let part = cx.slice_axis(boxes, rank - 1, Dim::from(i), Dim::one())?;
        parts.push(super::reduce::drop_axes(cx, part, &[rank - 1])?);
    }
    let mut out = vec![];
    for i in 0..2 {
        let (a, b) = (parts[i], parts[i + 2]);
        if centers {
            let half = cx.with_number(ScalarFn::Div, b, 2.0)?;
            out.push(cx.map(ScalarFn::Sub, &[a, half])?);
            out.push(cx.map(ScalarFn::Add, &[a, half])?);
        } else {
            out.push(cx.map(ScalarFn::Min, &[a, b])?);
            out.push(cx.map(ScalarFn::Max, &[a, b])?);
        }
    }
    let (height, width) = (cx.map(ScalarFn::Sub, &[out[1], out[0]])?, cx.map(ScalarFn::Sub, &[out[3], out[2]])?);
    out.push(cx.map(ScalarFn::Mul, &[height, width])?);
    Ok(out)
}

/// Which of the boxes (rows of `[batch, class, box]`, best first) overlap box `i` of their row by more than `most`.
fn overlap(b: &mut Builder, sides: &[Val], i: Val, most: Val) -> Res<Val> {
    let at = b.reshape(i, vec![Dim::one()])?;
    let own = sides.iter().map(|v| b.emit(Op::Gather { axis: 2 }, &[*v, at])).collect::<Res<Vec<_>>>()?;
    let side = |b: &mut Builder, k: usize| -> Res<Val> {
        let low = b.pointwise(ScalarFn::Max, &[own[k], sides[k]])?;
        let high = b.pointwise(ScalarFn::Min, &[own[k + 1], sides[k + 1]])?;
        let length = b.map(ScalarFn::Sub, &[high, low])?;
        b.with_number(ScalarFn::Max, length, 0.0)
    };
    let (height, width) = (side(b, 0)?, side(b, 2)?);
    let shared = b.map(ScalarFn::Mul, &[height, width])?;
    let both = b.pointwise(ScalarFn::Add, &[own[4], sides[4]])?;
    let both = b.map(ScalarFn::Sub, &[both, shared])?;
    let ratio = b.map(ScalarFn::Div, &[shared, both])?;
    b.pointwise(ScalarFn::Gt, &[ratio, most])
}

pub(crate) fn non_max_suppression(cx: &mut Cx) -> Res<Vec<Val>> {
    let (boxes, scores, name) = (cx.arg(0)?, cx.arg(1)?, cx.name.clone());
    let shape = cx.shape(scores);
    if shape.len() != 3 || cx.rank(boxes) != 3 {
        return invalid(format!("boxes {} and scores {}", cx.ty(boxes), cx.ty(scores)));
    }
    if !cx.shape(boxes)[2].is(4) {
        return missing(format!("boxes of type {}", cx.ty(boxes)));
    }
    let scalar = |cx: &mut Cx, i: usize, dtype: DType| -> Res<Option<Val>> {
        let Some(v) = cx.opt(i) else { return Ok(None) };
        let v = cx.cast(v, dtype)?;
        Ok(Some(cx.reshape(v, vec![])?))
    };
    let dtype = cx.dtype(scores);
    let most = scalar(cx, 2, DType::I64)?.unwrap_or_else(|| cx.scalar(DType::I64, 0.0));
    let iou = scalar(cx, 3, dtype)?.unwrap_or_else(|| cx.scalar(dtype, 0.0));
    // Best first, of each batch and class; boxes along with their scores.
    let ranked = cx.emit_all(Op::TopK { axis: 2, k: shape[2].clone(), largest: true }, &[scores], vec![])?;
    let (score, order) = (ranked[0], ranked[1]);
    let centers = cx.flag("center_point_box", false)?;
    let one_class = [shape[0].clone(), Dim::one(), shape[2].clone()];
    let mut sides = vec![];
    for v in corners(cx, boxes, centers)? {
        let v = cx.reshape(v, one_class.to_vec())?;
        let v = cx.broadcast_to(v, &shape)?;
        sides.push(cx.emit(Op::GatherElements { axis: 2 }, &[v, order])?);
    }
    let candidate = match scalar(cx, 4, dtype)? {
        Some(least) => cx.pointwise(ScalarFn::Gt, &[score, least])?,
        None => {
            let all = cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
            cx.broadcast_to(all, &shape)?
        }
    };
    // Candidates come first in each row: there is nothing to decide after the longest row of them.
    let counted = cx.cast(candidate, DType::I64)?;
    let rows = super::reduce::reduce(cx, ReduceFn::Sum, counted, &[2])?;
    let longest = super::reduce::reduce(cx, ReduceFn::Max, rows, &[0, 1, 2])?;
    let longest = cx.reshape(longest, vec![])?;
    let longest = cx.with_number(ScalarFn::Max, longest, 0.0)?;
    let zero = cx.scalar(DType::I64, 0.0);
    let taken = cx.broadcast_to(zero, &[shape[0].clone(), shape[1].clone(), Dim::one()])?;
    let go = cx.with_number(ScalarFn::Gt, most, 0.0)?;
    let places = cx.emit(Op::Iota { dtype: DType::I64, shape: shape.clone(), axis: 2 }, &[])?;
    let out = cx.repeat(longest, go, &[candidate, taken], &mut |b, i, carried| {
        let [keep, taken] = [carried[0], carried[1]];
        let at = b.reshape(i, vec![Dim::one()])?;
        let chosen = b.emit(Op::Gather { axis: 2 }, &[keep, at])?;
        let close = overlap(b, &sides, i, iou)?;
        let later = b.pointwise(ScalarFn::Gt, &[places, i])?;
        let drop = b.map(ScalarFn::And, &[close, later])?;
        let drop = b.pointwise(ScalarFn::And, &[drop, chosen])?;
        let stays = b.map(ScalarFn::Not, &[drop])?;
        let keep = b.map(ScalarFn::And, &[keep, stays])?;
        let chosen = b.cast(chosen, DType::I64)?;
        let taken = b.map(ScalarFn::Add, &[taken, chosen])?;
        let fewest = super::reduce::reduce(b, ReduceFn::Min, taken, &[0, 1, 2])?;
        let fewest = b.reshape(fewest, vec![])?;
        Ok(vec![b.map(ScalarFn::Lt, &[fewest, most])?, keep, taken])
    })?;
    // Of those left, the first so many of each row.
    let keep = out[0];
    let rank = cx.cast(keep, DType::I64)?;
    let rank = cx.emit(Op::Cumulative { f: ReduceFn::Sum, axis: 2, exclusive: false, reverse: false }, &[rank])?;
    let early = cx.pointwise(ScalarFn::Le, &[rank, most])?;
    let keep = cx.map(ScalarFn::And, &[keep, early])?;
    let sym = cx.data_symbol(&name, None);
    let found = cx.emit(Op::NonZero { sym }, &[keep])?;
    let at = cx.transpose(found, &[1, 0])?;
    let chosen = cx.emit(Op::GatherNd { batch: 0 }, &[order, at])?;
    let n = cx.shape(chosen)[0].clone();
    let chosen = cx.reshape(chosen, vec![n, Dim::one()])?;
    let rows = cx.slice_axis(at, 1, Dim::ZERO, Dim::from(2i64))?;
    Ok(vec![cx.emit(Op::Concat { axis: 1 }, &[rows, chosen])?])
}
