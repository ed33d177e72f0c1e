//! rnn
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer_lstm(_args: TypeArgs, _0: &Direction, _1: &Vec<Activation>, _2: &Real, _3: &bool) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_lstm(_args: EvalArgs, _0: &Direction, _1: &Vec<Activation>, _2: &Real, _3: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_gru(_args: TypeArgs, _0: &Direction, _1: &Vec<Activation>, _2: &Real, _3: &bool) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_gru(_args: EvalArgs, _0: &Direction, _1: &Vec<Activation>, _2: &Real, _3: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_rnn(_args: TypeArgs, _0: &Direction, _1: &Vec<Activation>, _2: &Real) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_rnn(_args: EvalArgs, _0: &Direction, _1: &Vec<Activation>, _2: &Real) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
