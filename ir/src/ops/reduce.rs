//! Reductions, positions of extremes, running sums.
use super::{axis_in, demand, number, result};
use crate::{
    DType, Dim, Tensor, TensorType,
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

pub(crate) fn eval(_args: EvalArgs, _f: &ReduceFn, _axes: &[usize]) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_arg(_args: EvalArgs, _f: &ReduceFn, _axis: &usize, _last: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_cumulative(_args: EvalArgs, _f: &ReduceFn, _axis: &usize, _exclusive: &bool, _reverse: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
