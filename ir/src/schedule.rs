//! How a kernel family runs a region: numbers as data, so that they can be chosen, printed, measured and kept.
use std::{collections::BTreeMap, fmt, str::FromStr};

/// A family's name and its knobs: `gemm mr=6 nv=2 kc=512`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Schedule {
    /// Kernel family.
    pub family: String,
    /// Knobs, sorted by name.
    pub knobs: BTreeMap<String, i64>,
}

impl Schedule {
    /// A schedule of `family` with these knobs.
    pub fn new(family: &str, knobs: &[(&str, i64)]) -> Self {
        Self { family: family.into(), knobs: knobs.iter().map(|(k, v)| ((*k).to_string(), *v)).collect() }
    }

    /// A knob's value, or `default`.
    pub fn knob(&self, name: &str, default: i64) -> i64 {
        self.knobs.get(name).copied().unwrap_or(default)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.family)?;
        self.knobs.iter().try_for_each(|(k, v)| write!(f, " {k}={v}"))
    }
}

impl FromStr for Schedule {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let mut words = s.split_whitespace();
        let family = words.next().ok_or("empty schedule")?.to_string();
        let knob =
            |w: &str| w.split_once('=').and_then(|(k, v)| Some((k.to_string(), v.parse().ok()?))).ok_or_else(|| format!("expected `name=number`, got `{w}`"));
        Ok(Self { family, knobs: words.map(knob).collect::<Result<_, _>>()? })
    }
}
