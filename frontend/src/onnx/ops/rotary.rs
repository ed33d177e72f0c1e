//! Rotary position embedding, of ONNX and of com.microsoft.
use super::{
    attention::{join_heads, split_heads},
    view::concat_along,
};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{Dim, Op, ScalarFn::*};

/// Which elements of a head turn together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pairs {
    /// Element `i` with element `i + depth / 2`.
    Halves,
    /// Element `2 i` with element `2 i + 1`.
    Neighbours,
}

/// The first `2 * r` elements of every head of `x[b, h, s, d]` turned by angles whose cosines and sines broadcast to
/// `[b, 1, s, r]`.
pub(crate) fn rotate(b: &mut Builder, x: Val, cos: Val, sin: Val, pairs: Pairs) -> Res<Val> {
    let shape = b.shape(x);
    let half = b.shape(cos).last().cloned().unwrap_or(Dim::one());
    let turned = half.clone() * Dim::from(2i64);
    let rest = shape[3].clone() - turned.clone();
    if rest.as_const().is_some_and(|n| n < 0) {
        return invalid(format!("{turned} elements of a head of {} are turned", shape[3]));
    }
    let head = b.slice_axis(x, 3, Dim::ZERO, turned.clone())?;
    let part = |b: &mut Builder, second: bool| -> Res<Val> {
        match pairs {
            Pairs::Halves => b.slice_axis(head, 3, if second { half.clone() } else { Dim::ZERO }, half.clone()),
            Pairs::Neighbours => {
                let (mut starts, mut sizes) = (vec![Dim::ZERO; 4], shape.clone());
                starts[3] = Dim::from(i64::from(second));
                sizes[3] = half.clone();
                b.emit(Op::Slice { starts, sizes, steps: vec![1, 1, 1, 2] }, &[head])
            }
        }
    };
    let (one, two) = (part(b, false)?, part(b, true)?);
    let mut mixed = |f, left, right| -> Res<Val> {
        let left = b.pointwise(Mul, &[left, one])?;
        let right = b.pointwise(Mul, &[right, two])?;
        b.map(f, &[left, right])
    };
    let (real, imaginary) = (mixed(Sub, cos, sin)?, mixed(Add, sin, cos)?);
    let mut full = shape.clone();
    full[3] = turned;
    let y = match pairs {
        Pairs::Halves => concat_along(b, &[real, imaginary], 3)?,
        Pairs::Neighbours => {
            let mut column = shape.clone();
            column[3] = half;
            column.push(Dim::one());
            let (real, imaginary) = (b.reshape(real, column.clone())?, b.reshape(imaginary, column)?);
            let y = concat_along(b, &[real, imaginary], 4)?;
            b.reshape(y, full.clone())?
        }
    };
    if rest.is(0) {
        return Ok(y);
    }
    let still = b.slice_axis(x, 3, full[3].clone(), rest)?;
    concat_along(b, &[y, still], 3)
}

/// Operands: x, cosines, sines, positions.
pub(crate) fn rotary_embedding(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let packed = cx.rank(x) == 3;
    let heads = if packed {
        match cx.int("num_heads", 0)? {
            n if n > 0 => split_heads(cx, x, &Dim::from(n))?,
            n => return invalid(format!("{n} heads")),
        }
    } else {
        x
    };
    if cx.rank(heads) != 4 {
        return invalid(format!("x is {}", cx.ty(x)));
    }
    let (cos, sin) = (cx.arg(1)?, cx.arg(2)?);
    let positions = cx.opt(3);
    let (cos, sin) = (angles(cx, cos, positions)?, angles(cx, sin, positions)?);
    let pairs = if cx.flag("interleaved", false)? { Pairs::Neighbours } else { Pairs::Halves };
    let wanted = match cx.int("rotary_embedding_dim", 0)? {
        0 => cx.shape(heads)[3].clone(),
        n => Dim::from(n),
    };
    let given = cx.shape(cos)[3].clone() * Dim::from(2i64);
    if given != wanted {
        match (given.as_const(), wanted.as_const()) {
            (Some(_), Some(_)) => return invalid(format!("angles for {given} elements, {wanted} are turned")),
            _ => return missing(format!("angles for {given} elements where {wanted} are turned")),
        }
    }
    let y = rotate(cx, heads, cos, sin, pairs)?;
    Ok(vec![if packed { join_heads(cx, y)? } else { y }])
}

/// A table `[positions, r]` looked up, or `[b, s, r]` as it is, as `[b, 1, s, r]`.
fn angles(b: &mut Builder, table: Val, positions: Option<Val>) -> Res<Val> {
    let table = match positions {
        Some(at) if b.rank(table) == 2 && b.rank(at) == 2 => b.emit(Op::Gather { axis: 0 }, &[table, at])?,
        None if b.rank(table) == 3 => table,
        _ => return invalid(format!("angles of type {}", b.ty(table))),
    };
    let mut shape = b.shape(table);
    shape.insert(1, Dim::one());
    b.reshape(table, shape)
}
