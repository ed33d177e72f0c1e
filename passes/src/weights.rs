//! Dequantised weights stay packed: `(cast(q) - zero) * scale` with a constant `q` becomes one `dequant`, which the products and
//! gathers that use it read through, instead of a constant of f32.
//!
//! Scales and zero points may be spelled in any way that can be computed now: one number, one a channel, one a block, with
//! transposes between. What a tensor of them repeats is found by looking at its elements.
use crate::{Changed, Ctx, PassError, eqsat::cost::Costs, rebuild::Rebuild};
use pavage_ir::{
    DType, Dim, Graph, Op, Scalar, ScalarFn, Tensor, TensorType, Value,
    op::{EvalArgs, TypeArgs},
};
use std::collections::BTreeMap;

/// Fewer elements than this are not worth a kernel of their own kind.
pub(crate) const LEAST: usize = 4096;

/// Windows with fewer weights find them in a cache, where reading them costs less than unpacking.
const LEAST_WINDOW: usize = 1 << 18;

/// Weights as they lie in memory, see `dequant`.
#[derive(Clone, Debug)]
pub struct Packed {
    /// The integers, or floats of 16 bits.
    pub q: Tensor,
    /// One scale a block.
    pub scale: Option<Tensor>,
    /// One zero point a block.
    pub zero: Option<Tensor>,
    /// Elements of a block along each axis; empty without a scale.
    pub blocks: Vec<usize>,
}

/// Rebuild with packed weights.
pub fn run(graph: &mut Graph, ctx: &Ctx) -> Result<Changed, PassError> {
    let mut found: BTreeMap<Value, Option<Packed>> = BTreeMap::new();
    let mut wanted: BTreeMap<(Value, usize), Value> = BTreeMap::new();
    for id in graph.schedule() {
        let Some(at) = operand(graph, id.into(), &ctx.costs) else { continue };
        let w = graph.operands(id)[at];
        if found.entry(w).or_insert_with(|| packed(graph, w)).is_some() {
            wanted.insert((id.into(), at), w);
        }
    }
    if wanted.is_empty() {
        return Ok(Changed::No);
    }
    let mut r = Rebuild::new("weights", graph);
    let mut made: BTreeMap<Value, Value> = BTreeMap::new();
    for id in graph.schedule() {
        r.at(id);
        let operand = (0..graph.operands(id).len()).find_map(|at| wanted.get(&(id.into(), at)).map(|w| (at, *w)));
        let (Some((at, w)), Some(op)) = (operand, graph.op(id)) else {
            r.copy(id)?;
            continue;
        };
        if let (None, Some(packed)) = (made.get(&w), &found[&w]) {
            made.insert(w, emit(&mut r, packed)?);
        }
        let mut operands: Vec<Value> = graph.operands(id).iter().map(|v| r.value(*v)).collect();
        operands[at] = made[&w];
        let new = r.add(op.clone(), &operands)?;
        r.set(id.into(), new);
    }
    *graph = r.finish().0;
    Ok(Changed::Yes)
}

/// Add packed weights to a graph in the making.
pub(crate) fn emit(r: &mut Rebuild, packed: &Packed) -> Result<Value, PassError> {
    let operands: Vec<Value> = [Some(&packed.q), packed.scale.as_ref(), packed.zero.as_ref()].into_iter().flatten().map(|t| r.constant(t.clone())).collect();
    r.add(Op::Dequant { blocks: packed.blocks.clone() }, &operands)
}

/// Which operand of a node may stay packed: the weights of a product of few enough rows or of windows of few enough pixels, and what
/// a gather picks from.
pub(crate) fn operand(graph: &Graph, v: Value, costs: &Costs) -> Option<usize> {
    let ty = graph.ty(v);
    let size = |d: &Dim| costs.nominal(d);
    let operands = graph.operands(v.node);
    let floats = |i: usize| operands.get(i).is_some_and(|o| graph.ty(*o).dtype == DType::F32);
    match graph.op(v.node)? {
        Op::MatMul { out: DType::F32 } if floats(1) => {
            let w = graph.ty(operands[1]);
            // Batches of weights have rows of their own.
            let batches: i64 = w.shape[..w.rank() - 2].iter().map(size).product();
            let rows = ty.shape[..ty.rank() - 1].iter().map(size).product::<i64>() / batches.max(1);
            (rows <= costs.packed_rows).then_some(1)
        }
        Op::Conv { lo, hi, groups: 1, .. } if floats(1) => {
            let w = graph.ty(operands[1]);
            let point = w.shape[2..].iter().all(|d| d.is(1)) && lo.iter().chain(hi).all(|p| *p == 0);
            let rows = ty.shape.iter().map(size).product::<i64>() / size(&w.shape[0]).max(1);
            // Windows make numbers of their weights at each pixel: for sizes that are known, and few.
            let many = w.const_shape().is_some_and(|s| s.iter().product::<usize>() >= LEAST_WINDOW);
            let window =
                many && rows <= costs.packed_pixels && (3..=4).contains(&w.rank()) && ty.const_shape().is_some() && lo.iter().chain(hi).all(|p| *p >= 0);
            (if point { rows <= costs.packed_rows } else { window }).then_some(1)
        }
        Op::Gather { .. } if floats(0) => Some(0),
        _ => None,
    }
}

/// The weights that `v` dequantises, if it does.
fn packed(graph: &Graph, v: Value) -> Option<Packed> {
    let ty = graph.ty(v);
    if ty.const_shape()?.iter().product::<usize>() < LEAST || ty.dtype != DType::F32 {
        return None;
    }
    let operands = graph.operands(v.node);
    match graph.op(v.node)? {
        Op::Transpose { perm } => {
            let inner = packed(graph, operands[0])?;
            let turn = |t: &Tensor| evaluate(&Op::Transpose { perm: perm.clone() }, &[t]);
            let blocks = if inner.blocks.is_empty() { vec![] } else { perm.iter().map(|p| inner.blocks[*p]).collect() };
            let some = |t: &Option<Tensor>| t.as_ref().map(turn).map_or(Some(None), |t| t.map(Some));
            Some(Packed { q: turn(&inner.q)?, scale: some(&inner.scale)?, zero: some(&inner.zero)?, blocks })
        }
        Op::Map(ScalarFn::Mul) => [(0, 1), (1, 0)].into_iter().find_map(|(y, s)| scaled(graph, operands[y], operands[s])),
        _ => None,
    }
}

/// `y * s` where `y` is `cast(q)` or `cast(q) - zero`.
fn scaled(graph: &Graph, y: Value, s: Value) -> Option<Packed> {
    let operands = graph.operands(y.node);
    let (cast, zero) = match graph.op(y.node)? {
        Op::Map(ScalarFn::Sub) => (operands[0], Some(operands[1])),
        Op::Cast { .. } => (y, None),
        _ => return None,
    };
    let Op::Cast { to: DType::F32 } = graph.op(cast.node)? else { return None };
    let q = graph.operands(cast.node)[0];
    let dtype = graph.ty(q).dtype;
    if !dtype.is_int() || !matches!(dtype.bits(), 4 | 8) {
        return None;
    }
    let q = constant(graph, q)?;
    let (scale, mut blocks) = narrowed(graph, s)?;
    let zero = match zero {
        None => None,
        Some(z) => Some(narrowed(graph, z)?),
    };
    let (scale, zero) = match zero {
        None => (scale, None),
        Some((z, own)) => {
            // Blocks in which neither changes.
            let both: Vec<usize> = blocks.iter().zip(&own).zip(q.shape()).map(|((a, b), n)| common(*a, *b, *n)).collect();
            let (s, z) = (spread(&scale, &blocks, &both, q.shape()), spread(&z, &own, &both, q.shape()));
            blocks = both;
            (s, Some(z))
        }
    };
    let zero = zero.filter(|z| z.to_f64().iter().any(|z| *z != 0.0));
    if scale.to_f64().iter().any(|s| !s.is_finite()) {
        return None;
    }
    let (q, zero) = match zero {
        None => (q, None),
        Some(z) => centred(q, z, &blocks),
    };
    // Scales of few elements each take what packing saves.
    let bytes = |t: &Tensor| t.dtype().bytes(t.count());
    let all = bytes(&q) + bytes(&scale) + zero.as_ref().map_or(0, bytes);
    (2 * all <= 4 * q.count()).then_some(Packed { q, scale: Some(scale), zero, blocks })
}

/// The largest block that divides both; a block that spans the axis divides nothing but itself.
fn common(a: usize, b: usize, n: usize) -> usize {
    match (a >= n, b >= n) {
        (true, _) => b,
        (_, true) => a,
        _ => gcd(a, b),
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A tensor of one value a block of `from` as one of one value a block of `to`.
fn spread(t: &Tensor, from: &[usize], to: &[usize], shape: &[usize]) -> Tensor {
    let out: Vec<usize> = shape.iter().zip(to).map(|(n, b)| n.div_ceil(*b)).collect();
    let count: usize = out.iter().product();
    let source = |i: usize| {
        let (mut rest, mut at, mut stride) = (i, 0, 1);
        for a in (0..out.len()).rev() {
            at += rest % out[a] * to[a] / from[a] * stride;
            rest /= out[a];
            stride *= shape[a].div_ceil(from[a]);
        }
        at
    };
    Tensor::from_scalars(t.dtype(), out.clone(), (0..count).map(|i| t.get(source(i))))
}

/// `q - zero` without a zero point where it fits the signed type of the same width; else the zero points as narrow as they go.
fn centred(q: Tensor, zero: Tensor, blocks: &[usize]) -> (Tensor, Option<Tensor>) {
    let values = zero.to_f64();
    if values.iter().any(|z| z.fract() != 0.0 || z.abs() > 255.0) {
        return (q, Some(zero));
    }
    let ones = vec![1; blocks.len()];
    let all = spread(&zero, blocks, &ones, q.shape());
    let signed = if q.dtype().bits() == 4 { DType::I4 } else { DType::I8 };
    let (least, most) = signed.int_range();
    let moved: Vec<i128> = (0..q.count()).map(|i| q.get(i).i() - all.get(i).f() as i128).collect();
    if moved.iter().all(|v| (least..=most).contains(v)) {
        return (Tensor::from_scalars(signed, q.shape().to_vec(), moved.into_iter().map(Scalar::I)), None);
    }
    let fits = values.iter().all(|z| (-128.0..=127.0).contains(z));
    let dtype = if fits {
        DType::I8
    } else if values.iter().all(|z| *z >= 0.0) {
        DType::U8
    } else {
        DType::I16
    };
    let narrow = Tensor::from_scalars(dtype, zero.shape().to_vec(), values.iter().map(|z| Scalar::I(*z as i128)));
    (q, Some(narrow))
}

/// A constant expression as one value a block, and the blocks.
fn narrowed(graph: &Graph, v: Value) -> Option<(Tensor, Vec<usize>)> {
    let shape = graph.ty(v).const_shape()?;
    // A broadcast says what repeats; anything else is looked at.
    let base = match graph.op(v.node) {
        Some(Op::Broadcast { .. }) => constant(graph, graph.operands(v.node)[0])?,
        _ => constant(graph, v)?,
    };
    let mut values: Vec<f64> = base.to_f64();
    let mut now = base.shape().to_vec();
    let mut blocks = vec![1; shape.len()];
    for axis in 0..shape.len() {
        let (n, inner) = (now[axis], now[axis + 1..].iter().product::<usize>());
        if n == 0 {
            return None;
        }
        // The greatest block whose multiples are where anything changes.
        let mut block = 0;
        for (i, v) in values.iter().enumerate() {
            let at = i / inner % n;
            if at > 0 && v.to_bits() != values[i - inner].to_bits() {
                block = gcd(block, at);
            }
        }
        let block = if block == 0 { n } else { block };
        values = values.iter().enumerate().filter(|(i, _)| (i / inner % n).is_multiple_of(block)).map(|(_, v)| *v).collect();
        now[axis] = n.div_ceil(block);
        // An axis along which nothing changes is one block.
        blocks[axis] = if now[axis] == 1 { shape[axis].max(1) } else { block };
    }
    let t = Tensor::from_scalars(DType::F32, now, values.into_iter().map(Scalar::F));
    Some((t, blocks))
}

/// The value of an expression of constants.
pub(crate) fn constant(graph: &Graph, v: Value) -> Option<Tensor> {
    if let Some(t) = graph.as_const(v) {
        return Some(t.clone());
    }
    let op = graph.op(v.node)?;
    if !matches!(op, Op::Broadcast { .. } | Op::Reshape { .. } | Op::Transpose { .. } | Op::Slice { .. } | Op::Cast { .. } | Op::Map(_)) {
        return None;
    }
    let operands = graph.operands(v.node).iter().map(|o| constant(graph, *o)).collect::<Option<Vec<_>>>()?;
    evaluate(op, &operands.iter().collect::<Vec<_>>())
}

fn evaluate(op: &Op, tensors: &[&Tensor]) -> Option<Tensor> {
    let types: Vec<TensorType> = tensors.iter().map(|t| t.ty()).collect();
    let results = op.infer(TypeArgs { types: &types.iter().collect::<Vec<_>>(), bodies: &[] }).ok()?;
    op.eval(EvalArgs { tensors, bodies: &[], results: &results }).ok()?.pop()
}
