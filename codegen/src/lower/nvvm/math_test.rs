//! The formulas, run in Rust and measured against `libm` in f64.
#![allow(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN must fail")]
use super::{Arith, Bin, Cmp, Math, Un, W};
use pavage_ir::{DType, Scalar, ScalarFn};

/// A value of the test machine.
#[derive(Clone, Copy, Debug)]
enum V {
    S(f32),
    D(f64),
    I(i32),
    L(i64),
    B(bool),
}

struct Machine;

fn num(v: V) -> f64 {
    match v {
        V::S(x) => f64::from(x),
        V::D(x) => x,
        V::I(x) => f64::from(x),
        V::L(x) => x as f64,
        V::B(b) => f64::from(u8::from(b)),
    }
}

fn maximum(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

impl Arith for Machine {
    type V = V;
    fn cf(&mut self, w: W, v: f64) -> V {
        if w == W::F32 { V::S(v as f32) } else { V::D(v) }
    }
    fn ci(&mut self, w: W, v: i64) -> V {
        if w == W::I32 { V::I(v as i32) } else { V::L(v) }
    }
    fn bin(&mut self, op: Bin, a: &V, b: &V) -> V {
        let float = |x: f64, y: f64| match op {
            Bin::FAdd => x + y,
            Bin::FSub => x - y,
            Bin::FMul => x * y,
            Bin::FDiv => x / y,
            Bin::FMax => maximum(x, y),
            Bin::FMin => -maximum(-x, -y),
            Bin::CopySign => x.copysign(y),
            _ => panic!("{op:?} on floats"),
        };
        let int = |x: i64, y: i64, bits: u32| match op {
            Bin::Add => x.wrapping_add(y),
            Bin::Sub => x.wrapping_sub(y),
            Bin::And => x & y,
            Bin::Or => x | y,
            Bin::Shl => x << (y as u32 % bits),
            Bin::AShr => x >> y,
            _ => panic!("{op:?} on integers"),
        };
        match (*a, *b) {
            // f32 results of f64 arithmetic on f32 operands round to the f32 result.
            (V::S(x), V::S(y)) => V::S(float(f64::from(x), f64::from(y)) as f32),
            (V::D(x), V::D(y)) => V::D(float(x, y)),
            (V::I(x), V::I(y)) => V::I(int(i64::from(x), i64::from(y), 32) as i32),
            (V::L(x), V::L(y)) => V::L(int(x, y, 64)),
            (V::B(x), V::B(y)) => V::B(match op {
                Bin::And => x & y,
                Bin::Or => x | y,
                Bin::Xor => x ^ y,
                _ => panic!("{op:?} on bools"),
            }),
            _ => panic!("{op:?} on {a:?} and {b:?}"),
        }
    }
    fn un(&mut self, op: Un, a: &V) -> V {
        let f = |x: f64| match op {
            Un::Neg => -x,
            Un::Abs => x.abs(),
            Un::Sqrt => x.sqrt(),
            Un::Floor => x.floor(),
            Un::Ceil => x.ceil(),
            Un::Rint => x.round_ties_even(),
            Un::Trunc => x.trunc(),
            Un::Ex2 => x.exp2(),
            Un::Rsqrt => 1.0 / x.sqrt(),
            Un::Rcp => 1.0 / x,
        };
        match *a {
            V::S(x) => V::S(f(f64::from(x)) as f32),
            V::D(x) => V::D(f(x)),
            _ => panic!("{op:?} on {a:?}"),
        }
    }
    fn fma(&mut self, a: &V, b: &V, c: &V) -> V {
        match (*a, *b, *c) {
            (V::S(x), V::S(y), V::S(z)) => V::S(x.mul_add(y, z)),
            (V::D(x), V::D(y), V::D(z)) => V::D(x.mul_add(y, z)),
            _ => panic!("fma"),
        }
    }
    fn cmp(&mut self, op: Cmp, a: &V, b: &V) -> V {
        let (x, y) = (num(*a), num(*b));
        V::B(match op {
            Cmp::FEq => x == y,
            Cmp::FNe => x != y,
            Cmp::FLt => x < y,
            Cmp::FLe => x <= y,
            Cmp::FGt => x > y,
            Cmp::FGe => x >= y,
            Cmp::FUno => x.is_nan() || y.is_nan(),
            Cmp::Ne => x != y,
        })
    }
    fn sel(&mut self, c: &V, a: &V, b: &V) -> V {
        if matches!(c, V::B(true)) { *a } else { *b }
    }
    fn fcast(&mut self, a: &V, to: W) -> V {
        if to == W::F32 { V::S(num(*a) as f32) } else { V::D(num(*a)) }
    }
    fn f2i(&mut self, a: &V, to: W) -> V {
        if to == W::I32 { V::I(num(*a) as i32) } else { V::L(num(*a) as i64) }
    }
    fn i2f(&mut self, a: &V, to: W) -> V {
        if to == W::F32 { V::S(num(*a) as f32) } else { V::D(num(*a)) }
    }
    fn bits(&mut self, a: &V, to: W) -> V {
        match (*a, to) {
            (V::S(x), W::I32) => V::I(x.to_bits() as i32),
            (V::I(x), W::F32) => V::S(f32::from_bits(x as u32)),
            (V::D(x), W::I64) => V::L(x.to_bits() as i64),
            (V::L(x), W::F64) => V::D(f64::from_bits(x as u64)),
            _ => panic!("bits of {a:?} as {to:?}"),
        }
    }
}

fn value(w: W, v: f64) -> V {
    if w == W::F32 { V::S(v as f32) } else { V::D(v) }
}

/// Units in the last place between what was computed and the exact value.
fn ulps(got: f64, want: f64, w: W) -> f64 {
    let (min, bits) = if w == W::F32 { (f64::from(f32::MIN_POSITIVE), 23) } else { (f64::MIN_POSITIVE, 52) };
    let want = if w == W::F32 { f64::from(want as f32) } else { want };
    if got == want || (got.is_nan() && want.is_nan()) {
        return 0.0;
    }
    let e = (want.abs().max(min).to_bits() >> 52) as i32 - 1023;
    (got - want).abs() / 2f64.powi(e - bits)
}

/// Deterministic points over the functions' domain, dense near zero, with the special values.
fn points(lo: f64, hi: f64) -> Vec<f64> {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = vec![0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 1e-6, -1e-6, 1e-30, 0.34, 0.55, 0.921_875];
    for i in 0..4000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let u = (seed >> 11) as f64 / (1u64 << 53) as f64;
        let x = lo + (hi - lo) * u;
        out.push(if i % 3 == 0 { x * 1e-3 } else { x });
    }
    out.retain(|x| *x >= lo && *x <= hi);
    out.push(f64::NAN);
    out
}

fn worst(f: ScalarFn, w: W, fast: bool, lo: f64, hi: f64) -> (f64, f64) {
    let dtype = DType::F64;
    let mut bad = (0.0, 0.0);
    for x in points(lo, hi) {
        let x = num(value(w, x));
        let got = num(Math::new(&mut Machine, w, fast).call(f, &[value(w, x)]).expect("a float function"));
        let want = f.eval(dtype, &[Scalar::F(x)]).f();
        let u = ulps(got, want, w);
        if !(u <= bad.0) {
            bad = (u, x);
        }
    }
    bad
}

#[test]
fn every_function_is_close_to_libm() {
    use ScalarFn::*;
    // Function, domain, allowed ulp in f32 and in f64.
    let table = [
        (Exp, -104.0, 88.7, 2.0, 3.0),
        (Log, 0.0, 3e38, 2.0, 2.0),
        (Log, 0.5, 2.0, 2.0, 2.0),
        (Tanh, -12.0, 12.0, 3.0, 4.0),
        (Erf, -5.0, 5.0, 3.0, 24.0),
        (Sigmoid, -80.0, 80.0, 3.0, 4.0),
        (Softplus, -60.0, 60.0, 3.0, 4.0),
        (Sin, -2.0e6, 2.0e6, 3.0, 4.0),
        (Cos, -2.0e6, 2.0e6, 3.0, 4.0),
        (Tan, -50.0, 50.0, 5.0, 8.0),
        (Asin, -1.0, 1.0, 5.0, 6.0),
        (Acos, -1.0, 1.0, 5.0, 8.0),
        (Atan, -1e4, 1e4, 3.0, 6.0),
        (Sinh, -88.0, 88.0, 6.0, 8.0),
        (Cosh, -88.0, 88.0, 6.0, 8.0),
        (Asinh, -1e6, 1e6, 5.0, 6.0),
        (Acosh, 1.0, 1e6, 6.0, 8.0),
        (Atanh, -0.999, 0.999, 5.0, 6.0),
        (Rsqrt, 1e-6, 1e6, 1.0, 2.0),
        (Recip, -1e6, 1e6, 1.0, 1.0),
    ];
    let mut wrong = vec![];
    for (f, lo, hi, u32s, u64s) in table {
        for (w, allowed) in [(W::F32, u32s), (W::F64, u64s)] {
            let (u, x) = worst(f, w, false, lo, hi);
            if !(u <= allowed) {
                wrong.push(format!("{f} {w:?} at {x:e}: {u} ulp, allowed {allowed}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn powers_and_remainders_follow_the_reference() {
    let mut wrong = vec![];
    let xs = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.3, -7.5, 10.0, 3.25, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
    for f in [ScalarFn::Pow, ScalarFn::Mod, ScalarFn::Rem] {
        for x in xs {
            for y in [0.0, 1.0, -1.0, 2.0, 3.0, -3.0, 0.5, 7.0, -2.5, f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
                if f != ScalarFn::Pow && (y.is_infinite() || x.is_infinite()) {
                    continue;
                }
                for w in [W::F32, W::F64] {
                    let got = num(Math::new(&mut Machine, w, false).call(f, &[value(w, x), value(w, y)]).expect("a float function"));
                    let want = f.eval(DType::F64, &[Scalar::F(num(value(w, x))), Scalar::F(y)]).f();
                    if !(ulps(got, want, w) <= 40.0) {
                        wrong.push(format!("{f} {w:?} ({x}, {y}): {got}, want {want}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn fast_functions_are_good_enough_for_sixteen_bit_results() {
    use ScalarFn::*;
    for (f, lo, hi) in [(Exp, -30.0, 30.0), (Sigmoid, -30.0, 30.0), (Tanh, -10.0, 10.0), (Erf, -4.0, 4.0)] {
        let (u, x) = worst(f, W::F32, true, lo, hi);
        assert!(u <= 64.0, "{f} at {x:e}: {u} ulp");
    }
}
