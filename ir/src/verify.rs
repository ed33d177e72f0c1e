//! The contract of graphs, which every pass may rely on and must keep:
//!
//! - no cycle runs through a graph;
//! - every operand is a result that its node has, and the types of every node are those its rule infers;
//! - a constant node has the type of its tensor; the inputs are exactly the input nodes, named uniquely;
//! - a graph has outputs, named uniquely (bodies of control flow may have none, and their outputs are
//!   known by position);
//! - a size symbol has one name and one pair of bounds, in nested graphs too; it occurs in the type of an
//!   input, or exactly one op defines it, or the graph around defines it;
//! - sizes in types and attributes name symbols only, never loop axes;
//! - nested graphs keep the same contract, and take what their op gives them.
use crate::{Dim, Graph, NodeId, NodeKind, Op, TensorType, Value, dim::Atom, op::TypeArgs, text_parse::is_symbol};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A graph that breaks the contract.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("@{graph}{}: {reason}", .node.map(|n| format!(", node {n}")).unwrap_or_default())]
pub struct VerifyError {
    /// Name of the graph.
    pub graph: String,
    /// Number of the node, where one is to blame.
    pub node: Option<usize>,
    /// The broken promise.
    pub reason: String,
}

/// Fails where the graph breaks the contract above.
pub fn verify(graph: &Graph) -> Result<(), VerifyError> {
    let whole = |reason: String| Err(VerifyError { graph: graph.name.clone(), node: None, reason });
    let symbols = graph.symbols();
    if let Some(pair) = symbols.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return whole(format!("size `{}` has two pairs of bounds", pair[0].name));
    }
    if let Some(sym) = symbols.iter().find(|s| !is_symbol(&s.name)) {
        return whole(format!("`{}` cannot name a size", sym.name));
    }
    if graph.outputs.is_empty() {
        return whole("there are no outputs".into());
    }
    let mut names = BTreeSet::new();
    if let Some(twice) = graph.outputs.iter().find(|o| !names.insert(&o.name)) {
        return whole(format!("two outputs are named `{}`", twice.name));
    }
    check(graph, &BTreeSet::new())
}

fn check(graph: &Graph, around: &BTreeSet<Arc<str>>) -> Result<(), VerifyError> {
    let blame = |node: Option<NodeId>, reason: String| VerifyError { graph: graph.name.clone(), node: node.map(NodeId::index), reason };
    if graph.is_cyclic() {
        return Err(blame(None, "there is a cycle".into()));
    }
    let known = sizes(graph, around).map_err(|reason| blame(None, reason))?;
    let nodes = graph.nodes();
    let exists: BTreeSet<NodeId> = nodes.iter().copied().collect();
    let has = |v: &Value| exists.contains(&v.node) && (v.result as usize) < graph[v.node].types.len();
    let mut names = BTreeSet::new();
    for id in graph.inputs() {
        match exists.contains(id).then(|| &graph[*id].kind) {
            Some(NodeKind::Input(name)) if names.insert(name) => {}
            Some(NodeKind::Input(name)) => return Err(blame(Some(*id), format!("two inputs are named `{name}`"))),
            _ => return Err(blame(Some(*id), "an input is no input node".into())),
        }
    }
    for id in nodes {
        let node = &graph[id];
        for v in graph.operands(id) {
            if !has(&v) {
                return Err(blame(Some(id), format!("operand {v:?} does not exist")));
            }
        }
        let expected: Vec<TensorType> = match &node.kind {
            NodeKind::Input(_) if graph.inputs().contains(&id) && node.types.len() == 1 => node.types.clone(),
            NodeKind::Input(name) => return Err(blame(Some(id), format!("`{name}` is not among the inputs"))),
            NodeKind::Const(tensor) => vec![tensor.ty()],
            NodeKind::Op(op, bodies) => {
                for body in bodies {
                    check(body, &known)?;
                }
                let operands = graph.operands(id);
                let types: Vec<&TensorType> = operands.iter().map(|v| graph.ty(*v)).collect();
                op.infer(TypeArgs { types: &types, bodies }).map_err(|e| blame(Some(id), e.to_string()))?
            }
        };
        if expected != node.types {
            let list = |types: &[TensorType]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(blame(Some(id), format!("declared {}, inferred {}", list(&node.types), list(&expected))));
        }
        stray(node.types.iter().flat_map(|t| &t.shape), node_op(&node.kind), &known).map_err(|reason| blame(Some(id), reason))?;
    }
    match graph.outputs.iter().find(|o| !has(&o.value)) {
        Some(o) => Err(blame(None, format!("output `{}` does not exist", o.name))),
        None => Ok(()),
    }
}

fn node_op(kind: &NodeKind) -> Option<&Op> {
    match kind {
        NodeKind::Op(op, _) => Some(op),
        _ => None,
    }
}

/// Names of the sizes that a graph may use.
fn sizes(graph: &Graph, around: &BTreeSet<Arc<str>>) -> Result<BTreeSet<Arc<str>>, String> {
    let mut known = around.clone();
    for id in graph.inputs() {
        let dims = graph[*id].types.iter().flat_map(|t| &t.shape);
        known.extend(dims.flat_map(Dim::symbols).map(|s| s.name));
    }
    let mut defined: BTreeMap<Arc<str>, NodeId> = BTreeMap::new();
    for id in graph.nodes() {
        for sym in graph.op(id).into_iter().flat_map(Op::defines) {
            if !known.insert(sym.name.clone()) || defined.insert(sym.name.clone(), id).is_some() {
                return Err(format!("size `{}` is defined twice", sym.name));
            }
        }
    }
    Ok(known)
}

fn stray<'a>(types: impl Iterator<Item = &'a Dim>, op: Option<&Op>, known: &BTreeSet<Arc<str>>) -> Result<(), String> {
    let mut found = Ok(());
    let mut visit = |d: &Dim| {
        if let Some(s) = d.symbols().iter().find(|s| !known.contains(&s.name)) {
            found = Err(format!("size `{}` is defined nowhere", s.name));
        }
        if d.any_atom(&|a| matches!(a, Atom::Axis(_) | Atom::Value(_))) {
            found = Err(format!("size {d} depends on a loop"));
        }
    };
    types.for_each(&mut visit);
    if let Some(op) = op {
        op.dims(&mut visit);
    }
    found
}
