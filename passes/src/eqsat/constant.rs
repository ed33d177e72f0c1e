//! What rules make of constants is computed at compile time: weights scaled, centred or put side by side.
//!
//! A class is **folded** if one of its terms is made of constants alone, through ops that say what they give whatever the
//! run-time sizes. Its candidate has a whole expression for members, constants for arguments, and next to no cost; no
//! kernel takes such terms in. [`fold`] evaluates them where a part joins the whole graph, once for each layer.
use super::{Facts, Head, Saturated, Term};
use crate::PassError;
use egg::{EGraph, Id};
use pavage_ir::{
    Graph, Op, Tensor, TensorType, Value,
    op::{EvalArgs, TypeArgs},
};
use std::collections::{BTreeMap, BTreeSet};

/// Predicted nanoseconds that a kernel is charged for each folded constant that it reads: of two plans that cost the same,
/// the one that leaves the model's constants as they are.
pub(super) const COST: f64 = 1e-3;
/// Elements of one folded constant at most.
const MOST: usize = 1 << 28;
/// A folded constant may be this many times larger than those it is made of.
const GROWTH: usize = 4;
/// Constants up to this many elements may always be made.
const SMALL: usize = 4096;

/// Whether the value of a term is known at compile time if its operands are.
pub(super) fn is_foldable(op: &Op) -> bool {
    matches!(
        op,
        Op::Map(_)
            | Op::Cast { .. }
            | Op::Broadcast { .. }
            | Op::Reshape { .. }
            | Op::Transpose { .. }
            | Op::Concat { .. }
            | Op::Reduce { .. }
            | Op::MatMul { .. }
            | Op::WinogradFilter { .. }
    ) || matches!(op, Op::Dims { values } if values.iter().all(|d| d.as_const().is_some()))
}

/// The folded classes of a saturated e-graph, each with its least deep expression: operands first, the class last.
pub(super) fn expressions(egraph: &EGraph<Term, Facts>) -> BTreeMap<Id, Vec<(Id, Term)>> {
    let mut ids: Vec<Id> = egraph.classes().filter(|c| c.data.constant).map(|c| c.id).collect();
    ids.sort();
    // The term of least depth, by rounds: what it is made of is always shallower, so that no expression is a circle.
    let is_leaf = |id: Id| egraph[id].nodes.iter().any(|t| matches!(t.head, Head::Leaf(_)));
    let mut done: BTreeSet<Id> = ids.iter().copied().filter(|id| is_leaf(*id)).collect();
    let mut term: BTreeMap<Id, &Term> = BTreeMap::new();
    loop {
        let ready = |t: &&Term| matches!(&t.head, Head::Op(op) if is_foldable(op)) && t.args.iter().all(|a| done.contains(a));
        let found: Vec<(Id, &Term)> = ids.iter().filter(|id| !done.contains(id)).filter_map(|id| Some((*id, egraph[*id].nodes.iter().find(ready)?))).collect();
        if found.is_empty() {
            break;
        }
        done.extend(found.iter().map(|(id, _)| *id));
        term.extend(found);
    }
    let elements = |id: &Id| egraph[*id].data.ty.const_shape().and_then(|s| pavage_ir::tensor::count_of(&s)).unwrap_or(usize::MAX);
    let expression = |root: Id| -> Option<Vec<(Id, Term)>> {
        let (mut members, mut leaves) = (vec![], 0usize);
        let mut seen = BTreeSet::new();
        let mut stack = vec![(root, false)];
        while let Some((id, leave)) = stack.pop() {
            match term.get(&id) {
                Some(t) if leave => members.push((id, (*t).clone())),
                Some(t) if seen.insert(id) => {
                    stack.push((id, true));
                    stack.extend(t.args.iter().map(|a| (*a, false)));
                }
                None if seen.insert(id) => leaves = leaves.saturating_add(elements(&id)),
                _ => {}
            }
        }
        let size = elements(&root);
        (size <= SMALL || size <= MOST && size <= leaves.saturating_mul(GROWTH)).then_some(members)
    };
    term.keys().filter_map(|id| Some((*id, expression(*id)?))).collect()
}

impl Saturated {
    /// Whether a class is computed at compile time.
    pub fn is_folded(&self, id: Id) -> bool {
        self.folded.contains_key(&id)
    }
}

/// The value that `members` of `graph` compute last, from constants of `values`.
pub(super) fn fold(graph: &Graph, members: &[pavage_ir::NodeId], values: &dyn Fn(Value) -> Option<Tensor>) -> Result<Tensor, PassError> {
    let broken = |why: String| PassError::Rules { reason: format!("a constant cannot be computed: {why}") };
    let mut known: BTreeMap<Value, Tensor> = BTreeMap::new();
    let mut last = None;
    for &id in members {
        let op = graph.op(id).ok_or_else(|| broken("no op".into()))?;
        let operands = graph.operands(id).into_iter().map(|v| known.get(&v).cloned().or_else(|| values(v)));
        let operands = operands.collect::<Option<Vec<Tensor>>>().ok_or_else(|| broken(format!("{op} reads what is no constant")))?;
        let types: Vec<TensorType> = operands.iter().map(Tensor::ty).collect();
        let types: Vec<&TensorType> = types.iter().collect();
        let results = op.infer(TypeArgs { types: &types, bodies: &[] }).map_err(|e| broken(e.to_string()))?;
        let tensors: Vec<&Tensor> = operands.iter().collect();
        let value = op.eval(EvalArgs { tensors: &tensors, bodies: &[], results: &results }).map_err(|e| broken(e.to_string()))?.pop();
        let value = value.ok_or_else(|| broken(format!("{op} gives nothing")))?;
        known.insert(id.into(), value.clone());
        last = Some(value);
    }
    last.ok_or_else(|| broken("nothing to compute".into()))
}
