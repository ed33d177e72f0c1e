//! Recurrent layers: operands that ONNX lets a model leave out are filled in.
use crate::onnx::{
    build::{Res, Val, invalid},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, Real, activation::Activation, attr::Direction};

/// What the three layers share.
struct Cell {
    x: Val,
    direction: Direction,
    directions: usize,
    /// Steps, batch and hidden extents.
    t: Dim,
    n: Dim,
    h: Dim,
    /// Whether the batch comes first.
    batch_first: bool,
    clip: Real,
}

fn cell(cx: &mut Cx) -> Res<Cell> {
    let mut x = cx.arg(0)?;
    let (w, r) = (cx.arg(1)?, cx.arg(2)?);
    if [x, w, r].iter().any(|v| cx.rank(*v) != 3) {
        return invalid(format!("x is {}, w is {}, r is {}", cx.ty(x), cx.ty(w), cx.ty(r)));
    }
    let direction = match cx.text("direction", "forward")?.as_str() {
        "forward" => Direction::Forward,
        "reverse" => Direction::Reverse,
        "bidirectional" => Direction::Bidirectional,
        other => return invalid(format!("direction `{other}`")),
    };
    let directions = if direction == Direction::Bidirectional { 2 } else { 1 };
    let batch_first = cx.flag("layout", false)?;
    if batch_first {
        x = cx.transpose(x, &[1, 0, 2])?;
    }
    let (mut shape, weights) = (cx.shape(x), cx.shape(w));
    shape[2] = cx.same_extent(&weights[2], &shape[2])?;
    x = cx.with_shape(x, shape.clone())?;
    let clip = Real::new(if cx.has("clip") { cx.float("clip", 0.0)? } else { 0.0 });
    Ok(Cell { x, direction, directions, t: shape[0].clone(), n: shape[1].clone(), h: cx.shape(r)[2].clone(), batch_first, clip })
}

impl Cell {
    /// Operand `i`, or zeros of this shape.
    fn or_zeros(&self, cx: &mut Cx, i: usize, shape: &[Dim]) -> Res<Val> {
        match cx.opt(i) {
            Some(v) => Ok(v),
            None => {
                let zero = cx.scalar_like(self.x, 0.0);
                cx.broadcast_to(zero, shape)
            }
        }
    }

    fn bias(&self, cx: &mut Cx, gates: usize) -> Res<Val> {
        self.or_zeros(cx, 3, &[Dim::from(self.directions), self.h.clone() * Dim::from(2 * gates)])
    }

    /// A state operand `[d, n, h]`.
    fn state(&self, cx: &mut Cx, i: usize) -> Res<Val> {
        let want = [Dim::from(self.directions), self.n.clone(), self.h.clone()];
        let Some(mut v) = cx.opt(i) else { return self.or_zeros(cx, i, &want) };
        if self.batch_first {
            v = cx.transpose(v, &[1, 0, 2])?;
        }
        let own = cx.shape(v);
        if own.len() != 3 {
            return invalid(format!("a state of type {}", cx.ty(v)));
        }
        for (a, b) in want.iter().zip(&own) {
            cx.same_extent(a, b)?;
        }
        cx.with_shape(v, want.to_vec())
    }

    /// Sequence lengths, all of them in full if not given.
    fn lengths(&self, cx: &mut Cx) -> Res<Val> {
        match cx.opt(4) {
            Some(v) => {
                let [own] = cx.shape(v).try_into().or_else(|_| invalid(format!("lengths of type {}", cx.ty(v))))?;
                cx.same_extent(&self.n, &own)?;
                let v = cx.with_shape(v, vec![self.n.clone()])?;
                cx.cast(v, DType::I32)
            }
            None => {
                let t = cx.known_dims(DType::I32, &[], vec![self.t.clone()]);
                cx.broadcast_to(t, std::slice::from_ref(&self.n))
            }
        }
    }

    /// ONNX names of gate activations, the defaults where none are given. Those that have parameters take them one after
    /// another, as far as the model gives any.
    fn activations(&self, cx: &Cx, defaults: &[Activation]) -> Res<Vec<Activation>> {
        let given = cx.strings("activations")?;
        let mut alphas = cx.floats("activation_alpha")?.unwrap_or_default().iter();
        let mut betas = cx.floats("activation_beta")?.unwrap_or_default().iter();
        let Some(given) = given else { return Ok(defaults.repeat(self.directions)) };
        if given.len() != defaults.len() * self.directions {
            return invalid(format!("{} activations", given.len()));
        }
        let mut find = |name: &String| {
            let plain = name.to_ascii_lowercase();
            let Some(f) = Activation::all().into_iter().find(|f| f.name().replace('_', "") == plain) else {
                return invalid(format!("the activation `{name}`"));
            };
            let drawn = f.parameters().into_iter().enumerate().map(|(i, default)| {
                let next = if i == 0 { alphas.next() } else { betas.next() };
                next.map_or(default, |v| Real::new(f64::from(*v)))
            });
            let drawn: Vec<Real> = drawn.collect();
            Ok(f.with(&drawn).unwrap_or(f))
        };
        given.iter().map(&mut find).collect()
    }

    /// Results `y[t, d, n, h]` and states, in the layout that the model wants.
    fn results(&self, cx: &mut Cx, results: Vec<Val>) -> Res<Vec<Val>> {
        if !self.batch_first {
            return Ok(results);
        }
        let turn = |(i, v): (usize, Val)| if i == 0 { cx.transpose(v, &[2, 0, 1, 3]) } else { cx.transpose(v, &[1, 0, 2]) };
        results.into_iter().enumerate().map(turn).collect()
    }
}

pub(crate) fn lstm(cx: &mut Cx) -> Res<Vec<Val>> {
    let c = cell(cx)?;
    let (w, r, b) = (cx.arg(1)?, cx.arg(2)?, c.bias(cx, 4)?);
    let (h0, c0) = (c.state(cx, 5)?, c.state(cx, 6)?);
    let peepholes = c.or_zeros(cx, 7, &[Dim::from(c.directions), c.h.clone() * Dim::from(3usize)])?;
    let lengths = c.lengths(cx)?;
    let activations = c.activations(cx, &[Activation::Sigmoid, Activation::Tanh, Activation::Tanh])?;
    let op = Op::Lstm { direction: c.direction, activations, clip: c.clip, coupled: cx.flag("input_forget", false)? };
    let out = cx.emit_all(op, &[c.x, w, r, b, h0, c0, peepholes, lengths], vec![])?;
    c.results(cx, out)
}

pub(crate) fn gru(cx: &mut Cx) -> Res<Vec<Val>> {
    let c = cell(cx)?;
    let (w, r, b) = (cx.arg(1)?, cx.arg(2)?, c.bias(cx, 3)?);
    let h0 = c.state(cx, 5)?;
    let lengths = c.lengths(cx)?;
    let activations = c.activations(cx, &[Activation::Sigmoid, Activation::Tanh])?;
    let op = Op::Gru { direction: c.direction, activations, clip: c.clip, linear_before_reset: cx.flag("linear_before_reset", false)? };
    let out = cx.emit_all(op, &[c.x, w, r, b, h0, lengths], vec![])?;
    c.results(cx, out)
}

pub(crate) fn rnn(cx: &mut Cx) -> Res<Vec<Val>> {
    let c = cell(cx)?;
    let (w, r, b) = (cx.arg(1)?, cx.arg(2)?, c.bias(cx, 1)?);
    let h0 = c.state(cx, 5)?;
    let lengths = c.lengths(cx)?;
    let activations = c.activations(cx, &[Activation::Tanh])?;
    let out = cx.emit_all(Op::Rnn { direction: c.direction, activations, clip: c.clip }, &[c.x, w, r, b, h0, lengths], vec![])?;
    c.results(cx, out)
}
