//! What a program needs of the sizes it is given.
use crate::Dim;

/// A relation of sizes without which a program is wrong: where it does not hold, a run is refused.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Requirement {
    /// The two are equal.
    Equal(Dim, Dim),
    /// The first is 1, or equal to the second: it broadcasts.
    Broadcasts(Dim, Dim),
}

impl Requirement {
    /// The size that is 0 where the relation holds, and only there.
    pub fn gap(&self) -> Dim {
        match self {
            Requirement::Equal(a, b) => a.clone() - b.clone(),
            Requirement::Broadcasts(a, b) => (a.clone() - Dim::one()) * (a.clone() - b.clone()),
        }
    }
}

impl std::fmt::Display for Requirement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Requirement::Equal(a, b) => write!(f, "the model needs {a} to equal {b}"),
            Requirement::Broadcasts(a, b) => write!(f, "the model needs {a} to be 1 or {b}"),
        }
    }
}
