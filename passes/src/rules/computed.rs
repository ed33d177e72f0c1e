//! Rules whose right-hand side is computed: views compose, and pointwise ops pass through what only repeats or moves.
use super::{groups, layouts, norms};
use crate::eqsat::{Facts, Head, Term};
use egg::{EGraph, Id};
use pavage_ir::{DType, Dim, Op, Real, ScalarFn, attr::ReduceFn};
use std::collections::BTreeSet;

/// The e-graph these rules run on.
pub type Egraph = EGraph<Term, Facts>;

/// A term to add and unite with a class.
#[derive(Clone)]
pub enum Build {
    /// An existing class.
    Class(Id),
    /// An op over terms.
    Op(Op, Vec<Build>),
}

/// A computed rule: what a term of a class also equals.
#[derive(Clone, Copy)]
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
    Computed { name: "reduce-reduce", apply: reduce_reduce },
    Computed { name: "map-of-broadcasts", apply: map_of_broadcasts },
    Computed { name: "neutral-element", apply: neutral },
    Computed { name: "saturating-cast", apply: saturating_cast },
    Computed { name: "attention", apply: attention },
    Computed { name: "split-k", apply: super::split::split_k },
    Computed { name: "im2col", apply: super::im2col::im2col },
    Computed { name: "winograd", apply: super::winograd::winograd },
    Computed { name: "repeated-operand", apply: repeated_operand },
    Computed { name: "grouped-attention", apply: groups::grouped_attention },
    Computed { name: "grouped-queries", apply: super::decode::grouped_queries },
    Computed { name: "split-keys", apply: super::decode::split_keys },
    Computed { name: "pixels-as-columns", apply: layouts::pixels_as_columns },
    Computed { name: "transpose-of-ones", apply: layouts::transpose_of_ones },
    Computed { name: "row-scale", apply: norms::row_scale },
    Computed { name: "row-first", apply: norms::row_first },
    Computed { name: "factor-into-weights", apply: norms::factor },
    Computed { name: "term-into-bias", apply: norms::term },
    Computed { name: "centred-weights", apply: norms::centred },
    Computed { name: "constants-meet", apply: norms::constants_meet },
];

pub(super) fn op(term: &Term) -> Option<&Op> {
    match &term.head {
        Head::Op(op) => Some(op),
        Head::Leaf(_) => None,
    }
}

pub(super) fn nodes(e: &Egraph, id: Id) -> impl Iterator<Item = &Term> {
    e[id].nodes.iter()
}

/// `transpose[p](transpose[q](x)) = transpose[q[p]](x)`.
fn transpose_transpose(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Transpose { perm }) = op(term) else { return vec![] };
    let inner = nodes(e, term.args[0]).filter_map(|n| match op(n) {
        Some(Op::Transpose { perm: q }) => Some((q.clone(), n.args[0])),
        _ => None,
    });
    let composed = inner.map(|(q, x)| (perm.iter().map(|&p| q[p]).collect::<Vec<_>>(), Build::Class(x)));
    // One that undoes another leaves no view at all.
    composed.map(|(perm, x)| if perm.is_sorted() { x } else { Build::Op(Op::Transpose { perm }, vec![x]) }).collect()
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

/// `reduce[p](reduce[q](x)) = reduce[p, q](x)` of one function: one pass over x, which may keep it for what follows.
fn reduce_reduce(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Reduce { f, axes }) = op(term) else { return vec![] };
    let inner = nodes(e, term.args[0]).filter_map(|n| match op(n) {
        Some(Op::Reduce { f: g, axes }) if f == g => Some((axes, n.args[0])),
        _ => None,
    });
    let joined = inner.map(|(first, x)| {
        let all: BTreeSet<usize> = axes.iter().chain(first).copied().collect();
        Build::Op(Op::Reduce { f: *f, axes: all.into_iter().collect() }, vec![Build::Class(x)])
    });
    joined.collect()
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

/// `cast(min(x, c)) = cast(x)` of floats as integers that do not reach beyond c, and likewise for `max`: the cast saturates.
fn saturating_cast(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Cast { to }) = op(term) else { return vec![] };
    if !to.is_int() || !e[term.args[0]].data.ty.dtype.is_float() {
        return vec![];
    }
    let (least, most) = to.int_range();
    let mut found = vec![];
    for n in nodes(e, term.args[0]) {
        let Some(Op::Map(f @ (ScalarFn::Max | ScalarFn::Min))) = op(n) else { continue };
        for (kept, bound) in [(n.args[0], n.args[1]), (n.args[1], n.args[0])] {
            let Some(c) = e[bound].data.uniform.map(f64::from_bits) else { continue };
            if if *f == ScalarFn::Max { c <= least as f64 } else { c >= most as f64 } {
                found.push(Build::Op(Op::Cast { to: *to }, vec![Build::Class(kept)]));
            }
        }
    }
    found
}

/// `softmax(scale * q k^T + mask) v` from its parts, whatever scales and masks the scores: before the product or after
/// it, by adding or by choosing minus infinity; the softmax may be computed in a wider dtype. Rounding differs: the parts
/// round scores and probabilities to their dtypes, `attention` keeps them wide.
fn attention(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::MatMul { out }) = op(term) else { return vec![] };
    let rank = e[term.args[0]].data.ty.rank();
    if e[term.args[0]].data.ty.dtype != *out || !out.is_float() {
        return vec![];
    }
    let Some(scores) = converted(e, term.args[0]).into_iter().find_map(|p| softmax_of(e, p, rank - 1)) else { return vec![] };
    let mut found = vec![];
    for (scaled, mask) in converted(e, scores).into_iter().flat_map(|s| masked(e, s)) {
        // A mask made narrower could overflow; one that was made wider goes back.
        let mask = match mask {
            Some(Mask::Add(m)) => match converted(e, m).into_iter().find(|m| e[*m].data.ty.dtype == *out) {
                Some(m) => Some(Mask::Add(m)),
                None => continue,
            },
            mask => mask,
        };
        for (product, scale) in scaled_by(e, scaled) {
            for node in nodes(e, product).filter(|n| matches!(op(n), Some(Op::MatMul { .. })) && e[n.args[0]].data.ty.dtype == *out) {
                for (q, of_q) in queries(e, node.args[0]) {
                    for (keys, of_k) in keys(e, node.args[1], rank) {
                        let mask = mask.as_ref().map(|m| m.build(e, *out));
                        let operands = [q.clone(), keys, Build::Class(term.args[1])].into_iter().chain(mask);
                        found.push(Build::Op(Op::Attention { scale: Real::new(scale * of_q * of_k) }, operands.collect()));
                    }
                }
            }
        }
    }
    found
}

/// A class, and the classes of floats that it is a conversion of.
fn converted(e: &Egraph, id: Id) -> Vec<Id> {
    let casts = nodes(e, id).filter(|n| matches!(op(n), Some(Op::Cast { .. })) && e[n.args[0]].data.ty.dtype.is_float());
    [id].into_iter().chain(casts.map(|n| n.args[0])).collect()
}

/// A class as itself times 1, as a multiple of another, and as a transpose of such a multiple.
pub(super) fn queries(e: &Egraph, id: Id) -> Vec<(Build, f64)> {
    let mut found: Vec<(Build, f64)> = scaled_by(e, id).into_iter().map(|(q, scale)| (Build::Class(q), scale)).collect();
    for n in nodes(e, id).filter(|n| matches!(op(n), Some(Op::Transpose { .. }))) {
        let scaled = scaled_by(e, n.args[0]).into_iter().filter(|(q, _)| *q != n.args[0]);
        found.extend(scaled.filter_map(|(q, scale)| Some((Build::Op(op(n)?.clone(), vec![Build::Class(q)]), scale))));
    }
    found
}

/// What `id` is the transpose of along its last two axes, with the factor that scales it there.
fn keys(e: &Egraph, id: Id, rank: usize) -> Vec<(Build, f64)> {
    let mut swap: Vec<usize> = (0..rank).collect();
    swap.swap(rank - 2, rank - 1);
    let turned = |(k, scale): (Id, f64)| (Build::Op(Op::Transpose { perm: swap.clone() }, vec![Build::Class(k)]), scale);
    let mut found: Vec<(Build, f64)> = scaled_by(e, id).into_iter().map(turned).collect();
    for n in nodes(e, id) {
        if let Some(Op::Transpose { perm }) = op(n) {
            // Scaled before it was transposed.
            let perm: Vec<usize> = swap.iter().map(|&p| perm[p]).collect();
            let scaled = scaled_by(e, n.args[0]).into_iter().filter(|(k, _)| *k != n.args[0]);
            found.extend(scaled.map(|(k, scale)| (Build::Op(Op::Transpose { perm: perm.clone() }, vec![Build::Class(k)]), scale)));
        }
    }
    found
}

/// The class whose softmax along the last axis `id` is: a quotient, or a product with the reciprocal.
pub(crate) fn softmax_of(e: &Egraph, id: Id, last: usize) -> Option<Id> {
    let quotient = |n: &Term| -> Vec<(Id, Id)> {
        match op(n) {
            Some(Op::Map(ScalarFn::Div)) => reduced(e, n.args[1], ReduceFn::Sum, last).map(|sum| (n.args[0], sum)).into_iter().collect(),
            Some(Op::Map(ScalarFn::Mul)) => {
                let recip = |of: Id| {
                    let base = nodes(e, of).find(|n| matches!(op(n), Some(Op::Broadcast { .. })))?.args[0];
                    let sum = nodes(e, base).find(|n| matches!(op(n), Some(Op::Map(ScalarFn::Recip))))?.args[0];
                    sum_of(e, sum, ReduceFn::Sum, last)
                };
                [(0, 1), (1, 0)].into_iter().filter_map(|(x, y)| Some((n.args[x], recip(n.args[y])?))).collect()
            }
            _ => vec![],
        }
    };
    nodes(e, id).flat_map(quotient).find_map(|(of, sum)| {
        if sum != of {
            return None;
        }
        let exp = nodes(e, sum).find(|n| matches!(op(n), Some(Op::Map(ScalarFn::Exp))))?;
        let shifted = nodes(e, exp.args[0]).find(|n| matches!(op(n), Some(Op::Map(ScalarFn::Sub))))?;
        (reduced(e, shifted.args[1], ReduceFn::Max, last)? == shifted.args[0]).then_some(shifted.args[0])
    })
}

/// The class that `id` is the reduction of, along `axis` alone.
fn sum_of(e: &Egraph, id: Id, f: ReduceFn, axis: usize) -> Option<Id> {
    nodes(e, id).find_map(|n| match op(n) {
        Some(Op::Reduce { f: g, axes }) if *g == f && axes.as_slice() == [axis] => Some(n.args[0]),
        _ => None,
    })
}

/// The class that `id` is the broadcast reduction of, along `axis` alone.
fn reduced(e: &Egraph, id: Id, f: ReduceFn, axis: usize) -> Option<Id> {
    let base = nodes(e, id).find(|n| matches!(op(n), Some(Op::Broadcast { .. })))?.args[0];
    sum_of(e, base, f, axis)
}

/// What is added to scores before the softmax.
enum Mask {
    /// This.
    Add(Id),
    /// Zero where the condition holds, else minus infinity. `swapped`: the other way round.
    Keep { cond: Id, low: Id, swapped: bool },
}

impl Mask {
    /// In dtype `out`, which has both zero and minus infinity.
    fn build(&self, e: &Egraph, out: DType) -> Build {
        match self {
            Mask::Add(m) => Build::Class(*m),
            Mask::Keep { cond, low, swapped } => {
                let ty = &e[*low].data.ty;
                // Zeros of this type: the size 0, repeated.
                let zero = Build::Op(Op::Dims { values: vec![Dim::ZERO] }, vec![]);
                let zero = Build::Op(Op::Reshape { shape: vec![Dim::one(); ty.rank()] }, vec![zero]);
                let zero = Build::Op(Op::Broadcast { shape: ty.shape.clone() }, vec![Build::Op(Op::Cast { to: ty.dtype }, vec![zero])]);
                let low = Build::Class(*low);
                let (yes, no) = if *swapped { (low, zero) } else { (zero, low) };
                let mask = Build::Op(Op::Map(ScalarFn::Select), vec![Build::Class(*cond), yes, no]);
                if ty.dtype == out { mask } else { Build::Op(Op::Cast { to: out }, vec![mask]) }
            }
        }
    }
}

/// A class as itself, as a sum with a mask, and as a choice between it and minus infinity. Any other number that stands
/// for minus infinity would not do: where a whole row is masked, the scores would show through the sum.
fn masked(e: &Egraph, id: Id) -> Vec<(Id, Option<Mask>)> {
    let mut found = vec![(id, None)];
    for n in nodes(e, id) {
        let low = |i: usize| e[n.args[i]].data.uniform == Some(f64::NEG_INFINITY.to_bits());
        match op(n) {
            Some(Op::Map(ScalarFn::Add)) => found.extend([(n.args[0], Some(Mask::Add(n.args[1]))), (n.args[1], Some(Mask::Add(n.args[0])))]),
            Some(Op::Map(ScalarFn::Select)) if low(2) => {
                found.push((n.args[1], Some(Mask::Keep { cond: n.args[0], low: n.args[2], swapped: false })));
            }
            Some(Op::Map(ScalarFn::Select)) if low(1) => {
                found.push((n.args[2], Some(Mask::Keep { cond: n.args[0], low: n.args[1], swapped: true })));
            }
            _ => {}
        }
    }
    found
}

/// A class as itself times 1, and as a multiple of another.
fn scaled_by(e: &Egraph, id: Id) -> Vec<(Id, f64)> {
    let mut found = vec![(id, 1.0)];
    for n in nodes(e, id) {
        let uniform = |i: usize| n.args.get(i).and_then(|a| e[*a].data.uniform).map(f64::from_bits);
        match (op(n), uniform(0), uniform(1)) {
            (Some(Op::Map(ScalarFn::Mul)), _, Some(c)) => found.push((n.args[0], c)),
            (Some(Op::Map(ScalarFn::Mul)), Some(c), _) => found.push((n.args[1], c)),
            (Some(Op::Map(ScalarFn::Div)), _, Some(c)) if c != 0.0 => found.push((n.args[0], 1.0 / c)),
            _ => {}
        }
    }
    found
}

/// A product whose right operand is repeated along the last batch axis (keys and values that groups of queries share): the
/// repetitions become rows of the left operand, and nothing is repeated.
/// `a[.., h*g, m, k] repeat_g(b)[.., h*g, k, n] = reshape(reshape(a)[.., h, g*m, k] b[.., h, k, n])`.
fn repeated_operand(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::MatMul { out }) = op(term) else { return vec![] };
    let (left, right) = (&e[term.args[0]].data.ty.shape, &e[term.args[1]].data.ty.shape);
    let Some(batch) = left.len().checked_sub(3) else { return vec![] };
    let mut shape = left.clone();
    shape.truncate(batch);
    let mut result = left.clone();
    result[batch + 2] = right[batch + 2].clone();
    let mut found = vec![];
    for (once, heads, times) in repeats(e, term.args[1], batch) {
        let rows = times * left[batch + 1].clone();
        let folded = shape.iter().cloned().chain([heads, rows, left[batch + 2].clone()]).collect();
        let left = Build::Op(Op::Reshape { shape: folded }, vec![Build::Class(term.args[0])]);
        let product = Build::Op(Op::MatMul { out: *out }, vec![left, once]);
        found.push(Build::Op(Op::Reshape { shape: result.clone() }, vec![product]));
    }
    found
}

/// What `id` repeats along `axis`, each element several times in a row: that tensor, its extent there, and how often.
pub(super) fn repeats(e: &Egraph, id: Id, axis: usize) -> Vec<(Build, Dim, Dim)> {
    let mut found = vec![];
    for n in nodes(e, id) {
        match op(n) {
            Some(Op::Broadcast { shape }) => {
                let from = &e[n.args[0]].data.ty.shape;
                if from[axis] == Dim::one() && shape[axis] != Dim::one() && (0..shape.len()).all(|i| i == axis || from[i] == shape[i]) {
                    found.push((Build::Class(n.args[0]), Dim::one(), shape[axis].clone()));
                }
            }
            Some(Op::Reshape { .. }) => found.extend(repeats_in_groups(e, n, axis)),
            Some(Op::Transpose { perm }) => {
                let inner = nodes(e, n.args[0]).filter(|n| matches!(op(n), Some(Op::Reshape { .. }))).flat_map(|n| repeats_in_groups(e, n, perm[axis]));
                found.extend(inner.map(|(once, heads, times)| (Build::Op(Op::Transpose { perm: perm.clone() }, vec![once]), heads, times)));
            }
            _ => {}
        }
    }
    found
}

/// The same of a reshape that joins `axis` and an axis of repetitions behind it.
fn repeats_in_groups(e: &Egraph, reshape: &Term, axis: usize) -> Vec<(Build, Dim, Dim)> {
    let Some(Op::Reshape { shape }) = op(reshape) else { return vec![] };
    let mut found = vec![];
    for n in nodes(e, reshape.args[0]) {
        let Some(Op::Broadcast { shape: wide }) = op(n) else { continue };
        let from = &e[n.args[0]].data.ty.shape;
        let joins = wide.len() == shape.len() + 1
            && wide[..axis] == shape[..axis]
            && wide[axis + 2..] == shape[axis + 1..]
            && from[axis + 1] == Dim::one()
            && (0..wide.len()).all(|i| i == axis + 1 || from[i] == wide[i]);
        if joins {
            let mut once = shape.clone();
            once[axis] = wide[axis].clone();
            found.push((Build::Op(Op::Reshape { shape: once }, vec![Build::Class(n.args[0])]), wide[axis].clone(), wide[axis + 1].clone()));
        }
    }
    found
}
