//! pool
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer(
    _args: TypeArgs,
    _0: &PoolFn,
    _1: &Vec<usize>,
    _2: &Vec<usize>,
    _3: &Vec<usize>,
    _4: &Vec<i64>,
    _5: &Vec<i64>,
    _6: &bool,
    _7: &Layout,
) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval(
    _args: EvalArgs,
    _0: &PoolFn,
    _1: &Vec<usize>,
    _2: &Vec<usize>,
    _3: &Vec<usize>,
    _4: &Vec<i64>,
    _5: &Vec<i64>,
    _6: &bool,
    _7: &Layout,
) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
