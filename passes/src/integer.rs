//! Quantised models: products of dequantised tensors become products of their integers.
//!
//! A tensor is dequantised where it is `(cast(q) - zero) * scale` with `q` of 8 bits. A convolution or matrix product of
//! two such tensors is `scale_x * scale_w * sum (q_x - zero_x) * (q_w - zero_w)`, and the sum is one of integers: exact, in
//! any order. It is formed as such; what follows it (a bias, a clamp, the division by the next scale) becomes one
//! multiply-add of the sum, per output channel, with factors that are computed in f64 and rounded once. So against the
//! model's own arithmetic the result differs by roundings of f32 only, and a quantised one by one step where the value
//! stood at a tie of two.
//!
//! The zero point of the left operand is taken out of the sum, as a constant a channel, where no padding is added.
//! The pass does so only where the device multiplies bytes faster than floats ([`crate::eqsat::cost::Costs`]).
use crate::{
    Changed, Ctx, PassError,
    fold::{broadcast_constant, narrow},
    rebuild::Rebuild,
};
use pavage_ir::{DType, Dim, Graph, NodeId, NodeKind, Op, Scalar, ScalarFn, Tensor, Value, attr::Layout};
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
    let product = |op: Option<&Op>| matches!(op, Some(Op::Conv { .. } | Op::MatMul { .. }));
    if !faster || !graph.nodes().into_iter().any(|id| product(graph.op(id)) && dequantising(graph, graph.operands(id)[0])) {
        return Ok(Changed::No);
    }
    let mut pass = Pass { r: Rebuild::new("integer", graph), linear: BTreeMap::new() };
    for id in graph.schedule() {
        pass.r.at(id);
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
}

impl Pass<'_> {
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
        // Channels of the weights, and of the result.
        let (row, axis, padded) = match op {
            Op::Conv { lo, hi, layout, .. } => {
                let channel = if *layout == Layout::ChannelsFirst { 1 } else { rank - 1 };
                (0, channel, lo.iter().chain(hi).any(|p| *p != 0))
            }
            _ => (rank - 1, rank - 1, false),
        };
        let (Some(w), Some(x)) = (self.dequantised(w)?, self.dequantised(x)?) else { return Ok(None) };
        let vary = |d: &Dequantised| d.scale.len() > 1 || d.zero.len() > 1;
        if vary(&x) || vary(&w) && w.axis != row {
            return Ok(None);
        }
        let Some(weights) = self.evaluated(w.q) else { return Ok(None) };
        let Some(centred) = centred(&weights, &w.zero, row) else { return Ok(None) };
        // Sums of this many products of bytes must fit 31 bits, and so must what stands in for a zero point.
        let sums = row_sums(&centred, row);
        if sums.iter().any(|(_, magnitude)| magnitude * 511.0 > f64::from(i32::MAX)) {
            return Ok(None);
        }
        let kernel = self.r.constant(centred);
        let mut left = x.q;
        let zero = x.zero[0];
        let shape = self.r.new.ty(left).shape.clone();
        let number = |r: &mut Rebuild, dtype: DType, values: Vec<f64>, axis: usize, full: Vec<Dim>| {
            let mut small = vec![1; full.len()];
            small[axis] = values.len();
            let t = Tensor::from_scalars(dtype, small, values.into_iter().map(|v| Scalar::I(v as i128)));
            let v = r.constant(t);
            r.add(Op::Broadcast { shape: full }, &[v])
        };
        if zero != 0.0 && padded {
            let z = number(&mut self.r, DType::I16, vec![zero], 0, shape)?;
            left = self.r.add(Op::Cast { to: DType::I16 }, &[left])?;
            left = self.r.add(Op::Map(ScalarFn::Sub), &[left, z])?;
        }
        let op = if let Op::MatMul { .. } = op { Op::MatMul { out: DType::I32 } } else { op.clone() };
        let mut sum = self.r.add(op, &[left, kernel])?;
        if zero != 0.0 && !padded {
            let full = self.r.new.ty(sum).shape.clone();
            let correction = sums.iter().map(|(sum, _)| -zero * sum).collect();
            let c = number(&mut self.r, DType::I32, correction, axis, full)?;
            sum = self.r.add(Op::Map(ScalarFn::Add), &[sum, c])?;
        }
        let factor = w.scale.iter().map(|s| s * x.scale[0]).collect();
        Ok(Some(Linear { sum, factor, offset: vec![0.0], clamps: vec![], axis }))
    }

    /// The value of a constant, transposed perhaps.
    fn evaluated(&self, v: Value) -> Option<Tensor> {
        if let Some(t) = self.r.new.as_const(v) {
            return Some(t.clone());
        }
        let op = self.r.new.op(v.node).filter(|op| matches!(op, Op::Transpose { .. } | Op::Reshape { .. }))?;
        let t = self.evaluated(self.r.new.operands(v.node)[0])?;
        let results = [self.r.new.ty(v).clone()];
        op.eval(pavage_ir::op::EvalArgs { tensors: &[&t], bodies: &[], results: &results }).ok()?.pop()
    }
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
