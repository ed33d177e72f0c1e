//! Conversions between element types.
use crate::onnx::{
    build::{Builder, Res, Val, invalid},
    cx::Cx,
};
use pavage_ir::{DType, Op, ScalarFn::*, minifloat::Mini};

/// Integers of a constant that are worth keeping as such.
const MANY: usize = 4096;

pub(crate) fn cast(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let Some(to) = cx.dtype_attr("to")? else { return invalid("attribute `to` is missing") };
    Ok(vec![from_node(cx, x, to)?])
}

pub(crate) fn cast_like(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, like) = (cx.arg(0)?, cx.arg(1)?);
    let to = cx.dtype(like);
    Ok(vec![from_node(cx, x, to)?])
}

fn from_node(cx: &mut Cx, x: Val, to: DType) -> Res<Val> {
    let saturate = cx.flag("saturate", true)?;
    if to == DType::F8E8M0 && cx.dtype(x) != to {
        let mode = cx.text("round_mode", "up")?;
        return power_of_two(cx, x, &mode, saturate);
    }
    convert(cx, x, to, saturate)
}

/// ONNX `Cast`. Floats become integers of less than a byte through wider ones, so what is out of range wraps; narrow floats
/// are held to their largest number when `saturate` is set.
pub(crate) fn convert(b: &mut Builder, x: Val, to: DType, saturate: bool) -> Res<Val> {
    let from = b.dtype(x);
    if from == to {
        return Ok(x);
    }
    if to.is_int() && to.is_packed() && from.is_float() {
        let x = b.cast(x, DType::I32)?;
        return b.cast(x, to);
    }
    // Weights stay packed, for passes to find.
    let many = b.ty(x).const_shape().is_some_and(|s| s.iter().product::<usize>() >= MANY);
    if to == DType::F32 && from.is_int() && from.bits() <= 8 && many {
        return b.cast_kept(x, to);
    }
    let Some(format) = Mini::of(to).filter(|_| saturate) else { return b.cast(x, to) };
    let x = if from.is_float() && !from.is_mini() { x } else { b.cast(x, DType::F32)? };
    let x = b.with_number(Min, x, format.max())?;
    let x = b.with_number(Max, x, -format.max())?;
    b.cast(x, to)
}

/// A float (positive, by the operator's contract) as a power of two, rounded up, down, or to the nearest with ties up.
fn power_of_two(b: &mut Builder, x: Val, mode: &str, saturate: bool) -> Res<Val> {
    let x = b.cast(x, DType::F32)?;
    let (least, most) = (2f64.powi(-127), 2f64.powi(127));
    let rounded = match mode {
        "nearest" => x,
        "up" | "down" => {
            // Below the largest mantissa the bits of a float are those of the power of two below it.
            let bits = b.emit(Op::BitCast { to: DType::U32 }, &[x])?;
            let step = b.scalar(DType::U32, if mode == "up" { f64::from(0x7f_ffff) } else { 0.0 });
            let mask = b.scalar(DType::U32, f64::from(0xff80_0000u32));
            let bits = b.pointwise(Add, &[bits, step])?;
            let bits = b.pointwise(And, &[bits, mask])?;
            let power = b.emit(Op::BitCast { to: DType::F32 }, &[bits])?;
            // Infinity and NaN stay; the least power is a subnormal number, of which the mask leaves nothing.
            let limit = b.scalar(DType::F32, least);
            let small = b.pointwise(Le, &[x, limit])?;
            let power = b.pointwise(Select, &[small, limit, power])?;
            let nan = b.pointwise(IsNan, &[x])?;
            b.pointwise(Select, &[nan, x, power])?
        }
        _ => return invalid(format!("round_mode `{mode}`")),
    };
    let held = if saturate {
        b.with_number(Min, rounded, most)?
    } else {
        let limit = b.scalar(DType::F32, least);
        let nan = b.scalar(DType::F32, f64::NAN);
        let small = b.pointwise(Lt, &[x, limit])?;
        b.pointwise(Select, &[small, nan, rounded])?
    };
    b.cast(held, DType::F8E8M0)
}

pub(crate) fn bitcast(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let Some(to) = cx.dtype_attr("to")? else { return invalid("attribute `to` is missing") };
    let from = cx.dtype(x);
    if from.bits() != to.bits() {
        return invalid(format!("the bits of {from} as {to}"));
    }
    // Integers of one width wrap to each other; a byte that becomes a bool keeps whether it is zero.
    let wraps = |d: DType| d.is_int() || d == DType::Bool;
    if from == to || wraps(from) && wraps(to) {
        return Ok(vec![cx.cast(x, to)?]);
    }
    let x = if from == DType::Bool { cx.cast(x, DType::U8)? } else { x };
    if to == DType::Bool {
        let bits = cx.emit(Op::BitCast { to: DType::U8 }, &[x])?;
        return Ok(vec![cx.cast(bits, to)?]);
    }
    Ok(vec![cx.emit(Op::BitCast { to }, &[x])?])
}
