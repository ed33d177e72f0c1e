//! The largest elements of a softmax without the softmax: it keeps their order, so they are the largest of what it is of.
//!
//! `topk(softmax(x))` is `topk(x)`, the values found turned into probabilities: `exp(v - v0) / sum(exp(x - v0))`, where `v0`
//! comes first. What is left of the softmax is one sum; it divides and writes `k` elements of a row, not all. Rounding
//! differs: probabilities that are equal once rounded are told apart. Both ways are searched, and the cheaper one is taken.
use super::{cost_of, every_rule, saturate};
use crate::{Ctx, PassError, rebuild::Rebuild, rules::computed};
use pavage_ir::{Dim, Graph, NodeId, NodeKind, Op, ScalarFn, Value, attr::ReduceFn};
use std::collections::{BTreeMap, BTreeSet};

/// Nodes looked at before the selection.
const MAX_NODES: usize = 32;

/// A selection from a softmax.
struct Site {
    topk: NodeId,
    axis: usize,
    k: Dim,
    /// What the softmax is of.
    of: Value,
}

/// The graph with selections from softmaxes replaced where that is cheaper; `None` where there are none.
pub(super) fn rewrite(graph: &Graph, ctx: &Ctx) -> Result<Option<Graph>, PassError> {
    let mut sites: Vec<Site> = vec![];
    for topk in graph.schedule() {
        if let Some(site) = site(graph, topk, ctx)? {
            sites.push(site);
        }
    }
    if sites.is_empty() {
        return Ok(None);
    }
    let mut new = Rebuild::new("selection", graph);
    for id in graph.schedule() {
        let Some(Site { axis, k, of, .. }) = sites.iter().find(|s| s.topk == id) else {
            new.at(id);
            new.copy(id)?;
            continue;
        };
        new.at(id);
        let x = new.value(*of);
        let found = new.add_with(Op::TopK { axis: *axis, k: k.clone(), largest: true }, &[x], vec![])?;
        // The sum is the softmax's work.
        new.at(graph.operands(id)[0].node);
        let (add, shape) = (&mut |op, operands: &[Value]| new.add(op, operands), &graph.ty(*of).shape);
        let values = probabilities(add, (shape, *axis, k), x, found.into())?;
        new.set(Value { node: id, result: 0 }, values);
        new.set(Value { node: id, result: 1 }, Value { node: found, result: 1 });
    }
    Ok(Some(new.finish().0))
}

/// Adds an op to the graph that is made.
type Add<'a> = &'a mut dyn FnMut(Op, &[Value]) -> Result<Value, PassError>;

/// `exp(v - v0) / sum(exp(x - v0))` along `axis` of `x`, which has this shape, for the largest elements `v` of `x`.
fn probabilities(add: Add, (shape, axis, k): (&[Dim], usize, &Dim), x: Value, v: Value) -> Result<Value, PassError> {
    let along = |n: &Dim| -> Vec<Dim> { shape.iter().enumerate().map(|(a, d)| if a == axis { n.clone() } else { d.clone() }).collect() };
    let (one, some) = (along(&Dim::one()), along(k));
    let first = add(Op::Slice { starts: vec![Dim::ZERO; shape.len()], sizes: one, steps: vec![1; shape.len()] }, &[v])?;
    let mut exp = |of: Value, shape: &[Dim]| {
        let base = add(Op::Broadcast { shape: shape.to_vec() }, &[first])?;
        let shifted = add(Op::Map(ScalarFn::Sub), &[of, base])?;
        add(Op::Map(ScalarFn::Exp), &[shifted])
    };
    let (all, chosen) = (exp(x, shape)?, exp(v, &some)?);
    let sum = add(Op::Reduce { f: ReduceFn::Sum, axes: vec![axis] }, &[all])?;
    let sum = add(Op::Broadcast { shape: some }, &[sum])?;
    add(Op::Map(ScalarFn::Div), &[chosen, sum])
}

/// The selection that `topk` is, if it is one from a softmax that nobody else reads, and cheaper without.
fn site(graph: &Graph, topk: NodeId, ctx: &Ctx) -> Result<Option<Site>, PassError> {
    let Some(Op::TopK { axis, k, largest: true }) = graph.op(topk) else { return Ok(None) };
    let p = graph.operands(topk)[0];
    let some = k.as_const().is_some_and(|k| k > 0);
    if !some || !graph.ty(p).dtype.is_float() || graph.users(p).len() != 1 || graph.outputs.iter().any(|o| o.value == p) {
        return Ok(None);
    }
    let before = Before::new(graph, p)?;
    let mut with = before.graph.clone();
    with.output("p", before.inner[&p]);
    let s = saturate(&with, &BTreeSet::new(), &every_rule()?, &ctx.costs)?;
    let Some(of) = computed::softmax_of(&s.egraph, s.class[&before.inner[&p]], *axis) else { return Ok(None) };
    let Some((&of, _)) = before.inner.iter().find(|(_, v)| s.class.get(v) == Some(&of)) else { return Ok(None) };
    let mut without = before.graph;
    // Without it, memory holds what is selected from, and the values come from there.
    let x = before.inner[&of];
    let ty = graph.ty(Value { node: topk, result: 0 });
    let v = without.input("values", ty.clone());
    let add = &mut |op, operands: &[Value]| without.add(op, operands).map_err(|source| PassError::IllTyped { pass: "selection", source });
    let values = probabilities(add, (&graph.ty(of).shape, *axis, k), x, v)?;
    without.output("values", values);
    without.output("x", x);
    without.prune();
    let pays = cost_of(&without, ctx)? < cost_of(&with, ctx)?;
    Ok(pays.then(|| Site { topk, axis: *axis, k: k.clone(), of }))
}

/// What is computed before a value, point by point and row by row, as a graph without outputs.
struct Before {
    graph: Graph,
    /// What each value is there.
    inner: BTreeMap<Value, Value>,
}

impl Before {
    fn new(outer: &Graph, last: Value) -> Result<Before, PassError> {
        let rows = |op: &Op| matches!(op, Op::Map(_) | Op::Cast { .. } | Op::Broadcast { .. } | Op::Reshape { .. } | Op::Transpose { .. } | Op::Reduce { .. });
        let mut members = vec![];
        let mut stack = vec![last.node];
        while let Some(id) = stack.pop() {
            if members.len() < MAX_NODES && !members.contains(&id) && outer.op(id).is_some_and(rows) {
                members.push(id);
                stack.extend(outer.operands(id).iter().map(|v| v.node));
            }
        }
        let mut this = Before { graph: Graph::new("before"), inner: BTreeMap::new() };
        for id in outer.schedule().into_iter().filter(|id| members.contains(id)) {
            let operands: Vec<Value> = outer.operands(id).iter().map(|v| this.value(outer, *v)).collect();
            let Some(op) = outer.op(id) else { continue };
            let v = this.graph.add(op.clone(), &operands).map_err(|source| PassError::IllTyped { pass: "selection", source })?;
            this.inner.insert(id.into(), v);
        }
        this.value(outer, last);
        Ok(this)
    }

    /// A value in here: computed, or an input.
    fn value(&mut self, outer: &Graph, v: Value) -> Value {
        if let Some(&known) = self.inner.get(&v) {
            return known;
        }
        let new = match &outer[v.node].kind {
            NodeKind::Const(t) if t.count() == 1 => self.graph.constant(t.clone()),
            _ => self.graph.input(format!("i{}", self.inner.len()), outer.ty(v).clone()),
        };
        self.inner.insert(v, new);
        new
    }
}
