//! Which nodes share a kernel.
//!
//! A **cluster** is a set of nodes that [`form`] accepts as one region. [`unfused`] gives every op a cluster of its
//! own; [`greedy`] grows clusters consumer by consumer. Views belong to whoever reads through them and cost nothing;
//! a reshape that nobody can read through is another name for the same memory.
use crate::{
    PassError,
    eqsat::cost::{self, Costs},
    form::{self, Formed, Illegal, form},
};
use pavage_ir::{Dim, Expr, ExprId, Graph, Heart, NodeId, Op, Region, ScalarFn, Value, program::Why};
use std::collections::{BTreeMap, BTreeSet};

/// Nodes that one kernel computes.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Members in schedule order; views that are read through included.
    pub members: Vec<NodeId>,
    /// The kernel.
    pub formed: Formed,
    /// Why these nodes are together, for people.
    pub rules: Vec<String>,
    /// The same at length.
    pub why: Why,
}

/// The members of a cluster as a graph of their own: its inputs are the arguments, its outputs the outputs, in order.
/// Constants that are written into the kernel stay constants. `None` if a member reads anything else.
pub(crate) fn member_graph(graph: &Graph, cluster: &Cluster) -> Option<Graph> {
    let mut new = Graph::new(cluster.formed.region.name.clone());
    let mut values: BTreeMap<Value, Value> = BTreeMap::new();
    for (i, v) in cluster.formed.args.iter().enumerate() {
        values.insert(*v, new.input(format!("a{i}"), graph.ty(*v).clone()));
    }
    for &id in &cluster.members {
        let mut operands = vec![];
        for v in graph.operands(id) {
            if let (None, Some(t)) = (values.get(&v), graph.as_const(v)) {
                values.insert(v, new.constant(t.clone()));
            }
            operands.push(*values.get(&v)?);
        }
        let node = new.add_with(graph.op(id)?.clone(), &operands, vec![]).ok()?;
        new.set_source(node, graph[id].source.clone());
        for result in 0..graph[id].types.len() as u32 {
            // A member that is an argument too is read, not computed.
            values.entry(Value { node: id, result }).or_insert(Value { node, result });
        }
    }
    for (i, v) in cluster.formed.outputs.iter().enumerate() {
        new.output(format!("out{i}"), *values.get(v)?);
    }
    new.prune();
    Some(new)
}

/// Ops that never cost a kernel when they can be read through.
pub(crate) fn is_free(op: &Op) -> bool {
    form::is_view(op) || matches!(op, Op::Dequant { .. } | Op::Iota { .. } | Op::Dims { .. } | Op::BindSize { .. })
}

/// Ops that are steps, not kernels.
pub(crate) fn is_control(op: &Op) -> bool {
    matches!(op, Op::If { .. } | Op::Loop { .. } | Op::BindSize { .. } | Op::Concat { .. })
}

/// One cluster an op.
pub fn unfused(graph: &Graph) -> Result<Vec<Cluster>, PassError> {
    let order = Order::new(graph);
    let mut clusters = vec![];
    for id in kernels(graph) {
        clusters.push(single(graph, &order, id)?);
    }
    Ok(clusters)
}

/// The nodes that need a kernel: neither free nor steps.
pub(crate) fn kernels(graph: &Graph) -> Vec<NodeId> {
    graph.schedule().into_iter().filter(|id| graph.op(*id).is_some_and(|op| !is_free(op) && !is_control(op))).collect()
}

/// The cluster of one node and the views it reads through.
pub(crate) fn single(graph: &Graph, order: &Order, id: NodeId) -> Result<Cluster, PassError> {
    let outputs: Vec<Value> = (0..graph[id].types.len() as u32).map(|result| Value { node: id, result }).collect();
    assemble(graph, order, &[id], &outputs).map(|(members, formed)| Cluster { members, formed, rules: vec![], why: Why::default() }).map_err(|e| {
        PassError::NoKernel { op: graph.op(id).map_or_else(String::new, ToString::to_string), sources: graph[id].source.clone(), reason: e.to_string() }
    })
}

/// Grow clusters greedily from one an op.
/// A destructive fuser with the same legality and costs as the e-graph's: the baseline that search has to beat.
pub fn greedy(graph: &Graph, costs: &Costs) -> Result<Vec<Cluster>, PassError> {
    Ok(grow(graph, unfused(graph)?, "greedy", costs))
}

/// In schedule order, each cluster joins the clusters of its operands where that is legal and predicted to be
/// cheaper. A value that others need too becomes a further output of the kernel.
pub fn grow(graph: &Graph, clusters: Vec<Cluster>, rule: &str, costs: &Costs) -> Vec<Cluster> {
    let order = Order::new(graph);
    let mut home: BTreeMap<NodeId, usize> = BTreeMap::new();
    let mut clusters: Vec<Option<Cluster>> = clusters.into_iter().map(Some).collect();
    let last = |c: &Option<Cluster>| c.as_ref().and_then(|c| c.members.iter().map(|m| order.of(*m)).max());
    clusters.sort_by_key(last);
    for (i, c) in clusters.iter().enumerate() {
        for m in c.iter().flat_map(|c| &c.members).filter(|m| graph.op(**m).is_some_and(|op| !is_free(op))) {
            home.insert(*m, i);
        }
    }
    for i in 0..clusters.len() {
        let mut here = i;
        while let Some(c) = &clusters[here] {
            // Latest producer first: an epilogue belongs to the heart that ran last.
            let mut producers: Vec<Vec<NodeId>> = c.formed.args.iter().filter_map(|v| through_views(graph, *v)).collect();
            producers.sort_by_key(|path| std::cmp::Reverse(order.of(path[path.len() - 1])));
            let joined = producers.iter().find_map(|path| {
                let there = *home.get(&path[path.len() - 1])?;
                join(graph, &order, &clusters, &home, (there, here), path, (rule, costs)).map(|c| (there, c))
            });
            let Some((there, cluster)) = joined else { break };
            for m in cluster.members.iter().filter(|m| graph.op(**m).is_some_and(|op| !is_free(op))) {
                home.insert(*m, there);
            }
            clusters[there] = Some(cluster);
            clusters[here] = None;
            here = there;
        }
    }
    clusters.into_iter().flatten().collect()
}

/// Cluster `there` and its user `here` as one, if that is legal and pays.
fn join(
    graph: &Graph,
    order: &Order,
    clusters: &[Option<Cluster>],
    home: &BTreeMap<NodeId, usize>,
    (there, here): (usize, usize),
    path: &[NodeId],
    (rule, costs): (&str, &Costs),
) -> Option<Cluster> {
    if there == here || !worthwhile(graph, clusters, there, here, path) || reaches_around(graph, order, clusters, home, there, here) {
        return None;
    }
    let (a, b) = (clusters[there].as_ref()?, clusters[here].as_ref()?);
    let core: BTreeSet<NodeId> = a.members.iter().chain(&b.members).chain(path).copied().collect();
    let mut core: Vec<NodeId> = core.into_iter().collect();
    core.sort_by_key(|n| order.of(*n));
    let outputs = escaping(graph, &core);
    // Exactly these: a view before them may be the result of another kernel.
    let (members, formed) = assemble_exact(graph, order, &core, &outputs).ok()?;
    let price = |f: &Formed| cost::predict(&f.region, costs);
    if price(&formed) >= price(&a.formed) + price(&b.formed) {
        return None;
    }
    let mut rules: Vec<String> = a.rules.iter().chain(&b.rules).cloned().collect();
    if !rules.iter().any(|r| r == rule) {
        rules.push(rule.into());
    }
    let mut why = a.why.clone();
    why.chain.extend(b.why.chain.iter().cloned());
    why.runner_up = Some((format!("@{} and @{}", a.formed.region.name, b.formed.region.name), price(&a.formed) + price(&b.formed) - price(&formed)));
    Some(Cluster { members, formed, rules, why })
}

/// Say of each cluster which others it reads, and why they are not one with it.
pub fn explain(graph: &Graph, clusters: &mut [Cluster], costs: &Costs) {
    let order = Order::new(graph);
    let price = |f: &Formed| cost::predict(&f.region, costs);
    let mut home: BTreeMap<Value, usize> = BTreeMap::new();
    for (i, c) in clusters.iter().enumerate() {
        home.extend(c.formed.outputs.iter().map(|v| (*v, i)));
    }
    for here in 0..clusters.len() {
        let mut apart = vec![];
        let mut seen = BTreeSet::new();
        for v in &clusters[here].formed.args {
            let mut from = *v;
            while !home.contains_key(&from) && graph.op(from.node).is_some_and(form::is_view) {
                from = graph.operands(from.node)[0];
            }
            let Some(&there) = home.get(&from).filter(|i| seen.insert(**i)) else { continue };
            let (a, b) = (&clusters[there], &clusters[here]);
            let mut core: Vec<NodeId> = a.members.iter().chain(&b.members).copied().collect::<BTreeSet<_>>().into_iter().collect();
            core.sort_by_key(|n| order.of(*n));
            let reason = match assemble_exact(graph, &order, &core, &escaping(graph, &core)) {
                Err(e) => e.to_string(),
                Ok((_, one)) if price(&one) < price(&a.formed) + price(&b.formed) => "one kernel is cheaper, but others run between the two".to_string(),
                Ok((_, one)) => format!("one kernel would take {:.0} ns, the two {:.0} ns", price(&one), price(&a.formed) + price(&b.formed)),
            };
            apart.push((a.formed.region.name.clone(), reason));
        }
        clusters[here].why.apart = apart;
    }
}

/// Position of each node in the schedule.
pub(crate) struct Order(BTreeMap<NodeId, usize>);

impl Order {
    pub(crate) fn new(graph: &Graph) -> Self {
        Self(graph.schedule().into_iter().enumerate().map(|(i, id)| (id, i)).collect())
    }
    pub(crate) fn of(&self, id: NodeId) -> usize {
        self.0.get(&id).copied().unwrap_or(usize::MAX)
    }
}

/// The views from `v` down to the op that computes what they show; the op comes last.
fn through_views(graph: &Graph, v: Value) -> Option<Vec<NodeId>> {
    let mut path = vec![v.node];
    while let Some(op) = graph.op(path[path.len() - 1]) {
        if !form::is_view(op) {
            return Some(path);
        }
        path.push(graph.operands(path[path.len() - 1])[0].node);
    }
    None
}

/// Values of `members` that others, or the outputs, need. A view of what is outside is none: who reads it makes its own.
pub(crate) fn escaping(graph: &Graph, members: &[NodeId]) -> Vec<Value> {
    let inside: BTreeSet<NodeId> = members.iter().copied().collect();
    let mut found = vec![];
    for &id in members {
        if graph.op(id).is_some_and(is_free) && !shows(graph, id, &inside) {
            continue;
        }
        for result in 0..graph[id].types.len() as u32 {
            let v = Value { node: id, result };
            let used = graph.users(v).iter().any(|(user, _)| !inside.contains(user)) || graph.outputs.iter().any(|o| o.value == v);
            if used {
                found.push(v);
            }
        }
    }
    found
}

/// Whether the free op `id` shows what one of `inside` computes.
fn shows(graph: &Graph, mut id: NodeId, inside: &BTreeSet<NodeId>) -> bool {
    while inside.contains(&id) {
        match graph.op(id) {
            Some(op) if !is_free(op) => return true,
            Some(op) if form::is_view(op) => id = graph.operands(id)[0].node,
            _ => return false,
        }
    }
    false
}

/// Whether joining cluster `from` with its user `to` would leave a path from one to the other through a third.
fn reaches_around(graph: &Graph, order: &Order, clusters: &[Option<Cluster>], home: &BTreeMap<NodeId, usize>, from: usize, to: usize) -> bool {
    let inside = |n: &NodeId| home.get(n).is_some_and(|h| *h == from || *h == to);
    let members = |cluster: usize| -> Vec<NodeId> {
        let all = clusters[cluster].iter().flat_map(|c| &c.members).copied();
        all.filter(|n| home.get(n) == Some(&cluster)).collect()
    };
    // What comes after all of `to` does not lead there.
    let last = members(to).iter().map(|n| order.of(*n)).max().unwrap_or(0);
    let mut stack: Vec<NodeId> = members(from);
    let mut seen: BTreeSet<NodeId> = BTreeSet::new();
    // Only paths that leave both clusters count; direct views between them are fine.
    let mut outside: BTreeSet<NodeId> = BTreeSet::new();
    while let Some(n) = stack.pop() {
        if order.of(n) > last {
            continue;
        }
        for result in 0..graph[n].types.len() as u32 {
            for (user, _) in graph.users(Value { node: n, result }) {
                let leaves = graph.op(user).is_some_and(|op| !form::is_view(op)) && !inside(&user);
                let via = leaves || outside.contains(&n);
                if inside(&user) {
                    if outside.contains(&n) && home.get(&user).is_some_and(|h| *h == to) {
                        return true;
                    }
                    continue;
                }
                // Follow users through their whole cluster: it runs as one.
                let mates = home.get(&user).map_or_else(|| vec![user], |h| members(*h));
                for mate in mates {
                    if seen.insert(mate) || (via && !outside.contains(&mate)) {
                        if via {
                            outside.insert(mate);
                        }
                        stack.push(mate);
                    }
                }
            }
        }
    }
    false
}

/// Whether joining along `path` (views, then the producer) saves more than it recomputes.
fn worthwhile(graph: &Graph, clusters: &[Option<Cluster>], from: usize, to: usize, path: &[NodeId]) -> bool {
    let (Some(a), Some(b)) = (&clusters[from], &clusters[to]) else { return false };
    let (producer, consumer) = (&a.formed.region, &b.formed.region);
    if matches!(producer.heart, Heart::Op(_)) {
        return false;
    }
    // Operands of contractions and windows are read many times, and by tiles: they are computed once, before.
    if !matches!(consumer.heart, Heart::Map | Heart::Reduce { .. }) {
        return false;
    }
    if matches!(producer.heart, Heart::Map) {
        let grows = path.iter().any(|n| matches!(graph.op(*n), Some(Op::Broadcast { .. })));
        let gathers = b.members.iter().any(|n| matches!(graph.op(*n), Some(Op::Gather { .. } | Op::GatherNd { .. } | Op::GatherElements { .. })));
        if (grows || gathers) && producer.exprs.iter().any(|(e, _)| matches!(e, Expr::Call(f, _) if is_dear(*f))) {
            return false;
        }
    }
    true
}

/// Functions that cost more than a memory access.
fn is_dear(f: ScalarFn) -> bool {
    use ScalarFn::*;
    !matches!(f, Add | Sub | Mul | Max | Min | Neg | Abs | Select | And | Or | Xor | Not | Eq | Ne | Lt | Le | Gt | Ge | Fma)
}

/// Form `core` with as many of the views before it as its heart can read through.
pub(crate) fn assemble(graph: &Graph, order: &Order, core: &[NodeId], outputs: &[Value]) -> Result<(Vec<NodeId>, Formed), Illegal> {
    let mut last = Illegal::Shapes;
    for absorb in [Absorb::All, Absorb::NoReshape, Absorb::Weights, Absorb::Nothing] {
        let members = close(graph, order, core, absorb);
        match form(graph, &members, outputs) {
            Ok(formed) if plain(&formed.region) => return Ok((members, formed)),
            Ok(_) => last = Illegal::OffSpine("view"),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Form exactly `members`.
pub(crate) fn assemble_exact(graph: &Graph, order: &Order, members: &[NodeId], outputs: &[Value]) -> Result<(Vec<NodeId>, Formed), Illegal> {
    let mut members = members.to_vec();
    members.sort_by_key(|n| order.of(*n));
    match form(graph, &members, outputs)? {
        formed if plain(&formed.region) || over_patches(graph, &members, &formed.region) => Ok((members, formed)),
        _ => Err(Illegal::OffSpine("view")),
    }
}

/// Whether a contraction's left operand is read window by window, as tiled kernels of wide devices can: candidates absorb patches there alone.
fn over_patches(graph: &Graph, members: &[NodeId], region: &Region) -> bool {
    let Heart::Contract { lhs, rhs, .. } = &region.heart else { return false };
    let patches = members.iter().any(|m| matches!(graph.op(*m), Some(Op::Patches { .. })));
    let load = |id: ExprId| matches!(region.expr(id), Expr::Load { .. });
    let affine = |id: ExprId| matches!(region.expr(id), Expr::Load { index, guard: None, .. } if (0..=region.space.len()).all(|k| index.iter().all(|d| d.affine_in(k).is_some())));
    patches && load(*lhs) && affine(*rhs)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Absorb {
    All,
    NoReshape,
    /// Packed weights alone.
    Weights,
    Nothing,
}

/// `core` and the free ops it reads through. Windows read whole tensors; `absorb` says what a contraction reads through.
fn close(graph: &Graph, order: &Order, core: &[NodeId], absorb: Absorb) -> Vec<NodeId> {
    let mut members: BTreeSet<NodeId> = core.iter().copied().collect();
    let mut stack: Vec<(NodeId, Absorb)> = core.iter().map(|id| (*id, Absorb::All)).collect();
    while let Some((id, level)) = stack.pop() {
        let level = match graph.op(id) {
            Some(op @ (Op::Conv { .. } | Op::MatMul { .. })) if matches!(op, Op::Conv { .. }) || absorb == Absorb::Weights => {
                // Windows read whole tensors, but weights may be packed.
                let w = graph.operands(id)[1].node;
                if absorb != Absorb::Nothing && matches!(graph.op(w), Some(Op::Dequant { .. })) {
                    members.insert(w);
                }
                continue;
            }
            Some(Op::Pool { .. } | Op::WinogradOutput { .. }) => continue,
            Some(op) if form::is_opaque(op) => continue,
            Some(Op::MatMul { .. } | Op::Attention { .. } | Op::AttentionParts { .. }) => absorb,
            _ => level,
        };
        for v in graph.operands(id) {
            let Some(op) = graph.op(v.node) else { continue };
            let take = match level {
                Absorb::Weights | Absorb::Nothing => false,
                Absorb::NoReshape => is_free(op) && !matches!(op, Op::Reshape { .. } | Op::BindSize { .. }),
                Absorb::All => is_free(op) && !matches!(op, Op::BindSize { .. }),
            };
            if take && members.insert(v.node) {
                stack.push((v.node, level));
            }
        }
    }
    let mut members: Vec<NodeId> = members.into_iter().collect();
    members.sort_by_key(|n| order.of(*n));
    members
}

/// The load behind packed weights, as [`Op::Dequant`] spells them; anything else is itself.
pub(crate) fn unpacked(region: &Region, id: ExprId) -> ExprId {
    match region.expr(id) {
        Expr::Call(ScalarFn::Mul | ScalarFn::Sub, xs) => unpacked(region, xs[0]),
        Expr::Cast(x) if region.dtype(*x).bits() <= 16 => *x,
        _ => id,
    }
}

/// Whether the heart's operands are loads that a tiled kernel can make: strided for a contraction, whole for windows, though a
/// convolution may read its image in any order of its axes. Weights may be packed.
fn plain(region: &Region) -> bool {
    let load = |id: ExprId| match region.expr(id) {
        Expr::Load { arg, index, guard: None } => Some((*arg, index.clone())),
        _ => None,
    };
    let identity = |id: ExprId| load(id).is_some_and(|(_, index)| index.iter().enumerate().all(|(i, d)| *d == Dim::axis(i)));
    match &region.heart {
        Heart::Contract { lhs, rhs, .. } => [*lhs, unpacked(region, *rhs)]
            .into_iter()
            .all(|id| load(id).is_some_and(|(_, index)| (0..=region.space.len()).all(|k| index.iter().all(|d| d.affine_in(k).is_some())))),
        Heart::Conv { x, w, input, .. } => {
            let whole = |index: &[Dim]| index.len() == input.len() && (0..input.len()).all(|k| index.contains(&Dim::axis(k)));
            load(*x).is_some_and(|(_, index)| whole(&index)) && identity(unpacked(region, *w))
        }
        Heart::Separable { x, w, point, .. } => identity(*x) && identity(*w) && identity(*point),
        Heart::Pool { x, .. } | Heart::WinogradOutput { x, .. } => identity(*x),
        Heart::Attention { q, k, v, .. } => [*q, *k, *v]
            .into_iter()
            .all(|id| load(id).is_some_and(|(_, index)| (0..region.space.len()).all(|a| index.iter().all(|d| d.affine_in(a).is_some())))),
        Heart::Map | Heart::Reduce { .. } | Heart::Op(_) => true,
    }
}
