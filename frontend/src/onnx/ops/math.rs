//! Arithmetic, comparison and logic.
use crate::onnx::{
    build::{Res, Val, invalid},
    cx::Cx,
};
use pavage_ir::{DType, ScalarFn};

/// A function of one operand.
pub(crate) fn unary(cx: &mut Cx, f: ScalarFn) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    Ok(vec![cx.map(f, &[x])?])
}

/// A function of two operands, broadcast.
pub(crate) fn binary(cx: &mut Cx, f: ScalarFn) -> Res<Vec<Val>> {
    let (a, b) = (cx.arg(0)?, cx.arg(1)?);
    Ok(vec![cx.pointwise(f, &[a, b])?])
}

/// A function of any number of operands, broadcast and combined from the left.
pub(crate) fn variadic(cx: &mut Cx, f: ScalarFn) -> Res<Vec<Val>> {
    let args = cx.args()?;
    let Some(first) = args.first() else { return invalid("no operands") };
    let args = if args.len() > 1 { cx.broadcast_all(&args)? } else { vec![*first] };
    let mut out = args[0];
    for v in &args[1..] {
        out = cx.map(f, &[out, *v])?;
    }
    Ok(vec![out])
}

pub(crate) fn mean(cx: &mut Cx) -> Res<Vec<Val>> {
    let n = cx.inputs.len();
    let sum = variadic(cx, ScalarFn::Add)?[0];
    Ok(vec![cx.with_number(ScalarFn::Div, sum, n as f64)?])
}

pub(crate) fn pow(cx: &mut Cx) -> Res<Vec<Val>> {
    let (a, b) = (cx.arg(0)?, cx.arg(1)?);
    let (base, exponent) = (cx.dtype(a), cx.dtype(b));
    // Fractional powers of integers are computed as floats and converted back.
    let work = if base.is_int() && exponent.is_float() { DType::F64 } else { base };
    let (x, y) = (cx.cast(a, work)?, cx.cast(b, work)?);
    // Squares and roots are what most exporters mean; they are exact and cheap.
    let known = cx.tensor(y).filter(|t| t.count() == 1).map(|t| t.get(0).f());
    let out = match known {
        Some(2.0) => {
            let rank = cx.rank(y);
            let x = if rank > cx.rank(x) { cx.broadcast_all(&[x, y])?[0] } else { x };
            cx.map(ScalarFn::Mul, &[x, x])?
        }
        _ => cx.pointwise(ScalarFn::Pow, &[x, y])?,
    };
    let out = if work == base { out } else { whole_power(cx, out, y)? };
    Ok(vec![cx.cast(out, base)?])
}

/// A power of an integer computed as a float: where the exponent is whole the result is too, whatever the last bit says.
fn whole_power(cx: &mut Cx, power: Val, exponent: Val) -> Res<Val> {
    let floor = cx.map(ScalarFn::Floor, &[exponent])?;
    let whole = cx.map(ScalarFn::Eq, &[floor, exponent])?;
    let upward = cx.with_number(ScalarFn::Ge, exponent, 0.0)?;
    let whole = cx.map(ScalarFn::And, &[whole, upward])?;
    let rounded = cx.map(ScalarFn::Round, &[power])?;
    cx.pointwise(ScalarFn::Select, &[whole, rounded, power])
}

pub(crate) fn modulo(cx: &mut Cx) -> Res<Vec<Val>> {
    let f = if cx.flag("fmod", false)? { ScalarFn::Rem } else { ScalarFn::Mod };
    binary(cx, f)
}

pub(crate) fn bit_shift(cx: &mut Cx) -> Res<Vec<Val>> {
    match cx.text("direction", "")?.as_str() {
        "LEFT" => binary(cx, ScalarFn::Shl),
        "RIGHT" => binary(cx, ScalarFn::Shr),
        other => invalid(format!("direction `{other}`")),
    }
}

pub(crate) fn clip(cx: &mut Cx) -> Res<Vec<Val>> {
    let mut x = cx.arg(0)?;
    let dtype = cx.dtype(x);
    let (lo, hi) = if cx.since < 11 {
        let mut bound = |name: &str| -> Res<Option<Val>> {
            let v = if cx.has(name) { Some(cx.float(name, 0.0)?) } else { None };
            Ok(v.map(|v| cx.scalar(dtype, v)))
        };
        (bound("min")?, bound("max")?)
    } else {
        (cx.opt(1), cx.opt(2))
    };
    for (bound, f) in [(lo, ScalarFn::Max), (hi, ScalarFn::Min)] {
        if let Some(bound) = bound {
            let shape = cx.shape(x);
            let bound = cx.reshape(bound, vec![])?;
            let bound = cx.broadcast_to(bound, &shape)?;
            x = cx.map(f, &[x, bound])?;
        }
    }
    Ok(vec![x])
}

pub(crate) fn select(cx: &mut Cx) -> Res<Vec<Val>> {
    let args = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    Ok(vec![cx.pointwise(ScalarFn::Select, &args)?])
}

pub(crate) fn is_inf(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let (negative, positive) = (cx.flag("detect_negative", true)?, cx.flag("detect_positive", true)?);
    let inf = cx.map(ScalarFn::IsInf, &[x])?;
    Ok(vec![match (negative, positive) {
        (true, true) => inf,
        (false, false) => cx.map(ScalarFn::Xor, &[inf, inf])?,
        (_, positive) => {
            let side = cx.with_number(if positive { ScalarFn::Gt } else { ScalarFn::Lt }, x, 0.0)?;
            cx.map(ScalarFn::And, &[inf, side])?
        }
    }])
}
