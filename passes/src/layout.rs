//! Layout: convolutions and pools become channels-last, and the transposes that brings move until they cancel.
//!
//! One pass in node order. Every value is carried as a new value and a permutation still owed: the old value is
//! `transpose[perm](new)`. Ops that can work on permuted operands do, and owe the same permutation; others have
//! it paid by a transpose first. Vectors lie along channels in depthwise convolutions and in every pointwise op,
//! and a 1x1 convolution is a matrix product as it stands.
use crate::{Changed, Ctx, PassError, canon, rebuild::Rebuild};
use pavage_ir::{Dim, Graph, NodeKind, Op, Value, attr::Layout};
use std::collections::BTreeMap;

type Perm = Vec<usize>;

/// Rebuild with channels-last images.
pub fn run(graph: &mut Graph, _: &Ctx) -> Result<Changed, PassError> {
    if !graph
        .nodes()
        .into_iter()
        .any(|id| matches!(graph.op(id), Some(Op::Conv { layout: Layout::ChannelsFirst, .. } | Op::ConvTranspose { layout: Layout::ChannelsFirst, .. })))
    {
        return Ok(Changed::No);
    }
    let mut pass = Pass { r: Rebuild::new("layout", graph), owed: BTreeMap::new(), paid: BTreeMap::new() };
    for id in graph.schedule() {
        pass.r.at(id);
        let NodeKind::Op(op, bodies) = &graph[id].kind else {
            pass.r.copy(id)?;
            continue;
        };
        let operands = graph.operands(id);
        if let Some((v, perm)) = pass.permuted(op, &operands, id.into())? {
            pass.r.set(id.into(), v);
            if !is_identity(&perm) {
                pass.owed.insert(id.into(), perm);
            }
            continue;
        }
        let operands = operands.iter().map(|v| pass.natural(*v)).collect::<Result<Vec<_>, _>>()?;
        match canon::view(&mut pass.r, op, &operands)? {
            Some(v) => pass.r.set(id.into(), v),
            None => {
                let new = pass.r.add_with(op.clone(), &operands, bodies.clone())?;
                pass.r.set_all(id, new);
            }
        }
    }
    for out in &graph.outputs {
        let v = pass.natural(out.value)?;
        pass.r.set(out.value, v);
        pass.owed.remove(&out.value);
    }
    let (new, _) = pass.r.finish();
    *graph = new;
    Ok(Changed::Yes)
}

struct Pass<'a> {
    r: Rebuild<'a>,
    /// Old values that are a transpose of their new value: `old = transpose[perm](new)`.
    owed: BTreeMap<Value, Perm>,
    /// Transposes made so far.
    paid: BTreeMap<(Value, Perm), Value>,
}

fn is_identity(perm: &[usize]) -> bool {
    perm.iter().enumerate().all(|(i, p)| i == *p)
}

fn inverse(perm: &[usize]) -> Perm {
    let mut out = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(i, &p)| out[p] = i);
    out
}

/// The permutation that takes channels-last to channels-first: `first = transpose[this](last)`.
fn to_first(rank: usize) -> Perm {
    [0, rank - 1].into_iter().chain(1..rank - 1).collect()
}

/// Of a reshape from `from` to `to` that only drops or adds axes of extent 1, where `from` is owed `perm`: the same on
/// the value that owes, and what its result owes.
fn squeezed(from: &[Dim], to: &[Dim], perm: &[usize]) -> Option<(Vec<Dim>, Perm)> {
    let real = |dims: &[Dim]| -> Vec<usize> { (0..dims.len()).filter(|i| !dims[*i].is(1)).collect() };
    let (old, new) = (real(from), real(to));
    if old.len() != new.len() || old.iter().zip(&new).any(|(a, b)| from[*a] != to[*b]) {
        return None;
    }
    // Axes of the result in the order in which the owing value has them; new ones of extent 1 come first.
    let place = |i: &usize| new.iter().position(|n| n == i).map(|k| perm[old[k]]);
    let mut order: Vec<usize> = (0..to.len()).collect();
    order.sort_by_key(place);
    let mut owed = vec![0; to.len()];
    order.iter().enumerate().for_each(|(at, i)| owed[*i] = at);
    Some((order.iter().map(|i| to[*i].clone()).collect(), owed))
}

impl Pass<'_> {
    fn transposed(&mut self, v: Value, perm: Perm) -> Result<Value, PassError> {
        if let Some(&known) = self.paid.get(&(v, perm.clone())) {
            return Ok(known);
        }
        // A transpose of a broadcast is a broadcast of a smaller transpose.
        let new = if let Some(Op::Broadcast { shape }) = self.r.new.op(v.node).cloned() {
            let base = self.r.new.operands(v.node)[0];
            let base = self.transposed(base, perm.clone())?;
            let shape = perm.iter().map(|&p| shape[p].clone()).collect();
            self.r.add(Op::Broadcast { shape }, &[base])?
        } else {
            let op = Op::Transpose { perm: perm.clone() };
            match canon::view(&mut self.r, &op, &[v])? {
                Some(v) => v,
                None => self.r.add(op, &[v])?,
            }
        };
        self.paid.insert((v, perm), new);
        Ok(new)
    }

    /// The new value in the old layout.
    fn natural(&mut self, old: Value) -> Result<Value, PassError> {
        let v = self.r.value(old);
        match self.owed.get(&old).cloned() {
            Some(perm) => self.transposed(v, perm),
            None => Ok(v),
        }
    }

    /// The new value `x` such that the old one is `transpose[perm](x)`.
    fn under(&mut self, old: Value, perm: &Perm) -> Result<Value, PassError> {
        if self.owed.get(&old) == Some(perm) {
            return Ok(self.r.value(old));
        }
        let v = self.natural(old)?;
        self.transposed(v, inverse(perm))
    }

    /// Whether putting `old` under another permutation costs next to nothing.
    fn cheap(&self, old: Value) -> bool {
        let graph = self.r.old;
        let small = |v: Value| graph.ty(v).shape.iter().filter(|d| !d.is(1)).count() <= 1;
        match &graph[old.node].kind {
            NodeKind::Const(_) => true,
            NodeKind::Op(Op::Broadcast { .. }, _) => small(graph.operands(old.node)[0]) || self.cheap(graph.operands(old.node)[0]),
            _ => small(old),
        }
    }

    /// `op` on permuted operands: the new value and what it owes. `None` where the op wants the old layout.
    fn permuted(&mut self, op: &Op, operands: &[Value], result: Value) -> Result<Option<(Value, Perm)>, PassError> {
        let rank = self.r.old.ty(result).rank();
        match op {
            Op::Conv { strides, dilations, lo, hi, groups, layout: Layout::ChannelsFirst } => {
                let perm = to_first(rank);
                let (x, w) = (self.under(operands[0], &perm)?, self.natural(operands[1])?);
                let op = Op::Conv {
                    strides: strides.clone(),
                    dilations: dilations.clone(),
                    lo: lo.clone(),
                    hi: hi.clone(),
                    groups: *groups,
                    layout: Layout::ChannelsLast,
                };
                return Ok(Some((self.r.add(op, &[x, w])?, perm)));
            }
            Op::ConvTranspose { strides, dilations, lo, hi, extra, groups, layout: Layout::ChannelsFirst } => {
                let perm = to_first(rank);
                let (x, w) = (self.under(operands[0], &perm)?, self.natural(operands[1])?);
                let op = Op::ConvTranspose {
                    strides: strides.clone(),
                    dilations: dilations.clone(),
                    lo: lo.clone(),
                    hi: hi.clone(),
                    extra: extra.clone(),
                    groups: *groups,
                    layout: Layout::ChannelsLast,
                };
                return Ok(Some((self.r.add(op, &[x, w])?, perm)));
            }
            Op::Pool { f, kernel, strides, dilations, lo, hi, ceil, layout: Layout::ChannelsFirst } => {
                let perm = to_first(rank);
                let x = self.under(operands[0], &perm)?;
                let op = Op::Pool {
                    f: *f,
                    kernel: kernel.clone(),
                    strides: strides.clone(),
                    dilations: dilations.clone(),
                    lo: lo.clone(),
                    hi: hi.clone(),
                    ceil: *ceil,
                    layout: Layout::ChannelsLast,
                };
                return Ok(Some((self.r.add(op, &[x])?, perm)));
            }
            _ => {}
        }
        let Some(perm) = operands.iter().find_map(|v| self.owed.get(v).cloned()) else { return Ok(None) };
        let back = inverse(&perm);
        let shuffle = |dims: &[Dim]| -> Vec<Dim> { back.iter().map(|&b| dims[b].clone()).collect() };
        let new = match op {
            Op::Map(_) | Op::Cast { .. } | Op::BitCast { .. } => {
                if operands.iter().any(|v| self.owed.get(v) != Some(&perm) && !self.cheap(*v)) {
                    return Ok(None);
                }
                let xs = operands.iter().map(|v| self.under(*v, &perm)).collect::<Result<Vec<_>, _>>()?;
                self.r.add(op.clone(), &xs)?
            }
            Op::Reduce { f, axes } => {
                let x = self.under(operands[0], &perm)?;
                let mut axes: Vec<usize> = axes.iter().map(|&a| perm[a]).collect();
                axes.sort_unstable();
                self.r.add(Op::Reduce { f: *f, axes }, &[x])?
            }
            Op::ArgReduce { f, axis, last } => {
                let x = self.under(operands[0], &perm)?;
                self.r.add(Op::ArgReduce { f: *f, axis: perm[*axis], last: *last }, &[x])?
            }
            Op::Broadcast { shape } => {
                let x = self.under(operands[0], &perm)?;
                self.r.add(Op::Broadcast { shape: shuffle(shape) }, &[x])?
            }
            Op::Slice { starts, sizes, steps } => {
                let x = self.under(operands[0], &perm)?;
                let steps = back.iter().map(|&b| steps[b]).collect();
                self.r.add(Op::Slice { starts: shuffle(starts), sizes: shuffle(sizes), steps }, &[x])?
            }
            Op::Pad { lo, hi, mode } => {
                let (x, value) = (self.under(operands[0], &perm)?, self.natural(operands[1])?);
                self.r.add(Op::Pad { lo: shuffle(lo), hi: shuffle(hi), mode: *mode }, &[x, value])?
            }
            Op::Concat { axis } => {
                if operands.iter().any(|v| self.owed.get(v) != Some(&perm) && !self.cheap(*v)) {
                    return Ok(None);
                }
                let xs = operands.iter().map(|v| self.under(*v, &perm)).collect::<Result<Vec<_>, _>>()?;
                self.r.add(Op::Concat { axis: perm[*axis] }, &xs)?
            }
            Op::Resize { mode, coord, nearest, sizes, scales, cubic_a, outside, antialias, exclude } if operands.len() == 1 => {
                let x = self.under(operands[0], &perm)?;
                let scales = back.iter().map(|&b| scales[b]).collect();
                let op = Op::Resize {
                    mode: *mode,
                    coord: *coord,
                    nearest: *nearest,
                    sizes: shuffle(sizes),
                    scales,
                    cubic_a: *cubic_a,
                    outside: *outside,
                    antialias: *antialias,
                    exclude: *exclude,
                };
                self.r.add(op, &[x])?
            }
            Op::Reshape { shape } => {
                let x = self.under(operands[0], &perm)?;
                let Some((last, owed)) = squeezed(&self.r.old.ty(operands[0]).shape, shape, &perm) else { return Ok(None) };
                return Ok(Some((self.r.add(Op::Reshape { shape: last }, &[x])?, owed)));
            }
            Op::Transpose { perm: outer } => {
                // old = transpose[outer](transpose[perm](x)): owe the composition, or nothing if it is the identity.
                let composed: Perm = outer.iter().map(|&p| perm[p]).collect();
                return Ok(Some((self.r.value(operands[0]), composed)));
            }
            _ => return Ok(None),
        };
        Ok(Some((new, perm)))
    }
}
