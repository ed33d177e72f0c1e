//! Matrix product.
use super::{demand, extent_is, number, rank_is, result, same_dtype};
use crate::{
    DType, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer(args: TypeArgs, out: &DType) -> Result<Vec<TensorType>, String> {
    let (a, b) = (args.types[0], args.types[1]);
    number("a", a)?;
    same_dtype(a, b)?;
    demand(a.rank() >= 2, || format!("a must have rank 2 or more, got {a}"))?;
    rank_is("b", b, a.rank())?;
    demand(a.dtype.is_float() == out.is_float() && a.dtype.is_int() == out.is_int(), || format!("a product of {} cannot be {out}", a.dtype))?;
    let r = a.rank();
    for i in 0..r - 2 {
        extent_is(&format!("batch axis {i}"), &b.shape[i], &a.shape[i])?;
    }
    demand(a.shape[r - 1] == b.shape[r - 2], || format!("inner extents differ: {} in {a} and {} in {b}", a.shape[r - 1], b.shape[r - 2]))?;
    let mut shape = a.shape.clone();
    shape[r - 1] = b.shape[r - 1].clone();
    Ok(vec![result(*out, shape)?])
}

pub(crate) fn eval(_args: EvalArgs, _out: &DType) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
