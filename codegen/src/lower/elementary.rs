//! Elementary functions of `f32` and `f64`, scalar or vector, written out as arithmetic: no library calls, the
//! same on every device, exact at infinities, zeros and NaN, subnormals kept.
//!
//! `f32` functions that kernels lean on (exp, log, tanh, erf, sigmoid, sin, cos) are in `f32`; the others go through
//! `f64` and are rounded once. Coefficients are those of fdlibm and Cephes, Taylor series for the exponential.
#![allow(clippy::excessive_precision, clippy::approx_constant, reason = "coefficients are quoted as published")]
use super::float::{Float, V, convert};
use pavage_ir::DType;

impl Float<'_> {
    // ---- exponentials ----

    /// `x`, and `low` beyond its last places, are `n ln 2 + r`: `n` as a float, `r`, and `e^r - 1` within its last places.
    fn exp_parts(&mut self, x: &V, low: Option<&V>) -> (V, V) {
        let scaled = self.mul_c(x, std::f64::consts::LOG2_E);
        let n = self.round(&scaled);
        let (hi, lo) =
            if self.double() { (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10) } else { (0.693_145_751_953_125, 1.428_606_820_309_417_2e-6) };
        let r = self.fma_c(&n, -hi, x);
        let mut r = self.fma_c(&n, -lo, &r);
        if let Some(low) = low {
            r = self.add(&r, low);
        }
        let terms = if self.double() { 13 } else { 7 };
        let mut c = vec![];
        let mut factorial = 1.0;
        for k in 2..=terms {
            factorial *= f64::from(k);
            c.push(1.0 / factorial);
        }
        let q = self.poly(&r, &c);
        let rr = self.mul(&r, &r);
        (n, self.fma(&q, &rr, &r))
    }

    pub(super) fn exp(&mut self, x: &V) -> V {
        self.exp_of_sum(x, None)
    }

    /// The exponential of `x + low`, where `low` is in the last places of `x`.
    fn exp_of_sum(&mut self, x: &V, low: Option<&V>) -> V {
        // Beyond these the result is 0 or infinite whatever the rounding.
        let x = if self.double() { self.clamp(x, -746.0, 710.0) } else { self.clamp(x, -104.0, 89.0) };
        let (n, m) = self.exp_parts(&x, low);
        let p = self.add_c(&m, 1.0);
        // Two factors, so that overflow and subnormal results come from one rounding multiplication. NaN goes through `p`.
        let n = self.as_int(&n);
        let one = self.ci(1);
        let half = self.i("shrsi", &n, &one);
        let rest = self.i("subi", &n, &half);
        let (a, b) = (self.pow2(&half), self.pow2(&rest));
        let p = self.mul(&p, &a);
        self.mul(&p, &b)
    }

    /// `e^x - 1` for `x` at least 0 and at most 88 (`f32`) or 700 (`f64`).
    fn expm1(&mut self, x: &V) -> V {
        let (n, m) = self.exp_parts(x, None);
        let n = self.as_int(&n);
        let s = self.pow2(&n);
        let less = self.add_c(&s, -1.0);
        self.fma(&m, &s, &less)
    }

    pub(super) fn tanh(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let a = self.clamp(&a, 0.0, if self.double() { 20.0 } else { 9.5 });
        let two = self.add(&a, &a);
        let e = self.expm1(&two);
        let below = self.add_c(&e, 2.0);
        let t = self.div(&e, &below);
        self.copysign(&t, x)
    }

    pub(super) fn sigmoid(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let minus = self.neg(&a);
        let e = self.exp(&minus);
        let below = self.add_c(&e, 1.0);
        let negative = self.cmp_c("olt", x, 0.0);
        let one = self.c(1.0);
        let top = self.sel(&negative, &e, &one);
        self.div(&top, &below)
    }

    pub(super) fn sinh(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let small = self.clamp(&a, 0.0, 22.0);
        let e = self.expm1(&small);
        let up = self.add_c(&e, 1.0);
        let ratio = self.div(&e, &up);
        let near = self.add(&e, &ratio);
        let near = self.mul_c(&near, 0.5);
        let far = self.half_exp(&a);
        let is_far = self.cmp_c("ogt", &a, 22.0);
        let r = self.sel(&is_far, &far, &near);
        self.copysign(&r, x)
    }

    pub(super) fn cosh(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let e = self.exp(&a);
        let one = self.c(1.0);
        let down = self.div(&one, &e);
        let sum = self.add(&e, &down);
        let near = self.mul_c(&sum, 0.5);
        let far = self.half_exp(&a);
        let is_far = self.cmp_c("ogt", &a, 22.0);
        self.sel(&is_far, &far, &near)
    }

    /// `e^a / 2` without overflow before its time.
    fn half_exp(&mut self, a: &V) -> V {
        let half = self.mul_c(a, 0.5);
        let w = self.exp(&half);
        let h = self.mul_c(&w, 0.5);
        self.mul(&h, &w)
    }

    // ---- logarithms ----

    /// A positive `x` as `2^n (1 + f)` with `1 + f` in `[sqrt(1/2), sqrt(2))`: `f`, exact, and `n` as a float.
    fn log_parts(&mut self, x: &V) -> (V, V) {
        let m_bits = self.mantissa();
        let (smallest, scale, scale_n) =
            if self.double() { (f64::MIN_POSITIVE, 2f64.powi(54), 54.0) } else { (f64::from(f32::MIN_POSITIVE), 2f64.powi(25), 25.0) };
        let tiny = self.cmp_c("olt", x, smallest);
        let up = self.mul_c(x, scale);
        let y = self.sel(&tiny, &up, x);
        // m in [sqrt(1/2), sqrt(2)): shift the exponent's boundary before splitting.
        let sqrt_half =
            if self.double() { i128::from(std::f64::consts::FRAC_1_SQRT_2.to_bits()) } else { i128::from(std::f32::consts::FRAC_1_SQRT_2.to_bits()) };
        let b = self.bits(&y);
        let k = self.ci(sqrt_half);
        let d = self.i("subi", &b, &k);
        let shift = self.ci(m_bits);
        let mask = self.ci((1i128 << m_bits) - 1);
        let n = if self.double() {
            // No vector arithmetic shift of i64 before AVX-512: the value is non-negative once biased.
            let bias = self.ci(1023i128 << m_bits);
            let biased = self.i("addi", &d, &bias);
            let s = self.i("shrui", &biased, &shift);
            let k = self.ci(1023);
            self.i("subi", &s, &k)
        } else {
            self.i("shrsi", &d, &shift)
        };
        let low = self.i("andi", &d, &mask);
        let mb = self.i("addi", &low, &k);
        let m = self.of_bits(&mb);
        let n = self.of_int(&n);
        let less = self.c(-scale_n);
        let zero = self.c(0.0);
        let adjust = self.sel(&tiny, &less, &zero);
        let n = self.add(&n, &adjust);

        (self.add_c(&m, -1.0), n)
    }

    /// `log((1 + s) / (1 - s)) / s - 2`, from `z = s^2`.
    fn log_series(&mut self, z: &V) -> V {
        let c: &[f64] = if self.double() {
            &[
                6.666666666666735130e-01,
                3.999999999940941908e-01,
                2.857142874366239149e-01,
                2.222219843214978396e-01,
                1.818357216161805012e-01,
                1.531383769920937332e-01,
                1.479819860511658591e-01,
            ]
        } else {
            &[0.666_666_626_93, 0.400_009_721_52, 0.284_987_866_88, 0.242_790_788_41]
        };
        let r = self.poly(z, c);
        self.mul(&r, z)
    }

    pub(super) fn log(&mut self, x: &V) -> V {
        let (f, n) = self.log_parts(x);
        let below = self.add_c(&f, 2.0);
        let s = self.div(&f, &below);
        let z = self.mul(&s, &s);
        let r = self.log_series(&z);
        let half = self.mul_c(&f, 0.5);
        let hfsq = self.mul(&half, &f);
        let (hi, lo) = if self.double() { (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10) } else { (6.931_381_225_6e-1, 9.058_000_614_5e-6) };
        let sum = self.add(&hfsq, &r);
        let nlo = self.mul_c(&n, lo);
        let t = self.fma(&s, &sum, &nlo);
        let t = self.sub(&hfsq, &t);
        let t = self.sub(&t, &f);
        let nhi = self.mul_c(&n, hi);
        let r = self.sub(&nhi, &t);
        self.log_edges(x, &r)
    }

    /// The logarithm of infinity, zero, and what is below it or no number; elsewhere `r`.
    fn log_edges(&mut self, x: &V, r: &V) -> V {
        let is_inf = self.cmp_c("oeq", x, f64::INFINITY);
        let r = self.sel_c(&is_inf, f64::INFINITY, r);
        let is_zero = self.cmp_c("oeq", x, 0.0);
        let r = self.sel_c(&is_zero, f64::NEG_INFINITY, &r);
        let bad = self.cmp_c("ult", x, 0.0);
        self.sel_c(&bad, f64::NAN, &r)
    }

    /// The logarithm as a sum of two `f64`, good to about 2^-60 of it; the second is small, and anything where the
    /// first is not finite.
    fn log_pair(&mut self, x: &V) -> (V, V) {
        let (f, n) = self.log_parts(x);
        // s = f / (2 + f), and what the rounding of the sum and of the quotient lost.
        let below = self.add_c(&f, 2.0);
        let back = self.add_c(&below, -2.0);
        let below_low = self.sub(&f, &back);
        let s = self.div(&f, &below);
        let minus = self.neg(&s);
        let rest = self.fma(&minus, &below, &f);
        let rest = self.fma(&minus, &below_low, &rest);
        let s_low = self.div(&rest, &below);
        let z = self.mul(&s, &s);
        let series = self.log_series(&z);
        // n ln2, its high part exact, then 2 s, which is smaller, then the rest.
        let whole = self.mul_c(&n, 6.931_471_803_691_238e-1);
        let twice = self.add(&s, &s);
        let sum = self.add(&whole, &twice);
        let kept = self.sub(&sum, &whole);
        let lost = self.sub(&twice, &kept);
        let low = self.fma_c(&n, 1.908_214_929_270_587_7e-10, &lost);
        let low = self.fma_c(&s_low, 2.0, &low);
        let low = self.fma(&s, &series, &low);
        let high = self.add(&sum, &low);
        let kept = self.sub(&high, &sum);
        let low = self.sub(&low, &kept);
        (self.log_edges(x, &high), low)
    }

    pub(super) fn log1p(&mut self, x: &V) -> V {
        let u = self.add_c(x, 1.0);
        let l = self.log(&u);
        // What rounding `u` lost, to first order.
        let back = self.add_c(&u, -1.0);
        let lost = self.sub(x, &back);
        let d = self.div(&lost, &u);
        let r = self.add(&l, &d);
        let big = self.cmp_c("oge", &u, if self.double() { 1e17 } else { 1e9 });
        let r = self.sel(&big, &l, &r);
        let zero = self.cmp_c("oeq", &u, 0.0);
        self.sel(&zero, &l, &r)
    }

    pub(super) fn softplus(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let minus = self.neg(&a);
        let e = self.exp(&minus);
        let l = self.log1p(&e);
        let zero = self.c(0.0);
        let above = self.cmp("olt", x, &zero);
        let m = self.sel(&above, &zero, x);
        self.add(&m, &l)
    }

    pub(super) fn asinh(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let aa = self.mul(&a, &a);
        let one = self.c(1.0);
        let inner = self.add(&aa, &one);
        let root = self.sqrt(&inner);
        let below = self.add_c(&root, 1.0);
        let q = self.div(&aa, &below);
        let t = self.add(&a, &q);
        let near = self.log1p(&t);
        let r = self.or_log_2(&a, &near);
        self.copysign(&r, x)
    }

    pub(super) fn acosh(&mut self, x: &V) -> V {
        let t = self.add_c(x, -1.0);
        let two = self.add(&t, &t);
        let inner = self.fma(&t, &t, &two);
        let root = self.sqrt(&inner);
        let s = self.add(&t, &root);
        let near = self.log1p(&s);
        let r = self.or_log_2(x, &near);
        let bad = self.cmp_c("ult", x, 1.0);
        self.sel_c(&bad, f64::NAN, &r)
    }

    /// `near`, or `log(2 a)` where `a` is so large that its square would overflow or add nothing.
    fn or_log_2(&mut self, a: &V, near: &V) -> V {
        let l = self.log(a);
        let far = self.add_c(&l, std::f64::consts::LN_2);
        let is_far = self.cmp_c("ogt", a, 2f64.powi(28));
        self.sel(&is_far, &far, near)
    }

    pub(super) fn atanh(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let minus = self.neg(&a);
        let below = self.add_c(&minus, 1.0);
        let two = self.add(&a, &a);
        let q = self.div(&two, &below);
        let l = self.log1p(&q);
        let r = self.mul_c(&l, 0.5);
        let r = self.copysign(&r, x);
        let bad = self.cmp_c("ugt", &a, 1.0);
        self.sel_c(&bad, f64::NAN, &r)
    }

    // ---- circular functions ----

    /// Sine (`false`) or cosine of `x`, the argument reduced in `f64`. Good to |x| of 2^50; beyond that the phase is
    /// not resolved, and the result only stays within -1..1.
    pub(super) fn sin_cos(&mut self, x: &V, cosine: bool) -> V {
        let wide = self.ty.with(DType::F64);
        let x64 = convert(self.e, x, self.ty, DType::F64);
        let (r, q) = {
            let mut w = Float::new(self.e, wide);
            let (r, k) = w.reduce(&x64);
            let k = if cosine { w.add_c(&k, 1.0) } else { k };
            let quarter = w.mul_c(&k, 0.25);
            let whole = w.f("math.floor", &[&quarter]);
            let q = w.fma_c(&whole, -4.0, &k);
            (r, q)
        };
        // Everything after the reduction in the type itself.
        let (r, q) = (convert(self.e, &r, wide, self.ty.dtype()), convert(self.e, &q, wide, self.ty.dtype()));
        let z = self.mul(&r, &r);
        let (sc, cc): (&[f64], &[f64]) = if self.double() {
            (
                &[
                    -1.66666666666666324348e-01,
                    8.33333333332248946124e-03,
                    -1.98412698298579493134e-04,
                    2.75573137070700676789e-06,
                    -2.50507602534068634195e-08,
                    1.58969099521155010221e-10,
                ],
                &[
                    4.16666666666666019037e-02,
                    -1.38888888888741095749e-03,
                    2.48015872894767294178e-05,
                    -2.75573143513906633035e-07,
                    2.08757232129817482790e-09,
                    -1.13596475577881948265e-11,
                ],
            )
        } else {
            (
                &[-1.666_666_641_626_5e-1, 8.333_329_385_889_5e-3, -1.983_933_483_609_7e-4, 2.718_311_493_989_8e-6],
                &[4.166_662_332_373_9e-2, -1.388_676_377_460_99e-3, 2.439_044_879_627_7e-5],
            )
        };
        let s = self.poly(&z, sc);
        let s = self.mul(&s, &z);
        let s = self.fma(&s, &r, &r);
        let c = self.poly(&z, cc);
        let zz = self.mul(&z, &z);
        let c = self.mul(&c, &zz);
        let one = self.c(1.0);
        let c1 = self.fma_c(&z, -0.5, &one);
        let c = self.add(&c1, &c);
        // Quadrants 1 and 3 take the cosine, 2 and 3 the other sign.
        let is1 = self.cmp_c("oeq", &q, 1.0);
        let is3 = self.cmp_c("oeq", &q, 3.0);
        let odd = self.logic("ori", &is1, &is3);
        let v = self.sel(&odd, &c, &s);
        let minus = self.neg(&v);
        let flip = self.cmp_c("oge", &q, 2.0);
        self.sel(&flip, &minus, &v)
    }

    /// `x - k pi/2` and `k`, for `f64`.
    fn reduce(&mut self, x: &V) -> (V, V) {
        let scaled = self.mul_c(x, std::f64::consts::FRAC_2_PI);
        let k = self.round(&scaled);
        // pi/2 in three pieces of 53 bits.
        let r = self.fma_c(&k, -1.570_796_326_794_896_6, x);
        let r = self.fma_c(&k, -6.123_233_995_736_766e-17, &r);
        let r = self.fma_c(&k, 1.497_384_904_859_169_6e-33, &r);
        // What is left of an argument beyond the resolution is no phase.
        let size = self.abs(&r);
        let lost = self.cmp_c("ogt", &size, 1.0);
        (self.sel_c(&lost, 0.0, &r), k)
    }

    pub(super) fn tan(&mut self, x: &V) -> V {
        let (s, c) = (self.sin_cos(x, false), self.sin_cos(x, true));
        self.div(&s, &c)
    }

    pub(super) fn atan(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let big = self.cmp_c("ogt", &a, 2.414_213_562_373_095);
        let mid = self.cmp_c("ogt", &a, 0.66);
        let minus_one = self.c(-1.0);
        let inverse = self.div(&minus_one, &a);
        let (less, more) = (self.add_c(&a, -1.0), self.add_c(&a, 1.0));
        let ratio = self.div(&less, &more);
        let t = self.sel(&mid, &ratio, &a);
        let t = self.sel(&big, &inverse, &t);
        let (zero, quarter, half) = (self.c(0.0), self.c(std::f64::consts::FRAC_PI_4), self.c(std::f64::consts::FRAC_PI_2));
        let base = self.sel(&mid, &quarter, &zero);
        let base = self.sel(&big, &half, &base);
        let (lo_half, lo_quarter) = (self.c(6.123_233_995_736_766e-17), self.c(3.061_616_997_868_383e-17));
        let low = self.sel(&mid, &lo_quarter, &zero);
        let low = self.sel(&big, &lo_half, &low);
        let z = self.mul(&t, &t);
        let p = self.poly(
            &z,
            &[-6.485021904942025371773e1, -1.228866684490136173410e2, -7.500855792314704667340e1, -1.615753718733365076637e1, -8.750608600031904122785e-1],
        );
        let q = self.poly(
            &z,
            &[1.945506571482613964425e2, 4.853903996359136964868e2, 4.328810604912902668951e2, 1.650270098316988542046e2, 2.485846490142306297962e1, 1.0],
        );
        let pz = self.mul(&p, &z);
        let y = self.div(&pz, &q);
        let y = self.fma(&t, &y, &t);
        let y = self.add(&y, &low);
        let r = self.add(&base, &y);
        self.copysign(&r, x)
    }

    pub(super) fn asin(&mut self, x: &V) -> V {
        let one = self.c(1.0);
        let (less, more) = (self.sub(&one, x), self.add(&one, x));
        let product = self.mul(&less, &more);
        let root = self.sqrt(&product);
        let t = self.div(x, &root);
        self.atan(&t)
    }

    pub(super) fn acos(&mut self, x: &V) -> V {
        let one = self.c(1.0);
        let (less, more) = (self.sub(&one, x), self.add(&one, x));
        let ratio = self.div(&less, &more);
        let root = self.sqrt(&ratio);
        let a = self.atan(&root);
        self.add(&a, &a)
    }

    // ---- others ----

    pub(super) fn erf(&mut self, x: &V) -> V {
        let a = self.abs(x);
        let s = self.mul(x, x);
        if !self.double() {
            let r = self.poly(&s, &[1.283_791_66e-1, -3.761_253_36e-1, 1.128_199_25e-1, -2.676_813_49e-2, 4.991_194_23e-3, -5.967_617_03e-4]);
            let near = self.fma(&r, x, x);
            let t = self.clamp(&a, 0.0, 4.0);
            let r =
                self.poly(&t, &[-1.287_175_12e-1, -6.348_466_87e-1, -1.067_778_77e-1, 2.425_462_19e-2, -3.883_964_38e-3, 3.831_971_26e-4, -1.728_534_70e-5]);
            let minus = self.neg(&t);
            let r = self.fma(&r, &t, &minus);
            let e = self.exp(&r);
            let one = self.c(1.0);
            let far = self.sub(&one, &e);
            let far = self.copysign(&far, x);
            let is_far = self.cmp_c("ogt", &a, 0.927_734_375);
            return self.sel(&is_far, &far, &near);
        }
        // fdlibm's four ranges, each evaluated, one taken.
        let p = self.poly(
            &s,
            &[1.28379167095512558561e-01, -3.25042107247001499370e-01, -2.84817495755985104766e-02, -5.77027029648944159157e-03, -2.37630166566501626084e-05],
        );
        let q = self.poly(
            &s,
            &[1.0, 3.97917223959155352819e-01, 6.50222499887672944485e-02, 5.08130628187576562776e-03, 1.32494738004321644526e-04, -3.96022827877536812320e-06],
        );
        let y = self.div(&p, &q);
        let near = self.fma(x, &y, x);
        let d = self.add_c(&a, -1.0);
        let p = self.poly(
            &d,
            &[
                -2.36211856075265944077e-03,
                4.14856118683748331666e-01,
                -3.72207876035701323847e-01,
                3.18346619901161753674e-01,
                -1.10894694282396677476e-01,
                3.54783043256182359371e-02,
                -2.16637559486879084300e-03,
            ],
        );
        let q = self.poly(
            &d,
            &[
                1.0,
                1.06420880400844228286e-01,
                5.40397917702171048937e-01,
                7.18286544141962662868e-02,
                1.26171219808761642112e-01,
                1.36370839120290507362e-02,
                1.19844998467991074170e-02,
            ],
        );
        let y = self.div(&p, &q);
        let mid = self.add_c(&y, 8.45062911510467529297e-01);
        let t = self.clamp(&a, 1.0, 6.0);
        let tt = self.mul(&t, &t);
        let one = self.c(1.0);
        let i = self.div(&one, &tt);
        let p1 = self.poly(
            &i,
            &[
                -9.86494403484714822705e-03,
                -6.93858572707181764372e-01,
                -1.05586262253232909814e+01,
                -6.23753324503260060396e+01,
                -1.62396669462573470355e+02,
                -1.84605092906711035994e+02,
                -8.12874355063065934246e+01,
                -9.81432934416914548592e+00,
            ],
        );
        let q1 = self.poly(
            &i,
            &[
                1.0,
                1.96512716674392571292e+01,
                1.37657754143519042600e+02,
                4.34565877475229228821e+02,
                6.45387271733267880336e+02,
                4.29008140027567833386e+02,
                1.08635005541779435134e+02,
                6.57024977031928170135e+00,
                -6.04244152148580987438e-02,
            ],
        );
        let p2 = self.poly(
            &i,
            &[
                -9.86494292470009928597e-03,
                -7.99283237680523006574e-01,
                -1.77579549177547519889e+01,
                -1.60636384855821916062e+02,
                -6.37566443368389627722e+02,
                -1.02509513161107724954e+03,
                -4.83519191608651397019e+02,
            ],
        );
        let q2 = self.poly(
            &i,
            &[
                1.0,
                3.03380607434824582924e+01,
                3.25792512996573918826e+02,
                1.53672958608443695994e+03,
                3.19985821950859553908e+03,
                2.55305040643316442583e+03,
                4.74528541206955367215e+02,
                -2.24409524465858183362e+01,
            ],
        );
        let outer = self.cmp_c("ogt", &t, 1.0 / 0.35);
        let (p, q) = (self.sel(&outer, &p2, &p1), self.sel(&outer, &q2, &q1));
        let ratio = self.div(&p, &q);
        let minus = self.neg(&tt);
        let power = self.add_c(&minus, -0.5625);
        let power = self.add(&power, &ratio);
        let e = self.exp(&power);
        let erfc = self.div(&e, &t);
        let far = self.sub(&one, &erfc);
        let is_far = self.cmp_c("oge", &a, 1.25);
        let r = self.sel(&is_far, &far, &mid);
        let r = self.copysign(&r, x);
        let is_near = self.cmp_c("ult", &a, 0.84375);
        self.sel(&is_near, &near, &r)
    }

    /// `f64` only.
    pub(super) fn pow(&mut self, a: &V, b: &V) -> V {
        let m = self.abs(a);
        // The exponential multiplies an error of the power, so the power is a sum of two: then powers that are whole come out whole.
        let (l, l_low) = self.log_pair(&m);
        let power = self.mul(b, &l);
        let minus = self.neg(&power);
        let low = self.fma(b, &l, &minus);
        let low = self.fma(b, &l_low, &low);
        let size = self.abs(&power);
        let inside = self.cmp_c("olt", &size, 746.0);
        let zero = self.c(0.0);
        let low = self.sel(&inside, &low, &zero);
        let r = self.exp_of_sum(&power, Some(&low));
        // |a| = 1 is 1 for every b, infinite ones too.
        let unit = self.cmp_c("oeq", &m, 1.0);
        let r = self.sel_c(&unit, 1.0, &r);
        let whole = self.f("math.trunc", &[b]);
        let is_whole = self.cmp("oeq", &whole, b);
        let half = self.mul_c(b, 0.5);
        let half_whole = self.f("math.trunc", &[&half]);
        let not_even = self.cmp("one", &half_whole, &half);
        let odd = self.logic("andi", &is_whole, &not_even);
        // The sign of `a`, -0 and -inf too, survives odd powers.
        let signed = self.copysign(&r, a);
        let r = self.sel(&odd, &signed, &r);
        let negative = self.cmp_c("olt", a, 0.0);
        let fraction = self.cmp("one", &whole, b);
        let bad = self.logic("andi", &negative, &fraction);
        let finite = self.cmp_c("ogt", &m, f64::INFINITY);
        let minus_inf = self.cmp_c("oeq", a, f64::NEG_INFINITY);
        // (-inf)^fraction is 0 or inf, not NaN.
        let keep = self.logic("ori", &finite, &minus_inf);
        let nan = self.sel_c(&bad, f64::NAN, &r);
        let r = self.sel(&keep, &r, &nan);
        let nan_a = self.cmp("uno", a, b);
        let r = self.sel_c(&nan_a, f64::NAN, &r);
        // a^0 and 1^b are 1 even for NaN.
        let one_a = self.cmp_c("oeq", a, 1.0);
        let r = self.sel_c(&one_a, 1.0, &r);
        let zero_b = self.cmp_c("oeq", b, 0.0);
        self.sel_c(&zero_b, 1.0, &r)
    }

    /// Remainder with the sign of the dividend; exact. `f64` only.
    pub(super) fn rem(&mut self, a: &V, b: &V) -> V {
        let (r0, d) = (self.abs(a), self.abs(b));
        let t = self.e.ty(self.ty);
        let r = self.e.fresh();
        let (x, y) = (self.e.fresh(), self.e.fresh());
        self.e.open(&format!("{r} = scf.while ({x} = {r0}) : ({t}) -> {t} {{"));
        let size = self.abs(&x);
        let again = self.cmp("oge", &size, &d);
        let zero = self.cmp_c("ogt", &d, 0.0);
        let finite = self.cmp_c("olt", &size, f64::INFINITY);
        let again = self.logic("andi", &again, &zero);
        let again = self.logic("andi", &again, &finite);
        let any = if self.ty.is_scalar() {
            again.clone()
        } else {
            let tb = self.e.ty(self.ty.with(DType::Bool));
            self.e.op(&format!("vector.reduction <or>, {again} : {tb} into i1"))
        };
        self.e.line(&format!("scf.condition({any}) {x} : {t}"));
        self.e.close("} do {");
        self.e.reopen();
        self.e.line(&format!("^bb0({y}: {t}):"));
        // The remainder by a rounded quotient is exact, though it may have the other sign. Where the quotient would overflow,
        // a multiple of the divisor goes first.
        let size = self.abs(&y);
        let small = self.mul_c(&size, 2f64.powi(-1000));
        let mut by = d.clone();
        for _ in 0..2 {
            let far = self.cmp("oge", &small, &by);
            let up = self.mul_c(&by, 2f64.powi(1000));
            by = self.sel(&far, &up, &by);
        }
        let q = self.div(&y, &by);
        let q = self.f("math.trunc", &[&q]);
        let q = self.neg(&q);
        let next = self.fma(&q, &by, &y);
        let done = self.cmp("ult", &size, &d);
        let next = self.sel(&done, &y, &next);
        self.e.line(&format!("scf.yield {next} : {t}"));
        self.e.close("}");
        let negative = self.cmp_c("olt", &r, 0.0);
        let up = self.add(&r, &d);
        let r = self.sel(&negative, &up, &r);
        let r = self.copysign(&r, a);
        // By zero or of an infinity: NaN. (`d` is NaN or `a` is NaN: `r` is already.)
        let by_zero = self.cmp_c("ueq", &d, 0.0);
        let r = self.sel_c(&by_zero, f64::NAN, &r);
        let of_inf = self.cmp_c("ueq", &r0, f64::INFINITY);
        self.sel_c(&of_inf, f64::NAN, &r)
    }

    pub(super) fn modulo(&mut self, a: &V, b: &V) -> V {
        let r = self.rem(a, b);
        let (neg_r, neg_b) = (self.cmp_c("olt", &r, 0.0), self.cmp_c("olt", b, 0.0));
        let differ = self.logic("xori", &neg_r, &neg_b);
        let some = self.cmp_c("one", &r, 0.0);
        let fix = self.logic("andi", &differ, &some);
        let moved = self.add(&r, b);
        self.sel(&fix, &moved, &r)
    }
}
