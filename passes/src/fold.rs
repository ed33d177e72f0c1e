//! Constant folding: what the evaluator can compute now is not computed at run time.
use crate::{Changed, Ctx, PassError, rebuild::Rebuild};
use pavage_ir::{
    Dim, Graph, NodeKind, Op, ScalarFn, Tensor, TensorType, Value,
    attr::Layout,
    op::{EvalArgs, TypeArgs},
};

/// A folded result may be this many times larger than what it is computed from.
const GROWTH: usize = 4;
/// Results up to this many elements are always worth keeping.
const SMALL: usize = 4096;

/// Replace nodes whose operands are constants by their values. Broadcasts of constants stay views.
pub fn run(graph: &mut Graph, _: &Ctx) -> Result<Changed, PassError> {
    let mut r = Rebuild::new("fold", graph);
    for id in graph.schedule() {
        r.at(id);
        let NodeKind::Op(op, bodies) = &graph[id].kind else {
            r.copy(id)?;
            continue;
        };
        let operands: Vec<Value> = graph.operands(id).iter().map(|v| r.value(*v)).collect();
        let constants = constants(&r.new, op, &operands);
        // Packed weights stay packed.
        let kept = !bodies.is_empty() || matches!(op, Op::Dequant { .. });
        match constants.filter(|_| !kept).and_then(|c| evaluate(op, &c)) {
            Some(values) => {
                for (i, t) in values.into_iter().enumerate() {
                    let v = r.constant(t);
                    r.set(Value { node: id, result: i as u32 }, v);
                }
            }
            None => r.copy(id)?,
        }
    }
    let (new, changed) = r.finish();
    *graph = new;
    Ok(changed)
}

/// The operands' values, if all are constants. Beside a constant of full size, a broadcast of one counts as one.
fn constants(graph: &Graph, op: &Op, operands: &[Value]) -> Option<Vec<Tensor>> {
    let full = matches!(op, Op::Map(_)) && operands.iter().any(|v| graph.as_const(*v).is_some());
    let value = |v: &Value| match (graph.as_const(*v), graph.op(v.node)) {
        (Some(t), _) => Some(t.clone()),
        (None, Some(op @ Op::Broadcast { .. })) if full => {
            let base = graph.as_const(graph.operands(v.node)[0])?;
            let results = [TensorType::new(base.dtype(), graph.ty(*v).const_shape()?)];
            op.eval(EvalArgs { tensors: &[base], bodies: &[], results: &results }).ok()?.pop()
        }
        _ => None,
    };
    operands.iter().map(value).collect()
}

/// The op's results, if its sizes are known and they are small enough to keep.
fn evaluate(op: &Op, operands: &[Tensor]) -> Option<Vec<Tensor>> {
    let from: usize = operands.iter().map(Tensor::count).sum();
    let types: Vec<TensorType> = operands.iter().map(Tensor::ty).collect();
    let types: Vec<&TensorType> = types.iter().collect();
    let results = op.infer(TypeArgs { types: &types, bodies: &[] }).ok()?;
    let to: usize = results.iter().map(|t| t.const_shape().and_then(|s| pavage_ir::tensor::count_of(&s))).sum::<Option<usize>>()?;
    let view = matches!(op, Op::Broadcast { .. } | Op::Iota { .. });
    if to > SMALL && (to > GROWTH * from || view) {
        return None;
    }
    if let Op::Reshape { .. } = op {
        return Some(vec![operands[0].reshaped(results[0].const_shape()?).ok()?]);
    }
    let tensors: Vec<&Tensor> = operands.iter().collect();
    op.eval(EvalArgs { tensors: &tensors, bodies: &[], results: &results }).ok()
}

/// `conv(x, w) * s` becomes `conv(x, w * s)`, and likewise for `matmul(x, w)`, where `w` and `s` are constants and
/// `s` varies along output channels only. `(conv(x, w) + b) * s` first becomes `conv(x, w) * s + b * s`. A quotient by a
/// constant is a product with its reciprocal.
pub fn run_scale(graph: &mut Graph, ctx: &Ctx) -> Result<Changed, PassError> {
    let mut any = Changed::No;
    // Each round moves every scale one step towards its contraction.
    for _ in 0..8 {
        let mut r = Rebuild::new("scale", graph);
        let mut changed = Changed::No;
        for id in graph.schedule() {
            r.at(id);
            let replaced = match graph.op(id) {
                Some(Op::Map(ScalarFn::Mul | ScalarFn::Div)) => push_scale(graph, &mut r, id.into())?,
                _ => None,
            };
            match replaced {
                Some(v) => {
                    r.set(id.into(), v);
                    changed = Changed::Yes;
                }
                None => r.copy(id)?,
            }
        }
        let (new, _) = r.finish();
        *graph = new;
        if changed == Changed::No {
            break;
        }
        any = Changed::Yes;
        // What the next round finds constant must be.
        run(graph, ctx)?;
    }
    Ok(any)
}

/// One step for the product or quotient `v`, if it scales by a constant along one axis.
fn push_scale(graph: &Graph, r: &mut Rebuild, v: Value) -> Result<Option<Value>, PassError> {
    let operands = graph.operands(v.node);
    let divides = graph.op(v.node) == Some(&Op::Map(ScalarFn::Div));
    for (x, s) in [(operands[0], operands[1]), (operands[1], operands[0])] {
        if graph.n_uses(x) != 1 || (divides && (x != operands[0] || !graph.ty(v).dtype.is_float())) {
            continue;
        }
        let Some(mut scale) = broadcast_constant(graph, s) else { continue };
        if divides {
            let Some(inverse) = evaluate(&Op::Map(ScalarFn::Recip), &[scale]).and_then(|mut t| t.pop()) else { continue };
            scale = inverse;
        }
        let ty = graph.ty(v).clone();
        match graph.op(x.node) {
            Some(op @ Op::Conv { layout, groups: _, .. }) => {
                let parts = graph.operands(x.node);
                let Some(w) = graph.as_const(parts[1]).cloned() else { continue };
                let channel = if *layout == Layout::ChannelsFirst { 1 } else { ty.rank() - 1 };
                let mut shape = vec![Dim::one(); w.shape().len()];
                shape[0] = Dim::from(w.shape()[0]);
                let Some(factor) = along(r, &scale, channel, &ty, shape, parts[1], graph)? else { continue };
                let weights = r.value(parts[1]);
                let weights = r.add(Op::Map(ScalarFn::Mul), &[weights, factor])?;
                return Ok(Some(scaled_product(graph, r, (x, v), op, weights)?));
            }
            Some(op @ Op::MatMul { .. }) if ty.dtype.is_float() => {
                let parts = graph.operands(x.node);
                let Some(w) = graph.as_const(parts[1]).cloned() else { continue };
                let mut shape = vec![Dim::one(); w.shape().len()];
                let n = w.shape().len() - 1;
                shape[n] = Dim::from(w.shape()[n]);
                let Some(factor) = along(r, &scale, ty.rank() - 1, &ty, shape, parts[1], graph)? else { continue };
                let weights = r.value(parts[1]);
                let weights = r.add(Op::Map(ScalarFn::Mul), &[weights, factor])?;
                return Ok(Some(scaled_product(graph, r, (x, v), op, weights)?));
            }
            Some(Op::Map(f @ (ScalarFn::Add | ScalarFn::Sub))) if ty.dtype.is_float() => {
                let parts = graph.operands(x.node);
                let to_contraction = |p: Value| graph.n_uses(p) == 1 && matches!(graph.op(p.node), Some(Op::Conv { .. } | Op::MatMul { .. }));
                let constant = |p: Value| broadcast_constant(graph, p).is_some();
                if !(to_contraction(parts[0]) && constant(parts[1]) || to_contraction(parts[1]) && constant(parts[0])) {
                    continue;
                }
                let s = if divides {
                    let inverse = r.constant(scale);
                    r.add(Op::Broadcast { shape: ty.shape.clone() }, &[inverse])?
                } else {
                    r.value(s)
                };
                let (a, b) = (r.value(parts[0]), r.value(parts[1]));
                let a = r.add(Op::Map(ScalarFn::Mul), &[a, s])?;
                let b = scaled(r, b, s)?;
                return Ok(Some(r.add(Op::Map(*f), &[a, b])?));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// The product `x` with other weights, in the place of `v`: it does the work of both.
fn scaled_product(graph: &Graph, r: &mut Rebuild, (x, v): (Value, Value), op: &Op, weights: Value) -> Result<Value, PassError> {
    let operand = r.value(graph.operands(x.node)[0]);
    let new = r.add(op.clone(), &[operand, weights])?;
    r.new.set_source(new.node, graph[x.node].source.iter().chain(&graph[v.node].source).cloned().collect());
    Ok(new)
}

/// `b * s` computed before broadcasting where both are broadcasts of one shape.
fn scaled(r: &mut Rebuild, b: Value, s: Value) -> Result<Value, PassError> {
    let inner = |r: &Rebuild, v: Value| match r.new.op(v.node) {
        Some(Op::Broadcast { .. }) => Some(r.new.operands(v.node)[0]),
        _ => None,
    };
    if let (Some(x), Some(y)) = (inner(r, b), inner(r, s))
        && r.new.ty(x) == r.new.ty(y)
    {
        let product = r.add(Op::Map(ScalarFn::Mul), &[x, y])?;
        let shape = r.new.ty(b).shape.clone();
        return r.add(Op::Broadcast { shape }, &[product]);
    }
    r.add(Op::Map(ScalarFn::Mul), &[b, s])
}

/// The constant that `v` repeats, as it is before its broadcast.
pub(crate) fn broadcast_constant(graph: &Graph, v: Value) -> Option<Tensor> {
    match graph.op(v.node) {
        Some(Op::Broadcast { .. }) => graph.as_const(graph.operands(v.node)[0]).cloned(),
        _ => graph.as_const(v).filter(|t| (1..=SMALL).contains(&t.count())).map(narrow),
    }
}

/// A constant with extent 1 along each axis on which it only repeats: folding has written small broadcasts out.
pub(crate) fn narrow(t: &Tensor) -> Tensor {
    let mut t = t.clone();
    for axis in 0..t.shape().len() {
        let (n, inner) = (t.shape()[axis], t.shape()[axis + 1..].iter().product::<usize>());
        let first = |i: usize| i / (n * inner) * (n * inner) + i % inner;
        if n > 1 && (0..t.count()).all(|i| t.get(i) == t.get(first(i))) {
            let mut shape = t.shape().to_vec();
            shape[axis] = 1;
            t = Tensor::from_scalars(t.dtype(), shape, (0..t.count()).filter(|i| i / inner % n == 0).map(|i| t.get(i)));
        }
    }
    t
}

/// `scale` as a factor of the weights, if it varies along `channel` of the result alone.
fn along(r: &mut Rebuild, scale: &Tensor, channel: usize, ty: &TensorType, shape: Vec<Dim>, weights: Value, graph: &Graph) -> Result<Option<Value>, PassError> {
    if scale.dtype() != graph.ty(weights).dtype {
        return Ok(None);
    }
    let uniform = scale.count() == 1;
    let per_channel = scale.shape().len() == ty.rank() && scale.shape().iter().enumerate().all(|(a, &n)| n == 1 || a == channel);
    if !uniform && !per_channel {
        return Ok(None);
    }
    let ones: Vec<usize> = vec![1; shape.len()];
    let small = if uniform { scale.reshaped(ones) } else { scale.reshaped(shape.iter().map(|d| d.as_const().unwrap_or(1) as usize).collect::<Vec<_>>()) };
    let Ok(small) = small else { return Ok(None) };
    let v = r.constant(small);
    let full = graph.ty(weights).shape.clone();
    Ok(Some(r.add(Op::Broadcast { shape: full }, &[v])?))
}
