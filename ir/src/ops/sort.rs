//! Selection by value: the largest elements, and the elements that are not zero.
use super::{
    axis_in, demand,
    elements::{Num, around, out, store, strides},
    number,
    reduce::before,
    result,
};
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

pub(crate) fn eval_topk(args: EvalArgs, axis: &usize, _k: &Dim, largest: &bool) -> Result<Vec<Tensor>, String> {
    if args.tensors[0].dtype().is_float() { topk::<f64>(&args, *axis, *largest) } else { topk::<i128>(&args, *axis, *largest) }
}

fn topk<T: Num>(args: &EvalArgs, axis: usize, largest: bool) -> Result<Vec<Tensor>, String> {
    let (x, (dtype, shape)) = (args.tensors[0], out(args, 0)?);
    let (outer, n, inner) = around(x.shape(), axis);
    let k = shape[axis];
    let values = T::load(x);
    let mut positions = vec![0i64; outer * k * inner];
    let mut found = vec![T::ZERO; positions.len()];
    for (o, j) in (0..outer).flat_map(|o| (0..inner).map(move |j| (o, j))) {
        let at = |i: usize| values[(o * n + i) * inner + j];
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| before(at(*a), at(*b), largest));
        for (r, i) in order.into_iter().take(k).enumerate() {
            let to = (o * k + r) * inner + j;
            (found[to], positions[to]) = (at(i), i as i64);
        }
    }
    Ok(vec![store(dtype, shape.clone(), &found)?, store(DType::I64, shape, &positions)?])
}

pub(crate) fn eval_nonzero(args: EvalArgs, _sym: &Sym) -> Result<Vec<Tensor>, String> {
    let x = args.tensors[0];
    let found: Vec<usize> = (0..x.count()).filter(|i| x.get(*i).b()).collect();
    let coordinates: Vec<i64> = strides(x.shape()).iter().zip(x.shape()).flat_map(|(s, n)| found.iter().map(move |i| (i / s % n) as i64)).collect();
    Ok(vec![Tensor::from_i64([x.shape().len(), found.len()], &coordinates)])
}
