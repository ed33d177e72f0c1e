//! Splitting a graph where nothing is lost, so that equal layers are searched once.
//!
//! A **cut** is a value that all later work gets its data through, and that memory holds in every plan: a contraction or
//! convolution reads it whole, or it outlives one that depends on it (the residual stream). Inputs, and values that need no
//! contraction, such as an attention mask, may pass it by. What lies between two cuts is a [`Part`]: a
//! graph of its own, constants as inputs, so that the parts of repeated layers are equal texts. Kernels never span a
//! cut; views and sizes are copied to where they are read.
use crate::{PassError, form, fuse};
use pavage_ir::{Graph, NodeId, NodeKind, Op, TensorType, Value};
use std::collections::{BTreeMap, BTreeSet};

/// Ops other than views that a part has at least (but for the last).
const MIN_OPS: usize = 24;

/// A stretch of a graph between cuts.
pub struct Part {
    /// The stretch. Source names are positions in `nodes`; outputs are unnamed.
    pub graph: Graph,
    /// What each input of `graph` is in the whole graph.
    pub inputs: Vec<Value>,
    /// Those inputs of `graph` that are constants in the whole graph; their names begin with `const`.
    pub constants: BTreeSet<Value>,
    /// What each output is in the whole graph.
    pub outputs: Vec<Value>,
    /// The whole graph's nodes, by the positions that are their source names here.
    pub nodes: Vec<NodeId>,
}

impl Part {
    /// What a value of the whole graph is here: an input, or computed.
    pub fn inner(&self, v: Value) -> Option<Value> {
        if let Some(at) = self.inputs.iter().position(|i| *i == v) {
            return Some(self.graph.inputs()[at].into());
        }
        let at = self.nodes.iter().position(|n| *n == v.node)?.to_string();
        let node = self.graph.nodes().into_iter().find(|id| self.graph.op(*id).is_some() && self.graph[*id].source.contains(&at))?;
        Some(Value { node, result: v.result })
    }

    /// A further constant of the whole graph, as an input.
    pub fn constant(&mut self, outer: Value, ty: TensorType) -> Value {
        if let Some(known) = self.inner(outer) {
            return known;
        }
        let v = self.graph.input(format!("const{}", self.inputs.len()), ty);
        self.constants.insert(v);
        self.inputs.push(outer);
        v
    }
}

/// The parts of `graph`, in an order in which each reads only inputs, constants and results of those before.
pub fn split(graph: &Graph) -> Result<Vec<Part>, PassError> {
    let flow = Flow::new(graph);
    let level = flow.levels(&flow.cuts());
    let last = level.iter().copied().max().unwrap_or(0);
    let mut by_level = vec![vec![]; last + 1];
    for (at, id) in flow.order.iter().enumerate() {
        by_level[level[at]].push(*id);
    }
    let level_of: BTreeMap<NodeId, usize> = flow.order.iter().zip(&level).map(|(id, l)| (*id, *l)).collect();
    by_level.iter().enumerate().map(|(n, nodes)| Cutter::new(graph, &level_of, n).part(nodes)).collect()
}

/// A set of positions.
#[derive(Clone)]
struct Bits(Vec<u64>);

impl Bits {
    fn has(&self, at: usize) -> bool {
        self.0[at / 64] >> (at % 64) & 1 == 1
    }
    fn set(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }
    fn join(&mut self, other: &Bits) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a |= b);
    }
    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len() * 64).filter(|at| self.has(*at))
    }
}

/// Who reads what, by position in the schedule; constants left out.
struct Flow<'g> {
    graph: &'g Graph,
    order: Vec<NodeId>,
    operands: Vec<Vec<usize>>,
    users: Vec<Vec<usize>>,
    /// Everything that depends on a node.
    after: Vec<Bits>,
    /// Whether an input of the graph reaches the node.
    fed: Vec<bool>,
    /// Whether no contraction, convolution or the like is before the node.
    plain: Vec<bool>,
}

impl<'g> Flow<'g> {
    fn new(graph: &'g Graph) -> Self {
        let order: Vec<NodeId> = graph.schedule().into_iter().filter(|id| !matches!(graph[*id].kind, NodeKind::Const(_))).collect();
        let at: BTreeMap<NodeId, usize> = order.iter().enumerate().map(|(i, id)| (*id, i)).collect();
        let operands: Vec<Vec<usize>> = order.iter().map(|id| graph.operands(*id).iter().filter_map(|v| at.get(&v.node).copied()).collect()).collect();
        let mut users = vec![vec![]; order.len()];
        let (mut fed, mut plain) = (vec![false; order.len()], vec![true; order.len()]);
        for (user, from) in operands.iter().enumerate() {
            fed[user] = matches!(graph[order[user]].kind, NodeKind::Input(_)) || from.iter().any(|f| fed[*f]);
            plain[user] = !graph.op(order[user]).is_some_and(form::is_heart) && from.iter().all(|f| plain[*f]);
            from.iter().for_each(|f| users[*f].push(user));
        }
        let mut after = vec![Bits(vec![0; order.len().div_ceil(64)]); order.len()];
        for from in (0..order.len()).rev() {
            let mut all = after[from].clone();
            for user in &users[from] {
                all.set(*user);
                all.join(&after[*user]);
            }
            after[from] = all;
        }
        Flow { graph, order, operands, users, after, fed, plain }
    }

    fn op(&self, at: usize) -> Option<&Op> {
        self.graph.op(self.order[at])
    }

    fn is_heart(&self, at: usize) -> bool {
        self.op(at).is_some_and(form::is_heart)
    }

    fn is_view(&self, at: usize) -> bool {
        self.op(at).is_some_and(form::is_view)
    }

    /// Who reads a node, be it through views.
    fn readers(&self, at: usize) -> Vec<usize> {
        let (mut found, mut stack) = (vec![], vec![at]);
        while let Some(n) = stack.pop() {
            for &user in &self.users[n] {
                if self.is_view(user) { stack.push(user) } else { found.push(user) }
            }
        }
        found
    }

    /// Whether memory holds the node's value in every plan.
    fn is_kept(&self, at: usize, hearts: &[usize]) -> bool {
        let readers = self.readers(at);
        readers.iter().any(|r| self.is_heart(*r)) || hearts.iter().any(|h| self.after[at].has(*h) && readers.iter().any(|r| self.after[*h].has(*r)))
    }

    /// Whether everything after a node gets its data through it, or from what is read on both sides.
    fn dominates(&self, at: usize) -> bool {
        let after = &self.after[at];
        after.iter().all(|n| {
            self.operands[n].iter().all(|&from| {
                if from == at || after.has(from) || !self.fed[from] {
                    return true;
                }
                let mut base = from;
                while self.is_view(base) {
                    base = self.operands[base][0];
                }
                let (there, here): (Vec<usize>, Vec<usize>) = self.readers(base).into_iter().partition(|r| after.has(*r));
                // What memory holds from the start, or what only the later part reads, is no reason against.
                let own = matches!(self.graph[self.order[base]].kind, NodeKind::Input(_)) || (self.plain[base] && here.is_empty());
                base == at || own || (self.plain[base] && there.iter().all(|r| !self.is_heart(*r)))
            })
        })
    }

    /// Positions of the cuts, each after the one before.
    fn cuts(&self) -> Vec<usize> {
        let works = |at: &usize| self.op(*at).is_some_and(|op| !fuse::is_free(op));
        let hearts: Vec<usize> = (0..self.order.len()).filter(|at| self.is_heart(*at)).collect();
        let mut cuts: Vec<usize> = vec![];
        for at in 0..self.order.len() {
            let after = |cut: usize| self.after[cut].has(at);
            let since = (0..at).filter(works).filter(|n| self.after[*n].has(at) && cuts.last().is_none_or(|cut| self.after[*cut].has(*n)));
            let candidate = works(&at) && self.graph[self.order[at]].types.len() == 1 && cuts.last().is_none_or(|cut| after(*cut));
            if candidate && since.take(MIN_OPS).count() == MIN_OPS && self.is_kept(at, &hearts) && self.dominates(at) {
                cuts.push(at);
            }
        }
        cuts
    }

    /// Which part each node belongs to: as many as there are cuts before it; what depends on no cut goes to its first
    /// reader.
    fn levels(&self, cuts: &[usize]) -> Vec<usize> {
        let mut level: Vec<usize> = (0..self.order.len()).map(|at| cuts.iter().filter(|c| self.after[**c].has(at)).count()).collect();
        for at in (0..self.order.len()).rev() {
            if level[at] == 0 && !cuts.contains(&at) {
                level[at] = self.users[at].iter().map(|u| level[*u]).min().unwrap_or(0);
            }
        }
        level
    }
}

/// Builds one part.
struct Cutter<'g> {
    graph: &'g Graph,
    level_of: &'g BTreeMap<NodeId, usize>,
    level: usize,
    part: Part,
    map: BTreeMap<Value, Value>,
}

impl<'g> Cutter<'g> {
    fn new(graph: &'g Graph, level_of: &'g BTreeMap<NodeId, usize>, level: usize) -> Self {
        let part = Part { graph: Graph::new("part"), inputs: vec![], constants: BTreeSet::new(), outputs: vec![], nodes: vec![] };
        Cutter { graph, level_of, level, part, map: BTreeMap::new() }
    }

    /// The part with these nodes, given in schedule order.
    fn part(mut self, nodes: &[NodeId]) -> Result<Part, PassError> {
        let definers: BTreeSet<NodeId> = self.graph.definers().into_values().collect();
        for &node in nodes {
            for result in 0..self.graph[node].types.len() as u32 {
                let v = Value { node, result };
                let input = matches!(self.graph[node].kind, NodeKind::Input(_));
                if (!input && !self.copied(v) && self.read_elsewhere(v)) || self.is_output(v) || definers.contains(&node) {
                    self.part.outputs.push(v);
                }
            }
        }
        // Operands before users, from the outputs: an order that equal layers share.
        for v in self.part.outputs.clone() {
            let mut stack = vec![v];
            while let Some(&top) = stack.last() {
                let missing: Vec<Value> = match self.inside(top) {
                    true if !self.map.contains_key(&top) => self.graph.operands(top.node).into_iter().filter(|o| !self.map.contains_key(o)).collect(),
                    _ => vec![],
                };
                if missing.is_empty() {
                    self.bring(top)?;
                    stack.pop();
                }
                stack.extend(missing.into_iter().rev());
            }
            let here = self.map[&v];
            let name = format!("out{}", self.part.graph.outputs.len());
            self.part.graph.output(name, here);
        }
        Ok(self.part)
    }

    fn is_output(&self, v: Value) -> bool {
        self.graph.outputs.iter().any(|o| o.value == v)
    }

    /// Whether another part reads `v`, be it through views, which it copies.
    fn read_elsewhere(&self, v: Value) -> bool {
        self.graph.users(v).iter().any(|(user, _)| {
            let (seen, result) = (Value::from(*user), self.level_of.get(user).is_some_and(|l| *l != self.level));
            if self.copied(seen) { self.read_elsewhere(seen) || (result && self.is_output(seen)) } else { result }
        })
    }

    /// Views and sizes: computed where they are read, never kept for a later part.
    fn copied(&self, v: Value) -> bool {
        self.graph.op(v.node).is_some_and(|op| fuse::is_free(op) && !matches!(op, Op::BindSize { .. }))
    }

    /// Whether the part computes `v` itself.
    fn inside(&self, v: Value) -> bool {
        matches!(self.graph[v.node].kind, NodeKind::Op(..)) && (self.level_of[&v.node] == self.level || self.copied(v))
    }

    /// Make `v` exist in the part; its operands do, if it is computed here.
    fn bring(&mut self, v: Value) -> Result<(), PassError> {
        if self.map.contains_key(&v) {
            return Ok(());
        }
        let node = &self.graph[v.node];
        match &node.kind {
            NodeKind::Const(t) if t.count() == 1 || super::uniform(t).is_some() => {
                let c = self.part.graph.constant(t.clone());
                self.map.insert(v, c);
            }
            NodeKind::Op(op, bodies) if self.inside(v) => {
                let operands: Vec<Value> = self.graph.operands(v.node).iter().map(|o| self.map[o]).collect();
                let ill = |source| PassError::IllTyped { pass: "eqsat", source };
                let new = self.part.graph.add_with(op.clone(), &operands, bodies.clone()).map_err(ill)?;
                self.part.graph.set_source(new, vec![self.part.nodes.len().to_string()]);
                self.part.nodes.push(v.node);
                for result in 0..node.types.len() as u32 {
                    self.map.insert(Value { node: v.node, result }, Value { node: new, result });
                }
            }
            _ => {
                let constant = matches!(node.kind, NodeKind::Const(_));
                let name = format!("{}{}", if constant { "const" } else { "in" }, self.part.inputs.len());
                let i = self.part.graph.input(name, self.graph.ty(v).clone());
                if constant {
                    self.part.constants.insert(i);
                }
                self.part.inputs.push(v);
                self.map.insert(v, i);
            }
        }
        Ok(())
    }
}
