//! What each rule promises, for people and for `pavage explain`.
//!
//! Text rules say it themselves, by `=>` or `~>`. A computed rule that needs more than types to hold checks its
//! **premise** on the facts of the e-graph, or finds it in the terms; where the premise cannot be shown, nothing is added.
use super::{FILES, Promise};
use std::fmt;

/// What a rule promises, and under which condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The same bits.
    Exact,
    /// Of floats, the same real numbers; rounding may differ.
    Real,
    /// The promise, where the premise was shown.
    Conditional {
        /// What holds then.
        promise: Promise,
        /// What must be so.
        premise: &'static str,
    },
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |p: &Promise| if *p == Promise::Exact { "exact" } else { "real" };
        match self {
            Class::Exact => f.write_str("exact"),
            Class::Real => f.write_str("real"),
            Class::Conditional { promise, premise } => write!(f, "{}, since {premise}", word(promise)),
        }
    }
}

const fn given(promise: Promise, premise: &'static str) -> Class {
    Class::Conditional { promise, premise }
}

/// The rules written in Rust.
const COMPUTED: &[(&str, Class)] = &[
    ("transpose-transpose", Class::Exact),
    ("reshape-reshape", Class::Exact),
    ("broadcast-broadcast", Class::Exact),
    ("view-nothing", Class::Exact),
    ("reduce-reduce", Class::Real),
    ("map-of-broadcasts", Class::Exact),
    ("neutral-element", given(Promise::Exact, "all elements of the other operand are neutral")),
    ("saturating-cast", given(Promise::Exact, "the integers do not reach beyond the bound")),
    ("attention", given(Promise::Real, "what a condition masks is minus infinity")),
    ("split-k", Class::Real),
    ("im2col", Class::Real),
    ("winograd", given(Promise::Real, "the weights are constants")),
    ("repeated-operand", Class::Exact),
    ("grouped-attention", Class::Exact),
    ("grouped-queries", Class::Exact),
    ("split-keys", Class::Real),
    ("pixels-as-columns", Class::Real),
    ("transpose-of-ones", Class::Exact),
    ("row-scale", given(Promise::Real, "the factor is one number a row")),
    ("row-first", given(Promise::Real, "the factor is one number a row")),
    ("factor-into-weights", given(Promise::Real, "factors and weights are constants")),
    ("term-into-bias", given(Promise::Real, "terms and weights are constants")),
    ("centred-weights", given(Promise::Real, "the mean is that of the same row and the weights are constants")),
    ("constants-meet", given(Promise::Real, "both terms are constants")),
    ("merge-products", given(Promise::Exact, "the weights are constants")),
    ("merge-convolutions", given(Promise::Exact, "the weights are constants")),
    ("merge-pointwise", Class::Exact),
];

/// What the rule of this name promises; `None` if there is none.
pub fn class(name: &str) -> Option<Class> {
    let text = || {
        let lines = FILES.iter().flat_map(|(_, text)| text.lines()).filter(|line| !line.starts_with('#'));
        let mut of = lines.filter_map(|line| line.split_once(": ")).filter(|(n, _)| n.trim() == name);
        of.next().map(|(_, rule)| if rule.contains("~>") { Class::Real } else { Class::Exact })
    };
    COMPUTED.iter().find(|(n, _)| *n == name).map(|(_, class)| *class).or_else(text)
}
