//! Determinants.
use super::reduce;
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, ScalarFn, attr::ReduceFn};

/// Largest matrix that is eliminated: every row is a few nodes.
const MOST_ROWS: i64 = 64;

/// The determinant of each matrix, by elimination with the largest pivot of each column.
pub(crate) fn det(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let (dtype, shape) = (cx.dtype(x), cx.shape(x));
    let Some((lead, [rows, columns])) = shape.split_last_chunk::<2>() else { return invalid(format!("matrices of type {}", cx.ty(x))) };
    let n = match cx.same_extent(rows, columns)?.as_const() {
        Some(n @ 1..=MOST_ROWS) => n,
        Some(n) => return missing(format!("the determinant of {n} by {n} matrices")),
        None => return missing("the determinant of matrices whose size is not known"),
    };
    let work = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let batch: Dim = lead.iter().cloned().product();
    let x = cx.cast(x, work)?;
    let mut a = cx.reshape(x, vec![batch.clone(), Dim::from(n), Dim::from(n)])?;
    let (zero, one, minus) = (cx.scalar(work, 0.0), cx.scalar(work, 1.0), cx.scalar(work, -1.0));
    let mut product: Option<Val> = None;
    for m in (1..=n).rev() {
        let column = cx.slice_axis(a, 2, Dim::ZERO, Dim::one())?;
        let size = cx.map(ScalarFn::Abs, &[column])?;
        let best = cx.emit(Op::ArgReduce { f: ReduceFn::Max, axis: 1, last: false }, &[size])?;
        let at = cx.broadcast_to(best, &[batch.clone(), Dim::one(), Dim::from(m)])?;
        let top = cx.emit(Op::GatherElements { axis: 1 }, &[a, at])?;
        let pivot = cx.slice_axis(top, 2, Dim::ZERO, Dim::one())?;
        let stays = cx.with_number(ScalarFn::Eq, best, 0.0)?;
        let sign = cx.pointwise(ScalarFn::Select, &[stays, one, minus])?;
        let signed = cx.map(ScalarFn::Mul, &[pivot, sign])?;
        product = Some(match product {
            Some(product) => cx.map(ScalarFn::Mul, &[product, signed])?,
            None => signed,
        });
        if m == 1 {
            break;
        }
        // The first row goes where the pivot's was.
        let first = cx.slice_axis(a, 1, Dim::ZERO, Dim::one())?;
        let rest = cx.slice_axis(a, 1, Dim::one(), Dim::from(m - 1))?;
        let row = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![Dim::one(), Dim::from(m - 1), Dim::one()], axis: 1 }, &[])?;
        let row = cx.with_number(ScalarFn::Add, row, 1.0)?;
        let taken = cx.pointwise(ScalarFn::Eq, &[row, best])?;
        let rest = cx.pointwise(ScalarFn::Select, &[taken, first, rest])?;
        let singular = cx.pointwise(ScalarFn::Eq, &[pivot, zero])?;
        let safe = cx.pointwise(ScalarFn::Select, &[singular, one, pivot])?;
        let factor = cx.slice_axis(rest, 2, Dim::ZERO, Dim::one())?;
        let factor = cx.pointwise(ScalarFn::Div, &[factor, safe])?;
        let (rest, top) = (cx.slice_axis(rest, 2, Dim::one(), Dim::from(m - 1))?, cx.slice_axis(top, 2, Dim::one(), Dim::from(m - 1))?);
        let off = cx.pointwise(ScalarFn::Mul, &[factor, top])?;
        a = cx.map(ScalarFn::Sub, &[rest, off])?;
    }
    let Some(product) = product else { return invalid("an empty matrix") };
    let y = reduce::drop_axes(cx, product, &[1, 2])?;
    let y = cx.reshape(y, lead.to_vec())?;
    Ok(vec![cx.cast(y, dtype)?])
}
