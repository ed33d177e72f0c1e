//! Float arithmetic as MLIR: a writer with one method an operation, and which arithmetic each function of the table becomes.
use super::Mlir;
use crate::tile::Ty;
use pavage_ir::{DType, Scalar, ScalarFn};

/// A float arithmetic writer: values are SSA names, all of one type.
pub struct Float<'e> {
    pub(super) e: &'e mut Mlir,
    /// `f32` or `f64`, scalar or vector.
    pub(super) ty: Ty,
}

pub(super) type V = String;

impl<'e> Float<'e> {
    /// A writer for values of `ty` (`f32` or `f64`).
    pub fn new(e: &'e mut Mlir, ty: Ty) -> Float<'e> {
        Float { e, ty }
    }

    pub(super) fn double(&self) -> bool {
        self.ty.dtype() == DType::F64
    }

    pub(super) fn ints(&self) -> Ty {
        self.ty.with(if self.double() { DType::I64 } else { DType::I32 })
    }

    pub(super) fn mantissa(&self) -> i128 {
        if self.double() { 52 } else { 23 }
    }

    // ---- one operation each ----

    /// A constant.
    pub fn c(&mut self, v: f64) -> V {
        self.e.constant(Scalar::F(v), self.ty)
    }

    pub(super) fn ci(&mut self, v: i128) -> V {
        let ty = self.ints();
        self.e.constant(Scalar::I(v), ty)
    }

    pub(super) fn f(&mut self, op: &str, args: &[&V]) -> V {
        let t = self.e.ty(self.ty);
        let args: Vec<&str> = args.iter().map(|a| a.as_str()).collect();
        self.e.op(&format!("{op} {} : {t}", args.join(", ")))
    }

    pub(super) fn i(&mut self, op: &str, a: &V, b: &V) -> V {
        let t = self.e.ty(self.ints());
        self.e.op(&format!("arith.{op} {a}, {b} : {t}"))
    }

    /// `a + b`.
    pub fn add(&mut self, a: &V, b: &V) -> V {
        self.f("arith.addf", &[a, b])
    }

    /// `a - b`.
    pub fn sub(&mut self, a: &V, b: &V) -> V {
        self.f("arith.subf", &[a, b])
    }

    /// `a * b`.
    pub fn mul(&mut self, a: &V, b: &V) -> V {
        self.f("arith.mulf", &[a, b])
    }

    /// `a / b`.
    pub fn div(&mut self, a: &V, b: &V) -> V {
        self.f("arith.divf", &[a, b])
    }

    pub(super) fn fma(&mut self, a: &V, b: &V, c: &V) -> V {
        self.f("math.fma", &[a, b, c])
    }

    pub(super) fn neg(&mut self, a: &V) -> V {
        self.f("arith.negf", &[a])
    }

    pub(super) fn abs(&mut self, a: &V) -> V {
        self.f("math.absf", &[a])
    }

    pub(super) fn sqrt(&mut self, a: &V) -> V {
        self.f("math.sqrt", &[a])
    }

    pub(super) fn round(&mut self, a: &V) -> V {
        self.f("math.roundeven", &[a])
    }

    pub(super) fn copysign(&mut self, a: &V, sign: &V) -> V {
        self.f("math.copysign", &[a, sign])
    }

    pub(super) fn mul_c(&mut self, a: &V, k: f64) -> V {
        let k = self.c(k);
        self.mul(a, &k)
    }

    pub(super) fn add_c(&mut self, a: &V, k: f64) -> V {
        let k = self.c(k);
        self.add(a, &k)
    }

    pub(super) fn fma_c(&mut self, a: &V, k: f64, c: &V) -> V {
        let k = self.c(k);
        self.fma(a, &k, c)
    }

    pub(super) fn cmp(&mut self, p: &str, a: &V, b: &V) -> V {
        self.f(&format!("arith.cmpf {p},"), &[a, b])
    }

    pub(super) fn cmp_c(&mut self, p: &str, a: &V, k: f64) -> V {
        let k = self.c(k);
        self.cmp(p, a, &k)
    }

    pub(super) fn sel_ty(&mut self, c: &V, a: &V, b: &V, ty: Ty) -> V {
        let t = self.e.ty(ty);
        let types = if ty.is_scalar() { t } else { format!("{}, {t}", self.e.ty(ty.with(DType::Bool))) };
        self.e.op(&format!("arith.select {c}, {a}, {b} : {types}"))
    }

    /// `c ? a : b`.
    pub fn sel(&mut self, c: &V, a: &V, b: &V) -> V {
        self.sel_ty(c, a, b, self.ty)
    }

    pub(super) fn sel_c(&mut self, c: &V, k: f64, b: &V) -> V {
        let k = self.c(k);
        self.sel(c, &k, b)
    }

    pub(super) fn logic(&mut self, op: &str, a: &V, b: &V) -> V {
        let t = self.e.ty(self.ty.with(DType::Bool));
        self.e.op(&format!("arith.{op} {a}, {b} : {t}"))
    }

    /// `x` held between bounds; NaN stays NaN.
    pub(super) fn clamp(&mut self, x: &V, lo: f64, hi: f64) -> V {
        let (lo, hi) = (self.c(lo), self.c(hi));
        let below = self.cmp("olt", x, &lo);
        let x = self.sel(&below, &lo, x);
        let above = self.cmp("ogt", &x, &hi);
        self.sel(&above, &hi, &x)
    }

    pub(super) fn bits(&mut self, v: &V) -> V {
        let (tf, ti) = (self.e.ty(self.ty), self.e.ty(self.ints()));
        self.e.op(&format!("arith.bitcast {v} : {tf} to {ti}"))
    }

    pub(super) fn of_bits(&mut self, v: &V) -> V {
        let (tf, ti) = (self.e.ty(self.ty), self.e.ty(self.ints()));
        self.e.op(&format!("arith.bitcast {v} : {ti} to {tf}"))
    }

    /// A float that holds a small integer, as an integer.
    pub(super) fn as_int(&mut self, v: &V) -> V {
        if self.double() {
            // The low bits of 1.5 * 2^52 + v are v: there is no vector conversion to i64 before AVX-512.
            let magic = 6_755_399_441_055_744.0;
            let moved = self.add_c(v, magic);
            let b = self.bits(&moved);
            let k = self.ci(i128::from(magic.to_bits()));
            return self.i("subi", &b, &k);
        }
        let (tf, ti) = (self.e.ty(self.ty), self.e.ty(self.ints()));
        self.e.op(&format!("arith.fptosi {v} : {tf} to {ti}"))
    }

    pub(super) fn of_int(&mut self, v: &V) -> V {
        if self.double() {
            let magic = 6_755_399_441_055_744.0_f64;
            let k = self.ci(i128::from(magic.to_bits()));
            let b = self.i("addi", v, &k);
            let moved = self.of_bits(&b);
            return self.add_c(&moved, -magic);
        }
        let (tf, ti) = (self.e.ty(self.ty), self.e.ty(self.ints()));
        self.e.op(&format!("arith.sitofp {v} : {ti} to {tf}"))
    }

    /// `c[0] + x * (c[1] + x * ...)`.
    pub(super) fn poly(&mut self, x: &V, c: &[f64]) -> V {
        let mut acc = self.c(c[c.len() - 1]);
        for k in c[..c.len() - 1].iter().rev() {
            let k = self.c(*k);
            acc = self.fma(&acc, x, &k);
        }
        acc
    }

    /// `2^n` for an integer `n` in the range of normal exponents.
    pub(super) fn pow2(&mut self, n: &V) -> V {
        let bias = self.ci(if self.double() { 1023 } else { 127 });
        let shift = self.ci(self.mantissa());
        let biased = self.i("addi", n, &bias);
        let up = self.i("shli", &biased, &shift);
        self.of_bits(&up)
    }

    /// A function of the table on values of this type.
    pub fn apply(&mut self, f: ScalarFn, args: &[V]) -> Option<V> {
        use ScalarFn::*;
        let a = &args[0];
        let through_f64 = matches!(f, Tan | Asin | Acos | Atan | Sinh | Cosh | Asinh | Acosh | Atanh | Softplus | Pow | Mod | Rem);
        if through_f64 && !self.double() {
            let (ty, wide) = (self.ty, self.ty.with(DType::F64));
            let args: Vec<V> = args.iter().map(|v| convert(self.e, v, ty, DType::F64)).collect();
            let r = Float::new(self.e, wide).apply(f, &args)?;
            return Some(convert(self.e, &r, wide, ty.dtype()));
        }
        Some(match f {
            Exp => self.exp(a),
            Log => self.log(a),
            Rsqrt => {
                let one = self.c(1.0);
                let root = self.sqrt(a);
                self.div(&one, &root)
            }
            Recip => {
                let one = self.c(1.0);
                self.div(&one, a)
            }
            Sin => self.sin_cos(a, false),
            Cos => self.sin_cos(a, true),
            Tan => self.tan(a),
            Asin => self.asin(a),
            Acos => self.acos(a),
            Atan => self.atan(a),
            Sinh => self.sinh(a),
            Cosh => self.cosh(a),
            Tanh => self.tanh(a),
            Asinh => self.asinh(a),
            Acosh => self.acosh(a),
            Atanh => self.atanh(a),
            Erf => self.erf(a),
            Sigmoid => self.sigmoid(a),
            Softplus => self.softplus(a),
            Pow => self.pow(a, &args[1]),
            Rem => self.rem(a, &args[1]),
            Mod => self.modulo(a, &args[1]),
            Sign => {
                let (zero, one, minus) = (self.c(0.0), self.c(1.0), self.c(-1.0));
                let (above, below) = (self.cmp("ogt", a, &zero), self.cmp("olt", a, &zero));
                let r = self.sel(&below, &minus, &zero);
                let r = self.sel(&above, &one, &r);
                let nan = self.cmp("uno", a, a);
                self.sel(&nan, a, &r)
            }
            Add => self.add(a, &args[1]),
            Sub => self.sub(a, &args[1]),
            Mul => self.mul(a, &args[1]),
            Div => self.div(a, &args[1]),
            Max => self.f("arith.maximumf", &[a, &args[1]]),
            Min => self.f("arith.minimumf", &[a, &args[1]]),
            Neg => self.neg(a),
            Abs => self.abs(a),
            Sqrt => self.sqrt(a),
            Floor => self.f("math.floor", &[a]),
            Ceil => self.f("math.ceil", &[a]),
            Round => self.round(a),
            Trunc => self.f("math.trunc", &[a]),
            Fma => self.fma(a, &args[1], &args[2]),
            Eq => self.cmp("oeq", a, &args[1]),
            Ne => self.cmp("une", a, &args[1]),
            Lt => self.cmp("olt", a, &args[1]),
            Le => self.cmp("ole", a, &args[1]),
            Gt => self.cmp("ogt", a, &args[1]),
            Ge => self.cmp("oge", a, &args[1]),
            IsNan => self.cmp("uno", a, a),
            IsInf => {
                let size = self.abs(a);
                self.cmp_c("oeq", &size, f64::INFINITY)
            }
            And | Or | Xor | Not | Shl | Shr | Select => return None,
        })
    }

    /// `max` or `min` with a constant that is no NaN: one instruction, and NaN of `x` comes through.
    pub fn max_min_constant(&mut self, max: bool, k: &V, x: &V) -> V {
        let wins = self.cmp(if max { "ogt" } else { "olt" }, k, x);
        self.sel(&wins, k, x)
    }
}

pub(super) fn convert(e: &mut Mlir, v: &str, from: Ty, dtype: DType) -> V {
    super::convert::cast(e, v, from, dtype)
}
