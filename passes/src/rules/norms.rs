//! Rules that fold a normalisation into the contraction after it: the statistic of a row moves behind the product, factors
//! and terms along the summed axis go into constant weights, and so does the subtraction of a row's mean.
//!
//! They look through a reshape between the two, as long as it keeps the last axis. All hold for real numbers, and are
//! applied to f32 and f64 alone: a row that is not normalised yet may overflow 16-bit products. The statistic is folded
//! from the row itself, mostly from its squares, so where the fold stays finite the row is far from the ends of the range.
use super::computed::{Build, Egraph, nodes, op};
use crate::eqsat::Term;
use egg::Id;
use pavage_ir::{DType, Dim, Op, ScalarFn, attr::ReduceFn};
use std::collections::BTreeSet;

/// A pointwise function of two operands before a contraction, perhaps with a reshape between.
struct Before<'e> {
    f: ScalarFn,
    /// The operands.
    args: [Id; 2],
    /// The shape that the contraction reads it in.
    to: &'e [Dim],
}

/// A product of floats with its operands: `x`, `w` and what it gives.
struct Product<'e> {
    operation: &'e Op,
    x: Id,
    w: Id,
    shape: &'e [Dim],
    before: Vec<Before<'e>>,
}

fn shape(e: &Egraph, id: Id) -> &[Dim] {
    &e[id].data.ty.shape
}

/// `term` as a product in f32 or f64, with the functions of two operands that its left operand is.
fn product<'e>(e: &'e Egraph, term: &'e Term) -> Option<Product<'e>> {
    let operation @ Op::MatMul { out } = op(term)? else { return None };
    let (x, w) = (term.args[0], term.args[1]);
    if !matches!(out, DType::F32 | DType::F64) || e[x].data.ty.dtype != *out || e[x].data.constant {
        return None;
    }
    let class = e.lookup(term.clone())?;
    let to = shape(e, x);
    let binary = |t: &Term| match (op(t), &t.args[..]) {
        (Some(Op::Map(f @ (ScalarFn::Mul | ScalarFn::Div | ScalarFn::Add | ScalarFn::Sub))), &[a, b]) => Some(Before { f: *f, args: [a, b], to }),
        _ => None,
    };
    let mut before: Vec<Before> = nodes(e, x).filter_map(binary).collect();
    for t in nodes(e, x).filter(|t| matches!(op(t), Some(Op::Reshape { .. })) && shape(e, t.args[0]).last() == to.last()) {
        before.extend(nodes(e, t.args[0]).filter_map(binary));
    }
    Some(Product { operation, x, w, shape: shape(e, class), before })
}

impl Before<'_> {
    /// Operands in either order that the function allows: the one that stays, and the other.
    fn orders(&self) -> Vec<(Id, Id)> {
        let [a, b] = self.args;
        if matches!(self.f, ScalarFn::Mul | ScalarFn::Add) { vec![(a, b), (b, a)] } else { vec![(a, b)] }
    }

    /// A full operand as the contraction would read it.
    fn read(&self, e: &Egraph, id: Id) -> Build {
        if shape(e, id) == self.to { Build::Class(id) } else { Build::Op(Op::Reshape { shape: self.to.to_vec() }, vec![Build::Class(id)]) }
    }
}

/// What `id` repeats.
fn bases(e: &Egraph, id: Id) -> impl Iterator<Item = Id> {
    nodes(e, id).filter(|t| matches!(op(t), Some(Op::Broadcast { .. }))).map(|t| t.args[0])
}

/// The constant that varies along the last axis alone and that `id` repeats or is.
fn along_last(e: &Egraph, id: Id) -> Option<Id> {
    let fits = |b: &Id| {
        let (own, full) = (shape(e, *b), shape(e, id));
        e[*b].data.constant && own.last() == full.last() && own[..own.len() - 1].iter().all(|d| d.is(1))
    };
    bases(e, id).find(fits).or(Some(id).filter(fits))
}

/// A constant vector with this axis as its last but `after`, in rank `rank`.
fn vector(e: &Egraph, id: Id, rank: usize, after: usize) -> Build {
    let mut to = vec![Dim::one(); rank];
    to[rank - 1 - after] = shape(e, id).last().cloned().unwrap_or_default();
    if shape(e, id) == to { Build::Class(id) } else { Build::Op(Op::Reshape { shape: to }, vec![Build::Class(id)]) }
}

/// Constant weights: as they are, or before they are repeated along batch axes.
struct Weights {
    base: Id,
    /// The shape they are repeated to.
    repeated: Option<Vec<Dim>>,
}

impl Weights {
    fn of(e: &Egraph, w: Id) -> Option<Weights> {
        let full = shape(e, w);
        let matrix = full.len() - 2;
        let base = bases(e, w).find(|b| e[*b].data.constant && shape(e, *b)[matrix..] == full[matrix..]);
        match base {
            Some(base) => Some(Weights { base, repeated: Some(full.to_vec()) }),
            None => e[w].data.constant.then_some(Weights { base: w, repeated: None }),
        }
    }

    /// `f(weights, other)`, repeated as they were; `other` is repeated to their shape first.
    fn map(&self, e: &Egraph, f: ScalarFn, other: Build) -> Build {
        let other = Build::Op(Op::Broadcast { shape: shape(e, self.base).to_vec() }, vec![other]);
        let new = Build::Op(Op::Map(f), vec![Build::Class(self.base), other]);
        match &self.repeated {
            Some(to) => Build::Op(Op::Broadcast { shape: to.clone() }, vec![new]),
            None => new,
        }
    }
}

/// `(x * r) @ w = (x @ w) * r` where `r` is one number a row, folded from the row; and likewise for quotients.
pub(super) fn row_scale(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(p) = product(e, term) else { return vec![] };
    let mut found = vec![];
    for b in p.before.iter().filter(|b| matches!(b.f, ScalarFn::Mul | ScalarFn::Div)) {
        for (x, r) in b.orders() {
            let full = shape(e, r);
            let lead = &full[..full.len() - 1];
            let row = |base: &Id| shape(e, *base).last().is_some_and(|d| d.is(1)) && shape(e, *base)[..lead.len()] == *lead && is_statistic(e, *base, x);
            let Some(base) = bases(e, r).find(row) else { continue };
            let mut rows = b.to.to_vec();
            rows[b.to.len() - 1] = Dim::one();
            let r = if shape(e, base) == rows { Build::Class(base) } else { Build::Op(Op::Reshape { shape: rows }, vec![Build::Class(base)]) };
            let product = Build::Op(p.operation.clone(), vec![b.read(e, x), Build::Class(p.w)]);
            found.push(Build::Op(Op::Map(b.f), vec![product, Build::Op(Op::Broadcast { shape: p.shape.to_vec() }, vec![r])]));
        }
    }
    found
}

/// `x * (r * g) = (x * r) * g` where `r` is one number a row, folded from the row, and `g` a constant along it: for the two
/// rules before to match.
pub(super) fn row_first(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Map(ScalarFn::Mul)) = op(term) else { return vec![] };
    if !matches!(e[term.args[0]].data.ty.dtype, DType::F32 | DType::F64) || shape(e, term.args[0]).is_empty() {
        return vec![];
    }
    let mut found = vec![];
    for (x, both) in [(term.args[0], term.args[1]), (term.args[1], term.args[0])] {
        for t in nodes(e, both).filter(|t| matches!(op(t), Some(Op::Map(ScalarFn::Mul)))) {
            for (r, g) in [(t.args[0], t.args[1]), (t.args[1], t.args[0])] {
                let row = |b: Id| shape(e, b).last().is_some_and(|d| d.is(1)) && is_statistic(e, b, x);
                if along_last(e, g).is_some() && bases(e, r).any(row) {
                    let inner = Build::Op(Op::Map(ScalarFn::Mul), vec![Build::Class(x), Build::Class(r)]);
                    found.push(Build::Op(Op::Map(ScalarFn::Mul), vec![inner, Build::Class(g)]));
                }
            }
        }
    }
    found
}

/// Whether `r` is computed from a fold over the rows of what is computed from `x` point by point.
fn is_statistic(e: &Egraph, r: Id, x: Id) -> bool {
    let (mut stack, mut seen) = (vec![(r, false)], BTreeSet::new());
    while let Some((id, folded)) = stack.pop() {
        if folded && id == x {
            return true;
        }
        if !seen.insert((id, folded)) || seen.len() > 256 {
            continue;
        }
        for t in nodes(e, id) {
            match op(t) {
                Some(Op::Map(_) | Op::Cast { .. } | Op::Broadcast { .. } | Op::Reshape { .. }) => stack.extend(t.args.iter().map(|a| (*a, folded))),
                Some(Op::Reduce { axes, .. }) if !folded && *axes == [shape(e, t.args[0]).len() - 1] => stack.push((t.args[0], true)),
                _ => {}
            }
        }
    }
    false
}

/// `(x * g) @ w = x @ (g^T * w)` for constants `g` along the summed axis and `w`; and likewise for quotients.
pub(super) fn factor(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some((p, weights)) = product(e, term).and_then(|p| Some((Weights::of(e, p.w)?, p))).map(|(w, p)| (p, w)) else { return vec![] };
    let rank = shape(e, weights.base).len();
    let mut found = vec![];
    for b in p.before.iter().filter(|b| matches!(b.f, ScalarFn::Mul | ScalarFn::Div)) {
        for (x, g) in b.orders() {
            let Some(g) = along_last(e, g) else { continue };
            let scaled = weights.map(e, b.f, vector(e, g, rank, 1));
            found.push(Build::Op(p.operation.clone(), vec![b.read(e, x), scaled]));
        }
    }
    found
}

/// `(x + b) @ w = x @ w + b @ w` for constants `b` along the summed axis and `w`.
pub(super) fn term(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some((p, weights)) = product(e, term).and_then(|p| Some((Weights::of(e, p.w)?, p))).map(|(w, p)| (p, w)) else { return vec![] };
    let of = shape(e, weights.base);
    let rank = of.len();
    if !of[..rank - 2].iter().all(|d| d.is(1)) {
        return vec![];
    }
    let mut found = vec![];
    for b in p.before.iter().filter(|b| matches!(b.f, ScalarFn::Add | ScalarFn::Sub)) {
        for (x, c) in b.orders() {
            let Some(c) = along_last(e, c) else { continue };
            let product = Build::Op(p.operation.clone(), vec![b.read(e, x), Build::Class(p.w)]);
            let bias = Build::Op(p.operation.clone(), vec![vector(e, c, rank, 0), Build::Class(weights.base)]);
            found.push(Build::Op(Op::Map(b.f), vec![product, Build::Op(Op::Broadcast { shape: p.shape.to_vec() }, vec![bias])]));
        }
    }
    found
}

/// `(x - mean(x)) @ w = x @ (w - mean of each column of w)`: what a row has in common meets columns that sum to zero.
pub(super) fn centred(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some((p, weights)) = product(e, term).and_then(|p| Some((Weights::of(e, p.w)?, p))).map(|(w, p)| (p, w)) else { return vec![] };
    let of = shape(e, weights.base);
    let along = of.len() - 2;
    let Some(k) = of[along].as_const() else { return vec![] };
    let mut found = vec![];
    for b in p.before.iter().filter(|b| b.f == ScalarFn::Sub) {
        let [x, mean] = b.args;
        if !bases(e, mean).any(|m| is_mean(e, m, x, k as f64)) {
            continue;
        }
        let mut column = of.to_vec();
        column[along] = Dim::one();
        let count = Build::Op(Op::Dims { values: vec![of[along].clone()] }, vec![]);
        let count = Build::Op(Op::Cast { to: e[p.x].data.ty.dtype }, vec![count]);
        let count = Build::Op(Op::Reshape { shape: vec![Dim::one(); of.len()] }, vec![count]);
        let count = Build::Op(Op::Broadcast { shape: column }, vec![count]);
        let sum = Build::Op(Op::Reduce { f: ReduceFn::Sum, axes: vec![along] }, vec![Build::Class(weights.base)]);
        let mean = Build::Op(Op::Map(ScalarFn::Div), vec![sum, count]);
        found.push(Build::Op(p.operation.clone(), vec![b.read(e, x), weights.map(e, ScalarFn::Sub, mean)]));
    }
    found
}

/// Whether `mean` is the mean of the `k` elements of each row of `x`.
fn is_mean(e: &Egraph, mean: Id, x: Id, k: f64) -> bool {
    let sum = |id: Id| {
        let fold = |t: &Term| matches!(op(t), Some(Op::Reduce { f: ReduceFn::Sum, axes }) if *axes == [shape(e, x).len() - 1]) && t.args[0] == x;
        nodes(e, id).any(fold)
    };
    let number = |id: Id| e[id].data.uniform.map(f64::from_bits);
    nodes(e, mean).any(|t| match (op(t), &t.args[..]) {
        (Some(Op::Map(ScalarFn::Div)), &[a, b]) => sum(a) && number(b) == Some(k),
        (Some(Op::Map(ScalarFn::Mul)), &[a, b]) => {
            let inverse = |id: Id| number(id).is_some_and(|c| (c * k - 1.0).abs() < 1e-6);
            (sum(a) && inverse(b)) || (sum(b) && inverse(a))
        }
        _ => false,
    })
}

/// `(x + c) + d = x + (c + d)` for repeated constants of one shape, floats; and the same where either is subtracted.
pub(super) fn constants_meet(e: &Egraph, term: &Term) -> Vec<Build> {
    let sum = |t: &Term| match op(t) {
        Some(Op::Map(f @ (ScalarFn::Add | ScalarFn::Sub))) => Some(*f),
        _ => None,
    };
    // What a constant is added to or subtracted from, and the constant.
    let constant = |id: Id| bases(e, id).find(|b| e[*b].data.constant);
    let split = |t: &Term| -> Vec<(ScalarFn, Id, Id)> {
        let Some(f) = sum(t) else { return vec![] };
        let orders = if f == ScalarFn::Add { vec![(0, 1), (1, 0)] } else { vec![(0, 1)] };
        orders.into_iter().filter_map(|(x, c)| Some((f, t.args[x], constant(t.args[c])?))).collect()
    };
    if sum(term).is_none() || !e[term.args[0]].data.ty.dtype.is_float() {
        return vec![];
    }
    // Where a constant changes nothing, as in `x - 0`, a class is a sum of itself: no end of constants would come of it.
    let own = e.lookup(term.clone());
    let mut found = vec![];
    for (outer, inner, d) in split(term).into_iter().filter(|(_, inner, _)| own != Some(*inner)) {
        for (f, x, c) in nodes(e, inner).flat_map(split).filter(|(_, x, c)| *x != inner && shape(e, *c) == shape(e, d)) {
            let of_constants = |f: ScalarFn, a: Id, b: Id| {
                let both = Build::Op(Op::Map(f), vec![Build::Class(a), Build::Class(b)]);
                Build::Op(Op::Broadcast { shape: shape(e, x).to_vec() }, vec![both])
            };
            let (f, both) = match (f, outer) {
                (ScalarFn::Add, ScalarFn::Add) => (ScalarFn::Add, of_constants(ScalarFn::Add, c, d)),
                (ScalarFn::Add, _) => (ScalarFn::Add, of_constants(ScalarFn::Sub, c, d)),
                (_, ScalarFn::Add) => (ScalarFn::Add, of_constants(ScalarFn::Sub, d, c)),
                _ => (ScalarFn::Sub, of_constants(ScalarFn::Add, c, d)),
            };
            found.push(Build::Op(Op::Map(f), vec![Build::Class(x), both]));
        }
    }
    found
}
