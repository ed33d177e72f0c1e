//! Floats of 8 bits and fewer, by their parameters: OCP 8-bit floats, their `fnuz` variants (no infinities, no negative
//! zero), the power-of-two scales of the OCP MX formats (version 1.0), and 4-bit floats.
use crate::DType;

/// What stands where a value is not a number, or too large for the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Infinities and NaNs with the largest exponent, as IEEE 754 has them.
    Ieee,
    /// One NaN in each sign with all bits set; no infinities: overflow gives NaN.
    TopNan,
    /// One NaN, the code of negative zero; no infinities: overflow gives NaN.
    ZeroNan,
    /// Neither: overflow gives the largest number, NaN the negative zero.
    Finite,
}

/// A format with a sign bit, an exponent and a mantissa.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mini {
    /// Bits of the mantissa, without the leading one.
    pub mantissa: u32,
    /// Exponent code of 1.0.
    pub bias: i32,
    /// Bits of exponent and mantissa: the sign is the bit above.
    pub body: u32,
    /// NaN and overflow.
    pub special: Special,
}

impl Mini {
    /// The format of a dtype; none for wider floats, for `f8e8m0` (which has no sign) and for other classes.
    pub const fn of(dtype: DType) -> Option<Mini> {
        let (mantissa, bias, body, special) = match dtype {
            DType::F8E4M3 => (3, 7, 7, Special::TopNan),
            DType::F8E5M2 => (2, 15, 7, Special::Ieee),
            DType::F8E4M3Fnuz => (3, 8, 7, Special::ZeroNan),
            DType::F8E5M2Fnuz => (2, 16, 7, Special::ZeroNan),
            DType::F4E2M1 => (1, 1, 3, Special::Finite),
            _ => return None,
        };
        Some(Mini { mantissa, bias, body, special })
    }

    /// Code of the sign bit.
    pub const fn sign(self) -> u8 {
        1 << self.body
    }

    /// Code of the largest number.
    pub const fn largest(self) -> u8 {
        match self.special {
            Special::Ieee => (((1 << (self.body - self.mantissa)) - 1) << self.mantissa) - 1,
            Special::TopNan => self.sign() - 2,
            Special::ZeroNan | Special::Finite => self.sign() - 1,
        }
    }

    /// The largest number.
    pub fn max(self) -> f64 {
        self.decode(self.largest())
    }

    /// The number of a code; bits above the format's are ignored.
    pub fn decode(self, code: u8) -> f64 {
        let body = code & (self.sign() - 1);
        let negative = code & self.sign() != 0;
        let sign = if negative { -1.0 } else { 1.0 };
        match self.special {
            Special::ZeroNan if body == 0 && negative => return f64::NAN,
            Special::TopNan | Special::Ieee if body > self.largest() => {
                let infinite = self.special == Special::Ieee && body == self.largest() + 1;
                return if infinite { sign * f64::INFINITY } else { f64::NAN };
            }
            _ => {}
        }
        let (exp, mant) = (i32::from(body >> self.mantissa), i32::from(body) & ((1 << self.mantissa) - 1));
        let unit = 1 - self.bias - self.mantissa as i32;
        if exp == 0 { sign * libm::scalbn(f64::from(mant), unit) } else { sign * libm::scalbn(f64::from(mant + (1 << self.mantissa)), exp - 1 + unit) }
    }

    /// The code of the number nearest to `v`, ties to even.
    pub fn encode(self, v: f64) -> u8 {
        let sign = if v.is_sign_negative() { self.sign() } else { 0 };
        if v.is_nan() {
            return match self.special {
                Special::Ieee | Special::TopNan => sign | (self.sign() - 1),
                Special::ZeroNan | Special::Finite => self.sign(),
            };
        }
        let a = v.abs();
        // Codes of finite numbers are in order: that of the binade below, plus the steps above it.
        let body = if a == 0.0 {
            0
        } else if a > 2.0 * self.max() {
            u32::MAX
        } else {
            let exp = libm::ilogb(a).max(1 - self.bias);
            let steps = libm::rint(libm::scalbn(a, self.mantissa as i32 - exp)) as u32;
            (((exp + self.bias - 1) as u32) << self.mantissa) + steps
        };
        let largest = u32::from(self.largest());
        match self.special {
            _ if body <= largest && !(self.special == Special::ZeroNan && body == 0) => sign | body as u8,
            Special::Ieee | Special::TopNan => sign | (largest as u8 + 1),
            Special::Finite => sign | largest as u8,
            Special::ZeroNan => {
                if body == 0 {
                    0
                } else {
                    self.sign()
                }
            }
        }
    }
}

/// Decode a float of at most 8 bits; other dtypes give NaN.
pub fn decode(code: u8, dtype: DType) -> f64 {
    match (Mini::of(dtype), dtype, code) {
        (Some(format), ..) => format.decode(code),
        (None, DType::F8E8M0, 0..=254) => libm::scalbn(1.0, i32::from(code) - 127),
        _ => f64::NAN,
    }
}

/// The code of the value of a float dtype of at most 8 bits nearest to `v`, ties to even. Beyond the largest number: infinity,
/// NaN where there is none, the largest number where there is neither. `f8e8m0` takes the power of two nearest to `|v|` by
/// difference, ties up, at least 2^-127. Other dtypes give 0.
pub fn encode(v: f64, dtype: DType) -> u8 {
    if let Some(format) = Mini::of(dtype) {
        return format.encode(v);
    }
    if dtype != DType::F8E8M0 {
        return 0;
    }
    let a = v.abs();
    if a.is_nan() || a >= libm::scalbn(1.5, 127) {
        return 255;
    }
    if a < libm::scalbn(1.0, -127) {
        return 0;
    }
    let exp = libm::ilogb(a);
    (exp + 127 + i32::from(libm::scalbn(a, -exp) >= 1.5)) as u8
}

/// Bits of an element in the low bits of a byte, as the dtype's own; `index` counts elements from the start of `bytes`.
pub fn packed(bytes: &[u8], dtype: DType, index: usize) -> u8 {
    let (bits, per) = (dtype.bits(), 8 / dtype.bits());
    bytes[index / per] >> (bits * (index % per)) & ((1u16 << bits) - 1) as u8
}

/// Replace the bits of one element of at most 8 bits.
pub fn pack(bytes: &mut [u8], dtype: DType, index: usize, code: u8) {
    let (bits, per) = (dtype.bits(), 8 / dtype.bits());
    let (shift, mask) = (bits * (index % per), ((1u16 << bits) - 1) as u8);
    let byte = &mut bytes[index / per];
    *byte = *byte & !(mask << shift) | (code & mask) << shift;
}
