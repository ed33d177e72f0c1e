//! Concatenations without copies: the kernel that computes a part writes it right where the concatenation wants it.
//!
//! A concatenation is built as one copy an operand, each into its slice of the result. Where kernels compute that operand
//! and nobody else reads it, their output becomes the slice: an index into the larger buffer, whose strides say whether the
//! slice is one run of memory or many. The copy is gone, and with it the operand's own buffer.
use crate::{
    eqsat::cost::{self, Costs},
    form::reindex,
};
use pavage_ir::{
    Dim, Expr, Heart, Region, Sym,
    dim::Atom,
    program::{Body, BufId, BufferKind, Step},
    region::RegionOutput,
};
use std::collections::BTreeSet;

/// Elements that a vector of pointwise code is taken to hold.
const LANES: i64 = 8;

/// Let kernels write into slices wherever that saves a copy, in nested bodies too.
pub fn write_in_place_of_copies(body: &mut Body, costs: &Costs) {
    for step in &mut body.steps {
        match step {
            Step::If { then_body, else_body, .. } => {
                write_in_place_of_copies(then_body, costs);
                write_in_place_of_copies(else_body, costs);
            }
            Step::Loop { body, .. } => write_in_place_of_copies(body, costs),
            Step::Run { .. } | Step::Copy { .. } | Step::Bind { .. } => {}
        }
    }
    let mut at = 0;
    while at < body.steps.len() {
        match moved(body, at, costs) {
            Some(changes) => apply(body, at, changes),
            None => at += 1,
        }
    }
}

/// An output of a step that goes elsewhere.
struct Change {
    step: usize,
    output: usize,
    to: BufId,
    place: RegionOutput,
}

/// A step that only moves elements: what it reads, what it writes, and the region, whose output says where each goes.
fn as_copy(step: &Step) -> Option<(BufId, BufId, &Region)> {
    let Step::Run { region, args, outputs, .. } = step else { return None };
    let ([from], [to], [_], [(Expr::Load { index, guard: None, .. }, _)]) = (&args[..], &outputs[..], &region.outputs[..], &region.exprs[..]) else {
        return None;
    };
    let whole = region.space == region.args[0].shape && index.iter().enumerate().all(|(k, d)| *d == Dim::axis(k));
    (region.heart == Heart::Map && whole).then_some((*from, *to, region))
}

/// What changes when the copy at `at` goes; `None` where it has to stay.
fn moved(body: &Body, at: usize, costs: &Costs) -> Option<Vec<Change>> {
    let (from, to, copied) = as_copy(&body.steps[at])?;
    let copy = &copied.outputs[0];
    let root = root(body, from);
    if !matches!(body.buffers[root.index()].kind, BufferKind::Temp) || !matches!(body.buffers[to.index()].kind, BufferKind::Temp | BufferKind::Output(_)) {
        return None;
    }
    // Nobody but the copy reads it, under whatever name, and kernels before the copy write it.
    let mine = |b: &BufId| self::root(body, *b) == root;
    if body.outputs.iter().any(mine) {
        return None;
    }
    let mut writers = vec![];
    for (i, step) in body.steps.iter().enumerate().filter(|(i, _)| *i != at) {
        match step {
            Step::Run { args, outputs, .. } => {
                let early = i < at && args.iter().any(|b| self::root(body, *b) == to);
                if early || args.iter().any(mine) {
                    return None;
                }
                for (n, _) in outputs.iter().enumerate().filter(|(_, b)| mine(b)) {
                    if i > at || outputs[n] != root {
                        return None;
                    }
                    writers.push((i, n));
                }
            }
            Step::Copy { from, to } if mine(from) || mine(to) => return None,
            Step::Bind { buffer, .. } if mine(buffer) => return None,
            Step::If { .. } | Step::Loop { .. } if touches(body, step, root) => return None,
            Step::Copy { .. } | Step::Bind { .. } | Step::If { .. } | Step::Loop { .. } => {}
        }
    }
    let first = writers.iter().map(|(i, _)| *i).min()?;
    // The larger buffer has to be there when the first of them writes.
    let late: BTreeSet<Sym> = body.steps[first..at].iter().flat_map(|s| defines(body, s)).collect();
    if copy.ty.shape.iter().chain(&copy.index).flat_map(Dim::symbols).any(|s| late.contains(&s)) {
        return None;
    }
    let shapes = (&body.buffers[root.index()].ty.shape, &body.buffers[from.index()].ty.shape);
    let change = |(step, output): (usize, usize)| {
        // Two results of one kernel are two buffers.
        let Step::Run { region, .. } = body.steps.get(step).filter(|s| !writes(s, to))? else { return None };
        let place = placed(region, output, shapes, copy)?;
        pays(region, &place, copied, costs).then_some(Change { step, output, to, place })
    };
    writers.into_iter().map(change).collect()
}

fn writes(step: &Step, buf: BufId) -> bool {
    matches!(step, Step::Run { outputs, .. } if outputs.contains(&buf))
}

/// Output `output` of `region` moved as `copy` moves what it writes, a tensor of the first of `shapes` read as the second.
/// `None` where no kernel could write it so.
fn placed(region: &Region, output: usize, shapes: (&Vec<Dim>, &Vec<Dim>), copy: &RegionOutput) -> Option<RegionOutput> {
    let out = &region.outputs[output];
    if !region.writes_anywhere() || out.ty.dtype.bits() < 8 {
        return None;
    }
    let axes = region.axes();
    let at = if shapes.0 == shapes.1 { out.index.clone() } else { reindex(&out.index, shapes.0, shapes.1, &axes) };
    let coordinate = |a: &Atom| match a {
        Atom::Axis(k) => at[*k as usize].clone(),
        other => Dim::from(other.clone()),
    };
    let index = copy.index.iter().map(|d| d.map_atoms_in(&coordinate, &axes)).collect();
    let place = RegionOutput { ty: copy.ty.clone(), expr: out.expr, index };
    place.is_affine().then_some(place)
}

/// Whether writing there costs less than `copy`. It costs something only where pointwise code had one run of elements and
/// has short ones now, which do not fill vectors.
fn pays(region: &Region, place: &RegionOutput, copy: &Region, costs: &Costs) -> bool {
    if region.heart != Heart::Map {
        return true;
    }
    let size = |d: &Dim| costs.nominal(d).max(1);
    let points: i64 = region.space.iter().map(size).product();
    let address = place.address();
    let mut run = 1;
    for (k, n) in region.space.iter().enumerate().rev().filter(|(_, n)| !n.is(1)) {
        if address.affine_in(k).is_none_or(|(stride, _)| stride != run) {
            break;
        }
        run *= size(n);
    }
    let idle = if run == points { 0 } else { (run + LANES - 1) / LANES * LANES - run };
    let lost = cost::price(region, costs).arithmetic * idle as f64 / run as f64;
    lost < cost::price(copy, costs).total
}

/// Make the changes, and remove the copy they stand for.
fn apply(body: &mut Body, at: usize, changes: Vec<Change>) {
    let Step::Run { origin: copy, .. } = body.steps[at].clone() else { return };
    for Change { step, output, to, place } in changes {
        let Step::Run { region, outputs, origin, .. } = &mut body.steps[step] else { continue };
        region.outputs[output] = place;
        outputs[output] = to;
        origin.sources.extend(copy.sources.iter().cloned());
        origin.sources.sort();
        origin.sources.dedup();
        origin.members.extend(copy.members.iter().cloned());
        if !origin.rules.iter().any(|r| r == "slice") {
            origin.rules.push("slice".into());
        }
    }
    body.steps.remove(at);
}

/// The buffer whose memory `buf` names.
fn root(body: &Body, mut buf: BufId) -> BufId {
    while let BufferKind::View(of) = body.buffers[buf.index()].kind {
        buf = of;
    }
    buf
}

/// Whether an `If` or `Loop` names the memory of `root`, nested bodies included.
fn touches(body: &Body, step: &Step, root: BufId) -> bool {
    let mine = |b: &BufId| self::root(body, *b) == root;
    let captured = |inner: &Body| inner.buffers.iter().any(|b| matches!(b.kind, BufferKind::Captured(of) if mine(&of)));
    match step {
        Step::If { cond, then_body, else_body, outputs } => mine(cond) || outputs.iter().any(mine) || captured(then_body) || captured(else_body),
        Step::Loop { trip, cond, body, carried, outputs } => mine(trip) || mine(cond) || carried.iter().chain(outputs).any(mine) || captured(body),
        Step::Run { .. } | Step::Copy { .. } | Step::Bind { .. } => false,
    }
}

/// Sizes that are known only once a step has run.
fn defines(body: &Body, step: &Step) -> Vec<Sym> {
    match step {
        Step::Bind { sym, .. } => vec![sym.clone()],
        Step::If { outputs, .. } | Step::Loop { outputs, .. } => {
            outputs.iter().flat_map(|b| &body.buffers[b.index()].ty.shape).flat_map(Dim::symbols).collect()
        }
        Step::Run { .. } | Step::Copy { .. } => vec![],
    }
}
