//! Recurrent layers, as ONNX defines `LSTM`, `GRU` and `RNN`.
use super::{demand, float, length_is, rank_is, result, shape_is};
use crate::{
    DType, Dim, Real, Tensor, TensorType,
    attr::{Activation, Direction},
    op::{EvalArgs, TypeArgs},
};

fn directions(direction: Direction) -> usize {
    match direction {
        Direction::Forward | Direction::Reverse => 1,
        Direction::Bidirectional => 2,
    }
}

/// Checks the operands all three layers have: `x`, `w`, `r`, `b`, `h0` first and `lens` last.
/// Returns the types of `y` and of a state.
fn check(types: &[&TensorType], direction: Direction, gates: usize, activations: &[Activation], per_direction: usize) -> Result<[TensorType; 2], String> {
    let [x, w, r, b, h0, .., lens] = types else { return Err("operands are missing".into()) };
    let d = directions(direction);
    rank_is("x", x, 3)?;
    rank_is("r", r, 3)?;
    float("x", x)?;
    for (name, ty) in ["w", "r", "b", "h0"].into_iter().zip([w, r, b, h0]) {
        demand(ty.dtype == x.dtype, || format!("{name} must hold {} as x does, got {ty}", x.dtype))?;
    }
    let (t, n, i, h) = (&x.shape[0], &x.shape[1], &x.shape[2], &r.shape[2]);
    let (d_dim, gates_h) = (Dim::from(d), h.clone() * Dim::from(gates));
    shape_is("w", w, &[d_dim.clone(), gates_h.clone(), i.clone()])?;
    shape_is("r", r, &[d_dim.clone(), gates_h.clone(), h.clone()])?;
    shape_is("b", b, &[d_dim.clone(), gates_h * Dim::from(2usize)])?;
    let state = [d_dim.clone(), n.clone(), h.clone()];
    shape_is("h0", h0, &state)?;
    demand(lens.dtype == DType::I32, || format!("lens must hold i32, got {lens}"))?;
    shape_is("lens", lens, std::slice::from_ref(n))?;
    length_is("activations", activations.len(), per_direction * d)?;
    let y = result(x.dtype, vec![t.clone(), d_dim, n.clone(), h.clone()])?;
    Ok([y, result(x.dtype, state.to_vec())?])
}

pub(crate) fn infer_lstm(args: TypeArgs, direction: &Direction, activations: &[Activation], _clip: &Real, _coupled: &bool) -> Result<Vec<TensorType>, String> {
    let [y, h] = check(args.types, *direction, 4, activations, 3)?;
    let (c0, p) = (args.types[5], args.types[6]);
    for (name, ty) in [("c0", c0), ("p", p)] {
        demand(ty.dtype == h.dtype, || format!("{name} must hold {} as x does, got {ty}", h.dtype))?;
    }
    shape_is("c0", c0, &h.shape)?;
    shape_is("p", p, &[h.shape[0].clone(), h.shape[2].clone() * Dim::from(3usize)])?;
    Ok(vec![y, h.clone(), h])
}

pub(crate) fn infer_gru(
    args: TypeArgs,
    direction: &Direction,
    activations: &[Activation],
    _clip: &Real,
    _linear_before_reset: &bool,
) -> Result<Vec<TensorType>, String> {
    check(args.types, *direction, 3, activations, 2).map(Vec::from)
}

pub(crate) fn infer_rnn(args: TypeArgs, direction: &Direction, activations: &[Activation], _clip: &Real) -> Result<Vec<TensorType>, String> {
    check(args.types, *direction, 1, activations, 1).map(Vec::from)
}

pub(crate) fn eval_lstm(_args: EvalArgs, _0: &Direction, _1: &[Activation], _2: &Real, _3: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_gru(_args: EvalArgs, _0: &Direction, _1: &[Activation], _2: &Real, _3: &bool) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
pub(crate) fn eval_rnn(_args: EvalArgs, _0: &Direction, _1: &[Activation], _2: &Real) -> Result<Vec<Tensor>, String> {
    Err("no evaluator".into())
}
