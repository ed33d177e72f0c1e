//! Rules over many terms at once: contractions of one operand with constant weights are one contraction with the weights
//! side by side, and each is a slice of it. So are pointwise functions of such slices.
//!
//! Siblings are merged all together, not in pairs, between rounds of the other rules. That a slice is read through costs
//! nothing; that it must be copied for a kernel that reads whole tensors, extraction counts.
use super::computed::{Build, Egraph, nodes, op};
use crate::eqsat::Term;
use egg::Id;
use pavage_ir::{Dim, Op, attr::Layout};
use std::collections::{BTreeMap, BTreeSet};

/// Siblings as parts of one term.
pub struct Merge {
    /// The term.
    pub whole: Build,
    /// Each sibling's class, its term there, and the views of `whole` that it is, the first applied first.
    pub parts: Vec<(Id, Term, Vec<Op>)>,
}

/// A rule over siblings.
#[derive(Clone, Copy)]
pub struct Siblings {
    /// Unique name.
    pub name: &'static str,
    /// All it finds.
    pub apply: fn(&Egraph) -> Vec<Merge>,
}

/// Every rule over siblings.
pub const RULES: &[Siblings] = &[
    Siblings { name: "merge-products", apply: products },
    Siblings { name: "merge-convolutions", apply: convolutions },
    Siblings { name: "merge-pointwise", apply: pointwise },
];

/// Terms of all classes, classes in order.
fn terms(e: &Egraph) -> Vec<(Id, &Term)> {
    let mut ids: Vec<Id> = e.classes().map(|c| c.id).collect();
    ids.sort();
    ids.into_iter().flat_map(|id| e[id].nodes.iter().map(move |t| (id, t))).collect()
}

/// Whether a constant holds constants side by side: merged weights are not merged again.
fn is_joined(e: &Egraph, id: Id) -> bool {
    let (mut stack, mut seen) = (vec![id], BTreeSet::new());
    while let Some(id) = stack.pop() {
        if seen.insert(id) {
            for t in nodes(e, id) {
                match op(t) {
                    Some(Op::Concat { .. }) => return true,
                    _ => stack.extend(t.args.iter().filter(|a| e[**a].data.constant)),
                }
            }
        }
    }
    false
}

/// The constant that a class is, or repeats along other axes than `axis`.
fn constant(e: &Egraph, id: Id, axis: usize) -> Option<Id> {
    let narrow = |t: &&Term| matches!(op(t), Some(Op::Broadcast { .. })) && e[t.args[0]].data.constant;
    let base = nodes(e, id).filter(narrow).map(|t| t.args[0]).find(|b| e[*b].data.ty.shape[axis] == e[id].data.ty.shape[axis]);
    base.or(e[id].data.constant.then_some(id))
}

/// Packed weights of constants in whose blocks `axis` does not lie: the blocks, and the constants.
fn packed(e: &Egraph, id: Id, axis: usize) -> Option<(&[usize], &[Id])> {
    nodes(e, id).find_map(|t| match op(t) {
        Some(Op::Dequant { blocks }) if blocks.get(axis).is_none_or(|b| *b == 1) && t.args.iter().all(|a| e[*a].data.constant) => {
            Some((blocks.as_slice(), t.args.as_slice()))
        }
        _ => None,
    })
}

/// Packed weights side by side along `axis`, as one; `None` where they are packed in different ways.
fn joined_packed(e: &Egraph, weights: &[Id], axis: usize) -> Option<Build> {
    let all: Vec<(&[usize], &[Id])> = weights.iter().map(|w| packed(e, *w, axis)).collect::<Option<_>>()?;
    let (blocks, first) = all[0];
    if all.iter().any(|(b, args)| *b != blocks || args.len() != first.len()) {
        return None;
    }
    let part = |i: usize| {
        let parts: Vec<Id> = all.iter().map(|(_, args)| args[i]).collect();
        let mut shape = e[parts[0]].data.ty.shape.clone();
        shape[axis] = total(&extents(e, &parts, axis));
        joined(e, &parts, axis, &shape)
    };
    Some(Build::Op(Op::Dequant { blocks: blocks.to_vec() }, (0..first.len()).map(part).collect::<Option<_>>()?))
}

/// Constants side by side along `axis`, repeated to `shape`; `None` where they differ along another axis.
fn joined(e: &Egraph, bases: &[Id], axis: usize, shape: &[Dim]) -> Option<Build> {
    let others = |id: Id| {
        let mut shape = e[id].data.ty.shape.clone();
        shape[axis] = Dim::ZERO;
        (e[id].data.ty.dtype, shape)
    };
    if bases.iter().any(|b| others(*b) != others(bases[0])) {
        return None;
    }
    let concat = Build::Op(Op::Concat { axis }, bases.iter().map(|b| Build::Class(*b)).collect());
    let mut own = others(bases[0]).1;
    own[axis] = shape[axis].clone();
    Some(if own == shape { concat } else { Build::Op(Op::Broadcast { shape: shape.to_vec() }, vec![concat]) })
}

/// The slices of a tensor of `shape` along `axis`, of these extents, one after the other.
fn slices(shape: &[Dim], axis: usize, extents: &[Dim]) -> Vec<Op> {
    let mut start = Dim::ZERO;
    extents
        .iter()
        .map(|n| {
            let (mut starts, mut sizes) = (vec![Dim::ZERO; shape.len()], shape.to_vec());
            starts[axis] = start.clone();
            sizes[axis] = n.clone();
            start = start.clone() + n.clone();
            Op::Slice { starts, sizes, steps: vec![1; shape.len()] }
        })
        .collect()
}

/// Sum of extents.
fn total(extents: &[Dim]) -> Dim {
    extents.iter().fold(Dim::ZERO, |sum, n| sum + n.clone())
}

/// Extents of classes along `axis`.
fn extents<'a>(e: &Egraph, ids: impl IntoIterator<Item = &'a Id>, axis: usize) -> Vec<Dim> {
    ids.into_iter().map(|id| e[*id].data.ty.shape[axis].clone()).collect()
}

/// Siblings by what they share; each class once.
struct Groups<'e, K>(BTreeMap<K, BTreeMap<Id, (&'e Term, Id)>>);

impl<'e, K: Ord> Groups<'e, K> {
    fn add(&mut self, key: K, class: Id, term: &'e Term, with: Id) {
        self.0.entry(key).or_default().entry(class).or_insert((term, with));
    }
    /// Those of two classes or more: classes, their terms, and what sets each apart.
    fn found(self) -> impl Iterator<Item = (K, Vec<(Id, &'e Term)>, Vec<Id>)> {
        self.0.into_iter().filter(|(_, g)| g.len() > 1).map(|(k, g)| {
            let with = g.values().map(|(_, w)| *w).collect();
            (k, g.into_iter().map(|(id, (t, _))| (id, t)).collect(), with)
        })
    }
}

/// `x @ w_i = slice_i(x @ concat(w))`, for constant weights and for packed ones.
fn products(e: &Egraph) -> Vec<Merge> {
    let mut groups = Groups(BTreeMap::new());
    for (class, term) in terms(e) {
        let Some(operation @ Op::MatMul { .. }) = op(term) else { continue };
        let (x, w) = (term.args[0], term.args[1]);
        let last = e[w].data.ty.rank() - 1;
        if e[class].data.ty.shape[last].as_const().is_none() {
            continue;
        }
        if let Some(base) = constant(e, w, last) {
            if !is_joined(e, base) {
                groups.add((x, operation.to_string()), class, term, base);
            }
        } else if let Some((blocks, parts)) = packed(e, w, last)
            && !is_joined(e, parts[0])
        {
            let types: Vec<String> = parts.iter().map(|p| e[*p].data.ty.dtype.to_string()).collect();
            groups.add((x, format!("{operation} of {} in {blocks:?}", types.join(", "))), class, term, w);
        }
    }
    let merged = groups.found().filter_map(|((x, _), siblings, bases)| {
        let (classes, first): (Vec<Id>, &Term) = (siblings.iter().map(|(id, _)| *id).collect(), siblings[0].1);
        let mut shape = e[classes[0]].data.ty.shape.clone();
        let last = shape.len() - 1;
        let widths = extents(e, &classes, last);
        shape[last] = total(&widths);
        let mut weights = e[first.args[1]].data.ty.shape.clone();
        weights[last] = shape[last].clone();
        let joined = if bases.iter().all(|b| packed(e, *b, last).is_some()) { joined_packed(e, &bases, last)? } else { joined(e, &bases, last, &weights)? };
        let operands = vec![Build::Class(x), joined];
        let whole = Build::Op(op(first)?.clone(), operands);
        Some(Merge { whole, parts: parts(siblings, slices(&shape, last, &widths)) })
    });
    merged.collect()
}

fn parts(siblings: Vec<(Id, &Term)>, slices: Vec<Op>) -> Vec<(Id, Term, Vec<Op>)> {
    siblings.into_iter().zip(slices).map(|((id, t), slice)| (id, t.clone(), vec![slice])).collect()
}

/// Convolutions of one tensor with windows of one kind: filters side by side.
fn convolutions(e: &Egraph) -> Vec<Merge> {
    let mut groups = Groups(BTreeMap::new());
    for (class, term) in terms(e) {
        let Some(operation @ Op::Conv { groups: 1, .. }) = op(term) else { continue };
        let (x, w) = (term.args[0], term.args[1]);
        if e[w].data.constant && !is_joined(e, w) {
            groups.add((x, operation.to_string()), class, term, w);
        }
    }
    let merged = groups.found().filter_map(|((x, _), siblings, filters)| {
        let Some(operation @ Op::Conv { layout, .. }) = op(siblings[0].1) else { return None };
        let classes: Vec<Id> = siblings.iter().map(|(id, _)| *id).collect();
        let mut shape = e[classes[0]].data.ty.shape.clone();
        let channel = if *layout == Layout::ChannelsFirst { 1 } else { shape.len() - 1 };
        let widths = extents(e, &classes, channel);
        shape[channel] = total(&widths);
        let mut weights = e[filters[0]].data.ty.shape.clone();
        weights[0] = total(&extents(e, &filters, 0));
        let whole = Build::Op(operation.clone(), vec![Build::Class(x), joined(e, &filters, 0, &weights)?]);
        Some(Merge { whole, parts: parts(siblings, slices(&shape, channel, &widths)) })
    });
    merged.collect()
}

/// A way to look at the parts of a whole: as slices, or as slices in another shape.
struct Parts<'e> {
    whole: Id,
    /// The axis of the whole that parts divide.
    axis: usize,
    /// Class of each part, and its view of a slice.
    seen: Vec<(Id, Option<&'e Op>)>,
    /// Extents of the parts along the axis.
    widths: Vec<Dim>,
}

/// Wholes whose slices are terms, part after part along one axis.
fn divided<'e>(e: &'e Egraph, terms: &[(Id, &'e Term)], users: &BTreeMap<Id, Vec<(Id, &'e Term)>>) -> Vec<Parts<'e>> {
    let mut by_whole: BTreeMap<(Id, usize), BTreeMap<i64, (Id, Dim)>> = BTreeMap::new();
    for (class, term) in terms {
        let Some(Op::Slice { starts, sizes, steps }) = op(term) else { continue };
        let whole = &e[term.args[0]].data.ty.shape;
        let cut: Vec<usize> = (0..whole.len()).filter(|a| sizes[*a] != whole[*a]).collect();
        if let [axis] = cut[..]
            && let Some(start) = starts[axis].as_const()
            && steps.iter().all(|s| *s == 1)
        {
            by_whole.entry((term.args[0], axis)).or_default().insert(start, (*class, sizes[axis].clone()));
        }
    }
    let mut found = vec![];
    for ((whole, axis), slices) in by_whole {
        let shape = &e[whole].data.ty.shape;
        let mut at = Dim::ZERO;
        let one_after_the_other = slices.iter().all(|(start, (_, n))| std::mem::replace(&mut at, Dim::from(*start) + n.clone()) == Dim::from(*start));
        if !one_after_the_other || at != shape[axis] {
            continue;
        }
        let widths: Vec<Dim> = slices.values().map(|(_, n)| n.clone()).collect();
        let classes: Vec<Id> = slices.values().map(|(id, _)| *id).collect();
        // The same reshape of all but the last axis.
        let reshaped = |id: Id| {
            users
                .get(&id)
                .into_iter()
                .flatten()
                .filter(move |(_, t)| matches!(op(t), Some(Op::Reshape { shape: to }) if to.last() == e[id].data.ty.shape.last()))
        };
        let lead = |t: &Term| match op(t) {
            Some(Op::Reshape { shape }) => shape[..shape.len() - 1].to_vec(),
            _ => vec![],
        };
        if axis + 1 == shape.len() {
            for (_, first) in reshaped(classes[0]) {
                let each = classes.iter().map(|id| reshaped(*id).find(|(_, t)| lead(t) == lead(first)).map(|(id, t)| (*id, op(t))));
                if let Some(seen) = each.collect::<Option<Vec<_>>>() {
                    found.push(Parts { whole, axis, seen, widths: widths.clone() });
                }
            }
        }
        found.push(Parts { whole, axis, seen: classes.into_iter().map(|id| (id, None)).collect(), widths });
    }
    found
}

/// `f(slice_i(y), c_i) = slice_i(f(y, concat(c)))` for constants `c_i`, or one value that repeats along the axis; and
/// `f(slice_i(y)) = slice_i(f(y))`.
fn pointwise(e: &Egraph) -> Vec<Merge> {
    let terms = terms(e);
    let mut users: BTreeMap<Id, Vec<(Id, &Term)>> = BTreeMap::new();
    for (class, term) in &terms {
        let args: BTreeSet<Id> = term.args.iter().copied().collect();
        args.into_iter().for_each(|a| users.entry(a).or_default().push((*class, *term)));
    }
    let mut found = vec![];
    for p in divided(e, &terms, &users) {
        let each: Vec<&[(Id, &Term)]> = p.seen.iter().map(|(id, _)| users.get(id).map_or(&[][..], Vec::as_slice)).collect();
        let mut done = BTreeSet::new();
        for (_, first) in each[0] {
            let Some(operation @ (Op::Map(_) | Op::Cast { .. })) = op(first) else { continue };
            let Some(at) = first.args.iter().position(|a| *a == p.seen[0].0).filter(|_| first.args.len() <= 2) else { continue };
            if !done.insert((operation.to_string(), at)) {
                continue;
            }
            // The user of each part that does the same to it, and the other operand there.
            let user =
                |i: usize| each[i].iter().find(|(_, t)| op(t) == Some(operation) && t.args[at] == p.seen[i].0 && (t.args.len() == 1 || t.args[0] != t.args[1]));
            let Some(siblings) = (0..each.len()).map(user).collect::<Option<Vec<_>>>() else { continue };
            let others: Vec<Id> = siblings.iter().filter_map(|(_, t)| t.args.get(1 - at.min(1)).filter(|_| t.args.len() == 2).copied()).collect();
            let mut operands = vec![Build::Class(p.whole)];
            if !others.is_empty() {
                let Some(other) = beside(e, &p, &others) else { continue };
                operands.insert(1 - at, other);
            }
            let shape = &e[p.whole].data.ty.shape;
            // Slices of the whole in the parts' shape: another name for its memory.
            let mut to = e[siblings[0].0].data.ty.shape.clone();
            let along = if p.seen[0].1.is_some() { to.len() - 1 } else { p.axis };
            to[along] = shape[p.axis].clone();
            let reshape = p.seen[0].1.map(|_| Op::Reshape { shape: to.clone() });
            let views = slices(&to, along, &p.widths).into_iter().map(|slice| reshape.clone().into_iter().chain([slice]).collect());
            let parts = siblings.iter().zip(views).map(|((id, t), views): (_, Vec<Op>)| (*id, (*t).clone(), views)).collect();
            found.push(Merge { whole: Build::Op(operation.clone(), operands), parts });
        }
    }
    found
}

/// What stands beside the whole where `others` stand beside its parts.
fn beside(e: &Egraph, p: &Parts, others: &[Id]) -> Option<Build> {
    let shape = &e[p.whole].data.ty.shape;
    let axis = if p.seen[0].1.is_some() { e[others[0]].data.ty.rank() - 1 } else { p.axis };
    // Coordinates before the axis are those of the whole, or repeat.
    let fitted = |of: &[Dim], along: Dim| -> Option<Vec<Dim>> {
        let lead_is_one = of[..axis].iter().all(|d| d.is(1));
        let mut own = if lead_is_one { vec![Dim::one(); shape.len()] } else { shape.clone() };
        let full = || of[..axis] == e[others[0]].data.ty.shape[..axis];
        if !(lead_is_one || full()) {
            return None;
        }
        own[p.axis] = along;
        Some(own)
    };
    let repeated = |build: Build, from: &[Dim]| if from == shape.as_slice() { build } else { Build::Op(Op::Broadcast { shape: shape.clone() }, vec![build]) };
    let reshaped = |id: Id, to: &[Dim]| {
        if e[id].data.ty.shape == to { Build::Class(id) } else { Build::Op(Op::Reshape { shape: to.to_vec() }, vec![Build::Class(id)]) }
    };
    // One value for all, which does not vary along the axis.
    let base = |id: Id| nodes(e, id).filter(|t| matches!(op(t), Some(Op::Broadcast { .. }))).map(|t| t.args[0]).filter(|b| e[*b].data.ty.shape[axis].is(1));
    if let Some(shared) = base(others[0]).find(|b| others.iter().all(|o| base(*o).any(|x| x == *b))) {
        let of = &e[shared].data.ty.shape;
        if p.seen[0].1.is_none() && axis + 1 < shape.len() {
            return Some(repeated(Build::Class(shared), of));
        }
        let own = fitted(of, Dim::one())?;
        return Some(repeated(reshaped(shared, &own), &own));
    }
    // Constants, one beside the other.
    let bases = others.iter().map(|o| constant(e, *o, axis)).collect::<Option<Vec<Id>>>()?;
    if p.seen[0].1.is_none() {
        return joined(e, &bases, axis, shape);
    }
    let mut parts = vec![];
    for (base, width) in bases.iter().zip(&p.widths) {
        parts.push((*base, fitted(&e[*base].data.ty.shape, width.clone())?));
    }
    let mut own = parts[0].1.clone();
    if parts.iter().any(|(_, of)| of[..p.axis] != own[..p.axis]) {
        return None;
    }
    own[p.axis] = total(&p.widths);
    let parts = parts.iter().map(|(id, own)| reshaped(*id, own)).collect();
    Some(repeated(Build::Op(Op::Concat { axis: p.axis }, parts), &own))
}
