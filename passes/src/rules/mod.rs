//! All rewrite rules: text in `*.rules`, [`computed`] ones whose attributes Rust works out, and [`siblings`] over many terms at once.
//!
//! A text rule is `name: lhs => rhs`, a pattern of op mnemonics and `?variables` on either side. `=>` promises equal
//! bits on every input; `~>` equal real numbers, rounding apart, and is applied to floats alone. `tests/rules.rs` runs
//! every rule against the evaluator, so a wrong one is caught the minute it is written. `README.md` has the rules for rules.
pub mod computed;
mod decode;
mod groups;
mod im2col;
mod layouts;
mod norms;
pub mod promises;
pub mod siblings;
mod split;
mod winograd;

use crate::eqsat::Term;
use egg::Pattern;

/// What a rule promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// The same bits.
    Exact,
    /// Of floats, the same real numbers; rounding may differ.
    Real,
}

/// One text rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Unique name.
    pub name: String,
    /// What it promises.
    pub promise: Promise,
    /// Pattern to find.
    pub lhs: Pattern<Term>,
    /// What it equals.
    pub rhs: Pattern<Term>,
}

/// The rule files.
pub const FILES: &[(&str, &str)] = &[("algebra.rules", include_str!("algebra.rules"))];

/// Rules that are applied together.
pub struct RuleSet {
    /// Text rules.
    pub text: Vec<Rule>,
    /// Computed rules.
    pub computed: Vec<computed::Computed>,
    /// Rules over siblings.
    pub siblings: Vec<siblings::Siblings>,
}

impl RuleSet {
    /// Every rule there is, or the line of a file that is none.
    pub fn all() -> Result<RuleSet, String> {
        Ok(RuleSet { text: all()?, computed: computed::RULES.to_vec(), siblings: siblings::RULES.to_vec() })
    }
}

/// Every text rule of every file, or the line that is none.
pub fn all() -> Result<Vec<Rule>, String> {
    let mut rules = vec![];
    for (file, text) in FILES {
        rules.extend(parse(file, text)?);
    }
    Ok(rules)
}

/// Parse the rules of one file.
pub fn parse(file: &str, text: &str) -> Result<Vec<Rule>, String> {
    let mut rules = vec![];
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let at = |what: &str| format!("{file}:{}: {what}: {line}", i + 1);
        let (name, rest) = line.split_once(": ").ok_or_else(|| at("expected `name: `"))?;
        let (promise, (lhs, rhs)) = match (rest.split_once("=>"), rest.split_once("~>")) {
            (Some(sides), None) => (Promise::Exact, sides),
            (None, Some(sides)) => (Promise::Real, sides),
            _ => return Err(at("expected one `=>` or `~>`")),
        };
        let pattern = |s: &str| s.trim().parse::<Pattern<Term>>().map_err(|e| at(&e.to_string()));
        let (lhs, rhs) = (pattern(lhs)?, pattern(rhs)?);
        if let Some(v) = rhs.vars().iter().find(|v| !lhs.vars().contains(v)) {
            return Err(at(&format!("{v} is unbound on the left")));
        }
        rules.push(Rule { name: name.trim().into(), promise, lhs, rhs });
    }
    Ok(rules)
}
