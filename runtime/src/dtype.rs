//! Element types on the wire; the names are those of the compiler's IR.
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

macro_rules! dtypes {
    ($( $(#[doc = $doc:literal])* $Name:ident = $text:literal, $bits:literal; )*) => {
        /// Type of one tensor element.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum DType { $( $(#[doc = $doc])* #[serde(rename = $text)] $Name ),* }

        impl DType {
            /// Every dtype, in table order.
            pub const ALL: &[DType] = &[$(DType::$Name),*];

            /// The name in text: `f32`.
            pub const fn name(self) -> &'static str { match self { $(DType::$Name => $text),* } }

            /// Width of one element in bits (below 8 for packed elements, 8 for `bool`).
            pub const fn bits(self) -> usize { match self { $(DType::$Name => $bits),* } }
        }

        impl FromStr for DType {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                match s { $($text => Ok(DType::$Name),)* _ => Err(format!("unknown dtype `{s}`")) }
            }
        }
    };
}

dtypes! {
    /// IEEE 754 binary64.
    F64 = "f64", 64;
    /// IEEE 754 binary32.
    F32 = "f32", 32;
    /// IEEE 754 binary16.
    F16 = "f16", 16;
    /// bfloat16: the upper half of binary32.
    BF16 = "bf16", 16;
    /// OCP 8-bit float, 4 exponent bits, no infinities.
    F8E4M3 = "f8e4m3", 8;
    /// OCP 8-bit float, 5 exponent bits.
    F8E5M2 = "f8e5m2", 8;
    /// 8-bit float, 4 exponent bits with bias 8, no infinities, no negative zero.
    F8E4M3Fnuz = "f8e4m3fnuz", 8;
    /// 8-bit float, 5 exponent bits with bias 16, no infinities, no negative zero.
    F8E5M2Fnuz = "f8e5m2fnuz", 8;
    /// OCP MX scale: a power of two from 2^-127 to 2^127, or NaN.
    F8E8M0 = "f8e8m0", 8;
    /// OCP MX 4-bit float, 2 exponent bits, neither infinities nor NaN, two to a byte, low nibble first.
    F4E2M1 = "f4e2m1", 4;
    /// 64-bit signed.
    I64 = "i64", 64;
    /// 32-bit signed.
    I32 = "i32", 32;
    /// 16-bit signed.
    I16 = "i16", 16;
    /// 8-bit signed.
    I8 = "i8", 8;
    /// 4-bit signed, two to a byte, low nibble first.
    I4 = "i4", 4;
    /// 2-bit signed, four to a byte, lowest bits first.
    I2 = "i2", 2;
    /// 64-bit unsigned.
    U64 = "u64", 64;
    /// 32-bit unsigned.
    U32 = "u32", 32;
    /// 16-bit unsigned.
    U16 = "u16", 16;
    /// 8-bit unsigned.
    U8 = "u8", 8;
    /// 4-bit unsigned, two to a byte, low nibble first.
    U4 = "u4", 4;
    /// 2-bit unsigned, four to a byte, lowest bits first.
    U2 = "u2", 2;
    /// Boolean, one byte, 0 or 1.
    Bool = "bool", 8;
}

impl DType {
    /// Bytes that `count` elements take (those narrower than a byte packed), or `None` beyond 64 bits.
    pub const fn bytes(self, count: usize) -> Option<usize> {
        match count.checked_mul(self.bits()) {
            Some(bits) => Some(bits.div_ceil(8)),
            None => None,
        }
    }

    /// Bytes to which the address of an element is a multiple.
    pub const fn align(self) -> usize {
        self.bits().div_ceil(8)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
