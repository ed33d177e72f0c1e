//! `DimExpr`: the wire form of an integer expression over an artifact's symbols.
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::fmt;

/// An integer expression over symbols; `Sym(i)` is the i-th symbol of the manifest.
///
/// In JSON a constant is a number, a symbol `{"sym":0}`, a sum `{"add":[...]}`, and so on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DimExpr {
    /// A number.
    Const(i64),
    /// The value of the manifest's symbol with this index.
    Sym(u32),
    /// Sum of the terms; 0 when there are none.
    Add(Vec<DimExpr>),
    /// Product of the factors; 1 when there are none.
    Mul(Vec<DimExpr>),
    /// Quotient rounded towards minus infinity.
    FloorDiv(Box<DimExpr>, Box<DimExpr>),
    /// Remainder with the sign of the divisor: `a - b * floor(a / b)`.
    Mod(Box<DimExpr>, Box<DimExpr>),
    /// The larger of the two.
    Max(Box<DimExpr>, Box<DimExpr>),
    /// The smaller of the two.
    Min(Box<DimExpr>, Box<DimExpr>),
}

/// Why an expression has no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DimError {
    /// The arithmetic leaves 64 bits.
    #[error("the arithmetic leaves 64 bits")]
    Overflow,
    /// A division by zero.
    #[error("division by zero")]
    DivisionByZero,
    /// The symbol with this index does not exist.
    #[error("symbol {0} does not exist")]
    NoSuchSymbol(u32),
}

impl DimExpr {
    /// The value for these symbol values, in the manifest's order.
    pub fn eval(&self, symbols: &[i64]) -> Result<i64, DimError> {
        let pair = |a: &DimExpr, b: &DimExpr| Ok((a.eval(symbols)?, b.eval(symbols)?));
        match self {
            DimExpr::Const(c) => Ok(*c),
            DimExpr::Sym(s) => symbols.get(*s as usize).copied().ok_or(DimError::NoSuchSymbol(*s)),
            DimExpr::Add(terms) => terms.iter().try_fold(0i64, |sum, t| sum.checked_add(t.eval(symbols)?).ok_or(DimError::Overflow)),
            DimExpr::Mul(factors) => factors.iter().try_fold(1i64, |product, f| product.checked_mul(f.eval(symbols)?).ok_or(DimError::Overflow)),
            DimExpr::FloorDiv(a, b) => pair(a, b).and_then(|(a, b)| floor_div(a, b)),
            DimExpr::Mod(a, b) => {
                let (a, b) = pair(a, b)?;
                let down = floor_div(a, b)?.checked_mul(b).ok_or(DimError::Overflow)?;
                a.checked_sub(down).ok_or(DimError::Overflow)
            }
            DimExpr::Max(a, b) => pair(a, b).map(|(a, b)| a.max(b)),
            DimExpr::Min(a, b) => pair(a, b).map(|(a, b)| a.min(b)),
        }
    }

    /// The value, when it is the same for all symbols because none occurs.
    pub fn as_const(&self) -> Option<i64> {
        if self.symbols().is_empty() { self.eval(&[]).ok() } else { None }
    }

    /// `(s, a, b)` where this is `a*s + b` for one symbol and numbers with `a` not 0: an extent that
    /// decides its symbol.
    pub fn linear(&self) -> Option<(u32, i64, i64)> {
        let (found, a, b) = self.coefficients()?;
        found.filter(|_| a != 0).map(|s| (s, a, b))
    }

    /// The symbol of a [`DimExpr::linear`] extent and the value that makes the extent `extent`, if
    /// there is one.
    pub fn solve(&self, extent: i64) -> Option<(u32, i64)> {
        let (s, a, b) = self.linear()?;
        let rest = extent.checked_sub(b)?;
        (rest.checked_rem(a)? == 0).then_some((s, rest.checked_div(a)?))
    }

    fn coefficients(&self) -> Option<(Option<u32>, i64, i64)> {
        match self {
            DimExpr::Const(c) => Some((None, 0, *c)),
            DimExpr::Sym(s) => Some((Some(*s), 1, 0)),
            DimExpr::Add(terms) => terms.iter().try_fold((None, 0i64, 0i64), |(s, a, b), term| {
                let (t, c, d) = term.coefficients()?;
                let same = s.is_none() || t.is_none() || s == t;
                same.then_some((s.or(t), a.checked_add(c)?, b.checked_add(d)?))
            }),
            DimExpr::Mul(factors) => factors.iter().try_fold((None, 0i64, 1i64), |(s, a, b), factor| match (factor.coefficients()?, (s, a, b)) {
                ((None, _, k), (s, a, b)) | ((s, a, b), (None, _, k)) => Some((s, a.checked_mul(k)?, b.checked_mul(k)?)),
                _ => None,
            }),
            _ => self.as_const().map(|c| (None, 0, c)),
        }
    }

    /// The symbols that occur, ascending, each once.
    pub fn symbols(&self) -> Vec<u32> {
        let mut found = Vec::new();
        self.visit_symbols(&mut |s| found.push(s));
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Calls `f` for each occurrence of a symbol.
    pub fn visit_symbols(&self, f: &mut dyn FnMut(u32)) {
        match self {
            DimExpr::Const(_) => {}
            DimExpr::Sym(s) => f(*s),
            DimExpr::Add(list) | DimExpr::Mul(list) => list.iter().for_each(|e| e.visit_symbols(f)),
            DimExpr::FloorDiv(a, b) | DimExpr::Mod(a, b) | DimExpr::Max(a, b) | DimExpr::Min(a, b) => {
                a.visit_symbols(f);
                b.visit_symbols(f);
            }
        }
    }

    /// The expression as text with the symbols' names: `4*n + 1`.
    pub fn with_names<'a>(&'a self, names: &'a [&'a str]) -> impl fmt::Display + 'a {
        Named { expr: self, names }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, names: &[&str], tight: bool) -> fmt::Result {
        let call = |f: &mut fmt::Formatter<'_>, name: &str, a: &DimExpr, b: &DimExpr| {
            write!(f, "{name}(")?;
            a.write(f, names, false)?;
            f.write_str(", ")?;
            b.write(f, names, false)?;
            f.write_str(")")
        };
        match self {
            DimExpr::Const(c) => write!(f, "{c}"),
            DimExpr::Sym(s) => match names.get(*s as usize) {
                Some(name) => f.write_str(name),
                None => write!(f, "s{s}"),
            },
            DimExpr::Add(list) if list.is_empty() => f.write_str("0"),
            DimExpr::Mul(list) if list.is_empty() => f.write_str("1"),
            DimExpr::Add(list) => {
                if tight {
                    f.write_str("(")?;
                }
                for (i, term) in list.iter().enumerate() {
                    if i > 0 {
                        f.write_str(" + ")?;
                    }
                    term.write(f, names, false)?;
                }
                if tight { f.write_str(")") } else { Ok(()) }
            }
            DimExpr::Mul(list) => {
                for (i, factor) in list.iter().enumerate() {
                    if i > 0 {
                        f.write_str("*")?;
                    }
                    factor.write(f, names, true)?;
                }
                Ok(())
            }
            DimExpr::FloorDiv(a, b) => call(f, "div", a, b),
            DimExpr::Mod(a, b) => call(f, "mod", a, b),
            DimExpr::Max(a, b) => call(f, "max", a, b),
            DimExpr::Min(a, b) => call(f, "min", a, b),
        }
    }
}

fn floor_div(a: i64, b: i64) -> Result<i64, DimError> {
    if b == 0 {
        return Err(DimError::DivisionByZero);
    }
    let quotient = a.checked_div(b).ok_or(DimError::Overflow)?;
    let inexact = a.checked_rem(b).ok_or(DimError::Overflow)? != 0;
    Ok(if inexact && (a < 0) != (b < 0) { quotient - 1 } else { quotient })
}

struct Named<'a> {
    expr: &'a DimExpr,
    names: &'a [&'a str],
}

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.expr.write(f, self.names, false)
    }
}

impl fmt::Display for DimExpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, &[], false)
    }
}

impl From<i64> for DimExpr {
    fn from(value: i64) -> Self {
        DimExpr::Const(value)
    }
}

impl Serialize for DimExpr {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        fn entry<S: Serializer>(to: S, key: &str, value: &impl Serialize) -> Result<S::Ok, S::Error> {
            let mut map = to.serialize_map(Some(1))?;
            map.serialize_entry(key, value)?;
            map.end()
        }
        match self {
            DimExpr::Const(c) => to.serialize_i64(*c),
            DimExpr::Sym(s) => entry(to, "sym", s),
            DimExpr::Add(list) => entry(to, "add", list),
            DimExpr::Mul(list) => entry(to, "mul", list),
            DimExpr::FloorDiv(a, b) => entry(to, "div", &(a, b)),
            DimExpr::Mod(a, b) => entry(to, "mod", &(a, b)),
            DimExpr::Max(a, b) => entry(to, "max", &(a, b)),
            DimExpr::Min(a, b) => entry(to, "min", &(a, b)),
        }
    }
}

impl<'de> Deserialize<'de> for DimExpr {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Expr;
        impl<'de> Visitor<'de> for Expr {
            type Value = DimExpr;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or one of {sym, add, mul, div, mod, max, min}")
            }
            fn visit_i64<E>(self, v: i64) -> Result<DimExpr, E> {
                Ok(DimExpr::Const(v))
            }
            fn visit_u64<E: serde::de::Error>(self, v: u64) -> Result<DimExpr, E> {
                i64::try_from(v).map(DimExpr::Const).map_err(E::custom)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DimExpr, A::Error> {
                let key: String = map.next_key()?.ok_or_else(|| A::Error::custom("empty"))?;
                let expr = match key.as_str() {
                    "sym" => DimExpr::Sym(map.next_value()?),
                    "add" => DimExpr::Add(map.next_value()?),
                    "mul" => DimExpr::Mul(map.next_value()?),
                    other => {
                        let node = match other {
                            "div" => DimExpr::FloorDiv,
                            "mod" => DimExpr::Mod,
                            "max" => DimExpr::Max,
                            "min" => DimExpr::Min,
                            _ => return Err(A::Error::custom(format!("no operator `{other}`"))),
                        };
                        let (a, b) = map.next_value()?;
                        node(a, b)
                    }
                };
                match map.next_key::<String>()? {
                    None => Ok(expr),
                    Some(_) => Err(A::Error::custom("two operators in one expression")),
                }
            }
        }
        from.deserialize_any(Expr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> DimExpr {
        use DimExpr::*;
        Add(vec![Mul(vec![Const(4), Sym(0)]), FloorDiv(Add(vec![Sym(1), Const(-1)]).into(), Const(2).into())])
    }

    #[test]
    fn values_text_and_json_agree() {
        let e = sample();
        assert_eq!(e.eval(&[3, 8]), Ok(15));
        assert_eq!(e.with_names(&["n", "h"]).to_string(), "4*n + div(h + -1, 2)");
        assert_eq!(e.to_string(), "4*s0 + div(s1 + -1, 2)");
        let json = serde_json::to_string(&e).unwrap();
        assert_eq!(json, r#"{"add":[{"mul":[4,{"sym":0}]},{"div":[{"add":[{"sym":1},-1]},2]}]}"#);
        assert_eq!(serde_json::from_str::<DimExpr>(&json).unwrap(), e);
        assert_eq!(e.symbols(), [0, 1]);
        assert_eq!(e.as_const(), None);
    }

    #[test]
    fn linear_extents_decide_their_symbol() {
        use DimExpr::*;
        let e = Add(vec![Mul(vec![Const(32), Sym(3)]), Const(-1), Const(5)]);
        assert_eq!(e.linear(), Some((3, 32, 4)));
        assert_eq!(e.solve(68), Some((3, 2)));
        assert_eq!(e.solve(69), None);
        assert_eq!(Sym(1).solve(7), Some((1, 7)));
        assert_eq!(Mul(vec![Sym(0), Sym(0)]).linear(), None);
        assert_eq!(Add(vec![Sym(0), Sym(1)]).linear(), None);
        assert_eq!(Add(vec![Sym(0), Mul(vec![Const(-1), Sym(0)])]).linear(), None);
        assert_eq!(FloorDiv(Sym(0).into(), Const(2).into()).linear(), None);
        assert_eq!(Mul(vec![Const(-1), Sym(0)]).solve(i64::MIN), None);
    }

    #[test]
    fn division_rounds_down_and_remainder_follows_the_divisor() {
        for (a, b) in [(7, 2), (-7, 2), (7, -2), (-7, -2), (6, 3), (-6, 3), (0, -5)] {
            let expect = (a as f64 / b as f64).floor() as i64;
            let div = DimExpr::FloorDiv(DimExpr::Const(a).into(), DimExpr::Const(b).into());
            let rem = DimExpr::Mod(DimExpr::Const(a).into(), DimExpr::Const(b).into());
            assert_eq!(div.eval(&[]), Ok(expect), "{a} div {b}");
            assert_eq!(rem.eval(&[]), Ok(a - b * expect), "{a} mod {b}");
        }
    }

    #[test]
    fn trouble_is_an_error_not_a_panic() {
        let big = || DimExpr::Const(i64::MIN);
        let minus = || DimExpr::Const(-1);
        let over = [
            DimExpr::Mul(vec![big(), minus()]),
            DimExpr::Add(vec![big(), minus()]),
            DimExpr::FloorDiv(big().into(), minus().into()),
            DimExpr::Mod(big().into(), minus().into()),
        ];
        for e in over {
            assert_eq!(e.eval(&[]), Err(DimError::Overflow), "{e}");
        }
        let zero = DimExpr::Mod(DimExpr::Const(1).into(), DimExpr::Const(0).into());
        assert_eq!(zero.eval(&[]), Err(DimError::DivisionByZero));
        assert_eq!(DimExpr::Sym(2).eval(&[1, 2]), Err(DimError::NoSuchSymbol(2)));
        assert!(serde_json::from_str::<DimExpr>(r#"{"pow":[1,2]}"#).is_err());
        let deep = format!("{}1{}", r#"{"add":["#.repeat(500), "]}".repeat(500));
        assert!(serde_json::from_str::<DimExpr>(&deep).is_err());
    }
}
