//! Long sums split into parts that run side by side: what a wide device needs for few rows and columns.
use super::computed::{Build, Egraph, op};
use crate::eqsat::Term;
use pavage_ir::{DType, Dim, Op, attr::ReduceFn};

/// A part sums at least so many products.
const LEAST: i64 = 256;

/// `a b = sum_s a[:, s] b[s, :]` over parts of the contracted axis, where the result has fewer tiles than the device has
/// units: as many parts as keep most of them busy. The parts are summed by another kernel, in the accumulator's dtype.
pub(super) fn split_k(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::MatMul { out }) = op(term) else { return vec![] };
    let (a, b) = (&e[term.args[0]].data.ty, &e[term.args[1]].data.ty);
    let (Some(left), Some(right)) = (a.const_shape(), b.const_shape()) else { return vec![] };
    if !out.is_float() {
        return vec![];
    }
    let size = |n: usize| n as i64;
    let rank = left.len();
    let (batch, m, k, n) = (left[..rank - 2].iter().product::<usize>(), size(left[rank - 2]), size(left[rank - 1]), size(right[rank - 1]));
    let costs = &e.analysis.costs;
    let [rows, columns] = if a.dtype.bits() == 16 { costs.half_tile } else { costs.tile }.map(|t| t as i64);
    let tiles = size(batch) * ((m + rows - 1) / rows) * ((n + columns - 1) / columns);
    let units = costs.units as i64;
    let fits = |parts: &i64| tiles * parts <= units && k % parts == 0 && k / parts >= LEAST;
    let Some(parts) = (1..=7).map(|p| 1i64 << p).take_while(fits).last().filter(|_| tiles > 0) else { return vec![] };
    let acc = if out.bits() < 32 { DType::F32 } else { *out };
    let with = |shape: &[Dim], tail: [i64; 3]| -> Vec<Dim> { shape[..rank - 2].iter().cloned().chain(tail.map(Dim::from)).collect() };
    let mut perm: Vec<usize> = (0..=rank).collect();
    perm.swap(rank - 2, rank - 1);
    let lhs = Build::Op(Op::Reshape { shape: with(&a.shape, [m, parts, k / parts]) }, vec![Build::Class(term.args[0])]);
    let lhs = Build::Op(Op::Transpose { perm }, vec![lhs]);
    let rhs = Build::Op(Op::Reshape { shape: with(&b.shape, [parts, k / parts, n]) }, vec![Build::Class(term.args[1])]);
    let products = Build::Op(Op::MatMul { out: acc }, vec![lhs, rhs]);
    let sum = Build::Op(Op::Reduce { f: ReduceFn::Sum, axes: vec![rank - 2] }, vec![products]);
    let shape = a.shape[..rank - 2].iter().cloned().chain([Dim::from(m), Dim::from(n)]).collect();
    let sum = Build::Op(Op::Reshape { shape }, vec![sum]);
    vec![if acc == *out { sum } else { Build::Op(Op::Cast { to: *out }, vec![sum]) }]
}
