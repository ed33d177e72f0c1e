//! Attention whose heads share keys and values in groups (Ainslie et al. 2023, arXiv 2305.13245), which exporters write by repeating them.
use super::computed::{Build, Egraph, op, repeats};
use crate::eqsat::Term;
use pavage_ir::{Dim, Op};

/// Keys and values that groups of queries share.
pub(super) struct Shared {
    /// Keys and values, each once.
    pub keys: Build,
    pub values: Build,
    /// Extent of the last batch axis without repetitions.
    pub heads: Dim,
    /// How often each is repeated.
    pub times: Dim,
}

/// What an attention repeats along the last batch axis, keys and values alike.
pub(super) fn shared(e: &Egraph, attention: &Term) -> Vec<Shared> {
    let Some(axis) = e[attention.args[0]].data.ty.rank().checked_sub(3) else { return vec![] };
    let all = repeats(e, attention.args[2], axis);
    let with_values = |(keys, heads, times): (Build, Dim, Dim)| {
        let (values, ..) = all.iter().find(|(_, h, t)| (h, t) == (&heads, &times))?;
        Some(Shared { keys, values: values.clone(), heads, times })
    };
    repeats(e, attention.args[1], axis).into_iter().filter_map(with_values).collect()
}

/// Attention over heads whose keys and values are repeated along the last batch axis: heads become two axes, one that keys and values have
/// and one along which they are the same, so that no kernel has to repeat them. For wide devices.
/// `attention(q[.., h*g, m, d], repeat_g(k)[.., h*g, n, d], repeat_g(v), mask) = reshape(attention(reshape(q)[.., h, g, m, d],
/// broadcast(k)[.., h, g, n, d], broadcast(v), reshape(mask)))`.
pub(super) fn grouped_attention(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Attention { scale }) = op(term) else { return vec![] };
    // One core has products with the groups as rows (`repeated-operand`).
    if !e.analysis.costs.is_wide() {
        return vec![];
    }
    let shape = |i: usize| e[term.args[i]].data.ty.shape.clone();
    let (q, v) = (shape(0), shape(2));
    let Some(head) = q.len().checked_sub(3) else { return vec![] };
    let mut result = q.clone();
    result[head + 2] = v[head + 2].clone();
    let apart = |shape: &[Dim], heads: &Dim, times: &Dim| -> Vec<Dim> {
        shape[..head].iter().cloned().chain([heads.clone(), times.clone()]).chain(shape[head + 1..].iter().cloned()).collect()
    };
    let mut found = vec![];
    // One head is a group as it stands.
    for Shared { keys, values, heads, times } in shared(e, term).into_iter().filter(|s| !s.heads.is(1)) {
        let broadcast = |once: Build, full: &[Dim]| {
            let one = Build::Op(Op::Reshape { shape: apart(full, &heads, &Dim::one()) }, vec![once]);
            Build::Op(Op::Broadcast { shape: apart(full, &heads, &times) }, vec![one])
        };
        let split = |i: usize| Build::Op(Op::Reshape { shape: apart(&shape(i), &heads, &times) }, vec![Build::Class(term.args[i])]);
        let operands = [split(0), broadcast(keys, &shape(1)), broadcast(values, &v)].into_iter().chain((term.args.len() > 3).then(|| split(3)));
        let attention = Build::Op(Op::Attention { scale: *scale }, operands.collect());
        found.push(Build::Op(Op::Reshape { shape: result.clone() }, vec![attention]));
    }
    found
}
