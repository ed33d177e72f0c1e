//! view
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer_broadcast(_args: TypeArgs, _0: &Vec<Dim>) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_broadcast(_args: EvalArgs, _0: &Vec<Dim>) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_reshape(_args: TypeArgs, _0: &Vec<Dim>) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_reshape(_args: EvalArgs, _0: &Vec<Dim>) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_transpose(_args: TypeArgs, _0: &Vec<usize>) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_transpose(_args: EvalArgs, _0: &Vec<usize>) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_slice(_args: TypeArgs, _0: &Vec<Dim>, _1: &Vec<Dim>, _2: &Vec<i64>) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_slice(_args: EvalArgs, _0: &Vec<Dim>, _1: &Vec<Dim>, _2: &Vec<i64>) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_pad(_args: TypeArgs, _0: &Vec<Dim>, _1: &Vec<Dim>, _2: &PadMode) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_pad(_args: EvalArgs, _0: &Vec<Dim>, _1: &Vec<Dim>, _2: &PadMode) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_concat(_args: TypeArgs, _0: &usize) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_concat(_args: EvalArgs, _0: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_iota(_args: TypeArgs, _0: &DType, _1: &Vec<Dim>, _2: &usize) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_iota(_args: EvalArgs, _0: &DType, _1: &Vec<Dim>, _2: &usize) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_dims(_args: TypeArgs, _0: &Vec<Dim>) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_dims(_args: EvalArgs, _0: &Vec<Dim>) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_bind_size(_args: TypeArgs, _0: &Sym) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_bind_size(_args: EvalArgs, _0: &Sym) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
