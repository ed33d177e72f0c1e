//! What a region does, counted: operations, and bytes that must cross memory once.
use pavage_ir::{
    DType, Dim, Expr, Heart, Op, Region, TensorType,
    dim::Atom,
    region::{ExprId, RegionOutput, StageFn},
};

/// Arithmetic operations and compulsory memory traffic of one run of a region, over size symbols.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// Multiplications, additions and function evaluations; a fused multiply-add counts as two.
    pub flops: Dim,
    /// Bytes read, each argument counted once.
    pub read: Dim,
    /// Bytes written.
    pub written: Dim,
}

/// Bytes of a tensor (nibbles rounded up to whole bytes an element pair).
pub fn bytes(ty: &TensorType) -> Dim {
    let bits = ty.dtype.bits() as i64;
    if bits < 8 { (ty.count() * Dim::from(bits)).ceil_div(&Dim::from(8i64)) } else { ty.count() * Dim::from(bits / 8) }
}

/// Count the work of a region.
pub fn work(region: &Region) -> Work {
    let points: Dim = region.space.iter().cloned().product();
    let axes: Dim = region.axes().into_iter().product();
    let calls = |roots: &[ExprId]| Dim::from(reachable_calls(region, roots));
    let outputs: Vec<ExprId> = region.outputs.iter().map(|o| o.expr).collect();
    let around = axes.clone() * calls(&outputs);
    let two = Dim::from(2i64);
    let heart = match &region.heart {
        Heart::Map => Dim::ZERO,
        Heart::Reduce { stages, .. } => {
            let roots: Vec<ExprId> = stages.iter().map(|s| s.expr).collect();
            let folds = stages.iter().filter(|s| matches!(s.f, StageFn::Fold(_) | StageFn::Arg { .. })).count();
            axes * (calls(&roots) + Dim::from(folds))
        }
        Heart::Contract { k, .. } => two * points.clone() * k.clone(),
        Heart::Conv { weights, .. } => two * points.clone() * weights[1..].iter().cloned().product(),
        Heart::Separable { weights, filters, .. } => {
            let pixels: Dim = region.space[..region.space.len() - 1].iter().cloned().product();
            let taps: Dim = weights.iter().cloned().product();
            two.clone() * pixels * taps + two * points.clone() * filters[1].clone()
        }
        Heart::Pool { kernel, .. } => points.clone() * Dim::from(kernel.iter().product::<usize>()),
        Heart::WinogradOutput { m, input, .. } => input.iter().cloned().product::<Dim>() * Dim::from(m + 1),
        Heart::Attention { keys, depth, .. } => {
            let rows: Dim = region.space[..region.space.len() - 1].iter().cloned().product();
            let width = region.space[region.space.len() - 1].clone();
            rows * keys.clone() * (two.clone() * depth.clone() + two * width + Dim::from(4i64))
        }
        Heart::Op(op) => op_flops(op, region),
    };
    let written = region.outputs.iter().map(|o| written_bytes(region, o)).sum();
    Work { flops: heart + around, read: read_bytes(region), written }
}

/// Partial writes (a slice of a concatenation) cover their points, not the whole tensor.
fn written_bytes(region: &Region, out: &RegionOutput) -> Dim {
    if !region.writes_anywhere() {
        return bytes(&out.ty);
    }
    let p = region.space.len();
    let in_row = |k: usize| out.index.iter().any(|d| d.any_atom(&|a| matches!(a, Atom::Axis(at) if *at as usize == k)));
    let axes = region.axes().into_iter().enumerate().filter(|(k, _)| *k < p || in_row(*k));
    bytes(&TensorType { dtype: out.ty.dtype, shape: axes.map(|(_, n)| n).collect() })
}

/// Arguments count once, but no more than the points that load from them (a gather reads rows, not the table).
fn read_bytes(region: &Region) -> Dim {
    let points: Dim = region.axes().into_iter().product();
    let map = matches!(region.heart, Heart::Map | Heart::Reduce { .. });
    region
        .args
        .iter()
        .map(|ty| {
            let whole = bytes(ty);
            if !map {
                return whole;
            }
            let touched = points.clone() * Dim::from((ty.dtype.bits() as i64 / 8).max(1));
            match (whole.as_const(), touched.as_const()) {
                (Some(a), Some(b)) => Dim::from(a.min(b)),
                _ if (whole.clone() - touched.clone()).is_nonneg() => touched,
                _ => whole,
            }
        })
        .sum()
}

fn op_flops(op: &Op, region: &Region) -> Dim {
    let count = |i: usize| region.args.get(i).map(TensorType::count).unwrap_or_default();
    let two = Dim::from(2i64);
    match op {
        Op::Lstm { .. } | Op::Gru { .. } | Op::Rnn { .. } => {
            let x = &region.args[0].shape;
            let rows = x.first().cloned().unwrap_or_default() * x.get(1).cloned().unwrap_or_default();
            two * rows * (count(1) + count(2))
        }
        Op::ConvTranspose { .. } => {
            let w = &region.args[1].shape;
            two * count(0) * w[1..].iter().cloned().product()
        }
        Op::TreeEnsemble { .. } => region.args[0].shape[0].clone() * count(7) * Dim::from(20i64),
        _ => region.outputs.iter().map(|o| o.ty.count()).sum::<Dim>() * two,
    }
}

fn reachable_calls(region: &Region, roots: &[ExprId]) -> usize {
    let mut seen = vec![false; region.exprs.len()];
    let mut stack: Vec<ExprId> = roots.to_vec();
    let mut calls = 0;
    while let Some(id) = stack.pop() {
        if std::mem::replace(&mut seen[id.0 as usize], true) {
            continue;
        }
        match region.expr(id) {
            Expr::Call(_, args) => {
                calls += usize::from(region.dtype(id) != DType::Bool);
                stack.extend(args);
            }
            Expr::Cast(x) | Expr::Bits(x) => stack.push(*x),
            _ => {}
        }
    }
    calls
}
