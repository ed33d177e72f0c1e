//! Rules for how images lie in memory: a 1x1 convolution as a product whose columns are pixels, for those who want its result
//! plane by plane, and transposes that move nothing.
//!
//! The layout pass makes every image channels-last. These rules stand at its borders alone: where a transpose undoes that,
//! or where there are so few channels that vectors along them would be mostly empty.
use super::computed::{Build, Egraph, nodes, op};
use crate::{eqsat::Term, form};
use egg::Id;
use pavage_ir::{DType, Dim, Op};
use std::collections::BTreeSet;

/// The permutation that takes channels-last to channels-first.
fn to_first(rank: usize) -> Vec<usize> {
    [0, rank - 1].into_iter().chain(1..rank - 1).collect()
}

/// The permutation that takes channels-first to channels-last.
fn to_last(rank: usize) -> Vec<usize> {
    [0].into_iter().chain(2..rank).chain([1]).collect()
}

/// `conv(x, w) = to_last(reshape(w @ x^T))` for a channels-last 1x1 convolution: rows are filters, columns pixels. Vectors then lie
/// along pixels, and the result is written plane by plane.
pub(super) fn pixels_as_columns(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(operation) = op(term) else { return vec![] };
    let [x, w] = term.args[..] else { return vec![] };
    let (image, weights) = (&e[x].data.ty, &e[w].data.ty);
    let lanes = e.analysis.costs.lanes;
    // Vectors are of processors; there alone it is known what they cost.
    if lanes <= 1.0 || image.dtype != DType::F32 || weights.shape.len() < 3 || !form::is_point_product(operation, &weights.shape) {
        return vec![];
    }
    let (rank, outputs) = (image.rank(), weights.shape[0].clone());
    let (n, channels) = (image.shape[0].clone(), image.shape[rank - 1].clone());
    let pixels: Dim = image.shape[1..rank - 1].iter().cloned().product();
    let few = outputs.as_const().is_some_and(|o| 4.0 * o as f64 <= lanes);
    let Some(class) = e.lookup(term.clone()) else { return vec![] };
    // Constant weights would be repeated for each of several images.
    let repeats = n.as_const().is_some_and(|n| n > 1);
    if repeats || pixels.as_const().is_some_and(|p| (p as f64) < lanes) || !(few || wanted_in_planes(e, class, rank)) {
        return vec![];
    }
    // Planes as they lie, if the image was turned round; else pixels are turned round where they are read.
    let turned = nodes(e, x).find(|t| matches!(op(t), Some(Op::Transpose { perm }) if *perm == to_last(rank)));
    let columns = match turned {
        Some(t) => Build::Op(Op::Reshape { shape: vec![n.clone(), channels.clone(), pixels] }, vec![Build::Class(t.args[0])]),
        None => {
            let rows = Build::Op(Op::Reshape { shape: vec![n.clone(), pixels, channels.clone()] }, vec![Build::Class(x)]);
            Build::Op(Op::Transpose { perm: vec![0, 2, 1] }, vec![rows])
        }
    };
    let filters = Build::Op(Op::Reshape { shape: vec![Dim::one(), outputs.clone(), channels.clone()] }, vec![Build::Class(w)]);
    let filters = if n.is(1) { filters } else { Build::Op(Op::Broadcast { shape: vec![n.clone(), outputs.clone(), channels] }, vec![filters]) };
    let planes: Vec<Dim> = [n, outputs].into_iter().chain(image.shape[1..rank - 1].iter().cloned()).collect();
    let product = Build::Op(Op::MatMul { out: DType::F32 }, vec![filters, columns]);
    vec![Build::Op(Op::Transpose { perm: to_last(rank) }, vec![Build::Op(Op::Reshape { shape: planes }, vec![product])])]
}

/// Whether a transpose to channels-first is made of `id`, perhaps after pointwise functions.
fn wanted_in_planes(e: &Egraph, id: Id, rank: usize) -> bool {
    let (mut stack, mut seen) = (vec![e.find(id)], BTreeSet::new());
    while let Some(id) = stack.pop().filter(|_| seen.len() < 16) {
        if !seen.insert(id) {
            continue;
        }
        for user in e[id].parents().map(|p| e.find(p)) {
            for t in nodes(e, user).filter(|t| t.args.iter().any(|a| e.find(*a) == id)) {
                match op(t) {
                    Some(Op::Transpose { perm }) if *perm == to_first(rank) => return true,
                    Some(Op::Map(_) | Op::Cast { .. }) => stack.push(user),
                    _ => {}
                }
            }
        }
    }
    false
}

/// A transpose that moves axes of extent 1 alone is a reshape.
pub(super) fn transpose_of_ones(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Transpose { perm }) = op(term) else { return vec![] };
    let from = &e[term.args[0]].data.ty.shape;
    let kept: Vec<usize> = perm.iter().copied().filter(|p| !from[*p].is(1)).collect();
    // One that moves nothing at all has a rule of its own.
    if !kept.is_sorted() || perm.is_sorted() {
        return vec![];
    }
    vec![Build::Op(Op::Reshape { shape: perm.iter().map(|p| from[*p].clone()).collect() }, vec![Build::Class(term.args[0])])]
}
