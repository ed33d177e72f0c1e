//! Type rules and reference evaluators, by op family.
//!
//! A type rule reads operand types and attributes and answers with result types or one sentence that
//! names both sides of the broken requirement. It accepts any input without panicking. Two extents are
//! equal when their canonical expressions are; where a rule needs equal extents it demands exactly that.
//!
//! An evaluator runs after its rule accepted the operands' actual types ([`check`]), so it relies on
//! ranks, dtypes and extents, and checks only what types do not say: the values of indices and sizes.
pub(crate) mod attention;
pub(crate) mod control;
pub(crate) mod conv;
pub(crate) mod elements;
pub(crate) mod gather;
pub(crate) mod matmul;
pub(crate) mod patches;
pub(crate) mod pointwise;
pub(crate) mod pool;
pub(crate) mod quant;
pub(crate) mod reduce;
pub(crate) mod resize;
pub(crate) mod rnn;
pub(crate) mod sort;
pub(crate) mod tree;
pub(crate) mod view;
pub(crate) mod winograd;

use crate::{
    DType, Dim, Op, OpError, TensorType,
    op::{EvalArgs, TypeArgs},
    tensor::count_of,
};

/// The op's result types for the operands as they are, or what its type rule objects to. None for control
/// flow, which is checked against its bodies as it runs: their types may hold symbols that the operands bind.
pub(crate) fn check(op: &Op, args: &EvalArgs) -> Result<Option<Vec<TensorType>>, OpError> {
    op.check_arity(args.tensors.len())?;
    for t in args.tensors {
        elements::fits(t.dtype(), t.shape()).map_err(|reason| OpError::Eval { op: op.mnemonic(), reason })?;
    }
    if matches!(op, Op::If { .. } | Op::Loop { .. }) {
        return Ok(None);
    }
    let types: Vec<TensorType> = args.tensors.iter().map(|t| t.ty()).collect();
    op.infer(TypeArgs { types: &types.iter().collect::<Vec<_>>(), bodies: &[] }).map(Some)
}

/// A result type, once its constant extents can be those of a tensor.
fn result(dtype: DType, shape: Vec<Dim>) -> Result<TensorType, String> {
    for (axis, d) in shape.iter().enumerate() {
        if d.as_const().is_some_and(|v| v < 0) {
            return Err(format!("axis {axis} of the result would have extent {d}"));
        }
    }
    let ty = TensorType { dtype, shape };
    match ty.const_shape() {
        Some(shape) if count_of(&shape).is_none() => Err(format!("the result {ty} has too many elements")),
        _ => Ok(ty),
    }
}

fn rank_is(what: &str, ty: &TensorType, rank: usize) -> Result<(), String> {
    if ty.rank() == rank { Ok(()) } else { Err(format!("{what} must have rank {rank}, got {ty}")) }
}

fn axis_in(axis: usize, ty: &TensorType) -> Result<(), String> {
    if axis < ty.rank() { Ok(()) } else { Err(format!("axis {axis} is not an axis of {ty}")) }
}

fn length_is(what: &str, got: usize, expected: usize) -> Result<(), String> {
    if got == expected { Ok(()) } else { Err(format!("`{what}` needs {expected} entries, got {got}")) }
}

fn extent_is(what: &str, got: &Dim, expected: &Dim) -> Result<(), String> {
    if got == expected { Ok(()) } else { Err(format!("{what}: extents differ: {expected} and {got}")) }
}

fn same_shape(a: &[Dim], b: &[Dim]) -> Result<(), String> {
    if a.len() != b.len() {
        return Err(format!("ranks differ: {} and {}", a.len(), b.len()));
    }
    a.iter().zip(b).enumerate().try_for_each(|(i, (a, b))| extent_is(&format!("axis {i}"), b, a))
}

fn same_dtype(a: &TensorType, b: &TensorType) -> Result<(), String> {
    if a.dtype == b.dtype { Ok(()) } else { Err(format!("operand dtypes differ: {} and {}", a.dtype, b.dtype)) }
}

/// Dtypes that a sum of products takes: equal ones, or any integers of up to 16 bits.
fn factors(a: &TensorType, b: &TensorType) -> Result<(), String> {
    let short = |t: &TensorType| t.dtype.is_int() && t.dtype.bits() <= 16;
    if short(a) && short(b) { Ok(()) } else { same_dtype(a, b) }
}

fn shape_is(what: &str, ty: &TensorType, shape: &[Dim]) -> Result<(), String> {
    rank_is(what, ty, shape.len())?;
    ty.shape.iter().zip(shape).enumerate().try_for_each(|(i, (got, expected))| extent_is(&format!("{what}, axis {i}"), got, expected))
}

fn demand(ok: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if ok { Ok(()) } else { Err(what()) }
}

fn number(what: &str, ty: &TensorType) -> Result<(), String> {
    demand(ty.dtype.is_float() || ty.dtype.is_int(), || format!("{what} must hold numbers, got {ty}"))
}

fn float(what: &str, ty: &TensorType) -> Result<(), String> {
    demand(ty.dtype.is_float(), || format!("{what} must hold floats, got {ty}"))
}

fn integer(what: &str, ty: &TensorType) -> Result<(), String> {
    demand(ty.dtype.is_int(), || format!("{what} must hold integers, got {ty}"))
}

fn scalar_of(what: &str, ty: &TensorType, dtype: DType) -> Result<(), String> {
    demand(ty.rank() == 0 && ty.dtype == dtype, || format!("{what} must be {dtype}[], got {ty}"))
}
