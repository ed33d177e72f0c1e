//! Elements of at most 8 bits that the hardware has no type for: floats by their codes, integers of 4 and 2 bits in a byte
//! register, extended by their sign; in memory the first of a byte is in the lowest bits. As `minifloat` has them.
use super::math::{Arith, Bin, Cmp};
use super::{Lower, Lowered, Reg, llty};
use crate::tile::Buf;
use pavage_ir::DType;
use pavage_ir::dtype::Class;
use pavage_ir::minifloat::{Mini, Special};

impl Lower<'_> {
    /// Conversions from or to these dtypes; 16-bit floats are `f32`.
    pub(super) fn convert_narrow(&mut self, r: &Reg, from: DType, to: DType) -> Lowered<Reg> {
        if from == to {
            return Ok(r.clone());
        }
        if from.is_mini() {
            let wide = self.decoded_mini(r, from);
            return self.convert(&wide, DType::F32, to);
        }
        if from.is_packed() {
            let byte = if from.class() == Class::Signed { DType::I8 } else { DType::U8 };
            return self.convert(r, byte, to);
        }
        if to.is_mini() {
            let wide = self.convert(r, from, DType::F32)?;
            return Ok(self.encoded_mini(&wide, to));
        }
        if from.is_float() {
            let v = self.convert(r, from, DType::I32)?;
            let (lo, hi) = to.int_range();
            let (lo, hi) = (self.e.i32(lo as i64), self.e.i32(hi as i64));
            let v = self.e.op("i32", format!("llvm.intr.smax({v}, {lo}) : (i32, i32) -> i32"));
            let v = self.e.op("i32", format!("llvm.intr.smin({v}, {hi}) : (i32, i32) -> i32"));
            return Ok(self.e.conv("trunc", &v, "i8"));
        }
        let v = self.convert(r, from, DType::I8)?;
        Ok(self.wrap(&v, to))
    }

    /// The low bits of a byte, extended by the sign of a packed dtype.
    pub(super) fn wrap(&mut self, v: &Reg, d: DType) -> Reg {
        let rest = 8 - d.bits() as i64;
        let up = self.e.int2c("shl", v, rest);
        self.e.int2c(if d.class() == Class::Signed { "ashr" } else { "lshr" }, &up, rest)
    }

    /// The element at `at` of a buffer of packed elements.
    pub(super) fn packed_element(&mut self, b: Buf, at: &Reg) -> Reg {
        let d = self.buf(b).dtype;
        let per = 8 / d.bits() as i64;
        let (base, _) = self.base(b);
        let byte = self.e.int2c("ashr", at, i64::from(per.ilog2()));
        let p = self.offset_by(&base, &byte, "i8");
        let v = self.e.op("i8", format!("llvm.load {p} {{alignment = 1 : i64}} : {} -> i8", p.ty));
        let part = self.e.int2c("and", at, per - 1);
        let by = self.e.int2c("mul", &part, d.bits() as i64);
        let by = self.e.conv("trunc", &by, "i8");
        let v = self.e.int2("lshr", &v, &by);
        self.wrap(&v, d)
    }

    fn decoded_mini(&mut self, r: &Reg, d: DType) -> Reg {
        debug_assert_eq!(llty(d), "i8");
        let e = &mut self.e;
        let wide = e.conv("zext", r, "i32");
        let Some(format) = Mini::of(d) else {
            // A power of two by its exponent; the least is no normal number.
            let up = e.int2c("shl", &wide, 23);
            let (zero, tiny, top) = (e.i32(0), e.i32(0x40_0000), e.i32(255));
            let least = e.icmp("eq", &wide, &zero);
            let bits = e.select(&least, &tiny, &up);
            let value = e.conv("bitcast", &bits, "f32");
            let nan = e.float("f32", f64::NAN);
            let is_nan = e.icmp("eq", &wide, &top);
            return e.select(&is_nan, &nan, &value);
        };
        if d == DType::F8E5M2 {
            // The bits are the upper half of a binary16.
            let up = e.int2c("shl", &wide, 8);
            let half = e.conv("trunc", &up, "i16");
            let half = e.conv("bitcast", &half, "f16");
            return e.conv("fpext", &half, "f32");
        }
        let sign = i64::from(format.sign());
        let body = e.int2c("and", &wide, sign - 1);
        let up = e.int2c("shl", &body, 23 - i64::from(format.mantissa));
        let signs = e.int2c("and", &wide, sign);
        let signs = e.int2c("shl", &signs, 31 - i64::from(format.body));
        let bits = e.int2("or", &up, &signs);
        let tiny = e.conv("bitcast", &bits, "f32");
        // From one exponent bias to the other: exact, subnormals included.
        let scale = e.float("f32", 2f64.powi(127 - format.bias));
        let value = e.bin(Bin::FMul, &tiny, &scale);
        let (code, of) = match format.special {
            Special::TopNan => (i64::from(format.largest()) + 1, &body),
            Special::ZeroNan => (sign, &wide),
            Special::Ieee | Special::Finite => return value,
        };
        let (code, nan) = (e.i32(code), e.float("f32", f64::NAN));
        let is_nan = e.icmp("eq", of, &code);
        e.select(&is_nan, &nan, &value)
    }

    fn encoded_mini(&mut self, r: &Reg, d: DType) -> Reg {
        let e = &mut self.e;
        let bits = e.conv("bitcast", r, "i32");
        let a_bits = e.int2c("and", &bits, 0x7fff_ffff);
        let Some(format) = Mini::of(d) else {
            // Half a step of the mantissa, which below the normal numbers is half as wide.
            let (normal, half, quarter, top) = (e.i32(0x80_0000), e.i32(0x40_0000), e.i32(0x20_0000), e.i32(255));
            let below = e.icmp("ult", &a_bits, &normal);
            let step = e.select(&below, &quarter, &half);
            let sum = e.int2("add", &a_bits, &step);
            let code = e.int2c("lshr", &sum, 23);
            let code = e.op("i32", format!("llvm.intr.umin({code}, {top}) : (i32, i32) -> i32"));
            return e.conv("trunc", &code, "i8");
        };
        let (mantissa, bias) = (i64::from(format.mantissa), format.bias);
        // Normal codes: round the mantissa in the integer, then shift the exponent's bias.
        let low = e.int2c("lshr", &a_bits, 23 - mantissa);
        let odd = e.int2c("and", &low, 1);
        let sum = e.int2c("add", &a_bits, (1 << (22 - mantissa)) - 1);
        let sum = e.int2("add", &sum, &odd);
        let shifted = e.int2c("lshr", &sum, 23 - mantissa);
        let normal = e.int2c("sub", &shifted, i64::from(127 - bias) << mantissa);
        // Subnormal codes: adding a float whose last place is the unit rounds in the hardware.
        let magic = 2f64.powi(1 - bias - mantissa as i32 + 23);
        let a = e.conv("bitcast", &a_bits, "f32");
        let magic_f = e.float("f32", magic);
        let moved = e.bin(Bin::FAdd, &a, &magic_f);
        let moved = e.conv("bitcast", &moved, "i32");
        let tiny = e.int2c("sub", &moved, i64::from((magic as f32).to_bits() as i32));
        let smallest = e.float("f32", 2f64.powi(1 - bias));
        let is_tiny = e.cmp(Cmp::FLt, &a, &smallest);
        let code = e.select(&is_tiny, &tiny, &normal);
        let sign = e.int2c("lshr", &bits, 31 - i64::from(format.body));
        let sign = e.int2c("and", &sign, i64::from(format.sign()));
        // Codes are in order, so what is too large, infinity among it, is above the largest.
        let largest = i64::from(format.largest());
        let is_nan = e.cmp(Cmp::FUno, r, r);
        let (limit, nan_code) = match format.special {
            Special::Ieee => (largest + 1, i64::from(format.sign()) - 1),
            Special::TopNan | Special::ZeroNan => (largest + 1, largest + 1),
            Special::Finite => (largest, 0),
        };
        let (limit, nan_code) = (e.i32(limit), e.i32(nan_code));
        let code = e.op("i32", format!("llvm.intr.umin({code}, {limit}) : (i32, i32) -> i32"));
        let code = e.select(&is_nan, &nan_code, &code);
        let sign = match format.special {
            Special::Ieee | Special::TopNan => sign,
            // The one stand-in for NaN is the negative zero.
            Special::Finite => {
                let minus = e.i32(i64::from(format.sign()));
                e.select(&is_nan, &minus, &sign)
            }
            // No sign with zero, nor with NaN, whose code is the sign bit itself.
            Special::ZeroNan => {
                let zero = e.i32(0);
                let plain = e.icmp("eq", &code, &zero);
                let signless = e.icmp("uge", &code, &limit);
                let drop = e.int2("or", &plain, &signless);
                e.select(&drop, &zero, &sign)
            }
        };
        let code = e.int2("or", &code, &sign);
        e.conv("trunc", &code, "i8")
    }
}
