//! What a kernel is predicted to cost: a roofline with a launch cost, in nanoseconds.
//!
//! One table a kind of device. The figures order alternatives; measured times replace them when a plan is tuned.
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Region, ScalarFn, TensorType, dim::Atom, program::Price};

/// What a device does in a nanosecond.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Starting a kernel.
    pub launch_ns: f64,
    /// Bytes moved between kernels, most of which stay in a cache.
    pub bytes_per_ns: f64,
    /// Multiply-adds of a tiled contraction, counted as two.
    pub contract_flops_per_ns: f64,
    /// The same where operands have 16 bits.
    pub half_flops_per_ns: f64,
    /// The same of integers of a byte into sums of 32 bits.
    pub byte_flops_per_ns: f64,
    /// Multiply-adds of fused attention.
    pub attention_flops_per_ns: f64,
    /// Simple operations of pointwise code.
    pub map_ops_per_ns: f64,
    /// Ending one reduction of one row.
    pub fold_ns: f64,
    /// Value of a size symbol when nothing better is known.
    pub nominal_size: i64,
}

/// One core of a current CPU. Attention is fused only by plain loops there.
pub const CPU: Costs = Costs {
    launch_ns: 100.0,
    bytes_per_ns: 25.0,
    contract_flops_per_ns: 80.0,
    half_flops_per_ns: 60.0,
    byte_flops_per_ns: 110.0,
    attention_flops_per_ns: 8.0,
    map_ops_per_ns: 24.0,
    fold_ns: 6.0,
    nominal_size: 64,
};

/// A Hopper-class GPU, kernels launched from a graph.
pub const GPU: Costs = Costs {
    launch_ns: 2000.0,
    bytes_per_ns: 3500.0,
    contract_flops_per_ns: 25_000.0,
    half_flops_per_ns: 500_000.0,
    // Integer products run in plain loops there.
    byte_flops_per_ns: 2_000.0,
    attention_flops_per_ns: 400_000.0,
    map_ops_per_ns: 10_000.0,
    fold_ns: 0.02,
    nominal_size: 64,
};

impl Default for Costs {
    fn default() -> Self {
        CPU
    }
}

/// Predicted time of one run of `region`, in nanoseconds.
pub fn predict(region: &Region, costs: &Costs) -> f64 {
    price(region, costs).total
}

/// What one run of `region` is predicted to cost.
pub fn price(region: &Region, costs: &Costs) -> Price {
    let size = |d: &Dim| d.eval(&|a: &Atom| matches!(a, Atom::Sym(_)).then_some(costs.nominal_size)).unwrap_or(costs.nominal_size) as f64;
    let product = |dims: &[Dim]| dims.iter().map(size).product::<f64>();
    let bytes = |ty: &TensorType| product(&ty.shape) * ty.dtype.bits() as f64 / 8.0;
    let points = product(&region.axes());
    let outputs: Vec<ExprId> = region.outputs.iter().map(|o| o.expr).collect();
    let mut ops = points * weight(region, &outputs);
    let (mut contract, mut folds) = (0.0, 0.0);
    let streams = matches!(region.heart, Heart::Map | Heart::Reduce { .. });
    match &region.heart {
        Heart::Map => {}
        Heart::Reduce { stages, .. } => {
            // Each stage walks the row again; what is dear is kept from one to the next.
            let all: Vec<ExprId> = outputs.iter().copied().chain(stages.iter().map(|s| s.expr)).collect();
            ops = points * (stages.len() as f64 + weight(region, &all));
            folds = product(&region.space) * stages.len() as f64 * costs.fold_ns;
        }
        Heart::Contract { k, .. } => contract = 2.0 * points * size(k),
        Heart::Conv { weights, .. } => contract = 2.0 * points * product(&weights[1..]),
        Heart::Pool { kernel, .. } => ops += points * kernel.iter().product::<usize>() as f64,
        Heart::Attention { keys, depth, q, .. } => {
            let rows = points / size(region.space.last().unwrap_or(&Dim::one()));
            let flops = 2.0 * size(keys) * (rows * size(depth) + points);
            // The matrix units take 16-bit heads of 64 and 128; other attention runs in plain loops.
            let fast = region.dtype(*q).bits() == 16 && depth.as_const().is_some_and(|d| d == 64 || d == 128);
            let rate = if fast { costs.attention_flops_per_ns } else { costs.attention_flops_per_ns.min(costs.map_ops_per_ns / 4.0) };
            return Price { launch: costs.launch_ns, arithmetic: flops / rate, memory: 0.0, total: costs.launch_ns + flops / rate };
        }
        Heart::Op(_) => ops += region.args.iter().map(|t| product(&t.shape)).sum::<f64>(),
    }
    let read: f64 = region.args.iter().map(|t| if streams { bytes(t).min(points * 8.0) } else { bytes(t) }).sum();
    let written: f64 = region.outputs.iter().map(|o| bytes(&o.ty)).sum();
    let half = region.args.first().is_some_and(|t| t.dtype.bits() == 16);
    let integers = matches!(&region.heart, Heart::Contract { acc: DType::I32, .. } | Heart::Conv { acc: DType::I32, .. });
    let rate = match (integers, half) {
        (true, _) => costs.byte_flops_per_ns,
        (_, true) => costs.half_flops_per_ns,
        _ => costs.contract_flops_per_ns,
    };
    let compute = contract / rate + ops / costs.map_ops_per_ns + folds;
    let memory = (read + written) / costs.bytes_per_ns;
    let total = costs.launch_ns + compute.max(memory) + 0.1 * compute.min(memory);
    Price { launch: costs.launch_ns, arithmetic: compute, memory, total }
}

/// Work of the expressions that `roots` need at a point, in simple operations.
fn weight(region: &Region, roots: &[ExprId]) -> f64 {
    let mut seen = vec![false; region.exprs.len()];
    let mut stack: Vec<ExprId> = roots.to_vec();
    let mut total = 0.0;
    while let Some(id) = stack.pop() {
        if std::mem::replace(&mut seen[id.0 as usize], true) {
            continue;
        }
        match region.expr(id) {
            Expr::Call(f, args) => {
                total += function(*f);
                stack.extend(args);
            }
            Expr::Cast(x) | Expr::Bits(x) => {
                total += 1.0;
                stack.push(*x);
            }
            Expr::Load { index, guard, .. } => {
                // Indices that data decides, or that divide, are gathers.
                let gathers = index.iter().any(|d| d.any_atom(&|a| matches!(a, Atom::Value(_) | Atom::Div(..) | Atom::Mod(..))));
                total += if gathers { 8.0 } else { 0.5 };
                stack.extend(guard);
                let mut values = vec![];
                index.iter().for_each(|d| collect_values(d, &mut values));
                stack.extend(values);
            }
            Expr::Index(d) => collect_values(d, &mut stack),
            Expr::Float(_) | Expr::Int(_) | Expr::Acc(_) => {}
        }
        if region.dtype(id) == DType::F64 || region.dtype(id) == DType::I64 {
            total += 0.5;
        }
    }
    total
}

fn collect_values(d: &Dim, into: &mut Vec<ExprId>) {
    for atom in d.terms().iter().flat_map(|(atoms, _)| atoms) {
        match atom {
            Atom::Value(v) => into.push(ExprId(*v)),
            Atom::Div(a, b) | Atom::Mod(a, b) | Atom::Max(a, b) | Atom::Min(a, b) => {
                collect_values(a, into);
                collect_values(b, into);
            }
            Atom::Sym(_) | Atom::Axis(_) => {}
        }
    }
}

/// Elements of a tensor, size symbols at their nominal value.
pub(super) fn elements(ty: &TensorType, costs: &Costs) -> f64 {
    let size = |d: &Dim| d.eval(&|a: &Atom| matches!(a, Atom::Sym(_)).then_some(costs.nominal_size)).unwrap_or(costs.nominal_size) as f64;
    ty.shape.iter().map(size).product()
}

/// Simple operations that a function is worth.
pub(super) fn function(f: ScalarFn) -> f64 {
    use ScalarFn::*;
    match f {
        Exp | Log | Tanh | Sigmoid | Sin | Cos => 8.0,
        Erf | Pow | Tan | Asin | Acos | Atan | Sinh | Cosh | Asinh | Acosh | Atanh | Softplus => 20.0,
        Div | Sqrt | Rsqrt | Recip | Mod | Rem => 3.0,
        _ => 1.0,
    }
}
