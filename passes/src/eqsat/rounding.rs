//! Rounding as a choice of the search: values in fewer bits, each with an error.
//!
//! What rounds is no equality, so no rule makes it and none starts from it. A [`Variant`] is computed beside the value that it
//! stands for, from the same operand, as terms of its own. Exact rules see both, and equate neither with the other. When they are done the
//! variant's class joins the value's, its terms there marked: from then on nothing but kernels are formed. A kernel that computes
//! the value by a marked term carries the variant's error, and extraction pays for it at a price in nanoseconds. So rounding is chosen with
//! everything else: unpacking in a prologue, requantisation in the epilogue of the kernel before, products merged or not.
//!
//! Equal parts share terms and kernels, but not their choice: errors were measured for each layer. For each part the plans that are
//! best at some price, the lower convex hull of time over error, are found by bisecting the price between each two that are known. A
//! knapsack ([`crate::precision::choice`]) then takes one plan a part, within the budget that all parts have together.
use super::{
    Group, PartPlan, Saturated, Whole, candidates, candidates::Candidates, every_rule, extract, joint, rebuild, roots, saturate_rounding, templates, uniform,
};
use crate::{Ctx, PassError, fuse::Cluster};
use egg::Id;
use pavage_ir::{Graph, NodeId, NodeKind, Op, Value, text};
use std::collections::{BTreeMap, BTreeSet};

/// Plans of one part at most.
const MAX_PLANS: usize = 24;

/// A value in fewer bits.
#[derive(Clone, Debug)]
pub struct Variant {
    /// What it stands for.
    pub value: Value,
    /// The values whose work it does: the layer's, and what follows it.
    pub covers: Vec<Value>,
    /// What the one input of `graph` is.
    pub operand: Value,
    /// How it is computed: its one output is of the value's type.
    pub graph: Graph,
    /// What it is, for people.
    pub label: String,
    /// Squared error of the layer's result, relative to its square.
    pub error: f64,
    /// Which layer it belongs to: at most one variant of a layer is taken.
    pub layer: usize,
    /// Which of the layer's variants it is.
    pub index: usize,
}

/// A part with its kernels, which equal parts share.
struct Searched {
    saturated: Saturated,
    candidates: Candidates,
    roots: Vec<Id>,
}

/// A way to compute a part.
#[derive(Clone)]
struct Plan {
    choice: extract::Choice,
    price: f64,
    time: f64,
    error: f64,
    /// Variants taken, by their place in the part.
    rounds: BTreeSet<usize>,
}

/// A part of the graph and its plans.
struct Offer {
    part: templates::Part,
    /// Its search, among the distinct ones.
    searched: usize,
    /// Its variants, among all.
    variants: Vec<usize>,
    /// From the exact plan to the fastest.
    plans: Vec<Plan>,
}

/// What the search offers: for each part of the graph plans that are faster the more they round.
pub struct Offers<'a> {
    graph: Graph,
    variants: &'a [Variant],
    searched: Vec<Searched>,
    parts: Vec<Offer>,
    ctx: &'a Ctx,
}

/// A variant that a plan takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Taken {
    /// See [`Variant::layer`].
    pub layer: usize,
    /// See [`Variant::index`].
    pub index: usize,
    /// How much longer the best plan of its part takes without it, in predicted nanoseconds.
    pub gain: f64,
}

impl<'a> Offers<'a> {
    /// Search `graph` with `variants` of its values.
    pub fn new(graph: &Graph, variants: &'a [Variant], ctx: &'a Ctx) -> Result<Self, PassError> {
        let parts = templates::split(graph)?;
        let mut this = Offers { graph: graph.clone(), variants, searched: vec![], parts: vec![], ctx };
        let mut known: BTreeMap<String, usize> = BTreeMap::new();
        let mut hulls: BTreeMap<(usize, Vec<u64>), Vec<Plan>> = BTreeMap::new();
        for mut part in parts {
            let mut here = vec![];
            let mut pairs = vec![];
            for (i, variant) in variants.iter().enumerate() {
                if let Some(pair) = splice(&mut this.graph, &mut part, variant)? {
                    here.push(i);
                    pairs.push(pair);
                }
            }
            let key = text::print(&part.graph);
            let searched = match known.get(&key) {
                Some(known) => *known,
                None => {
                    this.searched.push(search(&part, &pairs, ctx)?);
                    known.insert(key, this.searched.len() - 1);
                    this.searched.len() - 1
                }
            };
            let errors: Vec<f64> = here.iter().map(|v| variants[*v].error).collect();
            let key = (searched, errors.iter().map(|e| e.to_bits()).collect());
            let plans = match hulls.get(&key) {
                Some(known) => known.clone(),
                None => {
                    let found = this.searched[searched].hull(&errors, ctx)?;
                    hulls.insert(key, found.clone());
                    found
                }
            };
            this.parts.push(Offer { part, searched, variants: here, plans });
        }
        Ok(this)
    }

    /// For each part what its plans save against the exact one, and their errors.
    pub fn offers(&self) -> Vec<Vec<crate::precision::choice::Offer>> {
        let offer = |exact: &Plan, plan: &Plan| crate::precision::choice::Offer { gain: exact.time - plan.time, error: plan.error };
        self.parts.iter().map(|p| p.plans[1..].iter().map(|plan| offer(&p.plans[0], plan)).collect()).collect()
    }

    /// Predicted nanoseconds of the exact plans of all parts.
    pub fn exact_ns(&self) -> f64 {
        self.parts.iter().map(|p| p.plans[0].time).sum()
    }

    /// The variants that a plan of some part takes: layer and index.
    pub fn tried(&self) -> BTreeSet<(usize, usize)> {
        let of = |p: &Offer| p.plans.iter().flat_map(|plan| &plan.rounds).map(|r| self.id(p.variants[*r])).collect::<Vec<_>>();
        self.parts.iter().flat_map(of).collect()
    }

    fn id(&self, variant: usize) -> (usize, usize) {
        (self.variants[variant].layer, self.variants[variant].index)
    }

    /// The plan that a choice of [`Offers::offers`] takes for a part.
    fn plan(part: &Offer, pick: Option<usize>) -> &Plan {
        &part.plans[pick.map_or(0, |i| i + 1)]
    }

    /// The variants that a choice of offers takes: layer and index.
    pub fn chosen(&self, picks: &[Option<usize>]) -> BTreeMap<usize, usize> {
        let of = |(p, pick): (&Offer, &Option<usize>)| Self::plan(p, *pick).rounds.iter().map(|r| self.id(p.variants[*r])).collect::<Vec<_>>();
        self.parts.iter().zip(picks).flat_map(of).collect()
    }

    /// The graph that a choice of offers computes, and its kernels.
    pub fn build(&mut self, picks: &[Option<usize>]) -> Result<(Graph, Vec<Cluster>), PassError> {
        let mut whole = Whole::new(&self.graph);
        for (offer, pick) in self.parts.iter().zip(picks) {
            let plan = Self::plan(offer, *pick);
            let errors: Vec<f64> = offer.variants.iter().map(|v| self.variants[*v].error).collect();
            let s = &mut self.searched[offer.searched];
            // Equal parts have errors of their own.
            let label = |v: &usize| {
                let Variant { label, error, .. } = &self.variants[*v];
                if *error > 0.0 { format!("{label} (error {:.1e})", error.sqrt()) } else { label.clone() }
            };
            s.candidates.labels = offer.variants.iter().map(label).collect();
            s.candidates.price(plan.price, &errors, &|r| plan.price.is_finite() || plan.rounds.contains(&r));
            s.saturated.prove(&s.candidates, &plan.choice);
            let mut built = rebuild(&offer.part.graph, offer.part.outputs.len(), &s.saturated, &s.candidates, &plan.choice)?;
            built.drop_unused();
            whole.join(&offer.part, &built)?;
        }
        whole.finish(&self.ctx.costs)
    }

    /// What each variant that a choice of offers takes saves: against the best plan of its part that may take every other, but not it.
    pub fn gains(&mut self, picks: &[Option<usize>]) -> Result<Vec<Taken>, PassError> {
        let mut known: BTreeMap<(usize, Vec<usize>, usize), f64> = BTreeMap::new();
        let mut taken = vec![];
        for (offer, pick) in self.parts.iter().zip(picks) {
            let plan = Self::plan(offer, *pick);
            for r in &plan.rounds {
                let key = (offer.searched, plan.rounds.iter().copied().collect(), *r);
                let without = match known.get(&key) {
                    Some(known) => *known,
                    None => {
                        let errors = vec![0.0; offer.variants.len()];
                        let found = self.searched[offer.searched].plan(0.0, &errors, &|other| other != *r && plan.rounds.contains(&other), self.ctx)?.time;
                        known.insert(key, found);
                        found
                    }
                };
                let (layer, index) = (self.variants[offer.variants[*r]].layer, self.variants[offer.variants[*r]].index);
                taken.push(Taken { layer, index, gain: without - plan.time });
            }
        }
        taken.sort_by_key(|t| t.layer);
        Ok(taken)
    }
}

/// Write `variant` into the part that computes its value, if this is the one: the value there, and the variant.
fn splice(whole: &mut Graph, part: &mut templates::Part, variant: &Variant) -> Result<Option<(Value, Value)>, PassError> {
    let (Some(value), Some(operand)) = (part.inner(variant.value), part.inner(variant.operand)) else { return Ok(None) };
    if part.graph.op(value.node).is_none() {
        return Ok(None);
    }
    let covered = variant.covers.iter().filter_map(|v| part.inner(*v));
    let source: Vec<String> = covered.flat_map(|v| part.graph[v.node].source.clone()).collect();
    // What brings the operand onto its grid is work of whoever computes it.
    let operands = part.graph.op(operand.node).map_or(&source, |_| &part.graph[operand.node].source).clone();
    let early = before_product(&variant.graph);
    let mut values: BTreeMap<Value, Value> = BTreeMap::new();
    for id in variant.graph.schedule() {
        let v = match &variant.graph[id].kind {
            NodeKind::Input(_) => operand,
            // What layers bring onto the same grid is one value: one constant for all.
            NodeKind::Const(t) if t.count() == 1 || uniform(t).is_some() => {
                let same = |id: &NodeId| part.graph.as_const((*id).into()).is_some_and(|c| c.same_bits(t));
                let known = part.graph.nodes().into_iter().find(same);
                known.map_or_else(|| part.graph.constant(t.clone()), Value::from)
            }
            NodeKind::Const(t) => part.constant(whole.constant(t.clone()), t.ty()),
            NodeKind::Op(op, _) => {
                let inner: Vec<Value> = variant.graph.operands(id).iter().map(|o| values[o]).collect();
                let new = part.graph.add(op.clone(), &inner).map_err(|source| PassError::IllTyped { pass: "rounding", source })?;
                part.graph.set_source(new.node, if early.contains(&id) { operands.clone() } else { source.clone() });
                new
            }
        };
        values.insert(id.into(), v);
    }
    let by = values[&variant.graph.outputs[0].value];
    part.graph.output(format!("round{}", part.graph.outputs.len()), by);
    Ok(Some((value, by)))
}

/// The nodes of a variant that make of its input what its product reads, with the numbers that they read themselves.
fn before_product(graph: &Graph) -> BTreeSet<NodeId> {
    let product = |id: NodeId| matches!(graph.op(id), Some(Op::Conv { .. } | Op::MatMul { .. }));
    let mut early: BTreeSet<NodeId> = graph.inputs().iter().copied().collect();
    for id in graph.schedule() {
        if !product(id) && graph.operands(id).iter().any(|o| early.contains(&o.node)) {
            early.insert(id);
        }
    }
    for id in graph.schedule().into_iter().rev() {
        if graph.users(id.into()).iter().any(|(user, _)| early.contains(user)) {
            early.insert(id);
        }
    }
    early
}

/// The kernels of a part, variants among them.
fn search(part: &templates::Part, pairs: &[(Value, Value)], ctx: &Ctx) -> Result<Searched, PassError> {
    let saturated = saturate_rounding(&part.graph, &part.constants, &every_rule()?, &ctx.costs, pairs)?;
    let roots = roots(&part.graph, part.outputs.len(), &saturated);
    let candidates = candidates::form_all(&saturated, &ctx.costs)?;
    saturated.limits.iter().chain(&candidates.limits).for_each(|limit| ctx.limit(limit));
    let mut work = ctx.work.borrow_mut();
    work.parts += 1;
    work.terms += saturated.egraph.total_size();
    work.kernels += candidates.kernels.len();
    Ok(Searched { saturated, candidates, roots })
}

impl Searched {
    /// The best plan where a unit of error costs `price` nanoseconds, of the variants that are allowed.
    fn plan(&mut self, price: f64, errors: &[f64], allowed: &dyn Fn(usize) -> bool, ctx: &Ctx) -> Result<Plan, PassError> {
        self.candidates.price(price, errors, allowed);
        let choice = joint::choose(&self.saturated, &mut self.candidates, &self.roots, ctx.search, &ctx.costs)?;
        choice.limits.iter().for_each(|limit| ctx.limit(limit));
        ctx.work.borrow_mut().states += choice.states;
        let kernels = || choice.chosen.iter().map(|(_, k)| &self.candidates.kernels[*k]);
        let time = kernels().map(|k| k.time).sum();
        let rounds: BTreeSet<usize> = kernels().flat_map(|k| k.rounds.iter().copied()).collect();
        let error = rounds.iter().map(|r| errors[*r]).sum();
        Ok(Plan { choice, price, time, error, rounds })
    }

    /// The plans that are best at some price of errors, from the exact one to the fastest.
    fn hull(&mut self, errors: &[f64], ctx: &Ctx) -> Result<Vec<Plan>, PassError> {
        let exact = self.plan(f64::INFINITY, errors, &|_| false, ctx)?;
        if errors.is_empty() {
            return Ok(vec![exact]);
        }
        let fastest = self.plan(0.0, errors, &|_| true, ctx)?;
        if fastest.rounds.is_empty() || fastest.time >= exact.time {
            return Ok(vec![exact]);
        }
        let mut plans = vec![exact, fastest];
        // Neighbours between which nothing is.
        let mut done: Vec<(f64, f64)> = vec![];
        loop {
            let open = |w: &&[Plan]| w[1].error > w[0].error && w[0].time > w[1].time && !done.contains(&(w[0].error, w[1].error));
            let area = |w: &&[Plan]| (w[0].time - w[1].time) * (w[1].error - w[0].error);
            let Some(pair) = plans.windows(2).filter(open).max_by(|a, b| area(a).total_cmp(&area(b))) else { break };
            if plans.len() == MAX_PLANS {
                ctx.limit(&format!("{MAX_PLANS} plans of one part were weighed and there may be more"));
                break;
            }
            let (a, b) = (&pair[0], &pair[1]);
            let price = (a.time - b.time) / (b.error - a.error);
            let worth = |p: &Plan| p.time + price * p.error;
            let between = self.plan(price, errors, &|_| true, ctx)?;
            if worth(&between) < worth(a) * (1.0 - 1e-9) && a.error < between.error && between.error < b.error {
                let at = plans.iter().position(|p| p.error > between.error).unwrap_or(plans.len());
                plans.insert(at, between);
            } else {
                done.push((a.error, b.error));
            }
        }
        Ok(plans)
    }
}

impl PartPlan {
    /// Forget what variants that were not taken would have read.
    fn drop_unused(&mut self) {
        let live: BTreeSet<NodeId> = self.graph.schedule().into_iter().collect();
        self.groups.retain(|g: &Group| g.roots.iter().any(|r| live.contains(r)));
    }
}
