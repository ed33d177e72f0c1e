//! Scalar functions as straight-line arithmetic.
//!
//! GPUs have no math library in the driver, and the vendor's is not ours to ship, so every function
//! is built here from what the hardware gives (`ex2`, `rsqrt`, `fma`, IEEE division and root).
//! [`Arith`] is the little machine the formulas are written for: the emitter prints it as MLIR, the
//! tests run it in Rust and measure the error against `libm`.
//!
//! f32 functions are good to about 4 ulp (`fast` trades that for 2^-18 relative, for results that are
//! rounded to 16 bits anyway). f16 and bf16 are computed in f32 and rounded once.
#![allow(clippy::excessive_precision, reason = "published coefficients are kept as published")]
use pavage_ir::ScalarFn;

/// Width of a machine value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum W {
    /// `f32`.
    F32,
    /// `f64`.
    F64,
    /// `i32`.
    I32,
    /// `i64`.
    I64,
}

/// Two-operand instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bin {
    /// Float sum.
    FAdd,
    /// Float difference.
    FSub,
    /// Float product.
    FMul,
    /// Float quotient, correctly rounded.
    FDiv,
    /// NaN-propagating maximum.
    FMax,
    /// NaN-propagating minimum.
    FMin,
    /// Magnitude of the first, sign of the second.
    CopySign,
    /// Integer sum, wrapping.
    Add,
    /// Integer difference, wrapping.
    Sub,
    /// Signed quotient.
    SDiv,
    /// Unsigned quotient.
    UDiv,
    /// Signed remainder.
    SRem,
    /// Unsigned remainder.
    URem,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
    /// Left shift.
    Shl,
    /// Arithmetic right shift.
    AShr,
}

/// One-operand instructions on floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Un {
    /// Negation.
    Neg,
    /// Absolute value.
    Abs,
    /// Square root, correctly rounded.
    Sqrt,
    /// Toward negative infinity.
    Floor,
    /// Toward positive infinity.
    Ceil,
    /// Nearest, ties to even.
    Rint,
    /// Toward zero.
    Trunc,
    /// Power of two by the special-function unit: 2 ulp (f32 only).
    Ex2,
    /// `1 / sqrt` by the special-function unit: 1 ulp (f32 only).
    Rsqrt,
    /// `1 / x` by the special-function unit: 1 ulp (f32 only).
    Rcp,
}

/// Comparisons: of floats, and `Ne` of integers; the float ones are ordered (false on NaN) but `FNe`; `FUno` is true when either side is NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cmp {
    FEq,
    FNe,
    FLt,
    FLe,
    FGt,
    FGe,
    FUno,
    Ne,
}

/// The machine the formulas run on.
pub(crate) trait Arith {
    /// A value of it.
    type V: Clone;
    /// Float constant.
    fn cf(&mut self, w: W, v: f64) -> Self::V;
    /// Integer constant.
    fn ci(&mut self, w: W, v: i64) -> Self::V;
    /// Two operands of one width.
    fn bin(&mut self, op: Bin, a: &Self::V, b: &Self::V) -> Self::V;
    /// One operand.
    fn un(&mut self, op: Un, a: &Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(&mut self, a: &Self::V, b: &Self::V, c: &Self::V) -> Self::V;
    /// A bool.
    fn cmp(&mut self, op: Cmp, a: &Self::V, b: &Self::V) -> Self::V;
    /// `c ? a : b`.
    fn sel(&mut self, c: &Self::V, a: &Self::V, b: &Self::V) -> Self::V;
    /// Float to float (f32 <-> f64).
    fn fcast(&mut self, a: &Self::V, to: W) -> Self::V;
    /// Float to signed integer, toward zero; the value is in range.
    fn f2i(&mut self, a: &Self::V, to: W) -> Self::V;
    /// Signed integer to float.
    fn i2f(&mut self, a: &Self::V, to: W) -> Self::V;
    /// The same bits as another type.
    fn bits(&mut self, a: &Self::V, to: W) -> Self::V;
}

const LOG2E: f64 = std::f64::consts::LOG2_E;
const LN2: f64 = std::f64::consts::LN_2;
const LN2_HI: f64 = 6.93147180369123816490e-01;
const LN2_LO: f64 = 1.90821492927058770002e-10;

/// Formulas over a machine at one float width.
pub(crate) struct Math<'a, A: Arith> {
    a: &'a mut A,
    w: W,
    fast: bool,
}

impl<'a, A: Arith> Math<'a, A> {
    /// Formulas at width `w` (f32 or f64); `fast` allows 2^-18 relative error in f32.
    pub(crate) fn new(a: &'a mut A, w: W, fast: bool) -> Self {
        Math { a, w, fast: fast && w == W::F32 }
    }

    fn k(&mut self, v: f64) -> A::V {
        self.a.cf(self.w, v)
    }
    fn add(&mut self, a: &A::V, b: &A::V) -> A::V {
        self.a.bin(Bin::FAdd, a, b)
    }
    fn sub(&mut self, a: &A::V, b: &A::V) -> A::V {
        self.a.bin(Bin::FSub, a, b)
    }
    fn mul(&mut self, a: &A::V, b: &A::V) -> A::V {
        self.a.bin(Bin::FMul, a, b)
    }
    fn div(&mut self, a: &A::V, b: &A::V) -> A::V {
        if self.fast {
            let r = self.a.un(Un::Rcp, b);
            return self.mul(a, &r);
        }
        self.a.bin(Bin::FDiv, a, b)
    }
    fn abs(&mut self, a: &A::V) -> A::V {
        self.a.un(Un::Abs, a)
    }
    fn copysign(&mut self, a: &A::V, s: &A::V) -> A::V {
        self.a.bin(Bin::CopySign, a, s)
    }
    /// `c[0] x^n + ... + c[n]` by Horner.
    fn poly(&mut self, x: &A::V, c: &[f64]) -> A::V {
        let mut r = self.k(c[0]);
        for &v in &c[1..] {
            let v = self.k(v);
            r = self.a.fma(&r, x, &v);
        }
        r
    }
    fn wide(&self) -> bool {
        self.w == W::F64
    }
    /// `2^i` for an integer value inside the normal exponent range.
    fn pow2(&mut self, i: &A::V) -> A::V {
        let (iw, bias, shift) = if self.wide() { (W::I64, 1023, 52) } else { (W::I32, 127, 23) };
        let bias = self.a.ci(iw, bias);
        let shift = self.a.ci(iw, shift);
        let e = self.a.bin(Bin::Add, i, &bias);
        let e = self.a.bin(Bin::Shl, &e, &shift);
        self.a.bits(&e, self.w)
    }
    /// `r * 2^j` for an integral float `j`, in two steps so that neither factor leaves the range.
    fn scale(&mut self, r: &A::V, j: &A::V) -> A::V {
        let iw = if self.wide() { W::I64 } else { W::I32 };
        let i = self.a.f2i(j, iw);
        let one = self.a.ci(iw, 1);
        let h = self.a.bin(Bin::AShr, &i, &one);
        let l = self.a.bin(Bin::Sub, &i, &h);
        let (h, l) = (self.pow2(&h), self.pow2(&l));
        let r = self.mul(r, &h);
        self.mul(&r, &l)
    }

    fn exp(&mut self, x: &A::V) -> A::V {
        let log2e = self.k(LOG2E);
        if self.fast {
            let t = self.mul(x, &log2e);
            return self.a.un(Un::Ex2, &t);
        }
        let (lo, hi) = if self.wide() { (-760.0, 720.0) } else { (-105.0, 89.0) };
        let (lo, hi) = (self.k(lo), self.k(hi));
        let x = self.a.bin(Bin::FMax, x, &lo);
        let x = self.a.bin(Bin::FMin, &x, &hi);
        let j = self.mul(&x, &log2e);
        let j = self.a.un(Un::Rint, &j);
        let (chi, clo) = if self.wide() { (-LN2_HI, -LN2_LO) } else { (-0.693_145_75, -1.428_606_8e-6) };
        let (chi, clo) = (self.k(chi), self.k(clo));
        let f = self.a.fma(&j, &chi, &x);
        let f = self.a.fma(&j, &clo, &f);
        let r = if self.wide() {
            self.exp_taylor(&f)
        } else {
            let t = self.mul(&f, &log2e);
            self.a.un(Un::Ex2, &t)
        };
        self.scale(&r, &j)
    }
    /// `e^f` for |f| < 0.35, f64.
    fn exp_taylor(&mut self, f: &A::V) -> A::V {
        let em = self.expm1_taylor(f);
        let one = self.k(1.0);
        self.add(&em, &one)
    }
    /// `e^f - 1` for |f| < 0.35.
    fn expm1_taylor(&mut self, f: &A::V) -> A::V {
        let n = if self.wide() { 14 } else { 8 };
        let c: Vec<f64> = (2..=n).rev().map(|i| 1.0 / (1..=i).map(f64::from).product::<f64>()).collect();
        let p = self.poly(f, &c);
        let s = self.mul(f, f);
        self.a.fma(&p, &s, f)
    }
    fn expm1(&mut self, x: &A::V) -> A::V {
        let small = self.expm1_taylor(x);
        let (e, one, lim) = (self.exp(x), self.k(1.0), self.k(0.34));
        let big = self.sub(&e, &one);
        let m = self.abs(x);
        let c = self.a.cmp(Cmp::FLt, &m, &lim);
        self.a.sel(&c, &small, &big)
    }

    fn log(&mut self, x: &A::V) -> A::V {
        let (iw, mant, tiny, lift, lift_e) =
            if self.wide() { (W::I64, 52, f64::MIN_POSITIVE, 2f64.powi(54), 54.0) } else { (W::I32, 23, f64::from(f32::MIN_POSITIVE), 2f64.powi(23), 23.0) };
        // Subnormals are lifted into the normal range first.
        let (tiny, lift, zero, lift_e) = (self.k(tiny), self.k(lift), self.k(0.0), self.k(-lift_e));
        let low = self.a.cmp(Cmp::FLt, x, &tiny);
        let lifted = self.mul(x, &lift);
        let v = self.a.sel(&low, &lifted, x);
        let e0 = self.a.sel(&low, &lift_e, &zero);
        let b = self.a.bits(&v, iw);
        let base = self.a.ci(iw, if self.wide() { 0x3FE6_A09E_667F_3BCDu64 as i64 } else { 0x3f2a_aaab });
        let mask = self.a.ci(iw, if self.wide() { 0xFFF0_0000_0000_0000u64 as i64 } else { i64::from(0xff80_0000u32 as i32) });
        let d = self.a.bin(Bin::Sub, &b, &base);
        let e = self.a.bin(Bin::And, &d, &mask);
        let m = self.a.bin(Bin::Sub, &b, &e);
        let m = self.a.bits(&m, self.w);
        let sh = self.a.ci(iw, mant);
        let e = self.a.bin(Bin::AShr, &e, &sh);
        let e = self.a.i2f(&e, self.w);
        let e = self.add(&e, &e0);
        let one = self.k(1.0);
        let f = self.sub(&m, &one);
        let r = if self.wide() {
            let two = self.k(2.0);
            let den = self.add(&two, &f);
            let s = self.a.bin(Bin::FDiv, &f, &den);
            let z = self.mul(&s, &s);
            let p = self.poly(
                &z,
                &[
                    1.479819860511658591e-01,
                    1.531383769920937332e-01,
                    1.818357216161805012e-01,
                    2.222219843214978396e-01,
                    2.857142874366239149e-01,
                    3.999999999940941908e-01,
                    6.666666666666735130e-01,
                ],
            );
            let p = self.mul(&p, &z);
            let half = self.k(0.5);
            let hf = self.mul(&half, &f);
            let hfsq = self.mul(&hf, &f);
            let (ln2hi, ln2lo) = (self.k(LN2_HI), self.k(LN2_LO));
            let t = self.add(&hfsq, &p);
            let klo = self.mul(&e, &ln2lo);
            let t = self.a.fma(&s, &t, &klo);
            let t = self.sub(&hfsq, &t);
            let t = self.sub(&t, &f);
            let khi = self.mul(&e, &ln2hi);
            self.sub(&khi, &t)
        } else {
            let p = self.poly(&f, &[-0.130_310_06, 0.140_869_14, -0.121_483_51, 0.139_814_85, -0.166_846_13, 0.200_120_35, -0.249_996_2, 0.333_331_97, -0.5]);
            let s = self.mul(&f, &f);
            let r = self.a.fma(&p, &s, &f);
            let ln2 = self.k(LN2);
            self.a.fma(&e, &ln2, &r)
        };
        // 0 -> -inf, inf -> inf, negative and NaN -> NaN.
        let (ninf, inf, nan) = (self.k(f64::NEG_INFINITY), self.k(f64::INFINITY), self.k(f64::NAN));
        let c = self.a.cmp(Cmp::FLt, x, &inf);
        let r = self.a.sel(&c, &r, x);
        let c = self.a.cmp(Cmp::FEq, x, &zero);
        let r = self.a.sel(&c, &ninf, &r);
        let c = self.a.cmp(Cmp::FLt, x, &zero);
        self.a.sel(&c, &nan, &r)
    }
    /// `log(1 + u)` for `u > -1`, by Kahan's quotient.
    fn log1p(&mut self, u: &A::V) -> A::V {
        let (one, big) = (self.k(1.0), self.k(1e18));
        let w = self.add(&one, u);
        let l = self.log(&w);
        let d = self.sub(&w, &one);
        let q = self.a.bin(Bin::FDiv, u, &d);
        let r = self.mul(&l, &q);
        let c = self.a.cmp(Cmp::FEq, &w, &one);
        let r = self.a.sel(&c, u, &r);
        let c = self.a.cmp(Cmp::FGt, u, &big);
        self.a.sel(&c, &l, &r)
    }

    fn tanh(&mut self, x: &A::V) -> A::V {
        let t = self.abs(x);
        let (one, two) = (self.k(1.0), self.k(2.0));
        if self.wide() {
            let m2 = self.k(-2.0);
            let t2 = self.mul(&t, &m2);
            let em = self.expm1(&t2);
            let den = self.add(&em, &two);
            let q = self.a.bin(Bin::FDiv, &em, &den);
            let q = self.abs(&q);
            return self.copysign(&q, x);
        }
        let t2 = self.mul(&t, &two);
        let e = self.exp(&t2);
        let den = self.add(&e, &one);
        let q = self.div(&two, &den);
        let big = self.sub(&one, &q);
        let big = self.copysign(&big, x);
        let s = self.mul(x, x);
        let p = self.poly(&s, &[1.573_968_3e-2, -5.230_396_2e-2, 1.331_529_8e-1, -3.333_276_8e-1]);
        let p = self.mul(&p, &s);
        let small = self.a.fma(&p, x, x);
        let lim = self.k(0.55);
        let c = self.a.cmp(Cmp::FLt, &t, &lim);
        self.a.sel(&c, &small, &big)
    }

    fn erf(&mut self, x: &A::V) -> A::V {
        let t = self.abs(x);
        let one = self.k(1.0);
        if self.wide() {
            // 2/sqrt(pi) e^-x² x (1 + 2x²/3 (1 + 2x²/5 (...))): positive terms, so no cancellation.
            let six = self.k(6.0);
            let t = self.a.bin(Bin::FMin, &t, &six);
            let s = self.mul(&t, &t);
            let mut acc = one.clone();
            for n in (1..=120).rev() {
                let c = self.k(2.0 / (2.0 * f64::from(n) + 1.0));
                let q = self.mul(&s, &c);
                acc = self.a.fma(&acc, &q, &one);
            }
            let ns = self.a.un(Un::Neg, &s);
            let e = self.exp(&ns);
            let c = self.k(std::f64::consts::FRAC_2_SQRT_PI);
            let r = self.mul(&t, &c);
            let r = self.mul(&r, &e);
            let r = self.mul(&r, &acc);
            let r = self.a.bin(Bin::FMin, &r, &one);
            return self.copysign(&r, x);
        }
        let s = self.mul(x, x);
        let p = self.poly(&s, &[-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_66e-1]);
        let small = self.a.fma(&p, x, x);
        let four = self.k(4.0);
        let u = self.a.bin(Bin::FMin, &t, &four);
        let p = self.poly(&u, &[-1.728_534_7e-5, 3.831_971_3e-4, -3.883_964_4e-3, 2.425_462_2e-2, -1.067_778_77e-1, -6.348_466_9e-1, -1.287_175_1e-1]);
        let nu = self.a.un(Un::Neg, &u);
        let p = self.a.fma(&p, &u, &nu);
        let e = self.exp(&p);
        let big = self.sub(&one, &e);
        let big = self.copysign(&big, x);
        let lim = self.k(0.921_875);
        let c = self.a.cmp(Cmp::FLt, &t, &lim);
        self.a.sel(&c, &small, &big)
    }

    /// `(sin, cos)`; the argument is reduced in f64, good up to |x| about 1e15.
    fn sincos(&mut self, x: &A::V) -> (A::V, A::V) {
        let w = self.w;
        let (r, j) = {
            let x64 = if self.wide() { x.clone() } else { self.a.fcast(x, W::F64) };
            let mut m = Math { a: self.a, w: W::F64, fast: false };
            let c = m.k(std::f64::consts::FRAC_2_PI);
            let j = m.mul(&x64, &c);
            let j = m.a.un(Un::Rint, &j);
            let (hi, lo) = (m.k(-std::f64::consts::FRAC_PI_2), m.k(-6.123_233_995_736_766e-17));
            let r = m.a.fma(&j, &hi, &x64);
            let r = m.a.fma(&j, &lo, &r);
            (r, m.a.f2i(&j, W::I64))
        };
        let r = if w == W::F64 { r } else { self.a.fcast(&r, w) };
        let s = self.mul(&r, &r);
        let (sin, cos) = if self.wide() {
            let p = self.poly(
                &s,
                &[
                    1.58969099521155010221e-10,
                    -2.50507602534068634195e-08,
                    2.75573137070700676789e-06,
                    -1.98412698298579493134e-04,
                    8.33333333332248946124e-03,
                    -1.66666666666666324348e-01,
                ],
            );
            let q = self.poly(
                &s,
                &[
                    -1.13596475577881948265e-11,
                    2.08757232129817482790e-09,
                    -2.75573143513906633035e-07,
                    2.48015872894767294178e-05,
                    -1.38888888888741095749e-03,
                    4.16666666666666019037e-02,
                    -0.5,
                    1.0,
                ],
            );
            (p, q)
        } else {
            let p = self.poly(&s, &[2.865_679_6e-6, -1.985_599_2e-4, 8.333_386e-3, -1.666_666_7e-1]);
            let q = self.poly(&s, &[2.446_770_7e-5, -1.388_773e-3, 4.166_665_7e-2, -0.5, 1.0]);
            (p, q)
        };
        let rs = self.mul(&r, &s);
        let sin = self.a.fma(&sin, &rs, &r);
        // Quadrant j mod 4: odd swaps, then signs.
        let (one, two, zero) = (self.a.ci(W::I64, 1), self.a.ci(W::I64, 2), self.a.ci(W::I64, 0));
        let odd = self.a.bin(Bin::And, &j, &one);
        let odd = self.a.cmp(Cmp::Ne, &odd, &zero);
        let (s0, c0) = (self.a.sel(&odd, &cos, &sin), self.a.sel(&odd, &sin, &cos));
        let flip = |m: &mut Self, q: &A::V, v: &A::V| {
            let b = m.a.bin(Bin::And, q, &two);
            let b = m.a.cmp(Cmp::Ne, &b, &zero);
            let n = m.a.un(Un::Neg, v);
            m.a.sel(&b, &n, v)
        };
        let sin = flip(self, &j, &s0);
        let j1 = self.a.bin(Bin::Add, &j, &one);
        let cos = flip(self, &j1, &c0);
        (sin, cos)
    }

    fn atan(&mut self, x: &A::V) -> A::V {
        let t = self.abs(x);
        let one = self.k(1.0);
        let inv = self.a.bin(Bin::FDiv, &one, &t);
        let big = self.a.cmp(Cmp::FGt, &t, &one);
        let r = self.a.sel(&big, &inv, &t);
        let v = if self.wide() {
            // Two half-angle steps, then the series.
            let mut u = r;
            for _ in 0..2 {
                let q = self.a.fma(&u, &u, &one);
                let q = self.a.un(Un::Sqrt, &q);
                let q = self.add(&q, &one);
                u = self.a.bin(Bin::FDiv, &u, &q);
            }
            let s = self.mul(&u, &u);
            let c: Vec<f64> = (1..=13).rev().map(|i| (if i % 2 == 1 { -1.0 } else { 1.0 }) / f64::from(2 * i + 1)).collect();
            let p = self.poly(&s, &c);
            let p = self.mul(&p, &s);
            let v = self.a.fma(&p, &u, &u);
            let four = self.k(4.0);
            self.mul(&v, &four)
        } else {
            let s = self.mul(&r, &r);
            let p = self
                .poly(&s, &[2.785_698_3e-3, -1.586_602_3e-2, 4.247_222_3e-2, -7.497_530_4e-2, 1.064_488e-1, -1.420_703_1e-1, 1.999_345_4e-1, -3.333_314_7e-1]);
            let p = self.mul(&p, &s);
            self.a.fma(&p, &r, &r)
        };
        let half_pi = self.k(std::f64::consts::FRAC_PI_2);
        let far = self.sub(&half_pi, &v);
        let v = self.a.sel(&big, &far, &v);
        self.copysign(&v, x)
    }

    /// `e^|x| / 2` without early overflow, and `e^-|x| / 2`.
    fn half_exps(&mut self, x: &A::V) -> (A::V, A::V) {
        let half = self.k(0.5);
        let t = self.abs(x);
        let t = self.mul(&t, &half);
        let h = self.exp(&t);
        let hh = self.mul(&h, &half);
        let up = self.mul(&hh, &h);
        let down = self.a.bin(Bin::FDiv, &half, &h);
        let down = self.a.bin(Bin::FDiv, &down, &h);
        (up, down)
    }

    fn pow(&mut self, x: &A::V, y: &A::V) -> A::V {
        let w = self.w;
        let (x64, y64) = if w == W::F64 { (x.clone(), y.clone()) } else { (self.a.fcast(x, W::F64), self.a.fcast(y, W::F64)) };
        let mut m = Math { a: self.a, w: W::F64, fast: false };
        let (zero, one, half, inf, nan) = (m.k(0.0), m.k(1.0), m.k(0.5), m.k(f64::INFINITY), m.k(f64::NAN));
        let ax = m.abs(&x64);
        let l = m.log(&ax);
        let p = m.mul(&l, &y64);
        let r = m.exp(&p);
        // A negative base needs an integral exponent and takes its sign from the exponent's parity.
        let whole = m.a.un(Un::Rint, &y64);
        let is_int = m.a.cmp(Cmp::FEq, &whole, &y64);
        let h = m.mul(&y64, &half);
        let hr = m.a.un(Un::Rint, &h);
        let even = m.a.cmp(Cmp::FEq, &hr, &h);
        let neg = m.a.cmp(Cmp::FLt, &x64, &zero);
        let sx = m.copysign(&one, &x64);
        let signed = m.copysign(&r, &sx);
        let odd_r = m.a.sel(&even, &r, &signed);
        let r = m.a.sel(&is_int, &odd_r, &r);
        let ay = m.abs(&y64);
        let y_inf = m.a.cmp(Cmp::FEq, &ay, &inf);
        let ok_int = m.a.bin(Bin::Or, &is_int, &y_inf);
        let x_ninf = m.a.cmp(Cmp::FEq, &ax, &inf);
        let ok = m.a.bin(Bin::Or, &ok_int, &x_ninf);
        let bad = m.a.sel(&ok, &r, &nan);
        let r = m.a.sel(&neg, &bad, &r);
        let base_nan = m.a.cmp(Cmp::FUno, &x64, &y64);
        let r = m.a.sel(&base_nan, &nan, &r);
        let ax1 = m.a.cmp(Cmp::FEq, &ax, &one);
        let ax1 = m.a.bin(Bin::And, &ax1, &y_inf);
        let r = m.a.sel(&ax1, &one, &r);
        let y0 = m.a.cmp(Cmp::FEq, &y64, &zero);
        let x1 = m.a.cmp(Cmp::FEq, &x64, &one);
        let unit = m.a.bin(Bin::Or, &y0, &x1);
        let r = m.a.sel(&unit, &one, &r);
        if w == W::F64 { r } else { self.a.fcast(&r, w) }
    }

    /// `fmod`, exact while the quotient is below 2^53.
    fn rem(&mut self, x: &A::V, y: &A::V) -> A::V {
        let w = self.w;
        let (x64, y64) = if w == W::F64 { (x.clone(), y.clone()) } else { (self.a.fcast(x, W::F64), self.a.fcast(y, W::F64)) };
        let mut m = Math { a: self.a, w: W::F64, fast: false };
        let (zero, inf) = (m.k(0.0), m.k(f64::INFINITY));
        let (ax, ay) = (m.abs(&x64), m.abs(&y64));
        let q = m.a.bin(Bin::FDiv, &ax, &ay);
        let q = m.a.un(Un::Trunc, &q);
        let nq = m.a.un(Un::Neg, &q);
        let r = m.a.fma(&nq, &ay, &ax);
        // The rounded quotient may be one too large, never too small.
        let low = m.a.cmp(Cmp::FLt, &r, &zero);
        let up = m.add(&r, &ay);
        let r = m.a.sel(&low, &up, &r);
        let y_inf = m.a.cmp(Cmp::FEq, &ay, &inf);
        let x_fin = m.a.cmp(Cmp::FLt, &ax, &inf);
        let keep = m.a.bin(Bin::And, &y_inf, &x_fin);
        let r = m.a.sel(&keep, &ax, &r);
        let r = m.copysign(&r, &x64);
        if w == W::F64 { r } else { self.a.fcast(&r, w) }
    }

    /// The float function `f` of `args`; `None` for functions that are not of this kind
    /// (bitwise ones, comparisons and `select`).
    pub(crate) fn call(&mut self, f: ScalarFn, args: &[A::V]) -> Option<A::V> {
        use ScalarFn::*;
        let x = &args[0];
        let one = self.k(1.0);
        Some(match f {
            Add => self.add(x, &args[1]),
            Sub => self.sub(x, &args[1]),
            Mul => self.mul(x, &args[1]),
            Div => self.div(x, &args[1]),
            Max => self.a.bin(Bin::FMax, x, &args[1]),
            Min => self.a.bin(Bin::FMin, x, &args[1]),
            Rem => self.rem(x, &args[1]),
            Mod => {
                let y = &args[1];
                let r = self.rem(x, y);
                let (zero, s) = (self.k(0.0), self.add(&r, y));
                let (rl, yl) = (self.a.cmp(Cmp::FLt, &r, &zero), self.a.cmp(Cmp::FLt, y, &zero));
                let differ = self.a.bin(Bin::Xor, &rl, &yl);
                let nonzero = self.a.cmp(Cmp::FNe, &r, &zero);
                let c = self.a.bin(Bin::And, &differ, &nonzero);
                self.a.sel(&c, &s, &r)
            }
            Pow => self.pow(x, &args[1]),
            Neg => self.a.un(Un::Neg, x),
            Abs => self.abs(x),
            Sign => {
                let zero = self.k(0.0);
                let s = self.copysign(&one, x);
                let c = self.a.cmp(Cmp::FNe, x, &zero);
                let r = self.a.sel(&c, &s, &zero);
                let nan = self.a.cmp(Cmp::FUno, x, x);
                self.a.sel(&nan, x, &r)
            }
            Exp => self.exp(x),
            Log => self.log(x),
            Sqrt => self.a.un(Un::Sqrt, x),
            Rsqrt => {
                if self.wide() {
                    let s = self.a.un(Un::Sqrt, x);
                    self.div(&one, &s)
                } else {
                    self.a.un(Un::Rsqrt, x)
                }
            }
            Recip => self.div(&one, x),
            Sin => self.sincos(x).0,
            Cos => self.sincos(x).1,
            Tan => {
                let (s, c) = self.sincos(x);
                self.div(&s, &c)
            }
            Asin => {
                let (a, b) = (self.sub(&one, x), self.add(&one, x));
                let d = self.mul(&a, &b);
                let d = self.a.un(Un::Sqrt, &d);
                let q = self.a.bin(Bin::FDiv, x, &d);
                self.atan(&q)
            }
            Acos => {
                let (a, b) = (self.sub(&one, x), self.add(&one, x));
                let q = self.a.bin(Bin::FDiv, &a, &b);
                let q = self.a.un(Un::Sqrt, &q);
                let r = self.atan(&q);
                self.add(&r, &r)
            }
            Atan => self.atan(x),
            Sinh => {
                let (up, down) = self.half_exps(x);
                let big = self.sub(&up, &down);
                let big = self.copysign(&big, x);
                let s = self.mul(x, x);
                let n = if self.wide() { 10 } else { 5 };
                let c: Vec<f64> = (1..=n).rev().map(|i| 1.0 / (1..=2 * i + 1).map(f64::from).product::<f64>()).collect();
                let p = self.poly(&s, &c);
                let p = self.mul(&p, &s);
                let small = self.a.fma(&p, x, x);
                let t = self.abs(x);
                let c = self.a.cmp(Cmp::FLt, &t, &one);
                self.a.sel(&c, &small, &big)
            }
            Cosh => {
                let (up, down) = self.half_exps(x);
                self.add(&up, &down)
            }
            Tanh => self.tanh(x),
            Asinh => {
                let t = self.abs(x);
                let s = self.mul(&t, &t);
                let q = self.add(&s, &one);
                let q = self.a.un(Un::Sqrt, &q);
                let q = self.add(&q, &one);
                let q = self.a.bin(Bin::FDiv, &s, &q);
                let u = self.add(&t, &q);
                let near = self.log1p(&u);
                let far = self.log(&t);
                let (ln2, lim) = (self.k(LN2), self.k(1e9));
                let far = self.add(&far, &ln2);
                let c = self.a.cmp(Cmp::FGt, &t, &lim);
                let r = self.a.sel(&c, &far, &near);
                self.copysign(&r, x)
            }
            Acosh => {
                let t = self.sub(x, &one);
                let two = self.k(2.0);
                let q = self.add(&t, &two);
                let q = self.mul(&t, &q);
                let q = self.a.un(Un::Sqrt, &q);
                let u = self.add(&t, &q);
                let near = self.log1p(&u);
                let far = self.log(x);
                let (ln2, lim, nan) = (self.k(LN2), self.k(1e9), self.k(f64::NAN));
                let far = self.add(&far, &ln2);
                let c = self.a.cmp(Cmp::FGt, x, &lim);
                let r = self.a.sel(&c, &far, &near);
                let c = self.a.cmp(Cmp::FLt, x, &one);
                self.a.sel(&c, &nan, &r)
            }
            Atanh => {
                let t = self.abs(x);
                let (n, d) = (self.add(&t, &t), self.sub(&one, &t));
                let q = self.a.bin(Bin::FDiv, &n, &d);
                let l = self.log1p(&q);
                let half = self.k(0.5);
                let r = self.mul(&l, &half);
                let r = self.copysign(&r, x);
                let nan = self.k(f64::NAN);
                let c = self.a.cmp(Cmp::FGt, &t, &one);
                self.a.sel(&c, &nan, &r)
            }
            Erf => self.erf(x),
            Sigmoid => {
                let n = self.a.un(Un::Neg, x);
                let e = self.exp(&n);
                let d = self.add(&one, &e);
                self.div(&one, &d)
            }
            Softplus => {
                let zero = self.k(0.0);
                let m = self.a.bin(Bin::FMax, x, &zero);
                let t = self.abs(x);
                let t = self.a.un(Un::Neg, &t);
                let e = self.exp(&t);
                let l = self.log1p(&e);
                self.add(&m, &l)
            }
            Floor => self.a.un(Un::Floor, x),
            Ceil => self.a.un(Un::Ceil, x),
            Round => self.a.un(Un::Rint, x),
            Trunc => self.a.un(Un::Trunc, x),
            Fma => self.a.fma(x, &args[1], &args[2]),
            And | Or | Xor | Not | Shl | Shr | Eq | Ne | Lt | Le | Gt | Ge | IsNan | IsInf | Select => return None,
        })
    }
}

#[cfg(test)]
#[path = "math_test.rs"]
mod tests;
