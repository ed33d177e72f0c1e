//! Equality saturation over the op table, and the choice of kernels from what it finds.
//!
//! A graph is split where nothing is lost, and equal parts are searched once ([`templates`]). A part becomes terms: an op applied to e-classes, or a leaf (input, constant, or result of a step that is no
//! kernel). Rules add equal terms ([`crate::rules`]); [`candidates`] forms kernels, each one atomic with a cost of its
//! own; [`extract`] picks the set that computes every root most cheaply; and the chosen terms become a graph again.
//! Logical terms cannot be picked, so the cost of a plan is exactly the sum of its kernels.
pub mod candidates;
mod constant;
pub mod cost;
mod count;
pub mod extract;
#[cfg(feature = "ilp")]
pub mod ilp;
mod joint;
pub mod proof;
pub mod rounding;
mod selection;
pub mod templates;

use crate::{
    Ctx, PassError,
    fuse::{self, Cluster, Order},
    rules::{Promise, RuleSet, computed, siblings},
};
use candidates::Candidate;
use egg::{Analysis, DidMerge, EGraph, FromOp, Id, Language, Searcher};
use pavage_ir::{Graph, NodeId, NodeKind, Op, Tensor, TensorType, Value, program::Why, text};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

/// Rounds of rule application at most, before siblings are merged and after each time.
const MAX_ROUNDS: usize = 12;
/// Times that siblings are merged at most.
const MAX_MERGES: usize = 6;
/// Terms at most.
const MAX_TERMS: usize = 50_000;

/// The head of a term.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Head {
    /// A value that no rule looks into.
    Leaf(u32),
    /// An op of the table, attributes included.
    Op(Op),
}

/// A head applied to e-classes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term {
    /// What is applied.
    pub head: Head,
    /// To what.
    pub args: Vec<Id>,
}

impl Language for Term {
    type Discriminant = Head;
    fn discriminant(&self) -> Head {
        self.head.clone()
    }
    fn matches(&self, other: &Self) -> bool {
        self.head == other.head && self.args.len() == other.args.len()
    }
    fn children(&self) -> &[Id] {
        &self.args
    }
    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.args
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.head {
            Head::Leaf(n) => write!(f, "leaf{n}"),
            Head::Op(op) => write!(f, "{op}"),
        }
    }
}

impl FromOp for Term {
    type Error = pavage_ir::OpError;
    fn from_op(op: &str, args: Vec<Id>) -> Result<Self, Self::Error> {
        let op = Op::parse(op, &|_| None)?;
        op.check_arity(args.len())?;
        Ok(Term { head: Head::Op(op), args })
    }
}

/// What is known of a class: every term of it has this type.
#[derive(Clone, Debug, PartialEq)]
pub struct Fact {
    /// Type of the value.
    pub ty: TensorType,
    /// The bits (as f64) of the one value all elements have, if known.
    pub uniform: Option<u64>,
    /// Whether the value is made of constants alone.
    pub constant: bool,
    /// The term that was added first: the model's, if it has one here.
    pub oldest: Id,
}

/// The analysis: types, which must agree, and constants.
#[derive(Default)]
pub struct Facts {
    /// Facts of the leaves.
    pub leaves: Vec<Fact>,
    /// Pairs of types that a rule wrongly equated.
    pub conflicts: Vec<(TensorType, TensorType)>,
    /// The device, for rules that make work for it.
    pub costs: cost::Costs,
    /// Whether terms are those of the graph, not yet those of rules.
    pub of_graph: bool,
}

impl Analysis<Term> for Facts {
    type Data = Fact;
    fn make(egraph: &mut EGraph<Term, Self>, term: &Term, id: Id) -> Fact {
        match &term.head {
            Head::Leaf(n) => Fact { oldest: id, ..egraph.analysis.leaves[*n as usize].clone() },
            Head::Op(op) => {
                let args: Vec<Fact> = term.args.iter().map(|id| egraph[*id].data.clone()).collect();
                let types: Vec<&TensorType> = args.iter().map(|f| &f.ty).collect();
                let ty = op.infer(pavage_ir::op::TypeArgs { types: &types, bodies: &[] }).map(|mut t| t.remove(0));
                let uniform = match op {
                    Op::Broadcast { .. } | Op::Reshape { .. } | Op::Transpose { .. } => args.first().and_then(|f| f.uniform),
                    _ => None,
                };
                // A term is added only after its op was inferred on these very types.
                let ty = ty.expect("terms are well typed");
                // What the passes left as it was, dequantised weights say, stays.
                let constant = !egraph.analysis.of_graph && constant::is_foldable(op) && ty.const_shape().is_some() && args.iter().all(|f| f.constant);
                Fact { ty, uniform, constant, oldest: id }
            }
        }
    }
    fn merge(&mut self, a: &mut Fact, b: Fact) -> DidMerge {
        if a.ty != b.ty {
            self.conflicts.push((a.ty.clone(), b.ty.clone()));
        }
        let merged = (a.uniform.or(b.uniform), a.constant || b.constant);
        let did = DidMerge(merged != (a.uniform, a.constant), merged != (b.uniform, b.constant));
        (a.uniform, a.constant) = merged;
        // Nothing is made of it: terms above need not hear.
        a.oldest = a.oldest.min(b.oldest);
        did
    }
}

/// A graph as an e-graph: leaves and the class of every value.
pub struct Saturated {
    /// The e-graph, rebuilt.
    pub egraph: EGraph<Term, Facts>,
    /// Class of each value of the graph.
    pub class: BTreeMap<Value, Id>,
    /// Term of each value of the graph, by the id it was added with.
    pub origin: BTreeMap<Value, Id>,
    /// The value each leaf stands for.
    pub leaves: Vec<Value>,
    /// Rule that made a term, and the term it was applied to.
    pub made_by: HashMap<Term, (String, Term)>,
    /// Source names of classes.
    pub sources: BTreeMap<Id, Vec<String>>,
    /// Classes that are computed at compile time, each with its expression.
    pub(crate) folded: BTreeMap<Id, Vec<(Id, Term)>>,
    /// Terms that merging siblings made.
    pub(crate) merged: BTreeSet<Term>,
    /// Classes that exist without merged siblings.
    pub(crate) apart: BTreeSet<Id>,
    /// Terms that round, by class: the place of the variant that they are.
    pub(crate) rounds: BTreeMap<(Id, Term), usize>,
    /// Names of the rules that added or united something.
    pub fired: BTreeSet<String>,
    /// Whether some of the graph's ops are no terms: what goes into them and what comes out are leaves and roots, and nothing here says that one
    /// waits for the other.
    pub(crate) has_steps: bool,
    /// Limits that were hit.
    pub limits: Vec<String>,
    /// Rules behind the kernels of a plan, by the class they compute: see [`Saturated::prove`].
    chains: BTreeMap<Id, Vec<String>>,
}

/// Whether rules may look into a node: one result, no nested graphs, no effect on sizes.
fn is_term(graph: &Graph, id: NodeId) -> bool {
    matches!(&graph[id].kind, NodeKind::Op(op, bodies) if bodies.is_empty() && graph[id].types.len() == 1 && !matches!(op, Op::BindSize { .. } | Op::NonZero { .. }))
}

/// Add the graph and apply `rules` until nothing changes or a limit is hit. Inputs in `constants` are constants whose
/// values come later.
pub fn saturate(graph: &Graph, constants: &BTreeSet<Value>, rules: &RuleSet, costs: &cost::Costs) -> Result<Saturated, PassError> {
    saturate_rounding(graph, constants, rules, costs, &[])
}

/// The same where the second of each pair of values is a rounded variant of the first: see [`rounding`].
fn saturate_rounding(
    graph: &Graph,
    constants: &BTreeSet<Value>,
    rules: &RuleSet,
    costs: &cost::Costs,
    variants: &[(Value, Value)],
) -> Result<Saturated, PassError> {
    let mut egraph = EGraph::new(Facts { costs: costs.clone(), of_graph: true, ..Facts::default() }).with_explanations_enabled();
    let (mut class, mut leaves) = (BTreeMap::new(), vec![]);
    let mut sources: BTreeMap<Id, Vec<String>> = BTreeMap::new();
    for id in graph.schedule() {
        if is_term(graph, id) {
            let NodeKind::Op(op, _) = &graph[id].kind else { continue };
            let args = graph.operands(id).iter().map(|v| class[v]).collect();
            let c = egraph.add_uncanonical(Term { head: Head::Op(op.clone()), args });
            class.insert(Value::from(id), c);
            sources.entry(c).or_default().extend(graph[id].source.iter().cloned());
            continue;
        }
        for result in 0..graph[id].types.len() as u32 {
            let v = Value { node: id, result };
            let constant = graph.as_const(v).is_some() || constants.contains(&v);
            let fact = Fact { ty: graph.ty(v).clone(), uniform: graph.as_const(v).and_then(uniform), constant, oldest: Id::from(0) };
            egraph.analysis.leaves.push(fact);
            leaves.push(v);
            class.insert(v, egraph.add(Term { head: Head::Leaf(leaves.len() as u32 - 1), args: vec![] }));
        }
    }
    let made_by = HashMap::new();
    let mut s = Saturated {
        egraph,
        origin: class.clone(),
        class,
        leaves,
        made_by,
        sources,
        folded: BTreeMap::new(),
        merged: BTreeSet::new(),
        apart: BTreeSet::new(),
        rounds: BTreeMap::new(),
        fired: BTreeSet::new(),
        has_steps: graph.schedule().into_iter().any(|id| matches!(graph[id].kind, NodeKind::Op(..)) && !is_term(graph, id)),
        limits: vec![],
        chains: BTreeMap::new(),
    };
    s.egraph.rebuild();
    s.egraph.analysis.of_graph = false;
    s.run(rules)?;
    // The model has no variants: its terms are the exact ones.
    s.origin.retain(|v, _| !variants.iter().any(|(_, by)| by == v));
    s.round(variants)?;
    s.name_terms();
    s.folded = constant::expressions(&s.egraph);
    let by_merging = |rule: &str| rules.siblings.iter().any(|r| r.name == rule);
    s.merged = s.made_by.iter().filter(|(_, (rule, _))| by_merging(rule)).map(|(t, _)| t.clone()).collect();
    s.apart = s.without_merges();
    s.class = s.class.iter().map(|(v, id)| (*v, s.egraph.find(*id))).collect();
    let mut sources: BTreeMap<Id, Vec<String>> = BTreeMap::new();
    for (id, names) in &s.sources {
        sources.entry(s.egraph.find(*id)).or_default().extend(names.iter().cloned());
    }
    s.sources = sources;
    s.name_what_rules_made();
    Ok(s)
}

/// The value of every element of a small constant, if they are equal floats.
fn uniform(t: &Tensor) -> Option<u64> {
    if !t.dtype().is_float() || t.count() == 0 || t.count() > 4096 {
        return None;
    }
    let first = t.get(0).f().to_bits();
    (1..t.count()).all(|i| t.get(i).f().to_bits() == first).then_some(first)
}

impl Saturated {
    /// Rules until nothing changes; then siblings, until no more can be merged; and again.
    fn run(&mut self, rules: &RuleSet) -> Result<(), PassError> {
        for merges in 0.. {
            self.rewrite(rules)?;
            if !self.merge(&rules.siblings)? {
                break;
            }
            if merges == MAX_MERGES {
                self.limits.push(format!("siblings were merged {merges} times and there are more"));
                break;
            }
        }
        Ok(())
    }

    /// Terms by their canonical form, to name the rule behind each.
    fn name_terms(&mut self) {
        let made = std::mem::take(&mut self.made_by);
        self.made_by = made
            .into_iter()
            .map(|(mut t, (rule, mut on))| {
                t.args.iter_mut().chain(&mut on.args).for_each(|a| *a = self.egraph.find(*a));
                (t, (rule, on))
            })
            .collect();
    }

    /// Variants join what they stand for; no rule runs after.
    fn round(&mut self, variants: &[(Value, Value)]) -> Result<(), PassError> {
        let mut marked: Vec<(Id, Term, usize)> = vec![];
        for (i, (of, by)) in variants.iter().enumerate() {
            let (of, by) = (self.egraph.find(self.class[of]), self.egraph.find(self.class[by]));
            if of != by {
                marked.extend(self.egraph[by].nodes.iter().map(|t| (of, t.clone(), i)));
            }
        }
        for (of, by) in variants {
            self.egraph.union_trusted(self.class[of], self.class[by], "rounding");
        }
        self.settle()?;
        for (class, mut term, i) in marked {
            term.args.iter_mut().for_each(|a| *a = self.egraph.find(*a));
            self.rounds.insert((self.egraph.find(class), term), i);
        }
        Ok(())
    }

    /// Terms and classes.
    fn size(&self) -> (usize, usize) {
        (self.egraph.total_size(), self.egraph.number_of_classes())
    }

    /// Restore the e-graph's invariants; a rule that equated two types is an error.
    fn settle(&mut self) -> Result<(), PassError> {
        self.egraph.rebuild();
        match self.egraph.analysis.conflicts.first() {
            Some((a, b)) => Err(PassError::Rules { reason: format!("a rule equated {a} and {b}") }),
            None => Ok(()),
        }
    }

    /// Apply text and computed rules until nothing changes.
    fn rewrite(&mut self, rules: &RuleSet) -> Result<(), PassError> {
        for round in 0.. {
            if round == MAX_ROUNDS || self.egraph.total_size() > MAX_TERMS {
                self.limits.push(format!("equality saturation stopped after {round} rounds with {} terms", self.egraph.total_size()));
                break;
            }
            let before = self.size();
            // Everything is found first and added after, so the result does not depend on rule order.
            let mut found: Vec<(computed::Build, computed::Build, (String, Term))> = vec![];
            for rule in &rules.text {
                let head = rule.lhs.ast.last().and_then(|top| match top {
                    egg::ENodeOrVar::ENode(t) => Some(t.head.clone()),
                    egg::ENodeOrVar::Var(_) => None,
                });
                for matches in rule.lhs.search(&self.egraph) {
                    // Rounding is a matter of floats: integer division, say, is not the inverse of multiplication.
                    if rule.promise == Promise::Real && !self.egraph[matches.eclass].data.ty.dtype.is_float() {
                        continue;
                    }
                    let nodes = &self.egraph[matches.eclass].nodes;
                    let on = nodes.iter().find(|t| Some(&t.head) == head.as_ref()).unwrap_or(&nodes[0]).clone();
                    for subst in matches.substs {
                        let root = egg::Id::from(rule.rhs.ast.len() - 1);
                        let left = instantiate(&rule.lhs.ast, egg::Id::from(rule.lhs.ast.len() - 1), &subst);
                        found.push((left, instantiate(&rule.rhs.ast, root, &subst), (rule.name.clone(), on.clone())));
                    }
                }
            }
            let mut ids: Vec<Id> = self.egraph.classes().map(|c| c.id).collect();
            ids.sort();
            for id in ids {
                for term in &self.egraph[id].nodes {
                    for rule in &rules.computed {
                        found.extend((rule.apply)(&self.egraph, term).into_iter().map(|b| (as_build(id, term), b, (rule.name.to_string(), term.clone()))));
                    }
                }
            }
            // Terms that rules were applied to are looked up while they are what they were.
            let found: Vec<_> = found.into_iter().filter_map(|(left, build, made)| Some((self.add(left, &made)?, build, made))).collect();
            for (left, build, made) in found {
                self.unite(left, build, &made);
            }
            self.settle()?;
            if before == self.size() {
                break;
            }
        }
        Ok(())
    }

    /// Merge siblings until there are no more. Whether anything was merged.
    fn merge(&mut self, rules: &[siblings::Siblings]) -> Result<bool, PassError> {
        let at_first = self.size();
        loop {
            let before = self.size();
            let found: Vec<(&str, siblings::Merge)> = rules.iter().flat_map(|rule| (rule.apply)(&self.egraph).into_iter().map(|m| (rule.name, m))).collect();
            let mut with_terms = vec![];
            for (name, merge) in found {
                let terms = merge.parts.iter().map(|(class, on, _)| self.add(as_build(*class, on), &(name.to_string(), on.clone())));
                with_terms.push((name, terms.collect::<Option<Vec<Id>>>().unwrap_or_default(), merge));
            }
            for (name, terms, merge) in with_terms {
                let Some((_, first, _)) = merge.parts.first() else { continue };
                let Some(whole) = self.add(merge.whole, &(name.to_string(), first.clone())) else { continue };
                let names: Vec<String> = merge.parts.iter().filter_map(|(id, ..)| self.sources.get(id)).flatten().cloned().collect();
                self.sources.entry(self.egraph.find(whole)).or_default().extend(names);
                for (left, (_, on, views)) in terms.into_iter().zip(merge.parts) {
                    let part = views.into_iter().fold(computed::Build::Class(whole), |x, view| computed::Build::Op(view, vec![x]));
                    self.unite(left, part, &(name.to_string(), on));
                }
            }
            self.settle()?;
            if before == self.size() || self.egraph.total_size() > MAX_TERMS {
                return Ok(before != at_first);
            }
        }
    }

    /// Add what a rule found and unite it with the term it was found for.
    fn unite(&mut self, left: Id, build: computed::Build, made: &(String, Term)) {
        let before = self.egraph.total_size();
        let Some(new) = self.add(build, made) else { return };
        if self.egraph.union_trusted(left, new, made.0.clone()) || self.egraph.total_size() != before {
            self.fired.insert(made.0.clone());
        }
    }

    /// What a rule made on the way to a class does the work of the nodes that the class stands for.
    fn name_what_rules_made(&mut self) {
        loop {
            let mut named: BTreeMap<Id, BTreeSet<String>> = BTreeMap::new();
            for (term, (_, on)) in &self.made_by {
                let class = |t: &Term| self.egraph.lookup(Term { head: t.head.clone(), args: t.args.iter().map(|a| self.egraph.find(*a)).collect() });
                let (Some(made), Some(from)) = (class(term), class(on)) else { continue };
                if let (None, Some(names)) = (self.sources.get(&made), self.sources.get(&from)) {
                    named.entry(made).or_default().extend(names.iter().cloned());
                }
            }
            if named.is_empty() {
                return;
            }
            self.sources.extend(named.into_iter().map(|(id, names)| (id, names.into_iter().collect())));
        }
    }

    /// Classes that can be computed without terms that merging made.
    fn without_merges(&self) -> BTreeSet<Id> {
        let mut ids: Vec<Id> = self.egraph.classes().map(|c| c.id).collect();
        ids.sort();
        let mut apart = BTreeSet::new();
        loop {
            let ready = |t: &Term| !self.merged.contains(t) && t.args.iter().all(|a| apart.contains(a));
            let found: Vec<Id> = ids.iter().copied().filter(|id| !apart.contains(id) && self.egraph[*id].nodes.iter().any(ready)).collect();
            if found.is_empty() {
                return apart;
            }
            apart.extend(found);
        }
    }

    /// Add a term; `None` if it is ill typed here (a rule that does not apply at these shapes). Its id is that of these very
    /// operands, not its class's.
    fn add(&mut self, build: computed::Build, rule: &(String, Term)) -> Option<Id> {
        match build {
            computed::Build::Class(id) => Some(self.egraph[id].data.oldest),
            computed::Build::Op(op, args) => {
                let args = args.into_iter().map(|a| self.add(a, rule)).collect::<Option<Vec<Id>>>()?;
                let types: Vec<TensorType> = args.iter().map(|a| self.egraph[*a].data.ty.clone()).collect();
                let types: Vec<&TensorType> = types.iter().collect();
                op.infer(pavage_ir::op::TypeArgs { types: &types, bodies: &[] }).ok()?;
                let term = Term { head: Head::Op(op), args };
                let canonical = Term { head: term.head.clone(), args: term.args.iter().map(|a| self.egraph.find(*a)).collect() };
                if self.egraph.lookup(canonical.clone()).is_none() {
                    self.made_by.insert(canonical, rule.clone());
                }
                Some(self.egraph.add_uncanonical(term))
            }
        }
    }
}

impl Saturated {
    /// The rules that led to a term, the first applied to a term of the graph: a derivation of the term itself. That its operands'
    /// classes are equal to those of the graph is for the rules that united these to say, in the chains of their own terms.
    pub fn chain(&self, term: &Term) -> Vec<String> {
        let mut chain = vec![];
        let mut at = term;
        while let Some((rule, on)) = self.made_by.get(at).filter(|_| chain.len() < 16) {
            chain.push(rule.clone());
            at = on;
        }
        chain.reverse();
        chain
    }
}

/// A term as a rule's left side: itself on its operands.
fn as_build(class: Id, term: &Term) -> computed::Build {
    match &term.head {
        Head::Op(op) => computed::Build::Op(op.clone(), term.args.iter().map(|a| computed::Build::Class(*a)).collect()),
        Head::Leaf(_) => computed::Build::Class(class),
    }
}

fn instantiate(ast: &egg::PatternAst<Term>, at: Id, subst: &egg::Subst) -> computed::Build {
    match &ast[at] {
        egg::ENodeOrVar::Var(v) => computed::Build::Class(subst[*v]),
        egg::ENodeOrVar::ENode(t) => match &t.head {
            Head::Op(op) => computed::Build::Op(op.clone(), t.args.iter().map(|a| instantiate(ast, *a, subst)).collect()),
            Head::Leaf(_) => unreachable!("leaves have no text"),
        },
    }
}

/// The graph that the chosen kernels compute, and the kernels.
///
/// The graph is searched part by part ([`templates`]), equal parts once.
pub fn optimise(graph: &Graph, ctx: &Ctx) -> Result<(Graph, Vec<Cluster>), PassError> {
    let rewritten = selection::rewrite(graph, ctx)?;
    let graph = rewritten.as_ref().unwrap_or(graph);
    let mut known: BTreeMap<String, PartPlan> = BTreeMap::new();
    let mut whole = Whole::new(graph);
    for part in templates::split(graph)? {
        let key = text::print(&part.graph);
        if !known.contains_key(&key) {
            let plan = plan_part(&part, ctx)?;
            known.insert(key.clone(), plan);
        }
        whole.join(&part, &known[&key])?;
    }
    whole.finish(&ctx.costs)
}

/// The graph with selections from softmaxes replaced where that is cheaper, as [`optimise`] begins.
pub fn prepare(graph: &Graph, ctx: &Ctx) -> Result<Graph, PassError> {
    Ok(selection::rewrite(graph, ctx)?.unwrap_or_else(|| graph.clone()))
}

/// What a search did, in counts that do not depend on the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Parts that were searched: equal ones once.
    pub parts: usize,
    /// Terms in their e-graphs, after the rules.
    pub terms: usize,
    /// Kernels to choose from.
    pub kernels: usize,
    /// Partial plans that extraction looked at.
    pub states: usize,
}

/// One kernel of a part.
#[derive(Clone)]
struct Group {
    members: Vec<NodeId>,
    /// The members that give its results, the one it was chosen for first.
    roots: Vec<NodeId>,
    rules: Vec<String>,
    why: Why,
    /// Whether it is computed at compile time.
    folded: bool,
}

/// A part as its chosen kernels compute it.
struct PartPlan {
    graph: Graph,
    groups: Vec<Group>,
}

fn plan_part(part: &templates::Part, ctx: &Ctx) -> Result<PartPlan, PassError> {
    let graph = &part.graph;
    let mut saturated = saturate(graph, &part.constants, &every_rule()?, &ctx.costs)?;
    let roots = roots(graph, graph.outputs.len(), &saturated);
    let mut candidates = candidates::form_all(&saturated, &ctx.costs)?;
    let choice = joint::choose(&saturated, &mut candidates, &roots, ctx.search, &ctx.costs)?;
    saturated.prove(&candidates, &choice);
    saturated.limits.iter().chain(&candidates.limits).chain(&choice.limits).for_each(|limit| ctx.limit(limit));
    let mut work = ctx.work.borrow_mut();
    work.parts += 1;
    work.terms += saturated.egraph.total_size();
    work.kernels += candidates.kernels.len();
    work.states += choice.states;
    rebuild(graph, graph.outputs.len(), &saturated, &candidates, &choice)
}

fn every_rule() -> Result<RuleSet, PassError> {
    RuleSet::all().map_err(|reason| PassError::Rules { reason })
}

/// Predicted nanoseconds of the best plan of a small graph.
fn cost_of(graph: &Graph, ctx: &Ctx) -> Result<f64, PassError> {
    let saturated = saturate(graph, &BTreeSet::new(), &every_rule()?, &ctx.costs)?;
    let roots = roots(graph, graph.outputs.len(), &saturated);
    let mut candidates = candidates::form_all(&saturated, &ctx.costs)?;
    let choice = joint::choose(&saturated, &mut candidates, &roots, ctx.search, &ctx.costs)?;
    saturated.limits.iter().chain(&candidates.limits).chain(&choice.limits).for_each(|limit| ctx.limit(limit));
    Ok(choice.cost)
}

/// The whole graph, part by part.
struct Whole<'g> {
    old: &'g Graph,
    new: Graph,
    values: BTreeMap<Value, Value>,
    groups: Vec<Group>,
}

impl<'g> Whole<'g> {
    fn new(old: &'g Graph) -> Self {
        let mut whole = Whole { old, new: Graph::new(old.name.clone()), values: BTreeMap::new(), groups: vec![] };
        for &id in old.inputs() {
            if let NodeKind::Input(name) = &old[id].kind {
                let v = whole.new.input(name.clone(), old.ty(id.into()).clone());
                whole.values.insert(id.into(), v);
            }
        }
        whole
    }

    /// Append what `plan` makes of `part`.
    fn join(&mut self, part: &templates::Part, plan: &PartPlan) -> Result<(), PassError> {
        let mut local: BTreeMap<Value, Value> = BTreeMap::new();
        let read: BTreeSet<NodeId> = plan.graph.schedule().into_iter().collect();
        for (&inner, outer) in plan.graph.inputs().iter().zip(&part.inputs).filter(|(inner, _)| read.contains(*inner)) {
            let v = match (self.values.get(outer), self.old.as_const(*outer)) {
                (Some(v), _) => *v,
                (None, Some(t)) => self.new.constant(t.clone()),
                (None, None) => return Err(PassError::Rules { reason: "a part reads a value that none before it gives".into() }),
            };
            self.values.insert(*outer, v);
            local.insert(inner.into(), v);
        }
        let mut nodes: BTreeMap<NodeId, NodeId> = BTreeMap::new();
        let folded: BTreeSet<NodeId> = plan.groups.iter().filter(|g| g.folded).flat_map(|g| g.members.iter().copied()).collect();
        for id in plan.graph.schedule() {
            if folded.contains(&id) {
                if let Some(group) = plan.groups.iter().find(|g| g.folded && g.roots.contains(&id)) {
                    let values = |v: Value| local.get(&v).and_then(|v| self.new.as_const(*v)).cloned();
                    let value = constant::fold(&plan.graph, &group.members, &values)?;
                    local.insert(id.into(), self.new.constant(value));
                }
                continue;
            }
            let node = match &plan.graph[id].kind {
                NodeKind::Input(_) => continue,
                NodeKind::Const(t) => self.new.constant(t.clone()).node,
                NodeKind::Op(op, bodies) => {
                    let operands: Vec<Value> = plan.graph.operands(id).iter().map(|v| local[v]).collect();
                    self.new.add_with(op.clone(), &operands, bodies.clone()).map_err(|source| PassError::IllTyped { pass: "eqsat", source })?
                }
            };
            let from = plan.graph[id].source.iter().filter_map(|s| part.nodes.get(s.parse::<usize>().ok()?));
            self.new.set_source(node, from.flat_map(|n| self.old[*n].source.iter().cloned()).collect());
            nodes.insert(id, node);
            for result in 0..plan.graph[id].types.len() as u32 {
                local.insert(Value { node: id, result }, Value { node, result });
            }
        }
        for (out, outer) in plan.graph.outputs.iter().zip(&part.outputs) {
            self.values.insert(*outer, local[&out.value]);
        }
        for group in plan.groups.iter().filter(|g| !g.folded) {
            let members = group.members.iter().map(|m| nodes[m]).collect();
            let roots = group.roots.iter().map(|m| nodes[m]).collect();
            self.groups.push(Group { members, roots, ..group.clone() });
        }
        Ok(())
    }

    /// The graph and its kernels.
    fn finish(mut self, costs: &cost::Costs) -> Result<(Graph, Vec<Cluster>), PassError> {
        for out in &self.old.outputs {
            let v = match (self.values.get(&out.value), self.old.as_const(out.value)) {
                (Some(v), _) => *v,
                (None, Some(t)) => self.new.constant(t.clone()),
                (None, None) => return Err(PassError::Rules { reason: format!("no part gives output `{}`", out.name) }),
            };
            self.new.output(out.name.clone(), v);
        }
        let order = Order::new(&self.new);
        let mut formed = vec![];
        for Group { members, roots, rules, why, .. } in self.groups {
            // A reshape on its own is another name for its operand, and a concatenation a step: neither is a kernel.
            if members.iter().all(|m| self.new.op(*m).is_some_and(|op| matches!(op, Op::Reshape { .. }) || fuse::is_control(op))) {
                continue;
            }
            let outputs: Vec<Value> = roots.into_iter().map(Value::from).collect();
            let (members, region) = fuse::assemble_exact(&self.new, &order, &members, &outputs)
                .map_err(|e| PassError::Rules { reason: format!("a chosen kernel cannot be formed again: {e}") })?;
            formed.push(Cluster { members, formed: region, rules, why });
        }
        // Values that two kernels want: a kernel of several outputs, where that pays.
        let formed = fuse::grow(&self.new, formed, "share", costs);
        Ok((self.new, formed))
    }
}

/// Classes that must be in memory: the first so many outputs, and what steps outside the e-graph read.
fn roots(graph: &Graph, outputs: usize, s: &Saturated) -> Vec<Id> {
    let mut roots: Vec<Id> = graph.outputs[..outputs].iter().map(|o| s.class[&o.value]).collect();
    for id in graph.schedule() {
        if !is_term(graph, id) {
            roots.extend(graph.operands(id).iter().map(|v| s.class[v]));
        }
    }
    roots.sort();
    roots.dedup();
    roots
}

fn rebuild(graph: &Graph, outputs: usize, s: &Saturated, candidates: &candidates::Candidates, choice: &extract::Choice) -> Result<PartPlan, PassError> {
    let mut new = Graph::new(graph.name.clone());
    let mut values: BTreeMap<Id, Value> = BTreeMap::new();
    let ill = |source| PassError::IllTyped { pass: "eqsat", source };
    for &id in graph.inputs() {
        if let NodeKind::Input(name) = &graph[id].kind {
            let v = new.input(name.clone(), graph.ty(id.into()).clone());
            // An input that no output needs is no leaf.
            values.extend(s.class.get(&Value::from(id)).map(|class| (*class, v)));
        }
    }
    let mut groups: Vec<Group> = vec![];
    // Nodes outside the e-graph and chosen kernels, each once what it reads exists.
    let mut pending: Vec<Job> =
        graph.schedule().into_iter().filter(|id| !is_term(graph, *id) && !matches!(graph[*id].kind, NodeKind::Input(_))).map(Job::Node).collect();
    pending.extend(choice.chosen.iter().map(|(class, k)| Job::Kernel(*class, *k)));
    while !pending.is_empty() {
        let ready = |job: &Job| match job {
            Job::Node(id) => graph.operands(*id).iter().all(|v| values.contains_key(&s.class[v])),
            Job::Kernel(_, k) => candidates.kernels[*k].args.iter().all(|a| values.contains_key(a)),
        };
        let Some(at) = pending.iter().position(ready) else {
            return Err(PassError::Rules { reason: "the chosen kernels depend on each other in a circle".into() });
        };
        match pending.remove(at) {
            Job::Node(id) => {
                let operands: Vec<Value> = graph.operands(id).iter().map(|v| values[&s.class[v]]).collect();
                let node = match &graph[id].kind {
                    NodeKind::Const(t) => new.constant(t.clone()).node,
                    NodeKind::Op(op, bodies) => new.add_with(op.clone(), &operands, bodies.clone()).map_err(ill)?,
                    NodeKind::Input(_) => continue,
                };
                new.set_source(node, graph[id].source.clone());
                for result in 0..graph[id].types.len() as u32 {
                    values.insert(s.class[&Value { node: id, result }], Value { node, result });
                }
            }
            Job::Kernel(class, k) => {
                let kernel = &candidates.kernels[k];
                let mut group = emit(&mut new, s, (class, kernel), &values).map_err(ill)?;
                values.extend([class].iter().chain(&kernel.also).copied().zip(group.roots.iter().map(|r| Value::from(*r))));
                group.why.runner_up = runner_up(candidates, choice, class, k);
                groups.push(group);
            }
        }
    }
    for out in &graph.outputs[..outputs] {
        new.output(out.name.clone(), values[&s.class[&out.value]]);
    }
    Ok(PartPlan { graph: new, groups })
}

enum Job {
    Node(NodeId),
    Kernel(Id, usize),
}

/// Add a kernel's terms to the graph: members, those that give results, and the rules behind them.
fn emit(new: &mut Graph, s: &Saturated, (of, kernel): (Id, &Candidate), values: &BTreeMap<Id, Value>) -> Result<Group, pavage_ir::OpError> {
    let mut local: BTreeMap<Id, Value> = BTreeMap::new();
    let (mut members, mut rules) = (vec![], vec![]);
    let why = Why { chain: s.chains.get(&of).cloned().unwrap_or_default(), ..Why::default() };
    for (class, term) in &kernel.members {
        let Head::Op(op) = &term.head else { continue };
        let operands: Vec<Value> = term.args.iter().map(|a| local.get(a).copied().unwrap_or_else(|| values[a])).collect();
        let v = new.add(op.clone(), &operands)?;
        new.set_source(v.node, s.sources.get(class).cloned().unwrap_or_default());
        let chain = s.chain(term);
        if let Some(last) = chain.last() {
            rules.push(last.clone());
        }
        local.insert(*class, v);
        members.push(v.node);
    }
    rules.dedup();
    let also = kernel.also.iter().map(|c| local[c].node);
    let roots = [members[members.len() - 1]].into_iter().chain(also).collect();
    Ok(Group { members, roots, rules, why, folded: kernel.folded })
}

/// The cheapest other way to compute `class`, with the rest of the plan as it is: what runs, and what it costs more.
fn runner_up(all: &candidates::Candidates, choice: &extract::Choice, class: Id, chosen: usize) -> Option<(String, f64)> {
    // What having a class in memory costs beyond the plan, and the kernel for it.
    let mut cost: BTreeMap<Id, (f64, Option<usize>)> = all.leaves.iter().map(|c| (*c, (0.0, None))).collect();
    let given = choice.chosen.iter().filter(|(c, _)| *c != class).flat_map(|(c, k)| all.kernels[*k].also.iter().chain([c]));
    cost.extend(given.map(|c| (*c, (0.0, None))));
    let needs = |cost: &BTreeMap<Id, (f64, Option<usize>)>, k: usize| -> Option<f64> {
        all.kernels[k].args.iter().try_fold(all.kernels[k].cost, |sum, a| Some(sum + cost.get(a)?.0))
    };
    loop {
        let mut changed = false;
        for (c, kernels) in all.by_class.iter().filter(|(c, _)| **c != class) {
            let best = kernels.iter().filter_map(|k| Some((needs(&cost, *k)?, Some(*k)))).min_by(|a, b| a.0.total_cmp(&b.0));
            if let Some(best) = best.filter(|b| cost.get(c).is_none_or(|known| b.0 < known.0)) {
                cost.insert(*c, best);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    // What the chosen one gives beside it, another has to give too.
    let missing = |k: usize| all.kernels[chosen].also.iter().filter(move |c| !all.kernels[k].also.contains(c));
    let whole = |k: usize| missing(k).try_fold(needs(&cost, k)?, |sum, c| Some(sum + cost.get(c)?.0));
    let first_of = |k: usize| missing(k).filter_map(|c| cost.get(c)?.1).chain([k]).collect::<Vec<usize>>();
    let other = all.by_class.get(&class)?.iter().filter(|k| **k != chosen).filter_map(|k| Some((whole(*k)?, *k)));
    let name = |k: &usize| -> Option<String> {
        let ops = all.kernels[*k].members.iter().filter_map(|(_, t)| match &t.head {
            Head::Op(op) if !fuse::is_free(op) => Some(op.mnemonic()),
            _ => None,
        });
        let ops: Vec<&str> = ops.collect();
        let rounded: String = all.kernels[*k].rounds.iter().map(|r| format!(" in {}", all.labels[*r])).collect();
        (!ops.is_empty()).then(|| ops.join("_") + &rounded)
    };
    // The same work behind a view is no other way.
    let same = |first: usize| {
        let (mut work, mut stack) = (vec![], first_of(first));
        while let Some(k) = stack.pop() {
            work.extend(name(&k));
            stack.extend(all.kernels[k].args.iter().filter_map(|a| cost.get(a)?.1));
        }
        work == name(&chosen).into_iter().collect::<Vec<_>>()
    };
    let (price, first) = other.filter(|(_, k)| !same(*k)).min_by(|a, b| a.0.total_cmp(&b.0))?;
    let (mut kernels, mut stack) = (vec![], first_of(first));
    while let Some(k) = stack.pop() {
        kernels.push(k);
        stack.extend(all.kernels[k].args.iter().filter_map(|a| cost.get(a)?.1));
    }
    // Kernels that only the chosen one reads go with it.
    let readers = |a: &Id| choice.chosen.iter().filter(|(_, k)| all.kernels[*k].args.contains(a)).count();
    let freed = all.kernels[chosen].args.iter().filter(|a| readers(a) == 1 && !kernels.iter().any(|k| all.kernels[*k].args.contains(a)));
    let freed: f64 = freed.filter_map(|a| choice.chosen.iter().find(|(c, _)| c == a)).map(|(_, k)| all.kernels[*k].cost).sum();
    Some((kernels.iter().rev().filter_map(name).collect::<Vec<_>>().join(" + "), price - freed - all.kernels[chosen].cost))
}
