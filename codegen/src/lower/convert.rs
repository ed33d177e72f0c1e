//! Conversions between element types, as `Scalar::cast` defines them.
use super::Mlir;
use crate::tile::Ty;
use pavage_ir::{
    DType, Scalar,
    dtype::Class,
    minifloat::{Mini, Special},
};

/// Convert `v` of type `from` to `dtype`.
pub fn cast(e: &mut Mlir, v: &str, from: Ty, dtype: DType) -> String {
    let to = from.with(dtype);
    let (a, b) = (from.dtype(), dtype);
    if a == b {
        return v.to_owned();
    }
    let (ta, tb) = (e.ty(from), e.ty(to));
    match (a.class(), b.class()) {
        (Class::Float, Class::Float) => float(e, v, from, dtype),
        (_, Class::Bool) => {
            if a.is_float() {
                let wide = to_f32_or_f64(e, v, from);
                let zero = e.constant(Scalar::F(0.0), wide.1);
                let t = e.ty(wide.1);
                e.op(&format!("arith.cmpf une, {}, {zero} : {t}", wide.0))
            } else {
                let zero = e.constant(Scalar::I(0), from);
                e.op(&format!("arith.cmpi ne, {v}, {zero} : {ta}"))
            }
        }
        (Class::Float, _) => {
            let (v, wide) = to_f32_or_f64(e, v, from);
            let t = e.ty(wide);
            let signed = b.class() == Class::Signed;
            if b.bits() <= 16 {
                return narrow_int(e, &v, wide, dtype);
            }
            e.op(&format!("llvm.call_intrinsic \"llvm.fpto{}i.sat\"({v}) : ({t}) -> {tb}", if signed { "s" } else { "u" }))
        }
        (class, Class::Float) => {
            let unsigned = class != Class::Signed;
            let wide = if b == DType::F64 { DType::F64 } else { DType::F32 };
            let t = e.ty(from.with(wide));
            let r = e.op(&format!("arith.{}itofp {v} : {ta} to {t}", if unsigned { "u" } else { "s" }));
            float(e, &r, from.with(wide), dtype)
        }
        // Integers and bool to integers: extend by the source's sign, or drop bits.
        (class, _) => {
            let width = |d: DType| if d == DType::Bool { 1 } else { d.bits().max(8) };
            let r = match width(b).cmp(&width(a)) {
                std::cmp::Ordering::Equal => v.to_owned(),
                std::cmp::Ordering::Greater if class == Class::Signed => e.op(&format!("arith.extsi {v} : {ta} to {tb}")),
                std::cmp::Ordering::Greater => e.op(&format!("arith.extui {v} : {ta} to {tb}")),
                std::cmp::Ordering::Less => e.op(&format!("arith.trunci {v} : {ta} to {tb}")),
            };
            if b.is_packed() { wrap_packed(e, &r, to) } else { r }
        }
    }
}

/// Keep the low bits of each byte that an element narrower than a byte has, extended by the sign of the dtype.
pub fn wrap_packed(e: &mut Mlir, v: &str, ty: Ty) -> String {
    let t = e.ty(ty);
    let rest = e.constant(Scalar::I(8 - ty.dtype().bits() as i128), ty.with(DType::I8));
    let up = e.op(&format!("arith.shli {v}, {rest} : {t}"));
    let shift = if ty.dtype().class() == Class::Signed { "shrsi" } else { "shrui" };
    e.op(&format!("arith.{shift} {up}, {rest} : {t}"))
}

/// A float to an integer of at most 16 bits: clamped as a float, converted by the one vector instruction that x86 has, cut.
/// (The saturating intrinsic would go lane by lane.)
fn narrow_int(e: &mut Mlir, v: &str, ty: Ty, dtype: DType) -> String {
    let (lo, hi) = dtype.int_range();
    let t = e.ty(ty);
    let choose = |e: &mut Mlir, cond: &str, yes: &str, no: &str| {
        let text = select(e, cond, yes, no, ty);
        e.op(&text)
    };
    let (lo_v, hi_v) = (e.constant(Scalar::F(lo as f64), ty), e.constant(Scalar::F(hi as f64), ty));
    // NaN fails the comparison and becomes the lower end: 0 for unsigned, put right for signed.
    let above = e.op(&format!("arith.cmpf ogt, {v}, {lo_v} : {t}"));
    let mut r = choose(e, &above, v, &lo_v);
    let below = e.op(&format!("arith.cmpf olt, {r}, {hi_v} : {t}"));
    r = choose(e, &below, &r, &hi_v);
    if lo != 0 {
        let zero = e.constant(Scalar::F(0.0), ty);
        let number = e.op(&format!("arith.cmpf ord, {v}, {v} : {t}"));
        r = choose(e, &number, &r, &zero);
    }
    let (wide, narrow) = (e.ty(ty.with(DType::I32)), e.ty(ty.with(dtype)));
    let r = e.op(&format!("arith.fptosi {r} : {t} to {wide}"));
    e.op(&format!("arith.trunci {r} : {wide} to {narrow}"))
}

/// A float as `f64` if it is one, else as `f32`; with its type.
pub fn to_f32_or_f64(e: &mut Mlir, v: &str, from: Ty) -> (String, Ty) {
    let wide = if from.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    (float(e, v, from, wide), from.with(wide))
}

/// Convert between float types.
fn float(e: &mut Mlir, v: &str, from: Ty, dtype: DType) -> String {
    let (a, b) = (from.dtype(), dtype);
    if a == b {
        return v.to_owned();
    }
    let (f32t, to) = (from.with(DType::F32), from.with(dtype));
    let (ta, t32, tb) = (e.ty(from), e.ty(f32t), e.ty(to));
    let native = |d: DType| matches!(d, DType::F64 | DType::F32 | DType::F16);
    match (a, b) {
        (DType::F32, DType::BF16) => to_bf16(e, v, f32t),
        (DType::BF16, DType::F32) => {
            let ints = from.with(DType::I32);
            let ti = e.ty(ints);
            let wide = e.op(&format!("arith.extui {v} : {ta} to {ti}"));
            let sixteen = e.constant(Scalar::I(16), ints);
            let up = e.op(&format!("arith.shli {wide}, {sixteen} : {ti}"));
            e.op(&format!("arith.bitcast {up} : {ti} to {t32}"))
        }
        (DType::F8E5M2, DType::F32) => {
            // The bits are the upper half of a binary16.
            let (t16, half) = (e.ty(from.with(DType::I16)), e.ty(from.with(DType::F16)));
            let wide = e.op(&format!("arith.extui {v} : {ta} to {t16}"));
            let eight = e.constant(Scalar::I(8), from.with(DType::I16));
            let up = e.op(&format!("arith.shli {wide}, {eight} : {t16}"));
            let h = e.op(&format!("arith.bitcast {up} : {t16} to {half}"));
            e.op(&format!("arith.extf {h} : {half} to {t32}"))
        }
        (DType::F8E8M0, DType::F32) => from_e8m0(e, v, from),
        (DType::F32, DType::F8E8M0) => to_e8m0(e, v, from),
        (d, DType::F32) if let Some(format) = Mini::of(d) => from_mini(e, v, from, format),
        (DType::F32, d) if let Some(format) = Mini::of(d) => to_mini(e, v, from, d, format),
        _ if native(a) && native(b) && (a == DType::F32 || b == DType::F32) => {
            let op = if b.bits() > a.bits() { "extf" } else { "truncf" };
            let r = e.op(&format!("arith.{op} {v} : {ta} to {tb}"));
            if a == DType::F64 && b == DType::F32 && from.is_scalar() {
                // With AVX-512, LLVM would join this with a later rounding to f16 into a library call.
                return e.op(&format!("llvm.call_intrinsic \"llvm.arithmetic.fence.f32\"({r}) : (f32) -> f32"));
            }
            r
        }
        _ => {
            let wide = float(e, v, from, DType::F32);
            float(e, &wide, f32t, dtype)
        }
    }
}

/// Round `f32` to the bits of a `bf16`, ties to even, NaN kept quiet.
fn to_bf16(e: &mut Mlir, v: &str, ty: Ty) -> String {
    let ints = ty.with(DType::I32);
    let (tf, ti, ts) = (e.ty(ty), e.ty(ints), e.ty(ty.with(DType::I16)));
    let bits = e.op(&format!("arith.bitcast {v} : {tf} to {ti}"));
    let sixteen = e.constant(Scalar::I(16), ints);
    let one = e.constant(Scalar::I(1), ints);
    let half = e.constant(Scalar::I(0x7fff), ints);
    let quiet = e.constant(Scalar::I(0x7fc0), ints);
    let top = e.op(&format!("arith.shrui {bits}, {sixteen} : {ti}"));
    let odd = e.op(&format!("arith.andi {top}, {one} : {ti}"));
    let bias = e.op(&format!("arith.addi {odd}, {half} : {ti}"));
    let sum = e.op(&format!("arith.addi {bits}, {bias} : {ti}"));
    let rounded = e.op(&format!("arith.shrui {sum}, {sixteen} : {ti}"));
    let nan = e.op(&format!("arith.cmpf uno, {v}, {v} : {tf}"));
    let r = e.op(&select(e, &nan, &quiet, &rounded, ints));
    e.op(&format!("arith.trunci {r} : {ti} to {ts}"))
}

fn select(e: &Mlir, cond: &str, yes: &str, no: &str, ty: Ty) -> String {
    let t = e.ty(ty);
    if ty.is_scalar() {
        format!("arith.select {cond}, {yes}, {no} : {t}")
    } else {
        format!("arith.select {cond}, {yes}, {no} : {}, {t}", e.ty(ty.with(DType::Bool)))
    }
}

fn from_mini(e: &mut Mlir, v: &str, from: Ty, format: Mini) -> String {
    let ints = from.with(DType::I32);
    let f32t = from.with(DType::F32);
    let (ta, ti, tf) = (e.ty(from), e.ty(ints), e.ty(f32t));
    let wide = e.op(&format!("arith.extui {v} : {ta} to {ti}"));
    let sign = i128::from(format.sign());
    let [body_mask, sign_mask, up_by, sign_by] =
        [sign - 1, sign, 23 - i128::from(format.mantissa), 31 - i128::from(format.body)].map(|c| e.constant(Scalar::I(c), ints));
    let body = e.op(&format!("arith.andi {wide}, {body_mask} : {ti}"));
    let sign = e.op(&format!("arith.andi {wide}, {sign_mask} : {ti}"));
    let up = e.op(&format!("arith.shli {body}, {up_by} : {ti}"));
    let sign_up = e.op(&format!("arith.shli {sign}, {sign_by} : {ti}"));
    let bits = e.op(&format!("arith.ori {up}, {sign_up} : {ti}"));
    let tiny = e.op(&format!("arith.bitcast {bits} : {ti} to {tf}"));
    // From one exponent bias to the other: exact, subnormals included.
    let scale = e.constant(Scalar::F(2f64.powi(127 - format.bias)), f32t);
    let value = e.op(&format!("arith.mulf {tiny}, {scale} : {tf}"));
    let (code, of) = match format.special {
        Special::TopNan => (i128::from(format.largest()) + 1, &body),
        Special::ZeroNan => (i128::from(format.sign()), &wide),
        Special::Ieee | Special::Finite => return value,
    };
    let code = e.constant(Scalar::I(code), ints);
    let nan = e.constant(Scalar::F(f64::NAN), f32t);
    let is_nan = e.op(&format!("arith.cmpi eq, {of}, {code} : {ti}"));
    e.op(&select(e, &is_nan, &nan, &value, f32t))
}

/// Round `f32` to the code of a narrow float, as `minifloat::encode` does.
fn to_mini(e: &mut Mlir, v: &str, from: Ty, dtype: DType, format: Mini) -> String {
    let (mant, bias) = (format.mantissa as i32, format.bias);
    let ints = from.with(DType::I32);
    let (tf, ti, tb) = (e.ty(from), e.ty(ints), e.ty(from.with(dtype)));
    let bits = e.op(&format!("arith.bitcast {v} : {tf} to {ti}"));
    let [abs_mask, drop, one, sign_shift, sign_mask] =
        [0x7fff_ffff, i128::from(23 - mant), 1, 31 - i128::from(format.body), i128::from(format.sign())].map(|c| e.constant(Scalar::I(c), ints));
    let a_bits = e.op(&format!("arith.andi {bits}, {abs_mask} : {ti}"));
    let a = e.op(&format!("arith.bitcast {a_bits} : {ti} to {tf}"));
    // Normal codes: round the mantissa in the integer, then shift the exponent's bias.
    let half = e.constant(Scalar::I((1i128 << (22 - mant)) - 1), ints);
    let rebias = e.constant(Scalar::I(i128::from(127 - bias) << mant), ints);
    let low = e.op(&format!("arith.shrui {a_bits}, {drop} : {ti}"));
    let odd = e.op(&format!("arith.andi {low}, {one} : {ti}"));
    let with_half = e.op(&format!("arith.addi {a_bits}, {half} : {ti}"));
    let sum = e.op(&format!("arith.addi {with_half}, {odd} : {ti}"));
    let shifted = e.op(&format!("arith.shrui {sum}, {drop} : {ti}"));
    let normal = e.op(&format!("arith.subi {shifted}, {rebias} : {ti}"));
    // Subnormal codes: adding a float whose last place is the unit rounds in the hardware.
    let magic = 2f64.powi(1 - bias - mant + 23);
    let magic_f = e.constant(Scalar::F(magic), from);
    let magic_i = e.constant(Scalar::I(i128::from((magic as f32).to_bits())), ints);
    let moved = e.op(&format!("arith.addf {a}, {magic_f} : {tf}"));
    let moved_bits = e.op(&format!("arith.bitcast {moved} : {tf} to {ti}"));
    let tiny = e.op(&format!("arith.subi {moved_bits}, {magic_i} : {ti}"));
    let smallest = e.constant(Scalar::F(2f64.powi(1 - bias)), from);
    let is_tiny = e.op(&format!("arith.cmpf olt, {a}, {smallest} : {tf}"));
    let code = e.op(&select(e, &is_tiny, &tiny, &normal, ints));
    let sign = e.op(&format!("arith.shrui {bits}, {sign_shift} : {ti}"));
    let sign = e.op(&format!("arith.andi {sign}, {sign_mask} : {ti}"));
    // Codes are in order, so what is too large, infinity among it, is above the largest.
    let largest = i128::from(format.largest());
    let is_nan = e.op(&format!("arith.cmpf uno, {v}, {v} : {tf}"));
    let (limit, nan_code) = match format.special {
        Special::Ieee => (largest + 1, i128::from(format.sign()) - 1),
        Special::TopNan => (largest + 1, largest + 1),
        Special::Finite => (largest, 0),
        Special::ZeroNan => (largest + 1, largest + 1),
    };
    let (limit, nan_code) = (e.constant(Scalar::I(limit), ints), e.constant(Scalar::I(nan_code), ints));
    let code = e.op(&format!("arith.minui {code}, {limit} : {ti}"));
    let code = e.op(&select(e, &is_nan, &nan_code, &code, ints));
    let sign = match format.special {
        Special::Ieee | Special::TopNan => sign,
        Special::Finite => {
            // The one stand-in for NaN is the negative zero.
            e.op(&select(e, &is_nan, &sign_mask, &sign, ints))
        }
        Special::ZeroNan => {
            // No sign with zero, nor with NaN, whose code is the sign bit itself.
            let zero = e.constant(Scalar::I(0), ints);
            let plain = e.op(&format!("arith.cmpi eq, {code}, {zero} : {ti}"));
            let signless = e.op(&format!("arith.cmpi uge, {code}, {limit} : {ti}"));
            let drop = e.op(&format!("arith.ori {plain}, {signless} : {}", e.ty(ints.with(DType::Bool))));
            e.op(&select(e, &drop, &zero, &sign, ints))
        }
    };
    let code = e.op(&format!("arith.ori {code}, {sign} : {ti}"));
    e.op(&format!("arith.trunci {code} : {ti} to {tb}"))
}

fn from_e8m0(e: &mut Mlir, v: &str, from: Ty) -> String {
    let (ints, f32t) = (from.with(DType::I32), from.with(DType::F32));
    let (ta, ti, tf) = (e.ty(from), e.ty(ints), e.ty(f32t));
    let wide = e.op(&format!("arith.extui {v} : {ta} to {ti}"));
    let [zero, tiny, twenty_three, top] = [0, 0x40_0000, 23, 255].map(|c| e.constant(Scalar::I(c), ints));
    let up = e.op(&format!("arith.shli {wide}, {twenty_three} : {ti}"));
    let least = e.op(&format!("arith.cmpi eq, {wide}, {zero} : {ti}"));
    let bits = e.op(&select(e, &least, &tiny, &up, ints));
    let value = e.op(&format!("arith.bitcast {bits} : {ti} to {tf}"));
    let nan = e.constant(Scalar::F(f64::NAN), f32t);
    let is_nan = e.op(&format!("arith.cmpi eq, {wide}, {top} : {ti}"));
    e.op(&select(e, &is_nan, &nan, &value, f32t))
}

fn to_e8m0(e: &mut Mlir, v: &str, from: Ty) -> String {
    let ints = from.with(DType::I32);
    let (tf, ti, tb) = (e.ty(from), e.ty(ints), e.ty(from.with(DType::F8E8M0)));
    let bits = e.op(&format!("arith.bitcast {v} : {tf} to {ti}"));
    let [abs_mask, normal, half, quarter, shift, top] = [0x7fff_ffff, 0x80_0000, 0x40_0000, 0x20_0000, 23, 255].map(|c| e.constant(Scalar::I(c), ints));
    let a = e.op(&format!("arith.andi {bits}, {abs_mask} : {ti}"));
    // Half a step of the mantissa, which below the normal numbers is half as wide.
    let below = e.op(&format!("arith.cmpi ult, {a}, {normal} : {ti}"));
    let step = e.op(&select(e, &below, &quarter, &half, ints));
    let sum = e.op(&format!("arith.addi {a}, {step} : {ti}"));
    let code = e.op(&format!("arith.shrui {sum}, {shift} : {ti}"));
    let code = e.op(&format!("arith.minui {code}, {top} : {ti}"));
    e.op(&format!("arith.trunci {code} : {ti} to {tb}"))
}
