//! Rules whose right-hand side is computed: views compose, and pointwise ops pass through what only repeats or moves.
use crate::eqsat::{Facts, Head, Term};
use egg::{EGraph, Id};
use pavage_ir::{Dim, Op, ScalarFn};

/// The e-graph these rules run on.
pub type Egraph = EGraph<Term, Facts>;

/// A term to add and unite with a class.
pub enum Build {
    /// An existing class.
    Class(Id),
    /// An op over terms.
    Op(Op, Vec<Build>),
}

/// A computed rule: what a term of a class also equals.
pub struct Computed {
    /// Unique name.
    pub name: &'static str,
    /// All it gives for one e-node.
    pub apply: fn(&Egraph, &Term) -> Vec<Build>,
}

/// Every computed rule.
pub const RULES: &[Computed] = &[
    Computed { name: "transpose-transpose", apply: transpose_transpose },
    Computed { name: "reshape-reshape", apply: reshape_reshape },
    Computed { name: "broadcast-broadcast", apply: broadcast_broadcast },
    Computed { name: "view-nothing", apply: view_nothing },
    Computed { name: "map-of-broadcasts", apply: map_of_broadcasts },
    Computed { name: "neutral-element", apply: neutral },
];

fn op(term: &Term) -> Option<&Op> {
    match &term.head {
        Head::Op(op) => Some(op),
        Head::Leaf(_) => None,
    }
}

fn nodes(e: &Egraph, id: Id) -> impl Iterator<Item = &Term> {
    e[id].nodes.iter()
}

/// `transpose[p](transpose[q](x)) = transpose[q[p]](x)`.
fn transpose_transpose(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Transpose { perm }) = op(term) else { return vec![] };
    let inner = nodes(e, term.args[0]).filter_map(|n| match op(n) {
        Some(Op::Transpose { perm: q }) => Some((q.clone(), n.args[0])),
        _ => None,
    });
    inner.map(|(q, x)| Build::Op(Op::Transpose { perm: perm.iter().map(|&p| q[p]).collect() }, vec![Build::Class(x)])).collect()
}

/// `reshape(reshape(x)) = reshape(x)`.
fn reshape_reshape(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Reshape { shape }) = op(term) else { return vec![] };
    let inner = nodes(e, term.args[0]).filter(|n| matches!(op(n), Some(Op::Reshape { .. }))).map(|n| n.args[0]);
    inner.map(|x| Build::Op(Op::Reshape { shape: shape.clone() }, vec![Build::Class(x)])).collect()
}

/// `broadcast(broadcast(x)) = broadcast(x)`.
fn broadcast_broadcast(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Broadcast { shape }) = op(term) else { return vec![] };
    let inner = nodes(e, term.args[0]).filter(|n| matches!(op(n), Some(Op::Broadcast { .. }))).map(|n| n.args[0]);
    inner.map(|x| Build::Op(Op::Broadcast { shape: shape.clone() }, vec![Build::Class(x)])).collect()
}

/// A view that changes nothing is its operand.
fn view_nothing(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(op) = op(term) else { return vec![] };
    let same = |shape: &[Dim]| e[term.args[0]].data.ty.shape == shape;
    let nothing = match op {
        Op::Transpose { perm } => perm.iter().enumerate().all(|(i, p)| i == *p),
        Op::Reshape { shape } | Op::Broadcast { shape } => same(shape),
        _ => false,
    };
    if nothing { vec![Build::Class(term.args[0])] } else { vec![] }
}

/// `f(broadcast(x), broadcast(y)) = broadcast(f(x, y))` where x and y have one shape: computed once, repeated after.
fn map_of_broadcasts(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Map(f)) = op(term) else { return vec![] };
    let base = |id: Id| nodes(e, id).find(|n| matches!(op(n), Some(Op::Broadcast { .. }))).map(|n| n.args[0]);
    let Some(bases) = term.args.iter().map(|a| base(*a)).collect::<Option<Vec<Id>>>() else { return vec![] };
    let Some(first) = bases.first() else { return vec![] };
    if bases.iter().any(|b| e[*b].data.ty.shape != e[*first].data.ty.shape) {
        return vec![];
    }
    let shape = e[term.args[0]].data.ty.shape.clone();
    let inner = Build::Op(Op::Map(*f), bases.into_iter().map(Build::Class).collect());
    vec![Build::Op(Op::Broadcast { shape }, vec![inner])]
}

/// `x * 1`, `x / 1`, `x - 0` are x (`x + 0` is not: it turns -0 into 0).
fn neutral(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Map(f)) = op(term) else { return vec![] };
    let uniform = |id: Id| e[id].data.uniform;
    let keep = match f {
        ScalarFn::Mul if uniform(term.args[1]) == Some(1f64.to_bits()) => Some(0),
        ScalarFn::Mul if uniform(term.args[0]) == Some(1f64.to_bits()) => Some(1),
        ScalarFn::Div if uniform(term.args[1]) == Some(1f64.to_bits()) => Some(0),
        ScalarFn::Sub if uniform(term.args[1]) == Some(0f64.to_bits()) => Some(0),
        _ => None,
    };
    keep.map(|i| vec![Build::Class(term.args[i])]).unwrap_or_default()
}
