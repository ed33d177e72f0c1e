//! Attention whose heads share keys and values in groups (Ainslie et al. 2023, arXiv 2305.13245), which exporters write by repeating them.
use super::computed::{Build, Egraph, op, repeats};
use crate::eqsat::Term;
use pavage_ir::{Dim, Op};

/// Attention over heads whose keys and values are repeated along the last batch axis: heads become two axes, one that keys and values have
/// and one along which they are the same, so that no kernel has to repeat them. For wide devices.
/// `attention(q[.., h*g, m, d], repeat_g(k)[.., h*g, n, d], repeat_g(v), mask) = reshape(attention(reshape(q)[.., h, g, m, d],
/// broadcast(k)[.., h, g, n, d], broadcast(v), reshape(mask)))`.
pub(super) fn grouped_attention(e: &Egraph, term: &Term) -> Vec<Build> {
    let Some(Op::Attention { scale }) = op(term) else { return vec![] };
    // One core has products with the groups as rows (`repeated-operand`).
    if e.analysis.costs.units < 2.0 {
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
    for (keys, heads, times) in repeats(e, term.args[1], head) {
        // One head is a group as it stands.
        if heads.is(1) {
            continue;
        }
        for (values, ..) in repeats(e, term.args[2], head).into_iter().filter(|(_, h, t)| (h, t) == (&heads, &times)) {
            let shared = |once: Build, full: &[Dim]| {
                let one = Build::Op(Op::Reshape { shape: apart(full, &heads, &Dim::one()) }, vec![once]);
                Build::Op(Op::Broadcast { shape: apart(full, &heads, &times) }, vec![one])
            };
            let split = |i: usize| Build::Op(Op::Reshape { shape: apart(&shape(i), &heads, &times) }, vec![Build::Class(term.args[i])]);
            let operands = [split(0), shared(keys.clone(), &shape(1)), shared(values, &v)].into_iter().chain((term.args.len() > 3).then(|| split(3)));
            let attention = Build::Op(Op::Attention { scale: *scale }, operands.collect());
            found.push(Build::Op(Op::Reshape { shape: result.clone() }, vec![attention]));
        }
    }
    found
}
