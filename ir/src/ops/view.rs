//! Ops that move elements without computing on them, and sizes as data.
use super::{
    axis_in, demand,
    elements::{Walk, around, fits, move_element, out, pick, raw, remap, strides},
    extent_is, length_is, rank_is, result, same_dtype, scalar_of,
};
use crate::{
    DType, Dim, Scalar, Tensor, TensorType,
    attr::PadMode,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    text::bounds,
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

pub(crate) fn eval_broadcast(args: EvalArgs, _shape: &[Dim]) -> Result<Vec<Tensor>, String> {
    let (x, (_, shape)) = (args.tensors[0], out(&args, 0)?);
    let steps = strides(x.shape()).into_iter().zip(x.shape()).map(|(s, n)| if *n == 1 { 0 } else { s as i64 }).collect();
    Ok(vec![pick(x, shape.clone(), Walk::new(&shape, steps, 0))?])
}

pub(crate) fn eval_reshape(args: EvalArgs, _shape: &[Dim]) -> Result<Vec<Tensor>, String> {
    let (_, shape) = out(&args, 0)?;
    args.tensors[0].reshaped(shape).map(|t| vec![t]).map_err(|e| e.to_string())
}

pub(crate) fn eval_transpose(args: EvalArgs, perm: &[usize]) -> Result<Vec<Tensor>, String> {
    let (x, (_, shape)) = (args.tensors[0], out(&args, 0)?);
    let from = strides(x.shape());
    let steps = perm.iter().map(|&p| from[p] as i64).collect();
    Ok(vec![pick(x, shape.clone(), Walk::new(&shape, steps, 0))?])
}

pub(crate) fn eval_slice(args: EvalArgs, starts: &[Dim], _sizes: &[Dim], steps: &[i64]) -> Result<Vec<Tensor>, String> {
    let (x, (_, shape)) = (args.tensors[0], out(&args, 0)?);
    if shape.contains(&0) {
        return Ok(vec![pick(x, shape, std::iter::empty())?]);
    }
    // The rule saw constants, so every element read lies inside.
    let from = strides(x.shape());
    let mut base = 0i64;
    let mut walk = vec![];
    for (axis, start) in starts.iter().enumerate() {
        let start = start.as_const().ok_or_else(|| format!("axis {axis}: start {start} is not bound"))?;
        base += start * from[axis] as i64;
        // A step is taken only where there are two elements; else it may be anything.
        walk.push(if shape[axis] > 1 { steps[axis] * from[axis] as i64 } else { 0 });
    }
    Ok(vec![pick(x, shape.clone(), Walk::new(&shape, walk, base))?])
}

/// The element that stands at position `i` of an axis of extent `n` padded with `mode`.
fn padded(i: i64, n: i64, mode: PadMode) -> Option<usize> {
    let at = match mode {
        _ if (0..n).contains(&i) => i,
        PadMode::Constant => return None,
        PadMode::Edge => i.clamp(0, n - 1),
        PadMode::Wrap => i.rem_euclid(n),
        PadMode::Reflect if n == 1 => 0,
        PadMode::Reflect => {
            let period = 2 * (n - 1);
            let at = i.rem_euclid(period);
            at.min(period - at)
        }
    };
    usize::try_from(at).ok()
}

pub(crate) fn eval_pad(args: EvalArgs, lo: &[Dim], _hi: &[Dim], mode: &PadMode) -> Result<Vec<Tensor>, String> {
    let (x, value, (dtype, shape)) = (args.tensors[0], args.tensors[1], out(&args, 0)?);
    let mut maps = vec![];
    for (axis, lo) in lo.iter().enumerate() {
        let lo = lo.as_const().ok_or_else(|| format!("axis {axis}: padding {lo} is not bound"))?;
        maps.push((0..shape[axis] as i64).map(|i| padded(i.wrapping_sub(lo), x.shape()[axis] as i64, *mode)).collect());
    }
    let mut bytes = vec![0u8; dtype.bytes(fits(dtype, &shape)?)];
    for (to, from) in remap(x.shape(), &maps).into_iter().enumerate() {
        match from {
            Some(from) => move_element(&mut bytes, to, x.bytes(), from, dtype),
            None => move_element(&mut bytes, to, value.bytes(), 0, dtype),
        }
    }
    Ok(vec![raw(dtype, shape, bytes)?])
}

pub(crate) fn eval_concat(args: EvalArgs, axis: &usize) -> Result<Vec<Tensor>, String> {
    let (dtype, shape) = out(&args, 0)?;
    let (outer, total, inner) = around(&shape, *axis);
    let mut bytes = vec![0u8; dtype.bytes(fits(dtype, &shape)?)];
    let mut before = 0;
    for x in args.tensors {
        let n = x.shape()[*axis];
        for (o, j) in (0..outer).flat_map(|o| (0..n * inner).map(move |j| (o, j))) {
            move_element(&mut bytes, (o * total + before) * inner + j, x.bytes(), o * n * inner + j, dtype);
        }
        before += n;
    }
    Ok(vec![raw(dtype, shape, bytes)?])
}

pub(crate) fn eval_iota(args: EvalArgs, dtype: &DType, _shape: &[Dim], axis: &usize) -> Result<Vec<Tensor>, String> {
    let (_, shape) = out(&args, 0)?;
    let (outer, n, inner) = around(&shape, *axis);
    let values = (0..outer).flat_map(|_| (0..n).flat_map(|i| std::iter::repeat_n(Scalar::I(i as i128), inner)));
    Ok(vec![Tensor::from_scalars(*dtype, shape.clone(), values)])
}

pub(crate) fn eval_dims(_args: EvalArgs, values: &[Dim]) -> Result<Vec<Tensor>, String> {
    let values: Result<Vec<i64>, String> = values.iter().map(|d| d.as_const().ok_or_else(|| format!("size {d} is not bound"))).collect();
    let values = values?;
    Ok(vec![Tensor::from_i64([values.len()], &values)])
}

pub(crate) fn eval_bind_size(args: EvalArgs, sym: &Sym) -> Result<Vec<Tensor>, String> {
    let value = args.tensors[0].get(0).i() as i64;
    if value < sym.min || sym.max.is_some_and(|max| value > max) {
        return Err(format!("`{}` is {value}, outside {}", sym.name, bounds(sym)));
    }
    Ok(vec![args.tensors[0].clone()])
}
