//! Ops that move elements without computing on them, and sizes as data.
use super::{axis_in, demand, extent_is, length_is, rank_is, result, same_dtype, scalar_of};
use crate::{
    DType, Dim, Tensor, TensorType,
    attr::PadMode,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer_broadcast(args: TypeArgs, shape: &[Dim]) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    demand(x.rank() == shape.len(), || format!("ranks differ: {x} cannot become rank {}", shape.len()))?;
    for (i, (from, to)) in x.shape.iter().zip(shape).enumerate() {
        demand(from == to || from.is(1), || format!("axis {i} has extent {from}, cannot become {to}"))?;
    }
    Ok(vec![result(x.dtype, shape.to_vec())?])
}

pub(crate) fn infer_reshape(args: TypeArgs, shape: &[Dim]) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    let out = result(x.dtype, shape.to_vec())?;
    result(x.dtype, x.shape.clone())?;
    if let (Some(from), Some(to)) = (x.count().as_const(), out.count().as_const()) {
        demand(from == to, || format!("element counts differ: {x} has {from}, {out} has {to}"))?;
    }
    Ok(vec![out])
}

pub(crate) fn infer_transpose(args: TypeArgs, perm: &[usize]) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    demand(sorted.iter().copied().eq(0..x.rank()), || format!("{perm:?} is not an order of the {} axes of {x}", x.rank()))?;
    Ok(vec![result(x.dtype, perm.iter().map(|&p| x.shape[p].clone()).collect())?])
}

pub(crate) fn infer_slice(args: TypeArgs, starts: &[Dim], sizes: &[Dim], steps: &[i64]) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    length_is("starts", starts.len(), x.rank())?;
    length_is("sizes", sizes.len(), x.rank())?;
    length_is("steps", steps.len(), x.rank())?;
    for i in 0..x.rank() {
        demand(steps[i] != 0, || format!("axis {i}: the step is 0"))?;
        if let (Some(start), Some(size), Some(extent)) = (starts[i].as_const(), sizes[i].as_const(), x.shape[i].as_const())
            && size > 0
        {
            let last = i128::from(start) + (i128::from(size) - 1) * i128::from(steps[i]);
            let inside = |v: i128| (0..i128::from(extent)).contains(&v);
            demand(inside(start.into()) && inside(last), || format!("axis {i}: elements {start} to {last} leave the extent {extent}"))?;
        }
    }
    Ok(vec![result(x.dtype, sizes.to_vec())?])
}

pub(crate) fn infer_pad(args: TypeArgs, lo: &[Dim], hi: &[Dim], mode: &PadMode) -> Result<Vec<TensorType>, String> {
    let (x, value) = (args.types[0], args.types[1]);
    scalar_of("the pad value", value, x.dtype)?;
    length_is("lo", lo.len(), x.rank())?;
    length_is("hi", hi.len(), x.rank())?;
    let mut shape = vec![];
    for i in 0..x.rank() {
        let extent = x.shape[i].clone() + lo[i].clone() + hi[i].clone();
        if x.shape[i].is(0) && *mode != PadMode::Constant {
            demand(extent.is(0), || format!("axis {i} is empty: nothing to repeat with mode `{mode}`"))?;
        }
        shape.push(extent);
    }
    Ok(vec![result(x.dtype, shape)?])
}

pub(crate) fn infer_concat(args: TypeArgs, axis: &usize) -> Result<Vec<TensorType>, String> {
    let Some((first, rest)) = args.types.split_first() else { return Err("needs at least one operand".into()) };
    axis_in(*axis, first)?;
    let mut shape = first.shape.clone();
    for (k, ty) in rest.iter().enumerate() {
        same_dtype(first, ty)?;
        rank_is(&format!("operand {}", k + 1), ty, first.rank())?;
        for i in (0..first.rank()).filter(|i| i != axis) {
            extent_is(&format!("axis {i}"), &ty.shape[i], &first.shape[i])?;
        }
        shape[*axis] = shape[*axis].clone() + ty.shape[*axis].clone();
    }
    Ok(vec![result(first.dtype, shape)?])
}

pub(crate) fn infer_iota(_args: TypeArgs, dtype: &DType, shape: &[Dim], axis: &usize) -> Result<Vec<TensorType>, String> {
    demand(dtype.is_float() || dtype.is_int(), || format!("counts in numbers, not {dtype}"))?;
    let out = result(*dtype, shape.to_vec())?;
    axis_in(*axis, &out)?;
    Ok(vec![out])
}

pub(crate) fn infer_dims(_args: TypeArgs, values: &[Dim]) -> Result<Vec<TensorType>, String> {
    Ok(vec![TensorType::new(DType::I64, [values.len()])])
}

pub(crate) fn infer_bind_size(args: TypeArgs, _sym: &Sym) -> Result<Vec<TensorType>, String> {
    scalar_of("the size", args.types[0], DType::I64)?;
    Ok(vec![args.types[0].clone()])
}

pub(crate) fn eval_broadcast(_args: EvalArgs, _shape: &[Dim]) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_reshape(_args: EvalArgs, _shape: &[Dim]) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_transpose(_args: EvalArgs, _perm: &[usize]) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_slice(_args: EvalArgs, _starts: &[Dim], _sizes: &[Dim], _steps: &[i64]) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_pad(_args: EvalArgs, _lo: &[Dim], _hi: &[Dim], _mode: &PadMode) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_concat(_args: EvalArgs, _axis: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_iota(_args: EvalArgs, _dtype: &DType, _shape: &[Dim], _axis: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_dims(_args: EvalArgs, _values: &[Dim]) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_bind_size(_args: EvalArgs, _sym: &Sym) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
