//! resize
#![allow(unused_imports, clippy::too_many_arguments)]
use crate::{
    attr::*,
    dim::Sym,
    op::{EvalArgs, TypeArgs},
    *,
};
pub(crate) fn infer(
    _args: TypeArgs,
    _0: &ResizeMode,
    _1: &CoordMode,
    _2: &NearestMode,
    _3: &Vec<Dim>,
    _4: &Vec<Real>,
    _5: &Real,
    _6: &Real,
    _7: &bool,
    _8: &bool,
) -> Result<Vec<TensorType>, String> {
    Err("no type rule".into())
}
pub(crate) fn eval(
    _args: EvalArgs,
    _0: &ResizeMode,
    _1: &CoordMode,
    _2: &NearestMode,
    _3: &Vec<Dim>,
    _4: &Vec<Real>,
    _5: &Real,
    _6: &Real,
    _7: &bool,
    _8: &bool,
) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
