//! What `--precision` asks for, and what it reports.
use crate::Tensor;
use pavage_passes::precision::{
    Precision, Storage,
    quantise::{Method, Symmetry},
};
use std::{collections::BTreeMap, fmt, str::FromStr};

/// The precision of a model's layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// As the model says.
    #[default]
    Model,
    /// This one, for every layer that gains by it.
    Fixed(Precision),
    /// For each layer the one that gains most within the error budget.
    Auto,
}

impl Wanted {
    /// The precisions to consider.
    pub(crate) fn precisions(self) -> Vec<Precision> {
        match self {
            Wanted::Model => vec![],
            Wanted::Fixed(p) => vec![p],
            Wanted::Auto => Precision::NARROW.to_vec(),
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::Model => f.write_str("f32"),
            Wanted::Fixed(p) => p.fmt(f),
            Wanted::Auto => f.write_str("auto"),
        }
    }
}

impl FromStr for Wanted {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let fixed = || Precision::NARROW.into_iter().find(|p| p.name() == s).map(Wanted::Fixed);
        match s {
            "f32" => Ok(Wanted::Model),
            "auto" => Ok(Wanted::Auto),
            _ => fixed().ok_or_else(|| format!("`{s}`: a precision is f32, f16, bf16, int8, w8, w4 or auto")),
        }
    }
}

/// How far a model's outputs may move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaxError {
    /// One minus the cosine of the angle between an output and what it was, at most; the worst of all outputs and samples.
    Cos(f64),
    /// Share of rows whose largest element is another, at most.
    Top1(f64),
}

impl FromStr for MaxError {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let help = || format!("`{s}`: an error budget is cos=1e-3 (one minus the cosine) or top1=0.5% (rows whose largest element changes)");
        let (name, value) = s.split_once('=').ok_or_else(help)?;
        let (value, unit) = match value.strip_suffix('%') {
            Some(value) => (value, 0.01),
            None => (value, 1.0),
        };
        let value = value.parse::<f64>().map_err(|_| help())? * unit;
        match name {
            "cos" if unit == 1.0 && (0.0..=2.0).contains(&value) => Ok(MaxError::Cos(value)),
            "top1" if (0.0..=1.0).contains(&value) => Ok(MaxError::Top1(value)),
            _ => Err(help()),
        }
    }
}

impl fmt::Display for MaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MaxError::Cos(v) => write!(f, "cos={v}"),
            MaxError::Top1(v) => write!(f, "top1={v}"),
        }
    }
}

/// Inputs of one run of the model, to calibrate with.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Where it is from, for messages.
    pub name: String,
    /// The inputs by name.
    pub inputs: BTreeMap<String, Tensor>,
}

/// How layers are stored and computed.
#[derive(Clone, Debug, Default)]
pub struct PrecisionOptions {
    /// In what precision.
    pub wanted: Wanted,
    /// Groups of weights.
    pub storage: Storage,
    /// How ranges of activations are found.
    pub method: Method,
    /// The error budget; it takes samples. `auto` has one of `cos=1e-3` if none is given.
    pub max_error: Option<MaxError>,
    /// Inputs that errors and ranges are measured on.
    pub samples: Vec<Sample>,
}

impl PrecisionOptions {
    /// As flags of the command line; the samples are not named.
    pub(crate) fn flags(&self) -> Vec<String> {
        if self.wanted == Wanted::Model {
            return vec![];
        }
        let mut flags = vec![format!("--precision={}", self.wanted)];
        flags.extend(self.storage.group.map(|g| format!("--group={g}")));
        flags.extend((self.storage.symmetry == Symmetry::Asymmetric).then(|| "--asymmetric".to_string()));
        flags.extend(self.max_error.map(|e| format!("--max-error={e}")));
        flags.extend((!self.samples.is_empty()).then(|| format!("--calib-method={}", self.method.name())));
        flags
    }

    /// Read one of [`PrecisionOptions::flags`]; whether it is one.
    pub(crate) fn take(&mut self, flag: &str) -> Result<bool, String> {
        let bad = |what: &str| format!("bad flag `{what}`");
        match flag.split_once('=').map_or((flag, ""), |(name, value)| (name, value)) {
            ("--precision", v) => self.wanted = v.parse()?,
            ("--group", v) => self.storage.group = Some(v.parse().map_err(|_| bad(flag))?),
            ("--asymmetric", _) => self.storage.symmetry = Symmetry::Asymmetric,
            ("--max-error", _) => self.max_error = flag.strip_prefix("--max-error=").map(str::parse).transpose()?,
            ("--calib-method", v) => self.method = Method::ALL.into_iter().find(|m| m.name() == v).ok_or_else(|| bad(flag))?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// How far the outputs of a model moved on the samples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// See [`MaxError::Cos`].
    pub cos: f64,
    /// See [`MaxError::Top1`]; none where no output has rows of several elements.
    pub top1: Option<f64>,
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cos={:.2e}", self.cos)?;
        self.top1.map_or(Ok(()), |t| write!(f, ", top1={:.2}%", 100.0 * t))
    }
}

/// What became of one layer.
#[derive(Clone, Debug)]
pub struct LayerReport {
    /// `cpu` or `gpu`: they choose for themselves.
    pub device: &'static str,
    /// The model's nodes.
    pub layer: String,
    /// The precision chosen.
    pub precision: Precision,
    /// Predicted nanoseconds of the product alone, in f32.
    pub predicted_ns: f64,
    /// Predicted nanoseconds saved: how much longer the best plan with this layer in f32 takes, of those that have every other layer as chosen or
    /// in f32.
    pub gain_ns: f64,
    /// Measured on the samples: the root of the squares of what changes in the layer's result over those of the result.
    pub error: Option<f64>,
    /// Why it stayed as it was.
    pub why: String,
}

/// What `--precision` did.
#[derive(Clone, Debug, Default)]
pub struct PrecisionReport {
    /// Every layer, in order.
    pub layers: Vec<LayerReport>,
    /// The model's outputs against those in f32, where there are samples: one a kind of device.
    pub moved: Vec<(&'static str, Moved)>,
    /// What was asked for and could not be done as asked.
    pub notes: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_and_nonsense_is_not() {
        assert_eq!("cos=1e-3".parse(), Ok(MaxError::Cos(1e-3)));
        assert_eq!("top1=0.5%".parse(), Ok(MaxError::Top1(0.005)));
        assert_eq!("top1=0.25".parse(), Ok(MaxError::Top1(0.25)));
        for bad in ["", "cos", "cos=", "cos=x", "cos=-1", "cos=3", "cos=1%", "top1=150%", "top1=NaN", "mse=1", "cos=inf"] {
            assert!(bad.parse::<MaxError>().is_err(), "{bad}");
        }
    }

    #[test]
    fn flags_are_read_back() {
        let options = PrecisionOptions {
            wanted: Wanted::Fixed(Precision::W4),
            storage: Storage { group: Some(64), symmetry: Symmetry::Asymmetric },
            max_error: Some(MaxError::Top1(0.125)),
            ..PrecisionOptions::default()
        };
        let mut back = PrecisionOptions::default();
        for flag in options.flags() {
            assert!(back.take(&flag).unwrap(), "{flag}");
        }
        assert_eq!(back.flags(), options.flags());
        assert_eq!(back.take("--nonesuch"), Ok(false));
        assert!(back.take("--precision=f31").is_err());
    }
}
