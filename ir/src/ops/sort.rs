//! sort
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer_topk(_args: TypeArgs, _0: &usize, _1: &Dim, _2: &bool) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_topk(_args: EvalArgs, _0: &usize, _1: &Dim, _2: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_nonzero(_args: TypeArgs, _0: &Sym) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_nonzero(_args: EvalArgs, _0: &Sym) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
