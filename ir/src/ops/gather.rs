//! gather
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer(_args: TypeArgs, _0: &usize) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval(_args: EvalArgs, _0: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_elements(_args: TypeArgs, _0: &usize) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_elements(_args: EvalArgs, _0: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_nd(_args: TypeArgs, _0: &usize) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_nd(_args: EvalArgs, _0: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_scatter_elements(_args: TypeArgs, _0: &usize, _1: &ScatterFn) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_scatter_elements(_args: EvalArgs, _0: &usize, _1: &ScatterFn) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_scatter_nd(_args: TypeArgs, _0: &ScatterFn) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_scatter_nd(_args: EvalArgs, _0: &ScatterFn) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
