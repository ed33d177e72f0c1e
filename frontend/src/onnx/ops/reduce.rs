//! Reductions, arg-reductions and running sums.
use super::dynamic;
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, ScalarFn, attr::ReduceFn};

/// Combine along sorted axes, which stay with extent 1.
pub(crate) fn reduce(b: &mut Builder, f: ReduceFn, x: Val, axes: &[usize]) -> Res<Val> {
    b.emit(Op::Reduce { f, axes: axes.to_vec() }, &[x])
}

/// The mean along axes, which stay; narrow floats are summed in f32.
pub(crate) fn mean(b: &mut Builder, x: Val, axes: &[usize]) -> Res<Val> {
    let dtype = b.dtype(x);
    let work = if dtype.is_float() && dtype.bits() < 32 { DType::F32 } else { dtype };
    let wide = b.cast(x, work)?;
    let sum = reduce(b, ReduceFn::Sum, wide, axes)?;
    let shape = b.shape(x);
    let count: Dim = axes.iter().map(|a| shape[*a].clone()).product();
    let count = b.known_dims(DType::I64, &[], vec![count]);
    let count = b.cast(count, work)?;
    let mean = b.pointwise(ScalarFn::Div, &[sum, count])?;
    b.cast(mean, dtype)
}

/// A value without axes of extent 1.
pub(crate) fn drop_axes(b: &mut Builder, x: Val, axes: &[usize]) -> Res<Val> {
    let shape = b.shape(x).into_iter().enumerate().filter(|(i, _)| !axes.contains(i)).map(|(_, d)| d).collect();
    b.reshape(x, shape)
}

/// What the reduction operators compute.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain(ReduceFn),
    Mean,
    L1,
    L2,
    LogSum,
    LogSumExp,
    SumSquare,
}

pub(crate) fn convert(cx: &mut Cx, kind: Kind) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let rank = cx.rank(x);
    // Axes became an operand: of sums in operator set 13, of the others in 18.
    let as_operand = cx.since >= if kind == Kind::Plain(ReduceFn::Sum) { 13 } else { 18 };
    if let Some(axes) = cx.data(1).filter(|_| as_operand) {
        let (keep, name) = (cx.flag("keepdims", true)?, cx.name.clone());
        return Ok(vec![dynamic::reduce(cx, x, axes, keep, &name, &|b, x, axes| over(b, kind, x, axes))?]);
    }
    let given = if as_operand { cx.const_ints(1, "reduction axes")? } else { cx.ints_opt("axes")?.map(<[i64]>::to_vec) };
    let given = given.unwrap_or_default();
    let axes = match given.is_empty() {
        true if as_operand && cx.flag("noop_with_empty_axes", false)? => vec![],
        true => (0..rank).collect(),
        false => cx.axes(&given, rank)?,
    };
    let out = over(cx, kind, x, &axes)?;
    Ok(vec![if cx.flag("keepdims", true)? { out } else { drop_axes(cx, out, &axes)? }])
}

/// [`apply`] to any element type: bools are combined as small integers.
fn over(b: &mut Builder, kind: Kind, x: Val, axes: &[usize]) -> Res<Val> {
    if b.dtype(x) != DType::Bool {
        return apply(b, kind, x, axes);
    }
    let wide = b.cast(x, DType::U8)?;
    let out = apply(b, kind, wide, axes)?;
    b.cast(out, DType::Bool)
}

fn apply(b: &mut Builder, kind: Kind, x: Val, axes: &[usize]) -> Res<Val> {
    Ok(match kind {
        Kind::Plain(f) => reduce(b, f, x, axes)?,
        Kind::Mean => mean(b, x, axes)?,
        Kind::L1 => {
            let a = b.map(ScalarFn::Abs, &[x])?;
            reduce(b, ReduceFn::Sum, a, axes)?
        }
        Kind::L2 => {
            let sum = apply(b, Kind::SumSquare, x, axes)?;
            let dtype = b.dtype(sum);
            let wide = b.cast(sum, if dtype.is_float() { dtype } else { DType::F64 })?;
            let root = b.map(ScalarFn::Sqrt, &[wide])?;
            b.cast(root, dtype)?
        }
        Kind::LogSum => {
            let sum = reduce(b, ReduceFn::Sum, x, axes)?;
            log(b, sum)?
        }
        Kind::LogSumExp => {
            let dtype = b.dtype(x);
            let wide = b.cast(x, if dtype.is_float() { dtype } else { DType::F64 })?;
            // Shifted by the maximum, unless that is infinite, where a shift would give NaN.
            let top = reduce(b, ReduceFn::Max, wide, axes)?;
            let infinite = b.map(ScalarFn::IsInf, &[top])?;
            let zero = b.scalar_like(wide, 0.0);
            let top = b.pointwise(ScalarFn::Select, &[infinite, zero, top])?;
            let shifted = b.pointwise(ScalarFn::Sub, &[wide, top])?;
            let e = b.map(ScalarFn::Exp, &[shifted])?;
            let sum = reduce(b, ReduceFn::Sum, e, axes)?;
            let log = b.map(ScalarFn::Log, &[sum])?;
            let out = b.map(ScalarFn::Add, &[log, top])?;
            b.cast(out, dtype)?
        }
        Kind::SumSquare => {
            let square = b.map(ScalarFn::Mul, &[x, x])?;
            reduce(b, ReduceFn::Sum, square, axes)?
        }
    })
}

fn log(b: &mut Builder, x: Val) -> Res<Val> {
    let dtype = b.dtype(x);
    let wide = b.cast(x, if dtype.is_float() { dtype } else { DType::F64 })?;
    let out = b.map(ScalarFn::Log, &[wide])?;
    b.cast(out, dtype)
}

pub(crate) fn arg(cx: &mut Cx, f: ReduceFn) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axis = cx.axis(cx.int("axis", 0)?, cx.rank(x))?;
    let last = cx.flag("select_last_index", false)?;
    let out = cx.emit(Op::ArgReduce { f, axis, last }, &[x])?;
    Ok(vec![if cx.flag("keepdims", true)? { out } else { drop_axes(cx, out, &[axis])? }])
}

pub(crate) fn cumulative(cx: &mut Cx, f: ReduceFn) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let (exclusive, reverse) = (cx.flag("exclusive", false)?, cx.flag("reverse", false)?);
    let op = |axis| Op::Cumulative { f, axis, exclusive, reverse };
    if let Some(axis) = cx.data(1) {
        let name = cx.name.clone();
        return Ok(vec![dynamic::cumulative(cx, x, axis, &name, &op)?]);
    }
    let axis = match cx.known_ints(1).as_deref() {
        Some([axis]) => cx.axis(*axis, cx.rank(x))?,
        _ => return invalid("the axis operand is one integer"),
    };
    Ok(vec![cx.emit(op(axis), &[x])?])
}

pub(crate) fn top_k(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axis = cx.axis(cx.int("axis", -1)?, cx.rank(x))?;
    let largest = cx.flag("largest", true)?;
    let k = if cx.since < 10 { Dim::from(cx.int("k", 1)?) } else { count(cx, x, axis)? };
    if cx.dtype(x) == DType::Bool {
        return missing("TopK of bools");
    }
    cx.emit_all(Op::TopK { axis, k, largest }, &[x], vec![])
}

/// How many elements `TopK` gives; what data decides is held against the extent when run.
fn count(cx: &mut Cx, x: Val, axis: usize) -> Res<Dim> {
    let (k, name) = (cx.arg(1)?, cx.name.clone());
    if cx.dims(k).is_some() {
        return cx.size(k, &name);
    }
    let k = cx.cast(k, DType::I64)?;
    let k = cx.reshape(k, vec![])?;
    let extent = cx.shape(x)[axis].clone();
    let extent = cx.known_dims(DType::I64, &[], vec![extent]);
    let fits = cx.map(ScalarFn::Le, &[k, extent])?;
    dynamic::bind_one(cx, k, fits, &name)
}
