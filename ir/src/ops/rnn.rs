//! Recurrent layers, as ONNX defines `LSTM`, `GRU` and `RNN`.
use super::{
    demand,
    elements::{Num, out, store},
    float, length_is, rank_is, result, shape_is,
};
use crate::{
    DType, Dim, Real, Tensor, TensorType,
    activation::Activation,
    attr::Direction,
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

/// Operands of a recurrent layer as numbers.
struct Layer {
    x: Vec<f64>,
    w: Vec<f64>,
    r: Vec<f64>,
    b: Vec<f64>,
    h0: Vec<f64>,
    lens: Vec<i64>,
    steps: usize,
    batch: usize,
    inputs: usize,
    hidden: usize,
    directions: Vec<Run>,
    clip: f64,
}

/// Which end a direction starts from.
#[derive(Clone, Copy, PartialEq)]
enum Run {
    Forward,
    Backward,
}

/// One step of one sequence: `cell(direction, x, h, c)` updates the state.
type Cell<'a> = dyn Fn(usize, &[f64], &mut [f64], &mut [f64]) + 'a;

/// Results of a layer: `y[t, d, n, h]` and final states `[d, n, h]`.
struct Trace {
    y: Vec<f64>,
    h: Vec<f64>,
    c: Vec<f64>,
}

impl Layer {
    fn new(args: &EvalArgs, direction: Direction, clip: Real) -> Self {
        let t = args.tensors;
        let float = |i: usize| t[i].to_f64();
        let directions = match direction {
            Direction::Forward => vec![Run::Forward],
            Direction::Reverse => vec![Run::Backward],
            Direction::Bidirectional => vec![Run::Forward, Run::Backward],
        };
        Self {
            x: float(0),
            w: float(1),
            r: float(2),
            b: float(3),
            h0: float(4),
            lens: i64::load(t[t.len() - 1]),
            steps: t[0].shape()[0],
            batch: t[0].shape()[1],
            inputs: t[0].shape()[2],
            hidden: t[2].shape()[2],
            directions,
            clip: clip.get(),
        }
    }

    fn clipped(&self, v: f64) -> f64 {
        if self.clip > 0.0 { v.clamp(-self.clip, self.clip) } else { v }
    }

    /// Row `row` of direction `d`'s input weights times `x`, with its bias; rows count `gates * hidden`.
    fn input_sum(&self, d: usize, gates: usize, row: usize, x: &[f64]) -> f64 {
        let rows = gates * self.hidden;
        dot(&self.w[(d * rows + row) * self.inputs..], x) + self.b[d * 2 * rows + row]
    }

    /// Row `row` of direction `d`'s recurrent weights times `h`, with its bias.
    fn state_sum(&self, d: usize, gates: usize, row: usize, h: &[f64]) -> f64 {
        let rows = gates * self.hidden;
        dot(&self.r[(d * rows + row) * self.hidden..], h) + self.b[d * 2 * rows + rows + row]
    }

    /// Runs every direction of every sequence to its length.
    fn run(&self, c0: &[f64], cell: &Cell) -> Trace {
        let (d_n, hidden) = (self.directions.len(), self.hidden);
        let mut trace = Trace { y: vec![0.0; self.steps * d_n * self.batch * hidden], h: self.h0.clone(), c: c0.to_vec() };
        let mut no_cell = vec![];
        for (d, n) in (0..d_n).flat_map(|d| (0..self.batch).map(move |n| (d, n))) {
            let state = (d * self.batch + n) * hidden..(d * self.batch + n + 1) * hidden;
            let len = usize::try_from(self.lens[n]).unwrap_or(0).min(self.steps);
            for step in 0..len {
                let t = if self.directions[d] == Run::Forward { step } else { len - 1 - step };
                let x = &self.x[(t * self.batch + n) * self.inputs..][..self.inputs];
                let h = &mut trace.h[state.clone()];
                cell(d, x, h, trace.c.get_mut(state.clone()).unwrap_or(&mut no_cell));
                trace.y[((t * d_n + d) * self.batch + n) * hidden..][..hidden].copy_from_slice(h);
            }
        }
        trace
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn results(args: &EvalArgs, values: &[&[f64]]) -> Result<Vec<Tensor>, String> {
    let all = values.iter().enumerate();
    all.map(|(i, values)| out(args, i).and_then(|(dtype, shape)| store(dtype, shape, values))).collect()
}

pub(crate) fn eval_lstm(args: EvalArgs, direction: &Direction, activations: &[Activation], clip: &Real, coupled: &bool) -> Result<Vec<Tensor>, String> {
    out(&args, 0)?;
    let layer = Layer::new(&args, *direction, *clip);
    let (c0, p, n) = (args.tensors[5].to_f64(), args.tensors[6].to_f64(), layer.hidden);
    let trace = layer.run(&c0, &|d, x, h, c| {
        let [f, g, last] = [activations[3 * d], activations[3 * d + 1], activations[3 * d + 2]];
        let gate = |k: usize| (0..n).map(|j| layer.input_sum(d, 4, k * n + j, x) + layer.state_sum(d, 4, k * n + j, h)).collect::<Vec<_>>();
        let peep = |k: usize, j: usize, c: f64| p[(d * 3 + k) * n + j] * c;
        let (gate_i, gate_o, gate_f, gate_c) = (gate(0), gate(1), gate(2), gate(3));
        for j in 0..n {
            let i = f.apply(layer.clipped(gate_i[j] + peep(0, j, c[j])));
            let keep = if *coupled { 1.0 - i } else { f.apply(layer.clipped(gate_f[j] + peep(2, j, c[j]))) };
            c[j] = keep * c[j] + i * g.apply(layer.clipped(gate_c[j]));
            h[j] = f.apply(layer.clipped(gate_o[j] + peep(1, j, c[j]))) * last.apply(c[j]);
        }
    });
    results(&args, &[&trace.y, &trace.h, &trace.c])
}

pub(crate) fn eval_gru(
    args: EvalArgs,
    direction: &Direction,
    activations: &[Activation],
    clip: &Real,
    linear_before_reset: &bool,
) -> Result<Vec<Tensor>, String> {
    out(&args, 0)?;
    let layer = Layer::new(&args, *direction, *clip);
    let n = layer.hidden;
    let trace = layer.run(&[], &|d, x, h, _| {
        let [f, g] = [activations[2 * d], activations[2 * d + 1]];
        let gate = |k: usize| {
            let sums = (0..n).map(|j| layer.input_sum(d, 3, k * n + j, x) + layer.state_sum(d, 3, k * n + j, h));
            sums.map(|v| f.apply(layer.clipped(v))).collect::<Vec<f64>>()
        };
        let (update, reset) = (gate(0), gate(1));
        let scaled: Vec<f64> = h.iter().zip(&reset).map(|(h, r)| h * r).collect();
        let next: Vec<f64> = (0..n)
            .map(|j| {
                let row = 2 * n + j;
                let state = if *linear_before_reset { reset[j] * layer.state_sum(d, 3, row, h) } else { layer.state_sum(d, 3, row, &scaled) };
                g.apply(layer.clipped(layer.input_sum(d, 3, row, x) + state))
            })
            .collect();
        h.iter_mut().zip(update.iter().zip(next)).for_each(|(h, (z, next))| *h = (1.0 - z) * next + z * *h);
    });
    results(&args, &[&trace.y, &trace.h])
}

pub(crate) fn eval_rnn(args: EvalArgs, direction: &Direction, activations: &[Activation], clip: &Real) -> Result<Vec<Tensor>, String> {
    out(&args, 0)?;
    let layer = Layer::new(&args, *direction, *clip);
    let trace = layer.run(&[], &|d, x, h, _| {
        let sums = (0..layer.hidden).map(|j| layer.input_sum(d, 1, j, x) + layer.state_sum(d, 1, j, h));
        let next: Vec<f64> = sums.map(|v| activations[d].apply(layer.clipped(v))).collect();
        h.copy_from_slice(&next);
    });
    results(&args, &[&trace.y, &trace.h])
}
