//! What a point of a region costs on one core, roughly: enough for deciding about threads and grains.
use pavage_ir::{Dim, Expr, ExprId, Region, ScalarFn, dim::Atom};
use std::collections::BTreeSet;

/// Picoseconds per point of evaluating `roots` in vectors, memory included, each expression once.
pub fn point_ps(region: &Region, roots: &[ExprId]) -> i64 {
    let mut seen = BTreeSet::new();
    let mut todo = roots.to_vec();
    let mut ps = 0;
    while let Some(id) = todo.pop() {
        if !seen.insert(id) {
            continue;
        }
        let lanes_factor = region.dtype(id).bits().max(8) as i64;
        match region.expr(id) {
            Expr::Float(_) | Expr::Int(_) | Expr::Index(_) | Expr::Acc(_) => {}
            Expr::Load { index, guard, .. } => {
                // 10 GB/s, and more where the address is not a sum of axes.
                ps += lanes_factor * 12;
                let odd = index.iter().any(|d| d.any_atom(&|a| !matches!(a, Atom::Axis(_) | Atom::Sym(_))));
                ps += if odd || guard.is_some() { 1000 } else { 0 };
                todo.extend(guard.iter().copied());
            }
            Expr::Call(f, xs) => {
                ps += call_ps(*f) * lanes_factor / 32;
                todo.extend(xs);
            }
            Expr::Cast(x) | Expr::Bits(x) => {
                ps += 2 * lanes_factor;
                todo.push(*x);
            }
        }
    }
    ps.max(50)
}

fn call_ps(f: ScalarFn) -> i64 {
    use ScalarFn::*;
    match f {
        Exp | Tanh | Sigmoid => 500,
        Log | Softplus | Sin | Cos | Erf => 1200,
        Div | Sqrt | Rsqrt | Recip => 350,
        Pow | Tan | Asin | Acos | Atan | Sinh | Cosh | Asinh | Acosh | Atanh => 3000,
        Mod | Rem => 2000,
        _ => 70,
    }
}

/// Units of about 20 microseconds, given the picoseconds of one; a divisor for sizes known at run time only.
pub fn grain(unit_ps: &Dim) -> Dim {
    match unit_ps.as_const() {
        Some(ps) => Dim::from((20_000_000 / ps.max(1)).clamp(1, 1 << 20)),
        None => (Dim::from(20_000_000i64).div(unit_ps)).larger(&Dim::one()),
    }
}
