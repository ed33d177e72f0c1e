//! Quantised models: products of dequantised tensors become products of their integers.
//!
//! A tensor is dequantised where it is `(cast(q) - zero) * scale` with `q` of 8 bits. A convolution or matrix product of
//! two such tensors is `scale_x * scale_w * sum (q_x - zero_x) * (q_w - zero_w)`, and the sum is one of integers: exact, in
//! any order. It is formed as such; what follows it (a bias, a clamp, the division by the next scale) becomes one
//! multiply-add of the sum, per output channel, with factors that are computed in f64 and rounded once. So against the
//! model's own arithmetic the result differs by roundings of f32 only, and a quantised one by one step where the value
//! stood at a tie of two.
//!
//! The zero point of the left operand is taken out of the sum, as a constant a channel, where no padding is added. Matrix units
//! take bytes as they are, in whole words: for wide devices padding is written out as bytes that stand for 0, channels are
//! made whole words with weights of 0, and models that multiply integers themselves (`MatMulInteger`, `QLinearConv`) have
//! their zero points taken out too, known or not.
//!
//! The pass does so only where the device multiplies bytes faster than floats ([`crate::eqsat::cost::Costs`]).
use crate::{
    Changed, Ctx, PassError,
    eqsat::cost::WORD,
    fold::{broadcast_constant, narrow},
    rebuild::Rebuild,
};
use pavage_ir::{
    DType, Dim, Graph, NodeId, NodeKind, Op, Scalar, ScalarFn, Tensor, Value,
    attr::{Layout, PadMode},
};
use std::collections::BTreeMap;

/// `(q - zero) * scale`.
struct Dequantised {
    /// 8-bit integers, in the new graph.
    q: Value,
    /// One zero point, or one an index of the axis on which the scale varies.
    zero: Vec<f64>,
    /// One scale, or one an index of `axis`.
    scale: Vec<f64>,
    axis: usize,
}

/// `sum * factor + offset`, then the clamps in turn, with one factor and offset or one a channel.
#[derive(Clone)]
struct Linear {
    /// An i32 sum, in the new graph.
    sum: Value,
    factor: Vec<f64>,
    offset: Vec<f64>,
    clamps: Vec<(ScalarFn, f64)>,
    /// Axis of the channels.
    axis: usize,
}

/// Rebuild with integer products.
pub fn run(graph: &mut Graph, ctx: &Ctx) -> Result<Changed, PassError> {
    let faster = ctx.costs.byte_flops_per_ns > ctx.costs.contract_flops_per_ns;
    let wide = ctx.costs.is_wide();
    let product = |op: Option<&Op>| matches!(op, Some(Op::Conv { .. } | Op::MatMul { .. }));
    let concerned = |id: NodeId| {
        let left = || graph.operands(id)[0];
        product(graph.op(id)) && (dequantising(graph, left()) || wide && less(graph, left()).is_some())
    };
    if !faster || !graph.nodes().into_iter().any(concerned) {
        return Ok(Changed::No);
    }
    let mut pass = Pass { r: Rebuild::new("integer", graph), linear: BTreeMap::new(), wide };
    for id in graph.schedule() {
        pass.r.at(id);
        if let Some(sum) = pass.bytes_less_zero(id)? {
            pass.r.set(id.into(), sum);
            continue;
        }
        if let Some(linear) = pass.follow(id)? {
            pass.linear.insert(id.into(), linear);
            continue;
        }
        for v in graph.operands(id) {
            pass.settle(v)?;
        }
        pass.r.copy(id)?;
    }
    for out in &graph.outputs {
        pass.settle(out.value)?;
    }
    let (new, _) = pass.r.finish();
    *graph = new;
    Ok(Changed::Yes)
}

/// Whether `v` may be a dequantised tensor: a cheap first look.
fn dequantising(graph: &Graph, v: Value) -> bool {
    match graph.op(v.node) {
        Some(Op::Transpose { .. } | Op::Reshape { .. }) => dequantising(graph, graph.operands(v.node)[0]),
        Some(Op::Map(ScalarFn::Mul)) => true,
        _ => false,
    }
}

/// Bytes that something is taken off as wider integers, seen in another shape perhaps.
struct Less {
    q: Value,
    zero: Value,
    /// The shape or order of axes it is seen in.
    views: Vec<Op>,
}

fn less(graph: &Graph, v: Value) -> Option<Less> {
    match (graph.op(v.node)?, graph.operands(v.node).as_slice()) {
        (op @ (Op::Reshape { .. } | Op::Transpose { .. }), [x]) => {
            let mut inner = less(graph, *x)?;
            inner.views.push(op.clone());
            Some(inner)
        }
        (Op::Map(ScalarFn::Sub), [x, zero]) => {
            let Op::Cast { to: DType::I16 | DType::I32 } = graph.op(x.node)? else { return None };
            let q = *graph.operands(x.node).first()?;
            matches!(graph.ty(q).dtype, DType::U8 | DType::I8).then_some(Less { q, zero: *zero, views: vec![] })
        }
        _ => None,
    }
}

/// The one element behind broadcasts and reshapes.
fn single(graph: &Graph, v: Value) -> Option<Value> {
    match graph.op(v.node) {
        _ if graph.ty(v).count().is(1) => Some(v),
        Some(Op::Broadcast { .. } | Op::Reshape { .. }) => single(graph, graph.operands(v.node)[0]),
        _ => None,
    }
}

/// A zero point that is taken out of a sum.
#[derive(Clone, Copy)]
enum Zero {
    /// Known when the model is compiled.
    Known(f64),
    /// An element of the new graph.
    Value(Value),
}

/// The value of a constant behind broadcasts: one, or one an index of `axis`.
fn along(graph: &Graph, v: Value, axis: usize) -> Option<Vec<f64>> {
    let t = narrow(&broadcast_constant(graph, v)?);
    let rank = graph.ty(v).rank();
    let fits = t.count() == 1 || t.shape().len() == rank && t.shape().iter().enumerate().all(|(i, n)| *n == 1 || i == axis);
    fits.then(|| t.to_f64())
}

/// The axis on which a constant behind broadcasts varies, if it is at most one.
fn varying_axis(graph: &Graph, v: Value) -> Option<usize> {
    let t = narrow(&broadcast_constant(graph, v)?);
    let many: Vec<usize> = (0..t.shape().len()).filter(|i| t.shape()[*i] != 1).collect();
    if many.len() > 1 || t.shape().len() != graph.ty(v).rank() && t.count() != 1 { None } else { Some(many.first().copied().unwrap_or(0)) }
}

fn at(values: &[f64], i: usize) -> f64 {
    values[if values.len() == 1 { 0 } else { i }]
}

/// `f` of the values of both, channel by channel.
fn zip(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    (0..a.len().max(b.len())).map(|i| f(at(a, i), at(b, i))).collect()
}

struct Pass<'a> {
    r: Rebuild<'a>,
    /// Old values not yet computed.
    linear: BTreeMap<Value, Linear>,
    /// Whether products are for matrix units.
    wide: bool,
}

impl Pass<'_> {
    /// The sum of a product of bytes from which a zero point is taken, as one of the bytes themselves.
    fn bytes_less_zero(&mut self, id: NodeId) -> Result<Option<Value>, PassError> {
        let old = self.r.old;
        let Some(op @ (Op::Conv { .. } | Op::MatMul { .. })) = old.op(id).filter(|_| self.wide && old.ty(id.into()).dtype == DType::I32) else {
            return Ok(None);
        };
        let operands = old.operands(id);
        let Some(less) = less(old, operands[0]) else { return Ok(None) };
        let Some(zero) = single(old, less.zero) else { return Ok(None) };
        let Some(weights) = known(old, operands[1]) else { return Ok(None) };
        let (row, axis) = channels(op, weights.shape().len());
        let Some(centred) = centred(&weights, &[0.0], row).filter(|t| t.dtype() == DType::I8) else { return Ok(None) };
        if !matches!(op, Op::Conv { .. }) && weights.count() != weights.shape().iter().rev().take(2).product() {
            return Ok(None);
        }
        let zero = match known(old, zero) {
            Some(t) => Zero::Known(t.get(0).f()),
            None => Zero::Value(self.r.value(zero)),
        };
        let mut left = self.r.value(less.q);
        for view in less.views {
            left = self.r.add(view, &[left])?;
        }
        self.sum(op, left, zero, centred, (row, axis)).map(Some)
    }

    /// The sum of `(left - zero) * weights` in i32; channels are axis `row` of the weights and `axis` of the result.
    fn sum(&mut self, op: &Op, mut left: Value, zero: Zero, weights: Tensor, (row, axis): (usize, usize)) -> Result<Value, PassError> {
        let nothing = matches!(zero, Zero::Known(0.0));
        let mut op = if let Op::MatMul { .. } = op { Op::MatMul { out: DType::I32 } } else { op.clone() };
        let sums = row_sums(&weights, row);
        let ty = self.r.new.ty(left).clone();
        let padded = matches!(&op, Op::Conv { lo, hi, .. } if lo.iter().chain(hi).any(|p| *p != 0)) && !nothing;
        let mut weights = weights;
        let mut outside = true;
        if let (true, Op::Conv { lo, hi, groups, layout, .. }) = (self.wide, &mut op) {
            let (channel, first) = if *layout == Layout::ChannelsFirst { (1, 2) } else { (ty.rank() - 1, 1) };
            let mut around = [vec![Dim::ZERO; ty.rank()], vec![Dim::ZERO; ty.rank()]];
            // Channels come in whole words, more of them than the model has if need be.
            let (filters, channels) = (weights.shape()[0], weights.shape()[1]);
            let missing = if *groups == 1 && filters >= 8 { channels.next_multiple_of(WORD as usize) - channels } else { 0 };
            if missing > 0 {
                weights = with_channels(&weights, missing);
                around[1][channel] = Dim::from(missing);
            }
            if padded {
                for (sizes, all) in [lo, hi].into_iter().zip(&mut around) {
                    sizes.iter().enumerate().for_each(|(i, n)| all[first + i] = Dim::from(*n));
                    sizes.fill(0);
                }
            }
            if padded || missing > 0 {
                let value = match zero {
                    Zero::Known(z) => self.r.constant(Tensor::from_scalars(ty.dtype, vec![], [Scalar::I(z as i128)])),
                    Zero::Value(v) => {
                        let v = self.r.add(Op::Cast { to: ty.dtype }, &[v])?;
                        self.r.add(Op::Reshape { shape: vec![] }, &[v])?
                    }
                };
                let [lo, hi] = around;
                left = self.r.add(Op::Pad { lo, hi, mode: PadMode::Constant }, &[left, value])?;
            }
        } else if let (true, Zero::Known(z)) = (padded, zero) {
            let z = number(&mut self.r, DType::I16, &[z], 0, &ty.shape)?;
            left = self.r.add(Op::Cast { to: DType::I16 }, &[left])?;
            left = self.r.add(Op::Map(ScalarFn::Sub), &[left, z])?;
            outside = false;
        }
        let weights = self.r.constant(weights);
        let sum = self.r.add(op, &[left, weights])?;
        if nothing || !outside {
            return Ok(sum);
        }
        let full = self.r.new.ty(sum).shape.clone();
        let of_weights = |f: f64| sums.iter().map(|(sum, _)| f * sum).collect::<Vec<_>>();
        match zero {
            Zero::Known(z) => {
                let c = number(&mut self.r, DType::I32, &of_weights(-z), axis, &full)?;
                self.r.add(Op::Map(ScalarFn::Add), &[sum, c])
            }
            Zero::Value(v) => {
                let mut small = vec![Dim::one(); full.len()];
                let v = self.r.add(Op::Cast { to: DType::I32 }, &[v])?;
                let v = self.r.add(Op::Reshape { shape: small.clone() }, &[v])?;
                small[axis] = Dim::from(sums.len());
                let v = self.r.add(Op::Broadcast { shape: small.clone() }, &[v])?;
                let c = number(&mut self.r, DType::I32, &of_weights(1.0), axis, &small)?;
                let c = self.r.add(Op::Map(ScalarFn::Mul), &[v, c])?;
                let c = self.r.add(Op::Broadcast { shape: full }, &[c])?;
                self.r.add(Op::Map(ScalarFn::Sub), &[sum, c])
            }
        }
    }

    /// What a node is as a linear function of an integer sum.
    fn follow(&mut self, id: NodeId) -> Result<Option<Linear>, PassError> {
        let old = self.r.old;
        let NodeKind::Op(op, _) = &old[id].kind else { return Ok(None) };
        if old[id].types.first().is_none_or(|t| t.dtype != DType::F32) {
            return Ok(None);
        }
        let operands = old.operands(id);
        match op {
            Op::Conv { .. } | Op::MatMul { .. } => self.product(op, operands[0], operands[1]),
            Op::Map(f) if operands.len() == 2 => Ok(self.step(*f, operands[0], operands[1])),
            _ => Ok(None),
        }
    }

    /// A pointwise step on a linear value that nothing else uses.
    fn step(&self, f: ScalarFn, a: Value, b: Value) -> Option<Linear> {
        let old = self.r.old;
        let (v, other, first) = if self.linear.contains_key(&a) { (a, b, true) } else { (b, a, false) };
        let mut linear = self.linear.get(&v).filter(|_| old.n_uses(v) == 1)?.clone();
        let k = along(old, other, linear.axis)?;
        if k.iter().any(|k| !k.is_finite()) {
            return None;
        }
        match f {
            ScalarFn::Add if linear.clamps.is_empty() => linear.offset = zip(&linear.offset, &k, |o, k| o + k),
            ScalarFn::Sub if linear.clamps.is_empty() && first => linear.offset = zip(&linear.offset, &k, |o, k| o - k),
            ScalarFn::Mul | ScalarFn::Div if k.iter().all(|k| *k > 0.0) && (first || f == ScalarFn::Mul) => {
                let by = |x: f64, k: f64| if f == ScalarFn::Mul { x * k } else { x / k };
                if !linear.clamps.is_empty() && k.len() > 1 {
                    return None;
                }
                linear.factor = zip(&linear.factor, &k, by);
                linear.offset = zip(&linear.offset, &k, by);
                linear.clamps.iter_mut().for_each(|(_, c)| *c = by(*c, k[0]));
            }
            ScalarFn::Max | ScalarFn::Min if k.len() == 1 => linear.clamps.push((f, k[0])),
            _ => return None,
        }
        Some(linear)
    }

    /// Compute a linear value in the new graph.
    fn settle(&mut self, old: Value) -> Result<(), PassError> {
        let Some(linear) = self.linear.remove(&old) else { return Ok(()) };
        let ty = self.r.old.ty(old).clone();
        let constant = |r: &mut Rebuild, values: &[f64]| {
            let mut shape = vec![1; ty.rank()];
            shape[linear.axis] = values.len();
            let t = Tensor::from_scalars(DType::F32, shape, values.iter().map(|v| Scalar::F(*v)));
            let v = r.constant(t);
            r.add(Op::Broadcast { shape: ty.shape.clone() }, &[v])
        };
        let sum = self.r.add(Op::Cast { to: DType::F32 }, &[linear.sum])?;
        let factor = constant(&mut self.r, &linear.factor)?;
        let mut v = if linear.offset.iter().all(|o| *o == 0.0) {
            self.r.add(Op::Map(ScalarFn::Mul), &[sum, factor])?
        } else {
            let offset = constant(&mut self.r, &linear.offset)?;
            self.r.add(Op::Map(ScalarFn::Fma), &[sum, factor, offset])?
        };
        for (f, k) in &linear.clamps {
            let k = constant(&mut self.r, &[*k])?;
            v = self.r.add(Op::Map(*f), &[v, k])?;
        }
        self.r.set(old, v);
        Ok(())
    }

    /// A dequantised tensor, its integers in the new graph.
    fn dequantised(&mut self, v: Value) -> Result<Option<Dequantised>, PassError> {
        let old = self.r.old;
        let Some(op) = old.op(v.node) else { return Ok(None) };
        let operands = old.operands(v.node);
        match op {
            Op::Transpose { perm } => {
                let Some(mut inner) = self.dequantised(operands[0])? else { return Ok(None) };
                inner.q = self.r.add(op.clone(), &[inner.q])?;
                inner.axis = perm.iter().position(|p| *p == inner.axis).unwrap_or(0);
                Ok(Some(inner))
            }
            Op::Reshape { .. } => {
                let Some(mut inner) = self.dequantised(operands[0])? else { return Ok(None) };
                if inner.scale.len() > 1 || inner.zero.len() > 1 {
                    return Ok(None);
                }
                inner.q = self.r.add(op.clone(), &[inner.q])?;
                inner.axis = 0;
                Ok(Some(inner))
            }
            Op::Map(ScalarFn::Mul) => {
                let is_constant = |v: Value| broadcast_constant(old, v).is_some();
                let (y, s) = if is_constant(operands[1]) { (operands[0], operands[1]) } else { (operands[1], operands[0]) };
                let Some(axis) = varying_axis(old, s) else { return Ok(None) };
                let Some(scale) = along(old, s, axis) else { return Ok(None) };
                let (cast, zero, axis) = match old.op(y.node) {
                    Some(Op::Map(ScalarFn::Sub)) => {
                        let parts = old.operands(y.node);
                        let Some(zero_axis) = varying_axis(old, parts[1]) else { return Ok(None) };
                        let axis = if scale.len() > 1 { axis } else { zero_axis };
                        let Some(zero) = along(old, parts[1], axis) else { return Ok(None) };
                        (parts[0], zero, axis)
                    }
                    _ => (y, vec![0.0], axis),
                };
                if !matches!(old.op(cast.node), Some(Op::Cast { to: DType::F32 })) {
                    return Ok(None);
                }
                let q = old.operands(cast.node)[0];
                let whole = zero.iter().all(|z| z.fract() == 0.0 && z.abs() <= 255.0) && scale.iter().all(|s| s.is_finite() && *s > 0.0);
                let bytes = matches!(old.ty(q).dtype, DType::U8 | DType::I8);
                Ok((whole && bytes).then(|| Dequantised { q: self.r.value(q), zero, scale, axis }))
            }
            _ => Ok(None),
        }
    }

    /// `op` of two dequantised tensors, the second of them constant.
    fn product(&mut self, op: &Op, x: Value, w: Value) -> Result<Option<Linear>, PassError> {
        let rank = self.r.old.ty(w).rank();
        let (row, axis) = channels(op, rank);
        let (Some(w), Some(x)) = (self.dequantised(w)?, self.dequantised(x)?) else { return Ok(None) };
        let vary = |d: &Dequantised| d.scale.len() > 1 || d.zero.len() > 1;
        if vary(&x) || vary(&w) && w.axis != row {
            return Ok(None);
        }
        let Some(weights) = known(&self.r.new, w.q) else { return Ok(None) };
        let Some(centred) = centred(&weights, &w.zero, row) else { return Ok(None) };
        // Sums of this many products of bytes must fit 31 bits, and so must what stands in for a zero point.
        let sums = row_sums(&centred, row);
        if sums.iter().any(|(_, magnitude)| magnitude * 511.0 > f64::from(i32::MAX)) {
            return Ok(None);
        }
        // What stands in for it would differ from batch to batch.
        let batches = matches!(op, Op::MatMul { .. }) && weights.count() != weights.shape().iter().rev().take(2).product();
        if batches && x.zero[0] != 0.0 {
            return Ok(None);
        }
        let sum = self.sum(op, x.q, Zero::Known(x.zero[0]), centred, (row, axis))?;
        let factor = w.scale.iter().map(|s| s * x.scale[0]).collect();
        Ok(Some(Linear { sum, factor, offset: vec![0.0], clamps: vec![], axis }))
    }
}

/// The axis of the channels of the weights, of this rank, and that of the result.
fn channels(op: &Op, rank: usize) -> (usize, usize) {
    match op {
        Op::Conv { layout: Layout::ChannelsFirst, .. } => (0, 1),
        Op::Conv { .. } => (0, rank - 1),
        _ => (rank - 1, rank - 1),
    }
}

/// Integers along an axis, in every place of a shape.
fn number(r: &mut Rebuild, dtype: DType, values: &[f64], axis: usize, full: &[Dim]) -> Result<Value, PassError> {
    let mut small = vec![1; full.len()];
    small[axis] = values.len();
    let t = Tensor::from_scalars(dtype, small, values.iter().map(|v| Scalar::I(*v as i128)));
    let v = r.constant(t);
    r.add(Op::Broadcast { shape: full.to_vec() }, &[v])
}

/// The value of what is calculated from constants alone.
fn known(graph: &Graph, v: Value) -> Option<Tensor> {
    if let Some(t) = graph.as_const(v) {
        return Some(t.clone());
    }
    let plain = |op: &&Op| matches!(op, Op::Transpose { .. } | Op::Reshape { .. } | Op::Broadcast { .. } | Op::Cast { .. } | Op::Map(_));
    let op = graph.op(v.node).filter(plain)?;
    let tensors: Vec<Tensor> = graph.operands(v.node).iter().map(|x| known(graph, *x)).collect::<Option<_>>()?;
    graph.ty(v).const_shape()?;
    let tensors: Vec<&Tensor> = tensors.iter().collect();
    op.eval(pavage_ir::op::EvalArgs { tensors: &tensors, bodies: &[], results: &[graph.ty(v).clone()] }).ok()?.pop()
}

/// Weights of a convolution with so many channels more, all zero.
fn with_channels(weights: &Tensor, more: usize) -> Tensor {
    let mut shape = weights.shape().to_vec();
    let (channels, taps) = (shape[1], shape[2..].iter().product::<usize>());
    shape[1] += more;
    let wide = shape[1] * taps;
    let value = |i: usize| if i % wide < channels * taps { weights.get(i / wide * channels * taps + i % wide) } else { Scalar::I(0) };
    let count: usize = shape.iter().product();
    Tensor::from_scalars(weights.dtype(), shape, (0..count).map(value).collect::<Vec<_>>())
}

/// Index along `axis` of each element in turn.
fn rows(t: &Tensor, axis: usize) -> impl Iterator<Item = usize> {
    let (n, inner) = (t.shape()[axis], t.shape()[axis + 1..].iter().product::<usize>());
    (0..t.count()).map(move |i| i / inner % n)
}

/// `t - zero` as bytes, or as words where it takes nine bits.
fn centred(t: &Tensor, zero: &[f64], axis: usize) -> Option<Tensor> {
    if t.count() == 0 {
        return None;
    }
    let values: Vec<i128> = rows(t, axis).enumerate().map(|(i, row)| t.get(i).i() - at(zero, row) as i128).collect();
    let dtype = if values.iter().all(|v| (-128..=127).contains(v)) { DType::I8 } else { DType::I16 };
    Some(Tensor::from_scalars(dtype, t.shape().to_vec(), values.into_iter().map(Scalar::I)))
}

/// Sum and sum of magnitudes of each row.
fn row_sums(t: &Tensor, axis: usize) -> Vec<(f64, f64)> {
    let mut sums = vec![(0.0, 0.0); t.shape()[axis]];
    for (i, row) in rows(t, axis).enumerate() {
        let v = t.get(i).f();
        sums[row].0 += v;
        sums[row].1 += v.abs();
    }
    sums
}
