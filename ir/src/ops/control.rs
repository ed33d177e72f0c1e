//! control
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer_if(_args: TypeArgs) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_if(_args: EvalArgs) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_loop(_args: TypeArgs, _0: &usize, _1: &Sym) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_loop(_args: EvalArgs, _0: &usize, _1: &Sym) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_scan(_args: TypeArgs, _0: &usize, _1: &usize, _2: &Vec<bool>, _3: &Vec<bool>) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_scan(_args: EvalArgs, _0: &usize, _1: &usize, _2: &Vec<bool>, _3: &Vec<bool>) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
