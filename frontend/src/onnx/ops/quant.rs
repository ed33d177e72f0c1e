//! Quantisation, spelled in arithmetic whose result is exact.
use super::{cast::convert, conv::centred, linear};
use crate::onnx::{
    build::{Builder, Res, Val, invalid},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, ScalarFn::*, attr::ReduceFn};

/// A scale or zero point at the shape of `x`: one number, one an index of `axis`, or one a block along it.
fn spread(cx: &mut Cx, v: Val, x: Val) -> Res<Val> {
    let shape = cx.shape(x);
    let count = cx.ty(v).count();
    if cx.rank(v) == 0 || count.is(1) {
        let v = cx.reshape(v, vec![])?;
        return cx.broadcast_to(v, &shape);
    }
    if shape.is_empty() {
        return invalid(format!("a scale of type {} for a scalar", cx.ty(v)));
    }
    let axis = cx.axis(cx.int("axis", 1)?, shape.len())?;
    let block = cx.int("block_size", 0)?;
    if block == 0 {
        let mut own = vec![Dim::one(); shape.len()];
        own[axis] = cx.same_extent(&shape[axis], &count)?;
        let v = cx.reshape(v, own)?;
        return cx.broadcast_to(v, &shape);
    }
    let mut own = cx.shape(v);
    if block < 0 || own.len() != shape.len() {
        return invalid(format!("blocks of {block}, a scale of type {}", cx.ty(v)));
    }
    // (blocks) -> (blocks, 1) -> (blocks, block) -> (blocks * block), cut to the extent.
    let blocks = own[axis].clone();
    own.insert(axis + 1, Dim::one());
    let v = cx.reshape(v, own.clone())?;
    own[axis + 1] = Dim::from(block);
    let v = cx.emit(Op::Broadcast { shape: own.clone() }, &[v])?;
    own.remove(axis + 1);
    own[axis] = blocks * Dim::from(block);
    let v = cx.reshape(v, own.clone())?;
    if own[axis] == shape[axis] { Ok(v) } else { cx.slice_axis(v, axis, Dim::ZERO, shape[axis].clone()) }
}

/// Whether a constant is zero throughout.
fn is_zero(b: &Builder, v: Val) -> bool {
    b.tensor(v).is_some_and(|t| t.to_f64().iter().all(|v| *v == 0.0))
}

/// The dtype that an attribute names; 0 leaves it open.
fn named(cx: &Cx, attribute: &str) -> Res<Option<DType>> {
    if cx.int(attribute, 0)? == 0 { Ok(None) } else { cx.dtype_attr(attribute) }
}

/// Round a float to the nearest integer, ties to even, saturating, as `dtype`.
pub(crate) fn saturate(b: &mut Builder, x: Val, zero: Option<Val>, dtype: DType) -> Res<Val> {
    if dtype.is_float() {
        return convert(b, x, dtype, true);
    }
    let mut y = b.map(Round, &[x])?;
    if let Some(zero) = zero {
        let zero = b.cast(zero, b.dtype(y))?;
        y = b.pointwise(Add, &[y, zero])?;
    }
    let (least, most) = dtype.int_range();
    let y = b.with_number(Max, y, least as f64)?;
    let y = b.with_number(Min, y, most as f64)?;
    b.cast(y, dtype)
}

pub(crate) fn quantize(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, scale) = (cx.arg(0)?, cx.arg(1)?);
    let zero = cx.opt(2);
    let to = match (zero, named(cx, "output_dtype")?) {
        (Some(zero), _) => cx.dtype(zero),
        (None, Some(to)) => to,
        (None, None) => DType::U8,
    };
    // The quotient is rounded to the type of the scale before it is rounded to an integer.
    let precision = named(cx, "precision")?.unwrap_or(cx.dtype(scale));
    if !precision.is_float() {
        return invalid(format!("division in {precision}"));
    }
    let (wide, scale) = (cx.cast(x, precision)?, cx.cast(scale, precision)?);
    let scale = spread(cx, scale, x)?;
    let y = cx.map(Div, &[wide, scale])?;
    if to.is_float() {
        let saturate = cx.flag("saturate", true)?;
        return Ok(vec![convert(cx, y, to, saturate)?]);
    }
    let y = if precision.bits() < 32 { cx.cast(y, DType::F32)? } else { y };
    let zero = match zero.filter(|z| !is_zero(cx, *z)) {
        Some(zero) => {
            let zero = cx.cast(zero, DType::F32)?;
            Some(spread(cx, zero, x)?)
        }
        None => None,
    };
    Ok(vec![saturate(cx, y, zero, to)?])
}

pub(crate) fn dequantize(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, scale) = (cx.arg(0)?, cx.arg(1)?);
    let to = match named(cx, "output_dtype")? {
        Some(to) => to,
        None => cx.dtype(scale),
    };
    // Weights of bytes stay bytes, for products of integers.
    let bytes = cx.dtype(x).is_int() && cx.dtype(x).bits() <= 8;
    let mut y = if bytes { cx.cast_kept(x, DType::F32)? } else { cx.cast(x, DType::F32)? };
    if let Some(zero) = cx.opt(2)
        && !is_zero(cx, zero)
    {
        let zero = cx.cast(zero, DType::F32)?;
        let zero = spread(cx, zero, x)?;
        y = cx.map(Sub, &[y, zero])?;
    }
    let scale = cx.cast(scale, DType::F32)?;
    let scale = spread(cx, scale, x)?;
    let y = cx.map(Mul, &[y, scale])?;
    Ok(vec![cx.cast(y, to)?])
}

/// Operands that must be floats of one range: results are y, its scale and its zero point.
pub(crate) fn dynamic(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axes: Vec<usize> = (0..cx.rank(x)).collect();
    let mut bound = |f: ReduceFn, other| -> Res<Val> {
        let v = cx.emit(Op::Reduce { f, axes: axes.clone() }, &[x])?;
        let v = cx.reshape(v, vec![])?;
        cx.with_number(other, v, 0.0)
    };
    let (most, least) = (bound(ReduceFn::Max, Max)?, bound(ReduceFn::Min, Min)?);
    let range = cx.map(Sub, &[most, least])?;
    let scale = cx.with_number(Div, range, 255.0)?;
    let zero = cx.map(Div, &[least, scale])?;
    let zero = cx.map(Neg, &[zero])?;
    let zero = saturate(cx, zero, None, DType::U8)?;
    let shape = cx.shape(x);
    let wide = cx.broadcast_to(scale, &shape)?;
    let y = cx.map(Div, &[x, wide])?;
    let y = saturate(cx, y, Some(zero), DType::U8)?;
    Ok(vec![y, scale, zero])
}

/// An i32 sum of products times a scale, rounded to the type of `zero`.
pub(crate) fn requantize(b: &mut Builder, sum: Val, scale: Val, zero: Val) -> Res<Val> {
    let sum = b.cast(sum, DType::F32)?;
    let scale = b.cast(scale, DType::F32)?;
    let y = b.pointwise(Mul, &[sum, scale])?;
    let to = b.dtype(zero);
    let zero = b.reshape(zero, vec![])?;
    saturate(b, y, Some(zero), to)
}

pub(crate) fn matmul_integer(cx: &mut Cx) -> Res<Vec<Val>> {
    let (a, b) = (cx.arg(0)?, cx.arg(1)?);
    let (za, zb) = (cx.opt(2), cx.opt(3));
    // Zero points of a run along its rows, those of b along its columns.
    let (row, column) = (cx.rank(a).saturating_sub(2), cx.rank(b).saturating_sub(1));
    let a = centred(cx, a, za, row)?;
    let b = centred(cx, b, zb, column)?;
    Ok(vec![linear::matmul(cx, a, b, DType::I32)?])
}

/// Operands: a, its scale and zero point, b, its scale and zero point, y's scale and zero point.
pub(crate) fn qlinear_matmul(cx: &mut Cx) -> Res<Vec<Val>> {
    let (a, b) = (cx.arg(0)?, cx.arg(3)?);
    let (za, zb) = (cx.opt(2), cx.opt(5));
    let (row, column) = (cx.rank(a).saturating_sub(2), cx.rank(b).saturating_sub(1));
    let a = centred(cx, a, za, row)?;
    let b = centred(cx, b, zb, column)?;
    let y = linear::matmul(cx, a, b, DType::I32)?;
    let [mut sa, sb, sy, zy] = [cx.arg(1)?, cx.arg(4)?, cx.arg(6)?, cx.arg(7)?];
    if cx.rank(sa) == 1 && !cx.ty(sa).count().is(1) {
        let rows = cx.ty(sa).count();
        sa = cx.reshape(sa, vec![rows, Dim::one()])?;
    }
    let scale = cx.pointwise(Mul, &[sa, sb])?;
    let scale = cx.pointwise(Div, &[scale, sy])?;
    let scale = if cx.ty(scale).count().is(1) { cx.reshape(scale, vec![])? } else { scale };
    Ok(vec![requantize(cx, y, scale, zy)?])
}
