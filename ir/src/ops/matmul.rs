//! matmul
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer(_args: TypeArgs, _0: &DType) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval(_args: EvalArgs, _0: &DType) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
