//! Reading and writing at positions that data gives.
use super::{axis_in, demand, extent_is, integer, number, rank_is, result, same_dtype, same_shape, shape_is};
use crate::{
    DType, Dim, Tensor, TensorType,
    attr::ScatterFn,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer(args: TypeArgs, axis: &usize) -> Result<Vec<TensorType>, String> {
    let (data, indices) = (args.types[0], args.types[1]);
    integer("indices", indices)?;
    axis_in(*axis, data)?;
    let shape = data.shape[..*axis].iter().chain(&indices.shape).chain(&data.shape[axis + 1..]).cloned().collect();
    Ok(vec![result(data.dtype, shape)?])
}

fn check_elements(data: &TensorType, indices: &TensorType, axis: usize) -> Result<(), String> {
    integer("indices", indices)?;
    axis_in(axis, data)?;
    rank_is("indices", indices, data.rank())?;
    for i in (0..data.rank()).filter(|i| *i != axis) {
        if let (Some(d), Some(n)) = (data.shape[i].as_const(), indices.shape[i].as_const()) {
            demand(n <= d, || format!("axis {i}: indices have extent {n}, data only {d}"))?;
        }
    }
    Ok(())
}

pub(crate) fn infer_elements(args: TypeArgs, axis: &usize) -> Result<Vec<TensorType>, String> {
    let (data, indices) = (args.types[0], args.types[1]);
    check_elements(data, indices, *axis)?;
    Ok(vec![result(data.dtype, indices.shape.clone())?])
}

/// How many axes of data the last axis of `indices` indexes.
fn depth(data: &TensorType, indices: &TensorType, batch: usize) -> Result<usize, String> {
    integer("indices", indices)?;
    demand(indices.rank() > batch, || format!("indices must have more than {batch} axes, got {indices}"))?;
    let last = &indices.shape[indices.rank() - 1];
    let depth = last.as_const().and_then(|v| usize::try_from(v).ok());
    let depth = depth.ok_or_else(|| format!("the last axis of indices must be a constant, got {last}"))?;
    let room = data.rank().checked_sub(batch);
    demand(room.is_some_and(|room| depth <= room), || format!("indices of {depth} axes after {batch} batch axes do not fit {data}"))?;
    Ok(depth)
}

pub(crate) fn infer_nd(args: TypeArgs, batch: &usize) -> Result<Vec<TensorType>, String> {
    let (data, indices) = (args.types[0], args.types[1]);
    let depth = depth(data, indices, *batch)?;
    for i in 0..*batch {
        extent_is(&format!("batch axis {i}"), &indices.shape[i], &data.shape[i])?;
    }
    let shape = indices.shape[..indices.rank() - 1].iter().chain(&data.shape[batch + depth..]).cloned().collect();
    Ok(vec![result(data.dtype, shape)?])
}

fn check_combine(f: ScatterFn, data: &TensorType, updates: &TensorType) -> Result<(), String> {
    same_dtype(data, updates)?;
    match f {
        ScatterFn::Replace => Ok(()),
        ScatterFn::Max | ScatterFn::Min if data.dtype == DType::Bool => Ok(()),
        _ => number("data", data),
    }
}

pub(crate) fn infer_scatter_elements(args: TypeArgs, axis: &usize, f: &ScatterFn) -> Result<Vec<TensorType>, String> {
    let (data, indices, updates) = (args.types[0], args.types[1], args.types[2]);
    check_elements(data, indices, *axis)?;
    check_combine(*f, data, updates)?;
    same_shape(&indices.shape, &updates.shape).map_err(|e| format!("indices and updates: {e}"))?;
    Ok(vec![data.clone()])
}

pub(crate) fn infer_scatter_nd(args: TypeArgs, f: &ScatterFn) -> Result<Vec<TensorType>, String> {
    let (data, indices, updates) = (args.types[0], args.types[1], args.types[2]);
    let depth = depth(data, indices, 0)?;
    check_combine(*f, data, updates)?;
    let shape: Vec<Dim> = indices.shape[..indices.rank() - 1].iter().chain(&data.shape[depth..]).cloned().collect();
    shape_is("updates", updates, &shape)?;
    Ok(vec![data.clone()])
}

pub(crate) fn eval(_args: EvalArgs, _axis: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_elements(_args: EvalArgs, _axis: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_nd(_args: EvalArgs, _batch: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_scatter_elements(_args: EvalArgs, _axis: &usize, _f: &ScatterFn) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_scatter_nd(_args: EvalArgs, _f: &ScatterFn) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
