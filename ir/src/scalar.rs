//! Scalar functions: one table, from which pointwise ops, kernels and the evaluator take their meaning.
//!
//! Semantics, for every function: floats are computed in f64 and rounded once to the element type
//! (round to nearest even), so an f32 result is the correctly rounded one up to double rounding;
//! integers wrap (two's complement); integer division by zero gives 0 and `MIN / -1` wraps;
//! comparisons give `bool`; NaN compares unequal to everything and propagates through `max`, `min`.
use crate::{DType, minifloat};
use serde::{Deserialize, Serialize};
use std::fmt;

/// One element, outside any tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    /// A float of any width, held exactly.
    F(f64),
    /// An integer of any width.
    I(i128),
    /// A boolean.
    B(bool),
}

impl Scalar {
    /// As a float (bool is 0 or 1).
    pub fn f(self) -> f64 {
        match self {
            Scalar::F(v) => v,
            Scalar::I(v) => v as f64,
            Scalar::B(v) => f64::from(u8::from(v)),
        }
    }

    /// As an integer; floats truncate toward zero and saturate, NaN is 0.
    pub fn i(self) -> i128 {
        match self {
            Scalar::F(v) => v as i128,
            Scalar::I(v) => v,
            Scalar::B(v) => i128::from(v),
        }
    }

    /// As a boolean: not zero (NaN is true).
    pub fn b(self) -> bool {
        match self {
            Scalar::F(v) => v != 0.0,
            Scalar::I(v) => v != 0,
            Scalar::B(v) => v,
        }
    }

    /// The value after storing into an element of `dtype`: floats round to nearest even,
    /// integers wrap; a float stored into an integer truncates and saturates (NaN gives 0).
    pub fn cast(self, dtype: DType) -> Scalar {
        use crate::dtype::Class;
        match dtype.class() {
            Class::Float => Scalar::F(round_float(self.f(), dtype)),
            Class::Bool => Scalar::B(self.b()),
            Class::String => self,
            Class::Signed | Class::Unsigned => match self {
                Scalar::F(v) => {
                    let (lo, hi) = dtype.int_range();
                    Scalar::I((v as i128).clamp(lo, hi))
                }
                other => Scalar::I(wrap_int(other.i(), dtype)),
            },
        }
    }
}

/// Wrap an integer into the range of `dtype`.
pub fn wrap_int(v: i128, dtype: DType) -> i128 {
    let bits = dtype.bits() as u32;
    let low = v & ((1i128 << bits) - 1);
    if matches!(dtype.class(), crate::dtype::Class::Signed) && low >> (bits - 1) & 1 == 1 { low - (1i128 << bits) } else { low }
}

/// Round a float to the nearest value that `dtype` holds, ties to even; [`minifloat::encode`] has the narrow ones.
pub fn round_float(v: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F64 => v,
        DType::F32 => f64::from(v as f32),
        DType::F16 => half::f16::from_f64(v).to_f64(),
        DType::BF16 => half::bf16::from_f64(v).to_f64(),
        _ if dtype.is_mini() => minifloat::decode(minifloat::encode(v, dtype), dtype),
        _ => v,
    }
}

/// What a scalar function demands of its operands and what it gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sig {
    /// Floats in, the same float type out.
    Float,
    /// Any number in, the same type out.
    Number,
    /// Integers or bools in, the same type out.
    Bits,
    /// Any equal types in, bool out.
    Compare,
    /// Floats in, bool out.
    Test,
    /// `(bool, T, T) -> T`.
    Select,
}

macro_rules! scalars {
    ($( $(#[doc = $doc:literal])* $Name:ident = $text:literal, $arity:literal, $sig:ident; )*) => {
        /// A scalar function, applied elementwise by the op of the same name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum ScalarFn { $( $(#[doc = $doc])* $Name ),* }

        impl ScalarFn {
            /// Every function, in table order.
            pub const ALL: &[ScalarFn] = &[$(ScalarFn::$Name),*];
            /// The name in text.
            pub const fn name(self) -> &'static str { match self { $(ScalarFn::$Name => $text),* } }
            /// Operand count.
            pub const fn arity(self) -> usize { match self { $(ScalarFn::$Name => $arity),* } }
            /// Operand and result types.
            pub const fn sig(self) -> Sig { match self { $(ScalarFn::$Name => Sig::$sig),* } }
            /// The row's doc comment.
            pub const fn doc(self) -> &'static str { match self { $(ScalarFn::$Name => concat!($($doc),*)),* } }
            /// The function with this name.
            pub fn parse(s: &str) -> Option<Self> { match s { $($text => Some(ScalarFn::$Name),)* _ => None } }
        }
    };
}

scalars! {
    /// `a + b`; integers wrap.
    Add = "add", 2, Number;
    /// `a - b`; integers wrap.
    Sub = "sub", 2, Number;
    /// `a * b`; integers wrap.
    Mul = "mul", 2, Number;
    /// `a / b`; integers truncate toward zero, division by zero gives 0.
    Div = "div", 2, Number;
    /// Remainder with the sign of the divisor (Python `%`); by integer zero gives 0.
    Mod = "mod", 2, Number;
    /// Remainder with the sign of the dividend (C `fmod`); by integer zero gives 0.
    Rem = "rem", 2, Number;
    /// `a` to the power `b`; integer powers wrap, negative exponents of integers truncate.
    Pow = "pow", 2, Number;
    /// The larger; NaN if either is NaN.
    Max = "max", 2, Number;
    /// The smaller; NaN if either is NaN.
    Min = "min", 2, Number;
    /// `-a`; integers wrap.
    Neg = "neg", 1, Number;
    /// Absolute value; the smallest integer wraps to itself.
    Abs = "abs", 1, Number;
    /// -1, 0 or 1; NaN stays NaN.
    Sign = "sign", 1, Number;
    /// `e^a`.
    Exp = "exp", 1, Float;
    /// Natural logarithm.
    Log = "log", 1, Float;
    /// Square root.
    Sqrt = "sqrt", 1, Float;
    /// `1 / sqrt(a)`.
    Rsqrt = "rsqrt", 1, Float;
    /// `1 / a`.
    Recip = "recip", 1, Float;
    /// Sine, radians.
    Sin = "sin", 1, Float;
    /// Cosine, radians.
    Cos = "cos", 1, Float;
    /// Tangent, radians.
    Tan = "tan", 1, Float;
    /// Inverse sine.
    Asin = "asin", 1, Float;
    /// Inverse cosine.
    Acos = "acos", 1, Float;
    /// Inverse tangent.
    Atan = "atan", 1, Float;
    /// Hyperbolic sine.
    Sinh = "sinh", 1, Float;
    /// Hyperbolic cosine.
    Cosh = "cosh", 1, Float;
    /// Hyperbolic tangent.
    Tanh = "tanh", 1, Float;
    /// Inverse hyperbolic sine.
    Asinh = "asinh", 1, Float;
    /// Inverse hyperbolic cosine.
    Acosh = "acosh", 1, Float;
    /// Inverse hyperbolic tangent.
    Atanh = "atanh", 1, Float;
    /// Error function.
    Erf = "erf", 1, Float;
    /// `1 / (1 + e^-a)`.
    Sigmoid = "sigmoid", 1, Float;
    /// `log(1 + e^a)`, computed without overflow.
    Softplus = "softplus", 1, Float;
    /// Largest integer not above.
    Floor = "floor", 1, Float;
    /// Smallest integer not below.
    Ceil = "ceil", 1, Float;
    /// Nearest integer, ties to even.
    Round = "round", 1, Float;
    /// Toward zero.
    Trunc = "trunc", 1, Float;
    /// `a * b + c`, rounded once.
    Fma = "fma", 3, Float;
    /// Bitwise and logical and.
    And = "and", 2, Bits;
    /// Bitwise and logical or.
    Or = "or", 2, Bits;
    /// Bitwise and logical exclusive or.
    Xor = "xor", 2, Bits;
    /// Bitwise complement; logical not on bool.
    Not = "not", 1, Bits;
    /// `a << b`; shifts of the width or more give 0.
    Shl = "shl", 2, Bits;
    /// `a >> b`, arithmetic for signed; shifts of the width or more give 0 (or -1).
    Shr = "shr", 2, Bits;
    /// `a == b`.
    Eq = "eq", 2, Compare;
    /// `a != b`.
    Ne = "ne", 2, Compare;
    /// `a < b`.
    Lt = "lt", 2, Compare;
    /// `a <= b`.
    Le = "le", 2, Compare;
    /// `a > b`.
    Gt = "gt", 2, Compare;
    /// `a >= b`.
    Ge = "ge", 2, Compare;
    /// Whether the operand is NaN.
    IsNan = "isnan", 1, Test;
    /// Whether the operand is an infinity.
    IsInf = "isinf", 1, Test;
    /// `c ? a : b`.
    Select = "select", 3, Select;
}

impl fmt::Display for ScalarFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ScalarFn {
    /// Result dtype for these operand dtypes, or what is wrong.
    pub fn infer(self, args: &[DType]) -> Result<DType, String> {
        if args.len() != self.arity() {
            return Err(format!("takes {} operands, got {}", self.arity(), args.len()));
        }
        let same = |args: &[DType]| match args.iter().find(|d| **d != args[0]) {
            Some(d) => Err(format!("operand dtypes differ: {} and {d}", args[0])),
            None => Ok(args[0]),
        };
        let demand = |ok: bool, what: &str, d: DType| if ok { Ok(()) } else { Err(format!("needs {what}, got {d}")) };
        match self.sig() {
            Sig::Float => {
                let d = same(args)?;
                demand(d.is_float(), "floats", d).map(|()| d)
            }
            Sig::Number => {
                let d = same(args)?;
                demand(d.is_float() || d.is_int(), "numbers", d).map(|()| d)
            }
            Sig::Bits => {
                let d = same(args)?;
                demand(d.is_int() || d == DType::Bool, "integers or bool", d).map(|()| d)
            }
            Sig::Compare => same(args).map(|_| DType::Bool),
            Sig::Test => demand(args[0].is_float(), "floats", args[0]).map(|()| DType::Bool),
            Sig::Select => {
                demand(args[0] == DType::Bool, "a bool condition", args[0])?;
                same(&args[1..])
            }
        }
    }

    /// Reference semantics. `dtype` is the operands' type (for `select`, of the second and third).
    pub fn eval(self, dtype: DType, args: &[Scalar]) -> Scalar {
        use ScalarFn::*;
        let a = args[0];
        if self == Select {
            return if a.b() { args[1] } else { args[2] };
        }
        let b = args.get(1).copied().unwrap_or(Scalar::I(0));
        let order = |f: fn(std::cmp::Ordering) -> bool| {
            let o = if dtype.is_float() { a.f().partial_cmp(&b.f()) } else { Some(a.i().cmp(&b.i())) };
            Scalar::B(o.is_some_and(f))
        };
        match self {
            Eq => return order(|o| o.is_eq()),
            Ne => return Scalar::B(!order(|o| o.is_eq()).b()),
            Lt => return order(|o| o.is_lt()),
            Le => return order(|o| o.is_le()),
            Gt => return order(|o| o.is_gt()),
            Ge => return order(|o| o.is_ge()),
            IsNan => return Scalar::B(a.f().is_nan()),
            IsInf => return Scalar::B(a.f().is_infinite()),
            _ => {}
        }
        if dtype.is_float() {
            Scalar::F(self.eval_float(a.f(), b.f(), args.get(2).map_or(0.0, |c| c.f()))).cast(dtype)
        } else {
            Scalar::I(self.eval_int(a.i(), b.i(), dtype)).cast(dtype)
        }
    }

    fn eval_float(self, a: f64, b: f64, c: f64) -> f64 {
        use ScalarFn::*;
        match self {
            Add => a + b,
            Sub => a - b,
            Mul => a * b,
            Div => a / b,
            Mod => {
                let r = a % b;
                if r != 0.0 && (r < 0.0) != (b < 0.0) { r + b } else { r }
            }
            Rem => a % b,
            Pow => libm::pow(a, b),
            Max => {
                if a.is_nan() || b.is_nan() {
                    f64::NAN
                } else {
                    a.max(b)
                }
            }
            Min => {
                if a.is_nan() || b.is_nan() {
                    f64::NAN
                } else {
                    a.min(b)
                }
            }
            Neg => -a,
            Abs => a.abs(),
            Sign => {
                if a.is_nan() {
                    a
                } else if a > 0.0 {
                    1.0
                } else if a < 0.0 {
                    -1.0
                } else {
                    0.0
                }
            }
            Exp => libm::exp(a),
            Log => libm::log(a),
            Sqrt => a.sqrt(),
            Rsqrt => 1.0 / a.sqrt(),
            Recip => 1.0 / a,
            Sin => libm::sin(a),
            Cos => libm::cos(a),
            Tan => libm::tan(a),
            Asin => libm::asin(a),
            Acos => libm::acos(a),
            Atan => libm::atan(a),
            Sinh => libm::sinh(a),
            Cosh => libm::cosh(a),
            Tanh => libm::tanh(a),
            Asinh => libm::asinh(a),
            Acosh => libm::acosh(a),
            Atanh => libm::atanh(a),
            Erf => libm::erf(a),
            Sigmoid => 1.0 / (1.0 + libm::exp(-a)),
            Softplus => a.max(0.0) + libm::log1p(libm::exp(-a.abs())),
            Floor => a.floor(),
            Ceil => a.ceil(),
            Round => a.round_ties_even(),
            Trunc => a.trunc(),
            Fma => a.mul_add(b, c),
            And | Or | Xor | Not | Shl | Shr | Eq | Ne | Lt | Le | Gt | Ge | IsNan | IsInf | Select => f64::NAN,
        }
    }

    fn eval_int(self, a: i128, b: i128, dtype: DType) -> i128 {
        use ScalarFn::*;
        let bits = dtype.bits() as i128;
        match self {
            Add => a + b,
            Sub => a - b,
            Mul => wrap_int(a, dtype).wrapping_mul(b),
            Div => {
                if b == 0 {
                    0
                } else {
                    a / b
                }
            }
            Mod => {
                if b == 0 {
                    0
                } else {
                    let r = a % b;
                    if r != 0 && (r < 0) != (b < 0) { r + b } else { r }
                }
            }
            Rem => {
                if b == 0 {
                    0
                } else {
                    a % b
                }
            }
            Pow => int_pow(a, b, dtype),
            Max => a.max(b),
            Min => a.min(b),
            Neg => -a,
            Abs => a.abs(),
            Sign => a.signum(),
            And => a & b,
            Or => a | b,
            Xor => a ^ b,
            Not => {
                if dtype == DType::Bool {
                    i128::from(a == 0)
                } else {
                    !a
                }
            }
            Shl => {
                if b < 0 || b >= bits {
                    0
                } else {
                    a << b
                }
            }
            Shr => {
                if b < 0 || b >= bits {
                    if a < 0 { -1 } else { 0 }
                } else {
                    a >> b
                }
            }
            _ => a,
        }
    }
}

fn int_pow(a: i128, b: i128, dtype: DType) -> i128 {
    if b < 0 {
        return match a {
            1 => 1,
            -1 => {
                if b % 2 == 0 {
                    1
                } else {
                    -1
                }
            }
            _ => 0,
        };
    }
    let (mut base, mut exp, mut acc) = (a, b, 1i128);
    while exp > 0 {
        if exp & 1 == 1 {
            acc = wrap_int(acc.wrapping_mul(base), dtype);
        }
        base = wrap_int(base.wrapping_mul(base), dtype);
        exp >>= 1;
    }
    acc
}
