//! Attention of few queries over many keys, as a decoder asks for it: what groups of queries share is read once, and parts of
//! the keys run side by side where a wide device would stand still.
use super::{
    computed::{Build, Egraph, op, queries},
    groups::{Shared, shared},
};
use crate::eqsat::Term;
use pavage_ir::{Dim, Op, ScalarFn, attr::ReduceFn};

/// Queries that are few: attention over them is a matter of memory.
const FEW: i64 = 16;
/// Queries that share a read of the keys.
const TOGETHER: i64 = 8;
/// A part has at least so many keys.
const LEAST: i64 = 128;
/// Blocks that run side by side on a unit, each waiting for memory.
const BLOCKS: i64 = 4;
/// Parts are made of whole runs of so many.
const RUN: i64 = 32;
/// Elements of a key or value at most.
const WIDEST: i64 = 256;

/// Attention whose keys and values are repeated along the last batch axis: the repetitions become queries.
/// `attention(q[.., h*g, s, e], repeat_g(k), repeat_g(v)) = reshape(attention(reshape(q)[.., h, g*s, e], k, v))`.
pub(super) fn grouped_queries(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(attention @ Op::Attention { .. }) = op(term) else { return vec![] };
    // One core has products with the groups as rows (`repeated-operand`).
    if !e.analysis.costs.is_wide() {
        return vec![];
    }
    let shape = |i: usize| &e[term.args[i]].data.ty.shape;
    let Some(axis) = shape(0).len().checked_sub(3) else { return vec![] };
    let mut result = shape(0).clone();
    result[axis + 2] = shape(2)[axis + 2].clone();
    let mut found = vec![];
    for (Shared { keys, values, heads, .. }, rows) in shared_by_few(e, term) {
        let fold = |i: usize| {
            let folded = shape(i)[..axis].iter().cloned().chain([heads.clone(), rows.clone(), shape(i)[axis + 2].clone()]).collect();
            Build::Op(Op::Reshape { shape: folded }, vec![Build::Class(term.args[i])])
        };
        let operands = [fold(0), keys, values].into_iter().chain((3..term.args.len()).map(fold));
        let attention = Build::Op(attention.clone(), operands.collect());
        found.push(Build::Op(Op::Reshape { shape: result.clone() }, vec![attention]));
    }
    found
}

/// What an attention repeats along the last batch axis, for few queries: each with the queries that share it.
fn shared_by_few(e: &Egraph, attention: &Term) -> Vec<(Shared, Dim)> {
    let shape = &e[attention.args[0]].data.ty.shape;
    let queries = |s: &Shared| s.times.clone() * shape[shape.len() - 2].clone();
    let all = shared(e, attention).into_iter().map(|s| (queries(&s), s));
    all.filter(|(rows, _)| rows.as_const().is_some_and(|n| n <= FEW)).map(|(rows, s)| (s, rows)).collect()
}

/// `softmax(s) v = sum_p exp(m_p - m) (exp(s_p - m_p) v_p) / sum_p exp(m_p - m) sum(exp(s_p - m_p))` over parts of the keys with maxima
/// `m_p`, and `m` the largest of these: as many parts as keep a wide device busy, each with its part of the mask.
/// Where a part is masked throughout, `m_p` is minus infinity and its sums are 0: it adds nothing.
pub(super) fn split_keys(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Attention { scale }) = op(term) else { return vec![] };
    let [q, k, v] = [0, 1, 2].map(|i| &e[term.args[i]].data.ty);
    let Some(outer) = q.rank().checked_sub(2) else { return vec![] };
    let small = |d: &Dim, most: i64| d.as_const().is_some_and(|n| (1..=most).contains(&n));
    let width = &v.shape[outer + 1];
    if !small(&q.shape[outer], FEW) || !small(&q.shape[outer + 1], WIDEST) || !small(width, WIDEST) || q.dtype.bits() > 32 {
        return vec![];
    }
    // Other ways to write the scale are equal to the one that has all of it, and where queries share keys there is a better one.
    if [0, 1].iter().any(|i| queries(e, term.args[*i]).len() > 1) || !shared_by_few(e, term).is_empty() {
        return vec![];
    }
    let units = e.analysis.costs.units as i64;
    let keys = &k.shape[outer];
    let blocks = q.shape[..outer].iter().cloned().product::<Dim>() * q.shape[outer].ceil_div(&Dim::from(TOGETHER));
    let Some(part) = part_of(keys, &blocks, units) else { return vec![] };
    // Sums of parts, [.., p, s, d], and what stands behind them.
    let operands = term.args.iter().map(|a| Build::Class(*a)).collect();
    let parts = Build::Op(Op::AttentionParts { scale: *scale, part: part.clone() }, operands);
    let extents = |last: Dim| -> Vec<Dim> { q.shape[..outer].iter().cloned().chain([keys.ceil_div(&part), q.shape[outer].clone(), last]).collect() };
    let column = |start: Dim, size: Dim| {
        let mut starts = vec![Dim::ZERO; outer + 2];
        starts.push(start);
        Build::Op(Op::Slice { starts, sizes: extents(size), steps: vec![1; outer + 3] }, vec![parts.clone()])
    };
    let all = extents(width.clone());
    let wide = |x: Build| Build::Op(Op::Broadcast { shape: all.clone() }, vec![x]);
    let behind = |i: i64| wide(column(width.clone() + Dim::from(i), Dim::one()));
    let map = |f: ScalarFn, args: [Build; 2]| Build::Op(Op::Map(f), args.into());
    let over_parts = |f: ReduceFn, x: Build| Build::Op(Op::Reduce { f, axes: vec![outer] }, vec![x]);
    let tops = behind(0);
    let top = over_parts(ReduceFn::Max, tops.clone());
    let weight = Build::Op(Op::Map(ScalarFn::Exp), vec![map(ScalarFn::Sub, [tops, wide(top)])]);
    let sum = |x: Build| over_parts(ReduceFn::Sum, map(ScalarFn::Mul, [weight.clone(), x]));
    let result = map(ScalarFn::Div, [sum(column(Dim::ZERO, width.clone())), sum(behind(1))]);
    let shape = q.shape[..=outer].iter().cloned().chain([width.clone()]).collect();
    let result = Build::Op(Op::Reshape { shape }, vec![result]);
    vec![if q.dtype.bits() < 32 { Build::Op(Op::Cast { to: q.dtype }, vec![result]) } else { result }]
}

/// Keys of a part: [`BLOCKS`] blocks for each unit of the device, where that leaves [`LEAST`] keys or more. Of sizes that are not known it is
/// an expression, and the number of parts is found when they are.
fn part_of(keys: &Dim, blocks: &Dim, units: i64) -> Option<Dim> {
    if units < 2 {
        return None;
    }
    let most = Dim::from(BLOCKS * units);
    match (keys.as_const(), blocks.as_const()) {
        (_, Some(0)) => None,
        (Some(keys), Some(blocks)) => {
            let parts = (BLOCKS * units / blocks).min(keys / LEAST);
            let part = keys.checked_div(parts)?;
            let part = (part + RUN - 1) / RUN * RUN;
            (parts > 1 && part < keys).then(|| Dim::from(part))
        }
        (Some(keys), _) if keys < 2 * LEAST => None,
        (_, Some(blocks)) if 2 * blocks > BLOCKS * units => None,
        _ => Some(keys.ceil_div(&most.ceil_div(&blocks.larger(&Dim::one()))).larger(&Dim::from(LEAST))),
    }
}
