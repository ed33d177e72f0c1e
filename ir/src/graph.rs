//! A graph: inputs, constants and op nodes; values flow along edges.
//!
//! petgraph lives here and nowhere else. Edges run from operand to user and carry the operand's position
//! and which result of its node it is. A graph built through [`Graph::add`] is well typed and acyclic.
use crate::{
    Dim, Op, Tensor, TensorType,
    dim::{Atom, Sym},
    op::{OpError, TypeArgs},
};
use petgraph::{
    Direction,
    stable_graph::{NodeIndex, StableDiGraph},
    visit::EdgeRef,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

/// A node of one graph.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(NodeIndex);

impl NodeId {
    /// A number unique within the graph, stable while the node lives.
    pub fn index(self) -> usize {
        self.0.index()
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0.index())
    }
}

/// One result of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value {
    /// The node.
    pub node: NodeId,
    /// Which result.
    pub result: u32,
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}.{}", self.node, self.result)
    }
}

/// What computes a node's results.
#[derive(Clone, Debug)]
pub enum NodeKind {
    /// A graph input, with its name.
    Input(String),
    /// A constant; the bytes are shared, often with a mapped file.
    Const(Tensor),
    /// An op, with nested graphs if it is control flow.
    Op(Op, Vec<Graph>),
}

/// A node with the types of its results, which are what [`Op::infer`] says.
#[derive(Clone, Debug)]
pub struct Node {
    /// What computes it.
    pub kind: NodeKind,
    /// Result types.
    pub types: Vec<TensorType>,
    /// Names of the source model's nodes this stands for: sorted, without duplicates.
    pub source: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
struct Use {
    operand: u32,
    result: u32,
}

/// A named output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The name callers know.
    pub name: String,
    /// The value.
    pub value: Value,
}

/// One function of a model.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// `@name`.
    pub name: String,
    dag: StableDiGraph<Node, Use>,
    inputs: Vec<NodeId>,
    /// What the graph gives.
    pub outputs: Vec<Output>,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    fn push(&mut self, kind: NodeKind, types: Vec<TensorType>) -> NodeId {
        NodeId(self.dag.add_node(Node { kind, types, source: vec![] }))
    }

    /// Append an input.
    pub fn input(&mut self, name: impl Into<String>, ty: TensorType) -> Value {
        let id = self.push(NodeKind::Input(name.into()), vec![ty]);
        self.inputs.push(id);
        id.into()
    }

    /// A constant.
    pub fn constant(&mut self, tensor: Tensor) -> Value {
        let ty = tensor.ty();
        self.push(NodeKind::Const(tensor), vec![ty]).into()
    }

    /// Append a single-result `op(operands)`; its type is inferred, so an ill-typed node cannot be built.
    pub fn add(&mut self, op: Op, operands: &[Value]) -> Result<Value, OpError> {
        self.add_with(op, operands, vec![]).map(Value::from)
    }

    /// Append `op(operands)` with nested graphs and any number of results.
    pub fn add_with(&mut self, op: Op, operands: &[Value], bodies: Vec<Graph>) -> Result<NodeId, OpError> {
        let types = {
            let types: Vec<&TensorType> = operands.iter().map(|v| self.ty(*v)).collect();
            op.infer(TypeArgs { types: &types, bodies: &bodies })?
        };
        let id = self.push(NodeKind::Op(op, bodies), types);
        for (i, v) in operands.iter().enumerate() {
            self.dag.add_edge(v.node.0, id.0, Use { operand: i as u32, result: v.result });
        }
        Ok(id)
    }

    /// Inputs, in signature order.
    pub fn inputs(&self) -> &[NodeId] {
        &self.inputs
    }

    /// Name an output.
    pub fn output(&mut self, name: impl Into<String>, value: Value) {
        self.outputs.push(Output { name: name.into(), value });
    }

    /// Type of a value.
    pub fn ty(&self, v: Value) -> &TensorType {
        &self[v.node].types[v.result as usize]
    }

    /// The constant a value is, if it is one.
    pub fn as_const(&self, v: Value) -> Option<&Tensor> {
        match &self[v.node].kind {
            NodeKind::Const(t) => Some(t),
            _ => None,
        }
    }

    /// The op that computes a node, if it is one.
    pub fn op(&self, id: NodeId) -> Option<&Op> {
        match &self[id].kind {
            NodeKind::Op(op, _) => Some(op),
            _ => None,
        }
    }

    /// Nested graphs of a node.
    pub fn bodies(&self, id: NodeId) -> &[Graph] {
        match &self[id].kind {
            NodeKind::Op(_, bodies) => bodies,
            _ => &[],
        }
    }

    /// Nested graphs of a node, to be changed; their input and output types must stay.
    pub fn bodies_mut(&mut self, id: NodeId) -> &mut [Graph] {
        match self.dag.node_weight_mut(id.0).map(|n| &mut n.kind) {
            Some(NodeKind::Op(_, bodies)) => bodies,
            _ => &mut [],
        }
    }

    /// Operands of a node, in order.
    pub fn operands(&self, id: NodeId) -> Vec<Value> {
        let mut uses: Vec<_> = self
            .dag
            .edges_directed(id.0, Direction::Incoming)
            .map(|e| (e.weight().operand, Value { node: NodeId(e.source()), result: e.weight().result }))
            .collect();
        uses.sort();
        uses.into_iter().map(|(_, v)| v).collect()
    }

    /// Users of a value: nodes and operand positions, in node order.
    pub fn users(&self, v: Value) -> Vec<(NodeId, usize)> {
        let edges = self.dag.edges_directed(v.node.0, Direction::Outgoing).filter(|e| e.weight().result == v.result);
        let mut users: Vec<_> = edges.map(|e| (NodeId(e.target()), e.weight().operand as usize)).collect();
        users.sort();
        users
    }

    /// How often a value is read: by nodes and as an output.
    pub fn n_uses(&self, v: Value) -> usize {
        self.users(v).len() + self.outputs.iter().filter(|o| o.value == v).count()
    }

    /// Nodes that define a size symbol, by its name.
    pub fn definers(&self) -> BTreeMap<Arc<str>, NodeId> {
        let defined = |id: NodeId| self.op(id).into_iter().flat_map(Op::defines).map(move |sym| (sym.name.clone(), id));
        self.nodes().into_iter().flat_map(defined).collect()
    }

    /// What a node waits for: the nodes of its operands, and those that define the sizes in its attributes
    /// and result types.
    fn needs(&self, id: NodeId, definers: &BTreeMap<Arc<str>, NodeId>) -> Vec<NodeId> {
        let mut needs: Vec<NodeId> = self.operands(id).into_iter().map(|v| v.node).collect();
        if !definers.is_empty() {
            let mut visit = |d: &Dim| needs.extend(d.symbols().iter().filter_map(|s| definers.get(&s.name)).filter(|n| **n != id));
            self[id].types.iter().flat_map(|t| &t.shape).for_each(&mut visit);
            if let NodeKind::Op(op, bodies) = &self[id].kind {
                op.dims(&mut visit);
                bodies.iter().flat_map(Graph::symbols).for_each(|s| visit(&Dim::from(Atom::Sym(s))));
            }
        }
        needs
    }

    /// Every node that outputs need, operands before users, and nodes that define a size before those whose
    /// types or attributes use it. The order depends on the graph alone.
    pub fn schedule(&self) -> Vec<NodeId> {
        let definers = self.definers();
        let mut order = Vec::new();
        let mut seen: BTreeSet<NodeId> = BTreeSet::new();
        let mut stack: Vec<(NodeId, bool)> = self.outputs.iter().rev().map(|o| (o.value.node, false)).collect();
        while let Some((id, done)) = stack.pop() {
            if done {
                order.push(id);
            } else if seen.insert(id) {
                stack.push((id, true));
                stack.extend(self.needs(id, &definers).into_iter().rev().filter(|n| !seen.contains(n)).map(|n| (n, false)));
            }
        }
        order
    }

    /// All nodes, needed or not, in creation order.
    pub fn nodes(&self) -> Vec<NodeId> {
        self.dag.node_indices().map(NodeId).collect()
    }

    /// Make every reader of `old` read `new`; types must be equal.
    pub fn replace(&mut self, old: Value, new: Value) {
        debug_assert_eq!(self.ty(old), self.ty(new), "replacement keeps the type");
        for (user, operand) in self.users(old) {
            let edge = self.dag.edges_directed(user.0, Direction::Incoming).find(|e| e.weight().operand as usize == operand).map(|e| e.id());
            if let Some(edge) = edge {
                self.dag.remove_edge(edge);
            }
            self.dag.add_edge(new.node.0, user.0, Use { operand: operand as u32, result: new.result });
        }
        for out in self.outputs.iter_mut().filter(|o| o.value == old) {
            out.value = new;
        }
    }

    /// Remove nodes that no output needs (inputs stay). Returns how many went.
    pub fn prune(&mut self) -> usize {
        let live: BTreeSet<NodeId> = self.schedule().into_iter().chain(self.inputs.iter().copied()).collect();
        let dead: Vec<_> = self.nodes().into_iter().filter(|id| !live.contains(id)).collect();
        dead.iter().for_each(|id| {
            self.dag.remove_node(id.0);
        });
        dead.len()
    }

    /// Whether edges form a cycle: never in a graph built by [`Graph::add`].
    pub fn is_cyclic(&self) -> bool {
        petgraph::algo::is_cyclic_directed(&self.dag)
    }

    /// Record which source nodes a node stands for.
    pub fn set_source(&mut self, id: NodeId, mut source: Vec<String>) {
        source.sort();
        source.dedup();
        if let Some(node) = self.dag.node_weight_mut(id.0) {
            node.source = source;
        }
    }

    /// Every size symbol in types and attributes, each once, sorted by name.
    pub fn symbols(&self) -> Vec<Sym> {
        let mut found = BTreeSet::new();
        for id in self.nodes() {
            let node = &self[id];
            node.types.iter().flat_map(|t| &t.shape).for_each(|d| found.extend(d.symbols()));
            if let NodeKind::Op(op, bodies) = &node.kind {
                op.dims(&mut |d| found.extend(d.symbols()));
                bodies.iter().for_each(|g| found.extend(g.symbols()));
            }
        }
        found.into_iter().collect()
    }
}

impl std::ops::Index<NodeId> for Graph {
    type Output = Node;
    fn index(&self, id: NodeId) -> &Node {
        &self.dag[id.0]
    }
}

impl From<NodeId> for Value {
    fn from(node: NodeId) -> Self {
        Value { node, result: 0 }
    }
}
