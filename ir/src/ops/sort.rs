//! Selection by value: the largest elements, and the elements that are not zero.
use super::{axis_in, demand, number, result};
use crate::{
    DType, Dim, Tensor, TensorType,
    dim::{Atom, Sym},
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer_topk(args: TypeArgs, axis: &usize, k: &Dim, _largest: &bool) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    number("x", x)?;
    axis_in(*axis, x)?;
    if let (Some(k), Some(extent)) = (k.as_const(), x.shape[*axis].as_const()) {
        demand(k <= extent, || format!("axis {axis} has extent {extent}, cannot give {k} elements"))?;
    }
    let mut shape = x.shape.clone();
    shape[*axis] = k.clone();
    let values = result(x.dtype, shape)?;
    let positions = values.with_dtype(DType::I64);
    Ok(vec![values, positions])
}

pub(crate) fn infer_nonzero(args: TypeArgs, sym: &Sym) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    demand(x.dtype != DType::Str, || "strings are not numbers".into())?;
    Ok(vec![result(DType::I64, vec![Dim::from(x.rank()), Dim::from(Atom::Sym(sym.clone()))])?])
}

pub(crate) fn eval_topk(_args: EvalArgs, _axis: &usize, _k: &Dim, _largest: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_nonzero(_args: EvalArgs, _sym: &Sym) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
