//! Regions that the Hopper families are tried on, by tests and by the device check.
use pavage_ir::region::RegionOutput;
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Real, Region, Scalar, ScalarFn, TensorType};

/// What follows the product in [`linear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Nothing.
    None,
    /// A bias per column and GELU.
    BiasGelu,
    /// A bias per column, GELU, and a residual of the result's shape.
    BiasGeluAdd,
}

/// `tail(x[m, k] * w[k, n])` with `m` a symbol.
pub fn linear(dtype: DType, out: DType, n: i64, k: i64, tail: Tail) -> Region {
    let (m, n, k) = (Dim::sym("m"), Dim::from(n), Dim::from(k));
    let mut r = Region::new("linear", vec![m.clone(), n.clone()]);
    let arg = |r: &mut Region, dtype: DType, shape: Vec<Dim>| {
        r.args.push(TensorType { dtype, shape });
        r.args.len() as u32 - 1
    };
    let load = |r: &mut Region, arg: u32, index: Vec<Dim>| {
        let dtype = r.args[arg as usize].dtype;
        r.push(Expr::Load { arg, index, guard: None }, dtype)
    };
    let call = |r: &mut Region, f: ScalarFn, xs: &[ExprId]| r.push(Expr::Call(f, xs.to_vec()), DType::F32);
    let x = arg(&mut r, dtype, vec![m.clone(), k.clone()]);
    let w = arg(&mut r, dtype, vec![k.clone(), n.clone()]);
    let lhs = load(&mut r, x, vec![Dim::axis(0), Dim::axis(2)]);
    let rhs = load(&mut r, w, vec![Dim::axis(2), Dim::axis(1)]);
    r.heart = Heart::Contract { k, lhs, rhs, acc: DType::F32 };
    let mut v = r.push(Expr::Acc(0), DType::F32);
    if tail != Tail::None {
        let bias = arg(&mut r, dtype, vec![n.clone()]);
        let bias = load(&mut r, bias, vec![Dim::axis(1)]);
        let bias = r.push(Expr::Cast(bias), DType::F32);
        v = call(&mut r, ScalarFn::Add, &[v, bias]);
        let number = |r: &mut Region, x: f64| r.push(Expr::Float(Real::new(x)), DType::F32);
        let (root, one, half) = (number(&mut r, std::f64::consts::FRAC_1_SQRT_2), number(&mut r, 1.0), number(&mut r, 0.5));
        let e = call(&mut r, ScalarFn::Mul, &[v, root]);
        let e = call(&mut r, ScalarFn::Erf, &[e]);
        let e = call(&mut r, ScalarFn::Add, &[e, one]);
        let h = call(&mut r, ScalarFn::Mul, &[v, half]);
        v = call(&mut r, ScalarFn::Mul, &[h, e]);
    }
    if tail == Tail::BiasGeluAdd {
        let other = arg(&mut r, dtype, vec![m.clone(), n.clone()]);
        let other = load(&mut r, other, vec![Dim::axis(0), Dim::axis(1)]);
        let other = r.push(Expr::Cast(other), DType::F32);
        v = call(&mut r, ScalarFn::Add, &[v, other]);
    }
    let expr = if out == DType::F32 { v } else { r.push(Expr::Cast(v), out) };
    r.outputs.push(RegionOutput { ty: TensorType { dtype: out, shape: vec![m, n] }, expr, index: vec![Dim::axis(0), Dim::axis(1)] });
    r
}

/// What an attention hides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hides {
    /// Nothing.
    Nothing,
    /// What an additive f32 mask `[b, t]` says.
    Padding,
    /// Keys after the query.
    Future,
    /// Keys after the query, and those this many before it or more.
    Outside(i64),
}

/// Attention of `heads` heads that lie side by side in each row of the operands, `[b, s, heads, depth]`; the result lies
/// likewise.
pub fn self_attention(dtype: DType, heads: i64, depth: i64, hides: Hides) -> Region {
    let (b, s, h, d) = (Dim::sym("b"), Dim::sym("s"), Dim::from(heads), Dim::from(depth));
    let mut r = Region::new("attention", vec![b.clone(), h.clone(), s.clone(), d.clone()]);
    let shape = vec![b.clone(), s.clone(), h, d.clone()];
    let index = vec![Dim::axis(0), Dim::axis(2), Dim::axis(1), Dim::axis(3)];
    let mut operand = |arg: u32| {
        r.args.push(TensorType { dtype, shape: shape.clone() });
        r.push(Expr::Load { arg, index: index.clone(), guard: None }, dtype)
    };
    let (q, k, v) = (operand(0), operand(1), operand(2));
    let positions = |r: &mut Region, f: ScalarFn, key: Dim, query: Dim| {
        let (key, query) = (r.push(Expr::Index(key), DType::I64), r.push(Expr::Index(query), DType::I64));
        r.push(Expr::Call(f, vec![key, query]), DType::Bool)
    };
    let hidden = |r: &mut Region, seen: ExprId| {
        let (shown, hidden) = (r.constant(Scalar::F(0.0), dtype), r.constant(Scalar::F(f64::NEG_INFINITY), dtype));
        r.push(Expr::Call(ScalarFn::Select, vec![seen, shown, hidden]), dtype)
    };
    let mask = match hides {
        Hides::Nothing => None,
        Hides::Padding => {
            r.args.push(TensorType { dtype: DType::F32, shape: vec![b.clone(), s.clone()] });
            Some(r.push(Expr::Load { arg: 3, index: vec![Dim::axis(0), Dim::axis(3)], guard: None }, DType::F32))
        }
        Hides::Future => {
            let seen = positions(&mut r, ScalarFn::Le, Dim::axis(3), Dim::axis(2));
            Some(hidden(&mut r, seen))
        }
        Hides::Outside(window) => {
            let past = positions(&mut r, ScalarFn::Le, Dim::axis(3), Dim::axis(2));
            let near = positions(&mut r, ScalarFn::Gt, Dim::axis(3) + Dim::from(window), Dim::axis(2));
            let seen = r.push(Expr::Call(ScalarFn::And, vec![past, near]), DType::Bool);
            Some(hidden(&mut r, seen))
        }
    };
    r.heart = Heart::Attention { q, k, v, mask, scale: Real::new(1.0 / (depth as f64).sqrt()), keys: s, depth: d, part: None };
    let acc = r.push(Expr::Acc(0), dtype);
    r.outputs.push(RegionOutput { ty: TensorType { dtype, shape }, expr: acc, index });
    r
}

/// Attention of `rows` queries of each of `b` entries over `t` keys of `depth` elements, or over parts of so many keys.
pub fn decode(dtype: DType, rows: i64, depth: i64, part: Option<Dim>) -> Region {
    let (b, t, d) = (Dim::sym("b"), Dim::sym("t"), Dim::from(depth));
    let mut r = Region::new("decode", vec![b.clone()]);
    r.space.extend(part.iter().map(|n| t.ceil_div(n)));
    r.space.extend([Dim::from(rows), if part.is_some() { d.clone() + Dim::from(2i64) } else { d.clone() }]);
    let mut operand = |arg: u32, rows: Dim| {
        r.args.push(TensorType { dtype, shape: vec![b.clone(), rows, d.clone()] });
        r.push(Expr::Load { arg, index: (0..3).map(Dim::axis).collect(), guard: None }, dtype)
    };
    let (q, k, v) = (operand(0, Dim::from(rows)), operand(1, t.clone()), operand(2, t.clone()));
    let out = if part.is_some() { DType::F32 } else { dtype };
    r.heart = Heart::Attention { q, k, v, mask: None, scale: Real::new(1.0 / (depth as f64).sqrt()), keys: t, depth: d, part };
    let expr = r.push(Expr::Acc(0), out);
    let (shape, index) = (r.space.clone(), (0..r.space.len()).map(Dim::axis).collect());
    r.outputs.push(RegionOutput { ty: TensorType { dtype: out, shape }, expr, index });
    r
}
