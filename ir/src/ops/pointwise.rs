//! Pointwise ops and `cast`.
use super::{demand, result, same_shape};
use crate::{
    DType, ScalarFn, Tensor, TensorType,
    op::{EvalArgs, TypeArgs},
};

pub(crate) fn infer(args: TypeArgs, f: ScalarFn) -> Result<Vec<TensorType>, String> {
    let dtypes: Vec<DType> = args.types.iter().map(|t| t.dtype).collect();
    let dtype = f.infer(&dtypes)?;
    demand(!dtypes.contains(&DType::Str), || "strings have no arithmetic or order here".into())?;
    args.types.windows(2).try_for_each(|pair| same_shape(&pair[0].shape, &pair[1].shape))?;
    Ok(vec![result(dtype, args.types[0].shape.clone())?])
}

pub(crate) fn eval(_args: EvalArgs, _f: ScalarFn) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}

pub(crate) fn infer_cast(args: TypeArgs, to: &DType) -> Result<Vec<TensorType>, String> {
    let from = args.types[0].dtype;
    demand(from != DType::Str && *to != DType::Str, || format!("cannot convert {from} to {to}"))?;
    Ok(vec![result(*to, args.types[0].shape.clone())?])
}

pub(crate) fn eval_cast(_args: EvalArgs, _to: &DType) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
