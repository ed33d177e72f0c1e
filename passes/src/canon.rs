//! Canonical views: each spelling of the same view becomes one; nodes that do nothing go; equal nodes merge.
use crate::{Changed, Ctx, PassError, rebuild::Rebuild};
use pavage_ir::{Dim, Graph, NodeId, Op, Value};

/// Rebuild the graph in canonical form.
pub fn run(graph: &mut Graph, _: &Ctx) -> Result<Changed, PassError> {
    let mut r = Rebuild::new("canon", graph);
    for id in graph.schedule() {
        r.at(id);
        match graph.op(id) {
            Some(op) => {
                let op = op.clone();
                let operands: Vec<Value> = graph.operands(id).iter().map(|v| r.value(*v)).collect();
                match view(&mut r, &op, &operands)? {
                    Some(v) => r.set(id.into(), v),
                    None => copy(&mut r, id, op, &operands)?,
                }
            }
            None => r.copy(id)?,
        }
    }
    let (new, changed) = r.finish();
    *graph = new;
    Ok(changed)
}

fn copy(r: &mut Rebuild, id: NodeId, op: Op, operands: &[Value]) -> Result<(), PassError> {
    let bodies = r.old.bodies(id).to_vec();
    let new = r.add_with(op, operands, bodies)?;
    r.set_all(id, new);
    Ok(())
}

/// What a view of `operands` simplifies to; `None` keeps it.
pub(crate) fn view(r: &mut Rebuild, op: &Op, operands: &[Value]) -> Result<Option<Value>, PassError> {
    let Some(&x) = operands.first() else { return Ok(None) };
    let from = r.new.ty(x).clone();
    let inner = r.new.op(x.node).cloned();
    let below = |r: &Rebuild| r.new.operands(x.node)[0];
    Ok(match op {
        Op::Cast { to } | Op::BitCast { to } if *to == from.dtype => Some(x),
        Op::Broadcast { shape } if *shape == from.shape => Some(x),
        Op::Broadcast { shape } if matches!(inner, Some(Op::Broadcast { .. })) => {
            let base = below(r);
            Some(r.add(Op::Broadcast { shape: shape.clone() }, &[base])?)
        }
        Op::Reshape { shape } if *shape == from.shape => Some(x),
        Op::Reshape { shape } if matches!(inner, Some(Op::Reshape { .. })) => {
            let base = below(r);
            let op = Op::Reshape { shape: shape.clone() };
            Some(match view(r, &op, &[base])? {
                Some(v) => v,
                None => r.add(op, &[base])?,
            })
        }
        Op::Transpose { perm } => {
            if perm.iter().enumerate().all(|(i, p)| i == *p) {
                return Ok(Some(x));
            }
            if let Some(Op::Transpose { perm: first }) = inner {
                let composed: Vec<usize> = perm.iter().map(|&p| first[p]).collect();
                let base = below(r);
                let op = Op::Transpose { perm: composed };
                return Ok(Some(match view(r, &op, &[base])? {
                    Some(v) => v,
                    None => r.add(op, &[base])?,
                }));
            }
            // Moving axes of extent 1 past others moves no element.
            let real: Vec<usize> = perm.iter().copied().filter(|&p| !from.shape[p].is(1)).collect();
            if real.is_sorted() {
                let shape: Vec<Dim> = perm.iter().map(|&p| from.shape[p].clone()).collect();
                let op = Op::Reshape { shape };
                return Ok(Some(match view(r, &op, &[x])? {
                    Some(v) => v,
                    None => r.add(op, &[x])?,
                }));
            }
            None
        }
        Op::Slice { starts, sizes, steps } if *sizes == from.shape && starts.iter().all(|s| s.is(0)) && steps.iter().all(|s| *s == 1) => Some(x),
        Op::Pad { lo, hi, .. } if lo.iter().chain(hi).all(|d| d.is(0)) => Some(x),
        Op::Concat { .. } if operands.len() == 1 => Some(x),
        _ => None,
    })
}
