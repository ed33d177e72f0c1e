//! Reductions, positions of extremes, running sums.
use super::{
    axis_in, demand,
    elements::{Num, Walk, around, out, store, strides},
    number, result,
};
use crate::{
    DType, Dim, Scalar, Tensor, TensorType,
    attr::ReduceFn,
    op::{EvalArgs, TypeArgs},
};

fn with_one(x: &TensorType, axes: &[usize]) -> Vec<Dim> {
    x.shape.iter().enumerate().map(|(i, d)| if axes.contains(&i) { Dim::one() } else { d.clone() }).collect()
}

pub(crate) fn infer(args: TypeArgs, f: &ReduceFn, axes: &[usize]) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    if !(x.dtype == DType::Bool && matches!(f, ReduceFn::Max | ReduceFn::Min)) {
        number("x", x)?;
    }
    axes.iter().try_for_each(|&axis| axis_in(axis, x))?;
    demand(axes.windows(2).all(|w| w[0] < w[1]), || format!("axes {axes:?} are not sorted and distinct"))?;
    Ok(vec![result(x.dtype, with_one(x, axes))?])
}

pub(crate) fn infer_arg(args: TypeArgs, f: &ReduceFn, axis: &usize, _last: &bool) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    number("x", x)?;
    demand(matches!(f, ReduceFn::Max | ReduceFn::Min), || format!("finds `max` or `min`, not `{f}`"))?;
    axis_in(*axis, x)?;
    demand(!x.shape[*axis].is(0), || format!("axis {axis} of {x} is empty"))?;
    Ok(vec![result(DType::I64, with_one(x, &[*axis]))?])
}

pub(crate) fn infer_cumulative(args: TypeArgs, f: &ReduceFn, axis: &usize, _exclusive: &bool, _reverse: &bool) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    number("x", x)?;
    demand(matches!(f, ReduceFn::Sum | ReduceFn::Prod), || format!("runs `sum` or `prod`, not `{f}`"))?;
    axis_in(*axis, x)?;
    Ok(vec![x.clone()])
}

/// What an empty reduction gives.
fn neutral<T: Num>(f: ReduceFn, dtype: DType) -> T {
    match f {
        ReduceFn::Sum => T::ZERO,
        ReduceFn::Prod => T::ONE,
        ReduceFn::Max => T::from_scalar(least(dtype)),
        ReduceFn::Min => T::from_scalar(greatest(dtype)),
    }
}

/// The least value of a dtype: minus infinity where it has one.
pub(super) fn least(dtype: DType) -> Scalar {
    if dtype.is_float() { Scalar::F(f64::NEG_INFINITY).cast(dtype) } else { Scalar::I(dtype.int_range().0) }
}

fn greatest(dtype: DType) -> Scalar {
    if dtype.is_float() { Scalar::F(f64::INFINITY).cast(dtype) } else { Scalar::I(dtype.int_range().1) }
}

fn combine<T: Num>(f: ReduceFn, a: T, b: T) -> T {
    match f {
        ReduceFn::Sum => a.add(b),
        ReduceFn::Prod => a.mul(b),
        ReduceFn::Max => a.larger(b),
        ReduceFn::Min => a.smaller(b),
    }
}

pub(crate) fn eval(args: EvalArgs, f: &ReduceFn, axes: &[usize]) -> Result<Vec<Tensor>, String> {
    if args.tensors[0].dtype().is_float() { reduce::<f64>(&args, *f, axes) } else { reduce::<i128>(&args, *f, axes) }
}

fn reduce<T: Num>(args: &EvalArgs, f: ReduceFn, axes: &[usize]) -> Result<Vec<Tensor>, String> {
    let (x, (dtype, shape)) = (args.tensors[0], out(args, 0)?);
    let mut acc = vec![neutral::<T>(f, dtype); shape.iter().product()];
    let steps = strides(&shape).into_iter().enumerate().map(|(i, s)| if axes.contains(&i) { 0 } else { s as i64 }).collect();
    for (v, to) in T::load(x).into_iter().zip(Walk::new(x.shape(), steps, 0)) {
        acc[to] = combine(f, acc[to], v);
    }
    Ok(vec![store(dtype, shape, &acc)?])
}

/// `a` before `b` in an order that puts the largest (or smallest) first, NaN before everything.
pub(super) fn before<T: Num>(a: T, b: T, largest: bool) -> std::cmp::Ordering {
    let nan = |v: T| v.partial_cmp(&v).is_none();
    let order = if largest { b.partial_cmp(&a) } else { a.partial_cmp(&b) };
    order.unwrap_or_else(|| nan(b).cmp(&nan(a)))
}

pub(crate) fn eval_arg(args: EvalArgs, f: &ReduceFn, axis: &usize, last: &bool) -> Result<Vec<Tensor>, String> {
    let largest = *f == ReduceFn::Max;
    if args.tensors[0].dtype().is_float() { arg::<f64>(&args, largest, *axis, *last) } else { arg::<i128>(&args, largest, *axis, *last) }
}

fn arg<T: Num>(args: &EvalArgs, largest: bool, axis: usize, last: bool) -> Result<Vec<Tensor>, String> {
    let (x, (dtype, shape)) = (args.tensors[0], out(args, 0)?);
    let (outer, n, inner) = around(x.shape(), axis);
    let values = T::load(x);
    let mut found = vec![];
    for (o, j) in (0..outer).flat_map(|o| (0..inner).map(move |j| (o, j))) {
        let at = |i: usize| values[(o * n + i) * inner + j];
        let mut best = 0;
        for i in 1..n {
            let order = before(at(i), at(best), largest);
            if order.is_lt() || last && order.is_eq() {
                best = i;
            }
        }
        found.push(best as i64);
    }
    Ok(vec![store(dtype, shape, &found)?])
}

pub(crate) fn eval_cumulative(args: EvalArgs, f: &ReduceFn, axis: &usize, exclusive: &bool, reverse: &bool) -> Result<Vec<Tensor>, String> {
    if args.tensors[0].dtype().is_float() {
        cumulate::<f64>(&args, *f, *axis, *exclusive, *reverse)
    } else {
        cumulate::<i128>(&args, *f, *axis, *exclusive, *reverse)
    }
}

fn cumulate<T: Num>(args: &EvalArgs, f: ReduceFn, axis: usize, exclusive: bool, reverse: bool) -> Result<Vec<Tensor>, String> {
    let (x, (dtype, shape)) = (args.tensors[0], out(args, 0)?);
    let (outer, n, inner) = around(x.shape(), axis);
    let mut values = T::load(x);
    for (o, j) in (0..outer).flat_map(|o| (0..inner).map(move |j| (o, j))) {
        let mut acc = neutral::<T>(f, dtype);
        for i in 0..n {
            let at = (o * n + if reverse { n - 1 - i } else { i }) * inner + j;
            let next = combine(f, acc, values[at]);
            values[at] = if exclusive { acc } else { next };
            acc = next;
        }
    }
    Ok(vec![store(dtype, shape, &values)?])
}
