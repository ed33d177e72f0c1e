//! The reference evaluator of whole graphs: one node after another, in [`Graph::schedule`] order.
//!
//! Sizes come from the inputs: an input extent `a*n + b` of one symbol binds it; every other extent must then
//! agree. Ops that define sizes (`bind_size`, `nonzero`, `loop`) bind theirs when they run.
use crate::{Binding, Dim, Graph, Node, NodeId, NodeKind, Op, Sym, Tensor, TensorType, Value, attr::Sizes, dim::Atom, op::EvalArgs, ops, text::bounds};
use std::collections::BTreeMap;

/// Why a graph has no value for these inputs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvalError {
    /// Wrong number of inputs.
    #[error("@{graph} takes {expected} inputs, got {got}")]
    Count {
        /// Name of the graph.
        graph: String,
        /// Inputs the graph has.
        expected: usize,
        /// Inputs given.
        got: usize,
    },
    /// An input of another type than declared.
    #[error("input `{input}` of @{graph}: expected {expected}, got {got}{why}")]
    Input {
        /// Name of the graph.
        graph: String,
        /// Name of the input.
        input: String,
        /// Declared type.
        expected: String,
        /// Type of the tensor given.
        got: String,
        /// Which extent disagrees.
        why: String,
    },
    /// A node that cannot be computed.
    #[error("node {node} of @{graph} ({op}){source_names}: {reason}")]
    Node {
        /// Name of the graph.
        graph: String,
        /// Number of the node.
        node: usize,
        /// The op as text.
        op: String,
        /// Names of the source model's nodes, in parentheses; may be empty.
        source_names: String,
        /// What went wrong.
        reason: String,
    },
}

/// Values of the outputs for these inputs.
pub fn eval(graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, EvalError> {
    eval_graph(graph, inputs, &mut Binding::default())
}

/// [`eval`] where some symbols are bound already; adds those that inputs and ops bind.
pub fn eval_graph(graph: &Graph, inputs: &[Tensor], binding: &mut Binding) -> Result<Vec<Tensor>, EvalError> {
    let (expected, got) = (graph.inputs().len(), inputs.len());
    if expected != got {
        return Err(EvalError::Count { graph: graph.name.clone(), expected, got });
    }
    bind_inputs(graph, inputs, binding)?;
    let order = graph.schedule();
    let mut left: BTreeMap<Value, usize> = BTreeMap::new();
    let uses = order.iter().flat_map(|id| graph.operands(*id)).chain(graph.outputs.iter().map(|o| o.value));
    uses.for_each(|v| *left.entry(v).or_default() += 1);
    let mut values: BTreeMap<Value, Tensor> = graph.inputs().iter().map(|id| Value::from(*id)).zip(inputs.iter().cloned()).collect();
    for id in order {
        let operands = graph.operands(id);
        let results = match &graph[id].kind {
            NodeKind::Input(_) => continue,
            NodeKind::Const(tensor) => vec![tensor.clone()],
            NodeKind::Op(op, bodies) => {
                let tensors: Vec<&Tensor> = operands.iter().filter_map(|v| values.get(v)).collect();
                let run = |binding: &mut Binding| node(&graph[id], op, bodies, &tensors, binding);
                run(binding).map_err(|reason| failed(graph, id, op, reason))?
            }
        };
        for v in operands {
            if let Some(n) = left.get_mut(&v) {
                *n -= 1;
                if *n == 0 {
                    values.remove(&v);
                }
            }
        }
        let named = results.into_iter().enumerate().map(|(i, t)| (Value { node: id, result: i as u32 }, t));
        values.extend(named.filter(|(v, _)| left.contains_key(v)));
    }
    Ok(graph.outputs.iter().filter_map(|o| values.get(&o.value).cloned()).collect())
}

fn failed(graph: &Graph, id: NodeId, op: &Op, reason: String) -> EvalError {
    let names = &graph[id].source;
    let source_names = if names.is_empty() { String::new() } else { format!(" from {}", names.join(", ")) };
    EvalError::Node { graph: graph.name.clone(), node: id.index(), op: op.to_string(), source_names, reason }
}

/// Binds the lone symbols among input extents, then holds every extent against its tensor.
fn bind_inputs(graph: &Graph, inputs: &[Tensor], binding: &mut Binding) -> Result<(), EvalError> {
    let declared: Vec<(&str, &TensorType)> = graph.inputs().iter().map(|id| (input_name(&graph[*id]), &graph[*id].types[0])).collect();
    let error = |(name, ty): &(&str, &TensorType), tensor: &Tensor, why: String| EvalError::Input {
        graph: graph.name.clone(),
        input: name.to_string(),
        expected: ty.to_string(),
        got: tensor.ty().to_string(),
        why,
    };
    for (input, tensor) in declared.iter().zip(inputs) {
        if input.1.dtype != tensor.dtype() || input.1.rank() != tensor.shape().len() {
            return Err(error(input, tensor, String::new()));
        }
        for (dim, extent) in input.1.shape.iter().zip(tensor.shape()) {
            if let Some((sym, factor, offset)) = lone_symbol(dim)
                && !binding.0.contains_key(&sym.name)
            {
                let value = usize::try_from((*extent as i64 - offset) / factor).unwrap_or(0);
                bind_symbol(sym, value, binding).map_err(|e| error(input, tensor, format!(": {e}")))?;
            }
        }
    }
    for (input, tensor) in declared.iter().zip(inputs) {
        agrees(input.1, tensor, binding).map_err(|e| error(input, tensor, format!(": {e}")))?;
    }
    Ok(())
}

fn input_name(node: &Node) -> &str {
    match &node.kind {
        NodeKind::Input(name) => name,
        _ => "",
    }
}

/// The symbol, factor and offset of an extent such as `n`, `32*n` or `n+1`, which an input's extent decides.
fn lone_symbol(dim: &Dim) -> Option<(&Sym, i64, i64)> {
    let (offset, rest) = match dim.terms() {
        [(none, offset), rest @ ..] if none.is_empty() => (*offset, rest),
        rest => (0, rest),
    };
    match rest {
        [(atoms, factor)] if *factor > 0 => match atoms.as_slice() {
            [Atom::Sym(sym)] => Some((sym, *factor, offset)),
            _ => None,
        },
        _ => None,
    }
}

fn bind_symbol(sym: &Sym, value: usize, binding: &mut Binding) -> Result<(), String> {
    let value = i64::try_from(value).map_err(|_| format!("{value} is no size"))?;
    if value < sym.min || sym.max.is_some_and(|max| value > max) {
        return Err(format!("`{}` is {value}, outside {}", sym.name, bounds(sym)));
    }
    binding.0.insert(sym.name.clone(), value);
    Ok(())
}

/// Whether a tensor is what a type says, under this binding.
fn agrees(ty: &TensorType, tensor: &Tensor, binding: &Binding) -> Result<(), String> {
    if ty.dtype != tensor.dtype() || ty.rank() != tensor.shape().len() {
        return Err(format!("declared {ty}, got {}", tensor.ty()));
    }
    for (axis, (dim, extent)) in ty.shape.iter().zip(tensor.shape()).enumerate() {
        match dim.eval(binding) {
            Some(v) if usize::try_from(v) == Ok(*extent) => {}
            Some(v) if dim.as_const().is_some() => return Err(format!("axis {axis} must be {v}, is {extent}")),
            Some(v) => return Err(format!("axis {axis} must be {dim} = {v}, is {extent}")),
            None => return Err(format!("axis {axis}: size {dim} is not bound")),
        }
    }
    Ok(())
}

/// Runs one op: binds its attributes and result types, and then the symbol it defines.
fn node(node: &Node, op: &Op, bodies: &[Graph], tensors: &[&Tensor], binding: &mut Binding) -> Result<Vec<Tensor>, String> {
    let bound = op.bind(binding);
    let results: Vec<TensorType> = node.types.iter().map(|t| t.bind(binding)).collect();
    let args = EvalArgs { tensors, bodies, results: &results };
    let values = match ops::control::run(&bound, args, binding) {
        Some(values) => values?,
        None => bound.eval(args).map_err(|e| e.to_string())?,
    };
    match op {
        Op::BindSize { sym } => {
            let size = values.first().map_or(0, |t| t.get(0).i());
            bind_symbol(sym, usize::try_from(size).map_err(|_| format!("`{}` is {size}", sym.name))?, binding)?;
        }
        Op::NonZero { sym } => bind_symbol(sym, values.first().map_or(0, |t| t.shape()[1]), binding)?,
        Op::Loop { carried, trips, sizes } => {
            if let Some(stacked) = values.get(*carried) {
                bind_symbol(trips, stacked.shape()[0], binding)?;
            }
            bind_results(node, sizes, &values, binding)?;
        }
        Op::If { sizes } => bind_results(node, sizes, &values, binding)?,
        _ => {}
    }
    if values.len() != node.types.len() {
        return Err(format!("gave {} results for {}", values.len(), node.types.len()));
    }
    for (i, (ty, tensor)) in node.types.iter().zip(&values).enumerate() {
        agrees(ty, tensor, binding).map_err(|e| format!("result {i}: {e}"))?;
    }
    Ok(values)
}

/// Binds the sizes that control flow defines by the shapes of its results.
fn bind_results(node: &Node, sizes: &Sizes, values: &[Tensor], binding: &mut Binding) -> Result<(), String> {
    for (ty, tensor) in node.types.iter().zip(values) {
        for (dim, extent) in ty.shape.iter().zip(tensor.shape()) {
            if let Some(sym) = sizes.0.iter().find(|s| *dim == Dim::from(Atom::Sym((*s).clone()))) {
                bind_symbol(sym, *extent, binding)?;
            }
        }
    }
    Ok(())
}
