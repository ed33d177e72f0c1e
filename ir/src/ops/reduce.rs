//! reduce
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer(_args: TypeArgs, _0: &ReduceFn, _1: &Vec<usize>) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval(_args: EvalArgs, _0: &ReduceFn, _1: &Vec<usize>) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_arg(_args: TypeArgs, _0: &ReduceFn, _1: &usize, _2: &bool) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_arg(_args: EvalArgs, _0: &ReduceFn, _1: &usize, _2: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_cumulative(_args: TypeArgs, _0: &ReduceFn, _1: &usize, _2: &bool, _3: &bool) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_cumulative(_args: EvalArgs, _0: &ReduceFn, _1: &usize, _2: &bool, _3: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
