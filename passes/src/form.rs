//! Forming regions: a set of nodes that one kernel computes becomes a [`Region`], or the reason it cannot.
//!
//! There is one mechanism for producer, consumer, prologue, epilogue and reduction fusion. A region has at most
//! one heart (a contraction, convolution, pool or opaque op) or one family of reductions over the same rows.
//! Values the heart determines lie on the **spine**: each has coordinates in the region's axes, computed
//! forwards through pointwise ops, reshapes and transposes. Every other value is **pulled**: asked for at an
//! index, and the index mapped backwards through views, so that no view ever costs a kernel of its own.
mod patches;

use crate::positions::{self, Positions};
use pavage_ir::{
    DType, Dim, Expr, ExprId, Graph, Heart, NodeId, Op, Region, Scalar, ScalarFn, TensorType, Value,
    attr::{Layout, PadMode},
    dim::Atom,
    graph::NodeKind,
    region::{RegionOutput, Stage, StageFn, Window},
};
use std::collections::{BTreeMap, BTreeSet};

/// Expressions a region may hold: beyond this, recomputation outweighs what fusion saves.
const MAX_EXPRS: usize = 512;

/// Why nodes cannot be one kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    /// Two computations that each fix the loops.
    #[error("{0} and {1} both fix the loops of the kernel")]
    TwoHearts(&'static str, &'static str),
    /// The heart's result is needed at another point than the one being computed.
    #[error("{0} needs results of the heart at other points than its own")]
    OffSpine(&'static str),
    /// A reduction over other rows.
    #[error("reductions run over different rows")]
    Rows,
    /// No expression computes this op at a point.
    #[error("{0} has no value at a single point")]
    NotPointwise(&'static str),
    /// Results of different extents.
    #[error("results have different shapes")]
    Shapes,
    /// Elements narrower than a byte beside another result.
    #[error("results whose elements share bytes are written by a kernel of their own")]
    Packed,
    /// Too much would be recomputed.
    #[error("fusing would recompute too much ({0} expressions)")]
    TooLarge(usize),
}

/// A region and the values its arguments stand for.
#[derive(Clone, Debug)]
pub struct Formed {
    /// The kernel.
    pub region: Region,
    /// The value each argument reads.
    pub args: Vec<Value>,
    /// The value each output is.
    pub outputs: Vec<Value>,
}

/// Whether an op fixes the loops of a kernel.
pub fn is_heart(op: &Op) -> bool {
    matches!(op, Op::MatMul { .. } | Op::Attention { .. } | Op::AttentionParts { .. } | Op::Conv { .. } | Op::Pool { .. } | Op::WinogradOutput { .. })
        || is_opaque(op)
}

/// Whether an op stays an op of its own in a region.
pub fn is_opaque(op: &Op) -> bool {
    match op {
        Op::Map(_)
        | Op::Cast { .. }
        | Op::BitCast { .. }
        | Op::Dequant { .. }
        | Op::Broadcast { .. }
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Iota { .. }
        | Op::Dims { .. }
        | Op::BindSize { .. }
        | Op::Reduce { .. }
        | Op::ArgReduce { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::Pad { .. }
        | Op::Patches { .. }
        | Op::MatMul { .. }
        | Op::Attention { .. }
        | Op::AttentionParts { .. }
        | Op::Conv { .. }
        | Op::Pool { .. }
        | Op::WinogradOutput { .. } => false,
        Op::ConvTranspose { .. }
        | Op::Cumulative { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::Resize { .. }
        | Op::WinogradInput { .. }
        | Op::WinogradFilter { .. }
        | Op::TopK { .. }
        | Op::NonZero { .. }
        | Op::Lstm { .. }
        | Op::Gru { .. }
        | Op::Rnn { .. }
        | Op::TreeEnsemble { .. }
        | Op::If { .. }
        | Op::Loop { .. } => true,
    }
}

/// Form one region of `members` (topologically sorted) that gives `outputs`.
pub fn form<'g>(graph: &'g Graph, members: &[NodeId], outputs: &'g [Value]) -> Result<Formed, Illegal> {
    if outputs.len() > 1 && outputs.iter().any(|v| graph.ty(*v).dtype.is_packed()) {
        return Err(Illegal::Packed);
    }
    let name = members.iter().filter_map(|id| graph.op(*id)).filter(|op| !is_view(op)).map(Op::mnemonic).take(4).collect::<Vec<_>>().join("_");
    let name = if name.is_empty() { members.iter().filter_map(|id| graph.op(*id)).map(Op::mnemonic).next().unwrap_or("copy").to_string() } else { name };
    let mut former = Former {
        graph,
        members: members.iter().copied().collect(),
        region: Region::new(name, vec![]),
        args: vec![],
        coords: BTreeMap::new(),
        stages: BTreeMap::new(),
        axes: vec![],
        memo: BTreeMap::new(),
        space_id: 0,
        in_heart: false,
        full: None,
        results: outputs,
    };
    former.run(members, outputs)?;
    Ok(Formed { region: former.region, args: former.args, outputs: outputs.to_vec() })
}

/// Whether `op` is a channels-last depthwise convolution with these weights, one filter a channel.
pub fn is_depthwise(op: &Op, weights: &[Dim]) -> bool {
    let Op::Conv { groups, layout: Layout::ChannelsLast, .. } = op else { return false };
    *groups > 1 && weights[0] == Dim::from(*groups) && weights[1].is(1)
}

/// Whether `op` is a channels-last convolution that multiplies each pixel's channels by these weights, and nothing else.
pub fn is_point_product(op: &Op, weights: &[Dim]) -> bool {
    let Op::Conv { strides, lo, hi, groups: 1, layout: Layout::ChannelsLast, .. } = op else { return false };
    weights[2..].iter().all(|d| d.is(1)) && strides.iter().all(|s| *s == 1) && lo.iter().chain(hi).all(|p| *p == 0)
}

/// Ops that only rename coordinates.
pub fn is_view(op: &Op) -> bool {
    matches!(op, Op::Broadcast { .. } | Op::Reshape { .. } | Op::Transpose { .. } | Op::Slice { .. })
}

struct Former<'g> {
    graph: &'g Graph,
    /// What the region is to give.
    results: &'g [Value],
    members: BTreeSet<NodeId>,
    region: Region,
    args: Vec<Value>,
    /// Coordinates of spine values in the region's axes.
    coords: BTreeMap<Value, Vec<Dim>>,
    /// Stage or heart result of a spine root.
    stages: BTreeMap<Value, u32>,
    /// Extents of the axes expressions are written over just now.
    axes: Vec<Dim>,
    memo: BTreeMap<(u32, Value, Vec<Dim>, Option<ExprId>), ExprId>,
    space_id: u32,
    /// Whether operands of the heart are being written: they are read from memory, constants too.
    in_heart: bool,
    /// For reductions: the full coordinates of a row's elements, and the reduced axes of the operand.
    full: Option<(Vec<Dim>, Vec<usize>, TensorType)>,
}

impl Former<'_> {
    fn run(&mut self, members: &[NodeId], outputs: &[Value]) -> Result<(), Illegal> {
        let mut heart: Option<NodeId> = None;
        let pair = self.separable_pair(members);
        for &id in members {
            let Some(op) = self.graph.op(id) else { continue };
            match op {
                _ if pair.is_some_and(|(depthwise, _)| depthwise == id) => {}
                _ if pair.is_some_and(|(_, product)| product == id) => {
                    heart = Some(id);
                    self.separable(pair.map_or(id, |p| p.0), id)?;
                }
                Op::Reduce { .. } | Op::ArgReduce { .. } => {
                    if let Some(h) = heart.and_then(|h| self.graph.op(h)) {
                        return Err(Illegal::TwoHearts(h.mnemonic(), op.mnemonic()));
                    }
                    self.reduction(id, op)?;
                }
                op if is_heart(op) => {
                    let first = heart.and_then(|h| self.graph.op(h)).map(Op::mnemonic).or(self.full.as_ref().map(|_| "reduce"));
                    if let Some(first) = first {
                        return Err(Illegal::TwoHearts(first, op.mnemonic()));
                    }
                    heart = Some(id);
                    self.heart(id, op)?;
                }
                op => self.extend_spine(id, op)?,
            }
        }
        if heart.is_none() && self.full.is_none() {
            // A map: the points are those of the first output.
            let shape = outputs.first().map(|v| self.graph.ty(*v).shape.clone()).unwrap_or_default();
            self.region.space = shape.clone();
            self.axes = shape;
        }
        if let Some(op @ Op::If { .. } | op @ Op::Loop { .. }) = heart.and_then(|h| self.graph.op(h)) {
            return Err(Illegal::NotPointwise(op.mnemonic()));
        }
        if matches!(self.region.heart, Heart::Op(_)) {
            return self.opaque_outputs(heart, outputs);
        }
        for &v in outputs {
            let ty = self.graph.ty(v).clone();
            let (index, expr) = match self.coords.get(&v).cloned() {
                Some(at) => (at.clone(), self.pull(v, at, None)?),
                None => {
                    if ty.shape != self.region.space || self.full.is_some() || heart.is_some() {
                        return Err(Illegal::Shapes);
                    }
                    let at: Vec<Dim> = (0..ty.rank()).map(Dim::axis).collect();
                    (at.clone(), self.pull(v, at, None)?)
                }
            };
            self.region.outputs.push(RegionOutput { ty, expr, index });
        }
        if self.region.exprs.len() > MAX_EXPRS {
            return Err(Illegal::TooLarge(self.region.exprs.len()));
        }
        if heart.is_some() { self.affine_outputs() } else { Ok(()) }
    }

    /// A heart's kernel writes tiles: every output must lie along its axes with constant or symbolic strides.
    fn affine_outputs(&self) -> Result<(), Illegal> {
        if self.region.outputs.iter().all(RegionOutput::is_affine) { Ok(()) } else { Err(Illegal::OffSpine("reshape")) }
    }

    fn opaque_outputs(&mut self, heart: Option<NodeId>, outputs: &[Value]) -> Result<(), Illegal> {
        let Some(node) = heart else { return Ok(()) };
        let name = self.graph.op(node).map_or("op", Op::mnemonic);
        // An opaque op writes all its results, in order.
        let all: Vec<Value> = (0..self.graph[node].types.len()).map(|r| Value { node, result: r as u32 }).collect();
        if outputs != all {
            return Err(Illegal::OffSpine(name));
        }
        for v in all {
            let ty = self.graph.ty(v).clone();
            let expr = self.region.push(Expr::Acc(v.result), ty.dtype);
            let index = (0..ty.rank()).map(Dim::axis).collect();
            self.region.outputs.push(RegionOutput { ty, expr, index });
        }
        Ok(())
    }

    /// Enter the heart: fix the space and pull its operands.
    fn heart(&mut self, id: NodeId, op: &Op) -> Result<(), Illegal> {
        let operands = self.graph.operands(id);
        let out = self.graph.ty(id.into()).clone();
        self.region.space = out.shape.clone();
        let identity: Vec<Dim> = (0..out.rank()).map(Dim::axis).collect();
        let own = |ty: &TensorType| -> (Vec<Dim>, Vec<Dim>) { ((0..ty.rank()).map(Dim::axis).collect(), ty.shape.clone()) };
        self.in_heart = true;
        let heart = match op {
            Op::MatMul { out: acc } => {
                let p = out.rank();
                let a = self.graph.ty(operands[0]).clone();
                let k = a.shape[p - 1].clone();
                let mut axes = out.shape.clone();
                axes.push(k.clone());
                self.enter(axes);
                let batch: Vec<Dim> = (0..p - 2).map(Dim::axis).collect();
                let at = |x: usize, y: usize| batch.iter().cloned().chain([Dim::axis(x), Dim::axis(y)]).collect::<Vec<_>>();
                let lhs = self.pull(operands[0], at(p - 2, p), None)?;
                let rhs = self.pull(operands[1], at(p, p - 1), None)?;
                let acc = if *acc == DType::F16 || *acc == DType::BF16 { DType::F32 } else { *acc };
                Heart::Contract { k, lhs, rhs, acc }
            }
            Op::Attention { scale } | Op::AttentionParts { scale, .. } => {
                let at_own = |this: &mut Self, v: Value| {
                    let (at, shape) = own(this.graph.ty(v));
                    this.enter(shape);
                    this.pull(v, at, None)
                };
                let q = at_own(self, operands[0])?;
                let k = at_own(self, operands[1])?;
                let v = at_own(self, operands[2])?;
                // A mask is no matrix that must lie in memory.
                self.in_heart = false;
                let mask = operands.get(3).map(|m| at_own(self, *m)).transpose()?;
                let keys = self.graph.ty(operands[1]).clone();
                let [keys, depth] = [keys.shape[keys.rank() - 2].clone(), keys.shape[keys.rank() - 1].clone()];
                let part = if let Op::AttentionParts { part, .. } = op { Some(part.clone()) } else { None };
                Heart::Attention { q, k, v, mask, scale: *scale, keys, depth, part }
            }
            Op::Conv { strides, dilations, lo, hi, groups, layout } => {
                let window = Window { strides: strides.clone(), dilations: dilations.clone(), lo: lo.clone(), hi: hi.clone(), layout: *layout };
                let (x_at, input) = own(self.graph.ty(operands[0]));
                self.enter(input.clone());
                let x = self.pull(operands[0], x_at, None)?;
                let (w_at, weights) = own(self.graph.ty(operands[1]));
                self.enter(weights.clone());
                let w = self.pull(operands[1], w_at, None)?;
                let acc = if out.dtype == DType::F16 || out.dtype == DType::BF16 { DType::F32 } else { out.dtype };
                Heart::Conv { window, groups: *groups, x, input, w, weights, acc }
            }
            Op::Pool { f, kernel, strides, dilations, lo, hi, layout, .. } => {
                let window = Window { strides: strides.clone(), dilations: dilations.clone(), lo: lo.clone(), hi: hi.clone(), layout: *layout };
                let (x_at, input) = own(self.graph.ty(operands[0]));
                self.enter(input.clone());
                let x = self.pull(operands[0], x_at, None)?;
                Heart::Pool { f: *f, kernel: kernel.clone(), window, x, input }
            }
            Op::WinogradOutput { m, .. } => {
                let (x_at, input) = own(self.graph.ty(operands[0]));
                self.enter(input.clone());
                let x = self.pull(operands[0], x_at, None)?;
                Heart::WinogradOutput { m: *m, x, input }
            }
            op => {
                self.args = operands.clone();
                self.region.args = operands.iter().map(|v| self.graph.ty(*v).clone()).collect();
                Heart::Op(op.clone())
            }
        };
        self.in_heart = false;
        let opaque = matches!(heart, Heart::Op(_));
        let acc = match &heart {
            Heart::Contract { acc, .. } | Heart::Conv { acc, .. } => *acc,
            _ => out.dtype,
        };
        self.region.heart = heart;
        self.enter(out.shape.clone());
        if !opaque {
            let v = Value::from(id);
            self.coords.insert(v, identity.clone());
            self.stages.insert(v, 0);
            // The accumulator is rounded to the op's dtype at once, as the evaluator does.
            let raw = self.region.push(Expr::Acc(0), acc);
            let expr = if acc == out.dtype { raw } else { self.region.push(Expr::Cast(raw), out.dtype) };
            self.memo.insert((self.space_id, v, identity, None), expr);
        }
        Ok(())
    }

    /// The two convolutions of `members`, if they are all its hearts, the first depthwise and the second a product of each pixel's
    /// channels.
    fn separable_pair(&self, members: &[NodeId]) -> Option<(NodeId, NodeId)> {
        let fixes = |op: &Op| is_heart(op) || matches!(op, Op::Reduce { .. } | Op::ArgReduce { .. });
        let hearts: Vec<NodeId> = members.iter().copied().filter(|id| self.graph.op(*id).is_some_and(fixes)).collect();
        let [first, second] = hearts[..] else { return None };
        let weights = |id: NodeId| self.graph.operands(id).get(1).map(|w| &self.graph.ty(*w).shape);
        let fits = is_depthwise(self.graph.op(first)?, weights(first)?) && is_point_product(self.graph.op(second)?, weights(second)?);
        fits.then_some((first, second))
    }

    /// Enter a depthwise convolution and the product behind it.
    fn separable(&mut self, first: NodeId, second: NodeId) -> Result<(), Illegal> {
        let Some(Op::Conv { strides, dilations, lo, hi, layout, .. }) = self.graph.op(first).cloned() else { return Ok(()) };
        let window = Window { strides, dilations, lo, hi, layout };
        let (image, product) = (self.graph.operands(first), self.graph.operands(second));
        let (between, out) = (self.graph.ty(first.into()).clone(), self.graph.ty(second.into()).clone());
        let own = |rank: usize| -> Vec<Dim> { (0..rank).map(Dim::axis).collect() };
        let whole = |this: &mut Self, v: Value| {
            let shape = this.graph.ty(v).shape.clone();
            this.enter(shape.clone());
            this.pull(v, own(shape.len()), None).map(|expr| (expr, shape))
        };
        self.region.space = out.shape.clone();
        self.in_heart = true;
        let (x, input) = whole(self, image[0])?;
        let (w, weights) = whole(self, image[1])?;
        let (point, filters) = whole(self, product[1])?;
        self.in_heart = false;
        // What is done to the depthwise result: rows of it are computed out of their place, so by channel alone.
        self.enter(between.shape.clone());
        let at = own(between.rank());
        let acc = self.region.push(Expr::Acc(1), between.dtype);
        self.memo.insert((self.space_id, first.into(), at.clone(), None), acc);
        let from = self.region.exprs.len();
        let mid = self.pull(product[0], at, None)?;
        let channel = Dim::axis(between.rank() - 1);
        let by_channel = |d: &Dim| *d == channel || !d.any_atom(&|a| matches!(a, Atom::Axis(_) | Atom::Value(_)));
        let fits = |e: &Expr| match e {
            Expr::Load { index, guard, .. } => guard.is_none() && index.iter().all(by_channel),
            Expr::Index(_) => false,
            _ => true,
        };
        if !self.region.exprs[from..].iter().all(|(e, _)| fits(e)) {
            return Err(Illegal::OffSpine("conv"));
        }
        self.region.heart = Heart::Separable { window, x, input, w, weights, mid, point, filters, acc: out.dtype };
        self.enter(out.shape.clone());
        let (v, at) = (Value::from(second), own(out.rank()));
        self.coords.insert(v, at.clone());
        self.stages.insert(v, 0);
        let expr = self.region.push(Expr::Acc(0), out.dtype);
        self.memo.insert((self.space_id, v, at, None), expr);
        Ok(())
    }

    /// Expressions from here on are over `axes`.
    fn enter(&mut self, axes: Vec<Dim>) {
        self.axes = axes;
        self.space_id += 1;
    }

    fn reduction(&mut self, id: NodeId, op: &Op) -> Result<(), Illegal> {
        let (f, axes) = match op {
            Op::Reduce { f, axes } => (StageFn::Fold(*f), axes.clone()),
            Op::ArgReduce { f, axis, last } => (StageFn::Arg { f: *f, last: *last }, vec![*axis]),
            _ => return Ok(()),
        };
        let operand = self.graph.operands(id)[0];
        let ty = self.graph.ty(operand).clone();
        match &self.full {
            None => {
                let kept: Vec<usize> = (0..ty.rank()).filter(|a| !axes.contains(a)).collect();
                let mut full = vec![Dim::ZERO; ty.rank()];
                for (k, &axis) in kept.iter().chain(&axes).enumerate() {
                    full[axis] = Dim::axis(k);
                }
                self.region.space = kept.iter().map(|&a| ty.shape[a].clone()).collect();
                let reduced: Vec<Dim> = axes.iter().map(|&a| ty.shape[a].clone()).collect();
                self.enter(self.region.space.iter().chain(&reduced).cloned().collect());
                self.region.heart = Heart::Reduce { axes: reduced, stages: vec![] };
                self.full = Some((full, axes.clone(), ty.clone()));
            }
            Some((full, first, first_ty)) => {
                let same = match self.coords.get(&operand) {
                    Some(at) => at == full && axes == *first,
                    None => ty.shape == first_ty.shape && axes == *first,
                };
                if !same {
                    return Err(Illegal::Rows);
                }
            }
        }
        let Some((full, reduced, _)) = self.full.clone() else { return Ok(()) };
        let expr = self.pull(operand, full.clone(), None)?;
        let Heart::Reduce { stages, .. } = &mut self.region.heart else { return Ok(()) };
        // Two nodes may be the same reduction: it is done once.
        let stage = stages.iter().position(|s| s.f == f && s.expr == expr).unwrap_or(stages.len()) as u32;
        if stage as usize == stages.len() {
            stages.push(Stage { f, expr });
        }
        let row: Vec<Dim> = full.iter().enumerate().map(|(a, d)| if reduced.contains(&a) { Dim::ZERO } else { d.clone() }).collect();
        let v = Value::from(id);
        let dtype = self.graph.ty(v).dtype;
        let acc = self.region.push(Expr::Acc(stage), dtype);
        // The operand itself sits at the row's elements: it may be an output too (a sum that is normalised).
        if self.members.contains(&operand.node) {
            self.coords.insert(operand, full.clone());
        }
        // So do results that the operand is made of point by point (a sum that is squared).
        let mut stack = vec![operand];
        while let Some(v) = stack.pop() {
            if !self.members.contains(&v.node) || self.graph.ty(v).shape != ty.shape {
                continue;
            }
            if self.results.contains(&v) {
                self.coords.entry(v).or_insert_with(|| full.clone());
            }
            if matches!(self.graph.op(v.node), Some(Op::Map(_) | Op::Cast { .. })) {
                stack.extend(self.graph.operands(v.node));
            }
        }
        self.coords.insert(v, row.clone());
        self.stages.insert(v, stage);
        self.memo.insert((self.space_id, v, row, None), acc);
        Ok(())
    }

    /// Give `id` coordinates if an operand has some.
    fn extend_spine(&mut self, id: NodeId, op: &Op) -> Result<(), Illegal> {
        let operands = self.graph.operands(id);
        let on: Vec<Vec<Dim>> = operands.iter().filter_map(|v| self.coords.get(v).cloned()).collect();
        let Some(at) = on.first().cloned() else { return Ok(()) };
        if on.iter().any(|c| *c != at) {
            return Err(Illegal::OffSpine(op.mnemonic()));
        }
        let from = self.graph.ty(operands[0]).clone();
        let to = self.graph.ty(id.into()).clone();
        let coords = match op {
            Op::Map(_) | Op::Cast { .. } | Op::BitCast { .. } => at,
            Op::Transpose { perm } => perm.iter().map(|&p| at[p].clone()).collect(),
            Op::Reshape { .. } => reindex(&at, &from.shape, &to.shape, &self.axes),
            Op::Broadcast { .. } => {
                let Some((full, reduced, _)) = &self.full else { return Err(Illegal::OffSpine("broadcast")) };
                if from.rank() != full.len() {
                    return Err(Illegal::OffSpine("broadcast"));
                }
                let mut coords = at.clone();
                for a in 0..from.rank() {
                    if from.shape[a] != to.shape[a] {
                        let restores = reduced.contains(&a) && self.region_extent(&full[a]) == Some(&to.shape[a]) && at[a] == Dim::ZERO;
                        // A value of each element of the row (transposed, say) is repeated, not restored.
                        let elements = at.iter().any(|c| c.any_atom(&|x| full[a].any_atom(&|y| x == y)));
                        if !restores || elements {
                            return Err(Illegal::OffSpine("broadcast"));
                        }
                        coords[a] = full[a].clone();
                    }
                }
                coords
            }
            _ => return Err(Illegal::OffSpine(op.mnemonic())),
        };
        self.coords.insert(id.into(), coords);
        Ok(())
    }

    fn region_extent(&self, axis: &Dim) -> Option<&Dim> {
        (0..self.axes.len()).find(|k| *axis == Dim::axis(*k)).map(|k| &self.axes[k])
    }

    /// The value of `v` at `index`, an expression over the current axes. With a guard, the value matters
    /// only where the guard holds, and memory is read only there.
    fn pull(&mut self, v: Value, index: Vec<Dim>, guard: Option<ExprId>) -> Result<ExprId, Illegal> {
        let key = (self.space_id, v, index, guard);
        if let Some(&known) = self.memo.get(&key) {
            return Ok(known);
        }
        let (_, _, index, _) = key.clone();
        let expr = self.pull_new(v, index, guard)?;
        if self.region.exprs.len() > MAX_EXPRS {
            return Err(Illegal::TooLarge(self.region.exprs.len()));
        }
        self.memo.insert(key, expr);
        Ok(expr)
    }

    fn pull_new(&mut self, v: Value, index: Vec<Dim>, guard: Option<ExprId>) -> Result<ExprId, Illegal> {
        let ty = self.graph.ty(v).clone();
        let node = &self.graph[v.node];
        let on_spine = self.coords.get(&v).cloned();
        let op = match &node.kind {
            NodeKind::Const(t) if t.count() == 1 && !self.in_heart => return Ok(self.region.constant(t.get(0), ty.dtype)),
            NodeKind::Const(t) if !self.in_heart => {
                return match positions::of(t) {
                    Some(found) => Ok(self.positions(&found, &index, ty.dtype)),
                    None => Ok(self.load(v, index, guard)),
                };
            }
            NodeKind::Op(op, _) if self.members.contains(&v.node) => op.clone(),
            _ => return Ok(self.load(v, index, guard)),
        };
        if on_spine.as_ref().is_some_and(|at| *at != index || guard.is_some() || self.stages.contains_key(&v)) {
            return Err(Illegal::OffSpine(op.mnemonic()));
        }
        let operands = self.graph.operands(v.node);
        // On the spine a view only renames: its operand sits at its own coordinates.
        if on_spine.is_some() && is_view(&op) {
            let at = self.coords.get(&operands[0]).cloned().ok_or(Illegal::OffSpine(op.mnemonic()))?;
            return self.pull(operands[0], at, None);
        }
        let shape_of = |g: &Graph, v: Value| g.ty(v).shape.clone();
        match op {
            Op::Map(f) => {
                let args = operands.iter().map(|o| self.pull(*o, index.clone(), guard)).collect::<Result<Vec<_>, _>>()?;
                Ok(self.moved(f, &args).unwrap_or_else(|| self.region.push(Expr::Call(f, args), ty.dtype)))
            }
            Op::Cast { to } => {
                let x = self.pull(operands[0], index, guard)?;
                Ok(if self.region.dtype(x) == to { x } else { self.region.push(Expr::Cast(x), to) })
            }
            Op::BitCast { to } => {
                let x = self.pull(operands[0], index, guard)?;
                Ok(if self.region.dtype(x) == to { x } else { self.region.push(Expr::Bits(x), to) })
            }
            Op::Dequant { blocks } => self.pull_dequant(&operands, &index, &blocks, guard),
            Op::Broadcast { .. } => {
                let from = shape_of(self.graph, operands[0]);
                let at = index.into_iter().zip(&from).zip(&ty.shape).map(|((i, f), t)| if f == t { i } else { Dim::ZERO }).collect();
                self.pull(operands[0], at, guard)
            }
            Op::Reshape { .. } => {
                let at = reindex(&index, &ty.shape, &shape_of(self.graph, operands[0]), &self.axes);
                self.pull(operands[0], at, guard)
            }
            Op::Transpose { perm } => {
                let mut at = vec![Dim::ZERO; index.len()];
                perm.iter().zip(index).for_each(|(&p, i)| at[p] = i);
                self.pull(operands[0], at, guard)
            }
            Op::Slice { starts, steps, .. } => {
                let at = index.into_iter().zip(starts).zip(steps).map(|((i, start), step)| start + i * Dim::from(step)).collect();
                self.pull(operands[0], at, guard)
            }
            Op::Iota { axis, dtype, .. } => {
                let i = self.index(index[axis].clone());
                Ok(if dtype == DType::I64 { i } else { self.region.push(Expr::Cast(i), dtype) })
            }
            Op::Dims { values } => {
                let mut out = self.index(values.last().cloned().unwrap_or_default());
                for (i, value) in values.iter().enumerate().rev().skip(1) {
                    let here = self.compare(ScalarFn::Le, index[0].clone(), Dim::from(i));
                    let value = self.index(value.clone());
                    out = self.region.push(Expr::Call(ScalarFn::Select, vec![here, value, out]), DType::I64);
                }
                Ok(out)
            }
            Op::BindSize { .. } => self.pull(operands[0], index, guard),
            Op::Concat { axis } => {
                let mut parts = vec![];
                let mut start = Dim::ZERO;
                for o in &operands {
                    let end = start.clone() + self.graph.ty(*o).shape[axis].clone();
                    parts.push((*o, start, end.clone()));
                    start = end;
                }
                let mut out = None;
                for (i, (o, start, end)) in parts.iter().enumerate().rev() {
                    let below = self.compare(ScalarFn::Lt, index[axis].clone(), end.clone());
                    let mut inside = guard;
                    if i + 1 < parts.len() {
                        inside = Some(self.both(inside, below));
                    }
                    if i > 0 {
                        let above = self.compare(ScalarFn::Ge, index[axis].clone(), start.clone());
                        inside = Some(self.both(inside, above));
                    }
                    let mut at = index.clone();
                    at[axis] = index[axis].clone() - start.clone();
                    let here = self.pull(*o, at, inside)?;
                    out = Some(match out {
                        None => here,
                        Some(rest) => self.region.push(Expr::Call(ScalarFn::Select, vec![below, here, rest]), ty.dtype),
                    });
                }
                out.ok_or(Illegal::NotPointwise("concat"))
            }
            Op::Pad { lo, hi, mode } => self.pull_pad(&operands, &index, guard, (&lo, &hi, mode), ty.dtype),
            Op::Patches { kernel, strides, dilations, lo, .. } => self.pull_patches(operands[0], &index, guard, (&kernel, &strides, &dilations, &lo)),
            Op::Gather { axis } => {
                let data = shape_of(self.graph, operands[0]);
                let rank = self.graph.ty(operands[1]).rank();
                let i = self.pull(operands[1], index[axis..axis + rank].to_vec(), guard)?;
                let i = self.position(i, &data[axis]);
                let at = index[..axis].iter().cloned().chain([i]).chain(index[axis + rank..].iter().cloned()).collect();
                self.pull(operands[0], at, guard)
            }
            Op::GatherElements { axis } => {
                let data = shape_of(self.graph, operands[0]);
                let i = self.pull(operands[1], index.clone(), guard)?;
                let mut at = index;
                at[axis] = self.position(i, &data[axis]);
                self.pull(operands[0], at, guard)
            }
            Op::GatherNd { batch } => {
                let data = shape_of(self.graph, operands[0]);
                let indices = self.graph.ty(operands[1]).clone();
                let outer = indices.rank() - 1;
                let n = indices.shape[outer].as_const().ok_or(Illegal::NotPointwise("gather_nd"))? as usize;
                let mut at = index[..batch].to_vec();
                for j in 0..n {
                    let mut place = index[..outer].to_vec();
                    place.push(Dim::from(j));
                    let i = self.pull(operands[1], place, guard)?;
                    at.push(self.position(i, &data[batch + j]));
                }
                at.extend(index[outer..].iter().cloned());
                self.pull(operands[0], at, guard)
            }
            other => Err(Illegal::NotPointwise(other.mnemonic())),
        }
    }

    /// `(x - zero) * scale`, the last two at the block that the index lies in.
    fn pull_dequant(&mut self, operands: &[Value], index: &[Dim], blocks: &[usize], guard: Option<ExprId>) -> Result<ExprId, Illegal> {
        let x = self.pull(operands[0], index.to_vec(), guard)?;
        let mut v = self.region.push(Expr::Cast(x), DType::F32);
        let block = |this: &mut Self, of: Value| {
            let shape = this.graph.ty(of).shape.clone();
            let at = |((i, b), n): ((&Dim, &usize), &Dim)| if n.is(1) { Dim::ZERO } else { i.div_in(&Dim::from(*b), &this.axes) };
            let at = index.iter().zip(blocks).zip(&shape).map(at).collect();
            let v = this.pull(of, at, guard)?;
            Ok(if this.region.dtype(v) == DType::F32 { v } else { this.region.push(Expr::Cast(v), DType::F32) })
        };
        if let Some(&zero) = operands.get(2) {
            let zero = block(self, zero)?;
            v = self.region.push(Expr::Call(ScalarFn::Sub, vec![v, zero]), DType::F32);
        }
        if let Some(&scale) = operands.get(1) {
            let scale = block(self, scale)?;
            v = self.region.push(Expr::Call(ScalarFn::Mul, vec![v, scale]), DType::F32);
        }
        Ok(v)
    }

    fn pull_pad(
        &mut self,
        operands: &[Value],
        index: &[Dim],
        guard: Option<ExprId>,
        (lo, hi, mode): (&[Dim], &[Dim], PadMode),
        dtype: DType,
    ) -> Result<ExprId, Illegal> {
        let shape = self.graph.ty(operands[0]).shape.clone();
        let mut at: Vec<Dim> = index.iter().zip(lo).map(|(i, l)| i.clone() - l.clone()).collect();
        let padded: Vec<usize> = (0..at.len()).filter(|&a| !(lo[a].is(0) && hi[a].is(0))).collect();
        if mode == PadMode::Constant {
            let mut inside = None;
            for &a in &padded {
                if !lo[a].is(0) {
                    let c = self.compare(ScalarFn::Ge, at[a].clone(), Dim::ZERO);
                    inside = Some(self.both(inside, c));
                }
                if !hi[a].is(0) {
                    let c = self.compare(ScalarFn::Lt, at[a].clone(), shape[a].clone());
                    inside = Some(self.both(inside, c));
                }
            }
            let Some(inside) = inside else { return self.pull(operands[0], at, guard) };
            let all = self.both(guard, inside);
            let x = self.pull(operands[0], at, Some(all))?;
            let value = self.pull(operands[1], vec![], guard)?;
            return Ok(self.region.push(Expr::Call(ScalarFn::Select, vec![inside, x, value]), dtype));
        }
        for &a in &padded {
            let i = self.index(at[a].clone());
            let (zero, one, n) = (self.index(Dim::ZERO), self.index(Dim::one()), self.index(shape[a].clone()));
            let call = |this: &mut Self, f, args: &[ExprId]| this.region.push(Expr::Call(f, args.to_vec()), DType::I64);
            let last = call(self, ScalarFn::Sub, &[n, one]);
            let source = match mode {
                PadMode::Wrap => call(self, ScalarFn::Mod, &[i, n]),
                PadMode::Reflect => {
                    // Period 2(n-1): fold the position into one period, then mirror its second half.
                    let two = self.index(Dim::from(2i64));
                    let period = call(self, ScalarFn::Mul, &[last, two]);
                    let period = call(self, ScalarFn::Max, &[period, one]);
                    let m = call(self, ScalarFn::Mod, &[i, period]);
                    let mirrored = call(self, ScalarFn::Sub, &[period, m]);
                    call(self, ScalarFn::Min, &[m, mirrored])
                }
                PadMode::Constant | PadMode::Edge => i,
            };
            // Of an axis that turns out to be empty the place is 0, not -1.
            let high = call(self, ScalarFn::Min, &[source, last]);
            let clamped = call(self, ScalarFn::Max, &[high, zero]);
            at[a] = Dim::from(Atom::Value(clamped.0));
        }
        self.pull(operands[0], at, guard)
    }

    /// A position moved by another, or by a constant, is one too.
    fn moved(&mut self, f: ScalarFn, args: &[ExprId]) -> Option<ExprId> {
        let place = |id: &ExprId| match self.region.expr(*id) {
            Expr::Index(d) => Some(d.clone()),
            Expr::Int(c) if self.region.dtype(*id) == DType::I64 => Some(Dim::from(*c)),
            _ => None,
        };
        let [a, b] = [place(args.first()?)?, place(args.get(1)?)?];
        match f {
            ScalarFn::Add => Some(self.index(a + b)),
            ScalarFn::Sub => Some(self.index(a - b)),
            _ => None,
        }
    }

    /// What a constant of positions is at `index`.
    fn positions(&mut self, found: &Positions, index: &[Dim], dtype: DType) -> ExprId {
        match *found {
            Positions::Count { axis, start, step } => {
                let i = self.index(Dim::from(start) + index[axis].clone() * Dim::from(step));
                if dtype == DType::I64 { i } else { self.region.push(Expr::Cast(i), dtype) }
            }
            Positions::Triangle { row, col, diagonal, below, above } => {
                let last = index[row].clone() + Dim::from(diagonal);
                if below == Scalar::B(false) {
                    return self.compare(ScalarFn::Gt, index[col].clone(), last);
                }
                let inside = self.compare(ScalarFn::Le, index[col].clone(), last);
                if below == Scalar::B(true) {
                    return inside;
                }
                let (below, above) = (self.region.constant(below, dtype), self.region.constant(above, dtype));
                self.region.push(Expr::Call(ScalarFn::Select, vec![inside, below, above]), dtype)
            }
        }
    }

    fn index(&mut self, d: Dim) -> ExprId {
        match d.as_const() {
            Some(c) => self.region.push(Expr::Int(c), DType::I64),
            None => self.region.push(Expr::Index(d), DType::I64),
        }
    }

    fn compare(&mut self, f: ScalarFn, a: Dim, b: Dim) -> ExprId {
        if let (Some(x), Some(y)) = (a.as_const(), b.as_const()) {
            let holds = f.eval(DType::I64, &[Scalar::I(i128::from(x)), Scalar::I(i128::from(y))]);
            return self.region.constant(holds, DType::Bool);
        }
        let (a, b) = (self.index(a), self.index(b));
        self.region.push(Expr::Call(f, vec![a, b]), DType::Bool)
    }

    fn both(&mut self, a: Option<ExprId>, b: ExprId) -> ExprId {
        match a {
            None => b,
            Some(a) if a == b => a,
            Some(a) => self.region.push(Expr::Call(ScalarFn::And, vec![a, b]), DType::Bool),
        }
    }

    /// A data-dependent coordinate: negative counts from the end, out of range clamps.
    fn position(&mut self, i: ExprId, extent: &Dim) -> Dim {
        if let Expr::Int(c) = *self.region.expr(i)
            && let Some(n) = extent.as_const()
        {
            return Dim::from(if c < 0 { c + n } else { c }.clamp(0, (n - 1).max(0)));
        }
        if let Expr::Index(d) = self.region.expr(i).clone()
            && d.within(extent, &self.axes)
        {
            return d;
        }
        let i = if self.region.dtype(i) == DType::I64 { i } else { self.region.push(Expr::Cast(i), DType::I64) };
        let n = self.index(extent.clone());
        let (zero, one) = (self.index(Dim::ZERO), self.index(Dim::one()));
        let wrapped = self.region.push(Expr::Call(ScalarFn::Add, vec![i, n]), DType::I64);
        let negative = self.region.push(Expr::Call(ScalarFn::Lt, vec![i, zero]), DType::Bool);
        let i = self.region.push(Expr::Call(ScalarFn::Select, vec![negative, wrapped, i]), DType::I64);
        let i = self.region.push(Expr::Call(ScalarFn::Max, vec![i, zero]), DType::I64);
        let last = self.region.push(Expr::Call(ScalarFn::Sub, vec![n, one]), DType::I64);
        let i = self.region.push(Expr::Call(ScalarFn::Min, vec![i, last]), DType::I64);
        Dim::from(Atom::Value(i.0))
    }

    fn load(&mut self, v: Value, index: Vec<Dim>, guard: Option<ExprId>) -> ExprId {
        let at = self.args.iter().position(|a| *a == v).unwrap_or_else(|| {
            self.args.push(v);
            self.region.args.push(self.graph.ty(v).clone());
            self.args.len() - 1
        });
        let dtype = self.graph.ty(v).dtype;
        self.region.push(Expr::Load { arg: at as u32, index, guard }, dtype)
    }
}

/// Coordinates, over axes of these extents, of the same element under another shape.
pub(crate) fn reindex(at: &[Dim], from: &[Dim], to: &[Dim], axes: &[Dim]) -> Vec<Dim> {
    // Axes that agree from either end keep their coordinate: fewer divisions.
    let head = from.iter().zip(to).take_while(|(a, b)| a == b).count();
    let tail = from[head..].iter().rev().zip(to[head..].iter().rev()).take_while(|(a, b)| a == b).count();
    let (from_mid, to_mid) = (&from[head..from.len() - tail], &to[head..to.len() - tail]);
    let mut linear = Dim::ZERO;
    for (c, n) in at[head..from.len() - tail].iter().zip(from_mid) {
        linear = linear * n.clone() + c.clone();
    }
    let mut mid = vec![Dim::ZERO; to_mid.len()];
    let first_real = to_mid.iter().position(|n| !n.is(1));
    for i in (0..to_mid.len()).rev() {
        if to_mid[i].is(1) {
            continue;
        }
        if Some(i) == first_real {
            mid[i] = linear.clone();
        } else {
            mid[i] = linear.mod_in(&to_mid[i], axes);
            linear = linear.div_in(&to_mid[i], axes);
        }
    }
    at[..head].iter().cloned().chain(mid).chain(at[from.len() - tail..].iter().cloned()).collect()
}
