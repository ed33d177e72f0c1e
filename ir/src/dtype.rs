//! Element types.
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

macro_rules! dtypes {
    ($( $(#[doc = $doc:literal])* $Name:ident = $text:literal, $bits:literal, $class:ident; )*) => {
        /// Type of one tensor element.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum DType { $( $(#[doc = $doc])* $Name ),* }

        impl DType {
            /// Every dtype, in table order.
            pub const ALL: &[DType] = &[$(DType::$Name),*];

            /// The name in text: `f32`.
            pub const fn name(self) -> &'static str { match self { $(DType::$Name => $text),* } }

            /// Width of one element in bits (below 8 for packed elements, 8 for `bool`).
            pub const fn bits(self) -> usize { match self { $(DType::$Name => $bits),* } }

            /// Float, signed, unsigned, bool or string.
            pub const fn class(self) -> Class { match self { $(DType::$Name => Class::$class),* } }
        }

        impl FromStr for DType {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                match s { $($text => Ok(DType::$Name),)* _ => Err(format!("unknown dtype `{s}`")) }
            }
        }
    };
}

/// What kind of number an element is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Binary floating point.
    Float,
    /// Two's complement integer.
    Signed,
    /// Unsigned integer.
    Unsigned,
    /// `false` or `true`, stored as one byte 0 or 1.
    Bool,
    /// UTF-8 text; host only.
    String,
}

dtypes! {
    /// IEEE 754 binary64.
    F64 = "f64", 64, Float;
    /// IEEE 754 binary32.
    F32 = "f32", 32, Float;
    /// IEEE 754 binary16.
    F16 = "f16", 16, Float;
    /// bfloat16: the upper half of binary32.
    BF16 = "bf16", 16, Float;
    /// OCP 8-bit float, 4 exponent bits, no infinities (`FLOAT8E4M3FN`).
    F8E4M3 = "f8e4m3", 8, Float;
    /// OCP 8-bit float, 5 exponent bits (`FLOAT8E5M2`).
    F8E5M2 = "f8e5m2", 8, Float;
    /// 8-bit float, 4 exponent bits with bias 8, no infinities, no negative zero (`FLOAT8E4M3FNUZ`).
    F8E4M3Fnuz = "f8e4m3fnuz", 8, Float;
    /// 8-bit float, 5 exponent bits with bias 16, no infinities, no negative zero (`FLOAT8E5M2FNUZ`).
    F8E5M2Fnuz = "f8e5m2fnuz", 8, Float;
    /// OCP MX scale: a power of two from 2^-127 to 2^127, or NaN (`FLOAT8E8M0`).
    F8E8M0 = "f8e8m0", 8, Float;
    /// OCP MX 4-bit float, 2 exponent bits, neither infinities nor NaN (`FLOAT4E2M1`), two to a byte, low nibble first.
    F4E2M1 = "f4e2m1", 4, Float;
    /// 64-bit signed.
    I64 = "i64", 64, Signed;
    /// 32-bit signed.
    I32 = "i32", 32, Signed;
    /// 16-bit signed.
    I16 = "i16", 16, Signed;
    /// 8-bit signed.
    I8 = "i8", 8, Signed;
    /// 4-bit signed, two to a byte, low nibble first.
    I4 = "i4", 4, Signed;
    /// 2-bit signed, four to a byte, lowest bits first.
    I2 = "i2", 2, Signed;
    /// 64-bit unsigned.
    U64 = "u64", 64, Unsigned;
    /// 32-bit unsigned.
    U32 = "u32", 32, Unsigned;
    /// 16-bit unsigned.
    U16 = "u16", 16, Unsigned;
    /// 8-bit unsigned.
    U8 = "u8", 8, Unsigned;
    /// 4-bit unsigned, two to a byte, low nibble first.
    U4 = "u4", 4, Unsigned;
    /// 2-bit unsigned, four to a byte, lowest bits first.
    U2 = "u2", 2, Unsigned;
    /// Boolean.
    Bool = "bool", 8, Bool;
    /// Text.
    Str = "str", 0, String;
}

impl DType {
    /// Whether elements are binary floats.
    pub const fn is_float(self) -> bool {
        matches!(self.class(), Class::Float)
    }

    /// Whether elements are integers (not bool).
    pub const fn is_int(self) -> bool {
        matches!(self.class(), Class::Signed | Class::Unsigned)
    }

    /// Whether elements share bytes.
    pub const fn is_packed(self) -> bool {
        matches!(self.bits(), 1..8)
    }

    /// Whether elements are floats of at most 8 bits, held by [`crate::minifloat`].
    pub const fn is_mini(self) -> bool {
        self.is_float() && self.bits() <= 8
    }

    /// Bytes that `count` elements take (those narrower than a byte packed); the largest number where that is beyond it.
    pub const fn bytes(self, count: usize) -> usize {
        (count / 8).saturating_mul(self.bits()).saturating_add((count % 8 * self.bits()).div_ceil(8))
    }

    /// Smallest and largest integer an integer dtype holds.
    pub const fn int_range(self) -> (i128, i128) {
        let bits = self.bits() as u32;
        match self.class() {
            Class::Signed => (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1),
            Class::Unsigned => (0, (1i128 << bits) - 1),
            _ => (0, 1),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
