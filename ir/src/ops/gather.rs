//! Reading and writing at positions that data gives.
use super::{
    axis_in, demand,
    elements::{Num, Walk, around, move_element, out, pick, raw, store, strides},
    extent_is, integer, number, rank_is, result, same_dtype, same_shape, shape_is,
};
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

/// Positions on an axis of extent `n`, negative ones counted from its end.
fn positions(indices: &Tensor, n: usize) -> Result<Vec<usize>, String> {
    i128::load(indices).into_iter().map(|v| position(v, n)).collect()
}

fn position(v: i128, n: usize) -> Result<usize, String> {
    let at = if v < 0 { v + n as i128 } else { v };
    usize::try_from(at).ok().filter(|at| *at < n).ok_or_else(|| format!("index {v} is out of range for extent {n}"))
}

pub(crate) fn eval(args: EvalArgs, axis: &usize) -> Result<Vec<Tensor>, String> {
    let (data, indices, (_, shape)) = (args.tensors[0], args.tensors[1], out(&args, 0)?);
    let (outer, n, inner) = around(data.shape(), *axis);
    let at = positions(indices, n)?;
    let sources = (0..outer).flat_map(|o| at.iter().flat_map(move |i| (0..inner).map(move |j| (o * n + i) * inner + j)));
    Ok(vec![pick(data, shape, sources)?])
}

/// For every element of `indices`, the element of `data` it names.
fn element_places(data: &Tensor, indices: &Tensor, axis: usize) -> Result<Vec<usize>, String> {
    let steps = strides(data.shape());
    let at = positions(indices, data.shape()[axis])?;
    let others = steps.iter().enumerate().map(|(i, s)| if i == axis { 0 } else { *s as i64 }).collect();
    Ok(Walk::new(indices.shape(), others, 0).zip(at).map(|(base, i)| base + i * steps[axis]).collect())
}

pub(crate) fn eval_elements(args: EvalArgs, axis: &usize) -> Result<Vec<Tensor>, String> {
    let (data, indices, (_, shape)) = (args.tensors[0], args.tensors[1], out(&args, 0)?);
    let places = element_places(data, indices, *axis)?;
    Ok(vec![pick(data, shape, places.into_iter())?])
}

/// For every tuple of `indices`, where the slice it names starts in `data`; and the slices' length.
fn slice_places(data: &Tensor, indices: &Tensor, batch: usize) -> Result<(Vec<usize>, usize), String> {
    let (steps, depth) = (strides(data.shape()), indices.shape()[indices.shape().len() - 1]);
    let tuples: usize = indices.shape()[..indices.shape().len() - 1].iter().product();
    let batches: usize = data.shape()[..batch].iter().product();
    let slice: usize = data.shape()[batch + depth..].iter().product();
    let of_batch: usize = data.shape()[batch..].iter().product();
    let values = i128::load(indices);
    let mut places = vec![];
    for t in 0..tuples {
        let mut place = t / (tuples / batches.max(1)).max(1) * of_batch;
        for (k, v) in values[t * depth..(t + 1) * depth].iter().enumerate() {
            place += position(*v, data.shape()[batch + k])? * steps[batch + k];
        }
        places.push(place);
    }
    Ok((places, slice))
}

pub(crate) fn eval_nd(args: EvalArgs, batch: &usize) -> Result<Vec<Tensor>, String> {
    let (data, indices, (_, shape)) = (args.tensors[0], args.tensors[1], out(&args, 0)?);
    let (places, slice) = slice_places(data, indices, *batch)?;
    Ok(vec![pick(data, shape, places.into_iter().flat_map(|p| p..p + slice))?])
}

pub(crate) fn eval_scatter_elements(args: EvalArgs, axis: &usize, f: &ScatterFn) -> Result<Vec<Tensor>, String> {
    let places = element_places(args.tensors[0], args.tensors[1], *axis)?;
    scatter(&args, &places, *f)
}

pub(crate) fn eval_scatter_nd(args: EvalArgs, f: &ScatterFn) -> Result<Vec<Tensor>, String> {
    let (places, slice) = slice_places(args.tensors[0], args.tensors[1], 0)?;
    let places: Vec<usize> = places.into_iter().flat_map(|p| p..p + slice).collect();
    scatter(&args, &places, *f)
}

/// Combines update `i` into element `places[i]`, in row-major order of the updates.
fn scatter(args: &EvalArgs, places: &[usize], f: ScatterFn) -> Result<Vec<Tensor>, String> {
    let (data, updates) = (args.tensors[0], args.tensors[2]);
    if f == ScatterFn::Replace {
        let mut bytes = data.bytes().to_vec();
        places.iter().enumerate().for_each(|(i, at)| move_element(&mut bytes, *at, updates.bytes(), i, data.dtype()));
        return Ok(vec![raw(data.dtype(), data.shape().to_vec(), bytes)?]);
    }
    if data.dtype().is_float() { combine::<f64>(data, updates, places, f) } else { combine::<i128>(data, updates, places, f) }
}

fn combine<T: Num>(data: &Tensor, updates: &Tensor, places: &[usize], f: ScatterFn) -> Result<Vec<Tensor>, String> {
    let mut values = T::load(data);
    for (at, v) in places.iter().zip(T::load(updates)) {
        let old = values[*at];
        values[*at] = match f {
            ScatterFn::Replace => v,
            ScatterFn::Add => old.add(v),
            ScatterFn::Mul => old.mul(v),
            ScatterFn::Max => old.larger(v),
            ScatterFn::Min => old.smaller(v),
        };
    }
    Ok(vec![store(data.dtype(), data.shape().to_vec(), &values)?])
}
