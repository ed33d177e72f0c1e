//! conv
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer(
    _args: TypeArgs,
    _0: &Vec<usize>,
    _1: &Vec<usize>,
    _2: &Vec<i64>,
    _3: &Vec<i64>,
    _4: &usize,
    _5: &Layout,
) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval(_args: EvalArgs, _0: &Vec<usize>, _1: &Vec<usize>, _2: &Vec<i64>, _3: &Vec<i64>, _4: &usize, _5: &Layout) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn infer_transpose(
    _args: TypeArgs,
    _0: &Vec<usize>,
    _1: &Vec<usize>,
    _2: &Vec<i64>,
    _3: &Vec<i64>,
    _4: &Vec<usize>,
    _5: &usize,
    _6: &Layout,
) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval_transpose(
    _args: EvalArgs,
    _0: &Vec<usize>,
    _1: &Vec<usize>,
    _2: &Vec<i64>,
    _3: &Vec<i64>,
    _4: &Vec<usize>,
    _5: &usize,
    _6: &Layout,
) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
