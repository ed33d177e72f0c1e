//! Ensembles of decision trees.
use super::{demand, float, integer, rank_is, result, same_shape};
use crate::{
    DType, Dim, Tensor, TensorType,
    attr::Aggregate,
    op::{EvalArgs, TypeArgs},
};

const OPERANDS: [&str; 10] = ["x", "feature", "mode", "threshold", "yes", "no", "missing", "roots", "target", "weight"];

pub(crate) fn infer(args: TypeArgs, targets: &usize, _aggregate: &Aggregate) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    rank_is("x", x, 2)?;
    demand(x.dtype == DType::F32, || format!("x must hold f32, got {x}"))?;
    for (name, ty) in OPERANDS.into_iter().zip(args.types).skip(1) {
        rank_is(name, ty, 1)?;
        match name {
            "threshold" | "weight" => float(name, ty)?,
            _ => integer(name, ty)?,
        }
    }
    for i in 2..=6 {
        same_shape(&args.types[1].shape, &args.types[i].shape).map_err(|e| format!("`feature` and `{}`: {e}", OPERANDS[i]))?;
    }
    same_shape(&args.types[8].shape, &args.types[9].shape).map_err(|e| format!("`target` and `weight`: {e}"))?;
    Ok(vec![result(DType::F32, vec![x.shape[0].clone(), Dim::from(*targets)])?])
}

pub(crate) fn eval(_args: EvalArgs, _targets: &usize, _aggregate: &Aggregate) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
