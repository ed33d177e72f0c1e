//! Errors, sorted by whose move it is.
use crate::{DType, DimError};
use std::fmt;
use std::path::PathBuf;

/// What went wrong. [`Error::exit_code`] says whose move it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // The request.
    /// A name that is no input of the model.
    #[error("the model has no input `{name}`; its inputs are {have}")]
    NoSuchInput {
        /// The name given.
        name: String,
        /// The names there are.
        have: Names,
    },
    /// An input that was given no value.
    #[error("input `{0}` was given no value")]
    MissingInput(String),
    /// An input given twice.
    #[error("input `{0}` was given twice")]
    RepeatedInput(String),
    /// An input of the wrong element type.
    #[error("input `{input}`: the model takes {expected}, got {found}")]
    InputDType {
        /// Name of the input.
        input: String,
        /// What the model takes.
        expected: DType,
        /// What was given.
        found: DType,
    },
    /// An input of the wrong shape.
    #[error("input `{input}`: the model takes {expected}, got {found}{}", .why.as_deref().map(|w| format!(" ({w})")).unwrap_or_default())]
    InputShape {
        /// Name of the input.
        input: String,
        /// The shape the model takes, symbols by name: `[n x 3 x 224]`.
        expected: String,
        /// The shape given.
        found: Shape,
        /// Where a size in the way comes from, when that is another input.
        why: Option<String>,
    },
    /// A size outside what the artifact was compiled for.
    #[error("{what}: {symbol} is {value}, compiled for {min} to {max}")]
    SizeRange {
        /// Where the size was met: "input `x`".
        what: String,
        /// Name of the size.
        symbol: String,
        /// Its value.
        value: i64,
        /// Smallest value compiled for.
        min: i64,
        /// Largest value compiled for.
        max: i64,
    },
    /// A guard of the artifact does not hold.
    #[error("{message}: {value} is not in {min} to {max}")]
    Guard {
        /// What the artifact says about it.
        message: String,
        /// The value found.
        value: i64,
        /// Smallest value allowed.
        min: i64,
        /// Largest value allowed.
        max: i64,
    },
    /// A value in the memory of another device.
    #[error("input `{input}` is in the memory of {found}, the session runs on {session}")]
    WrongDevice {
        /// Name of the input.
        input: String,
        /// Where the value is.
        found: String,
        /// Where the session runs.
        session: String,
    },
    /// A plan name that the artifact lacks.
    #[error("the artifact has no plan `{name}`; it has {have}")]
    NoSuchPlan {
        /// The name asked for.
        name: String,
        /// The names there are.
        have: Names,
    },
    /// A device name that means nothing.
    #[error("no device `{0}`: cpu, cuda, cuda:N and null are devices")]
    NoSuchDevice(String),
    /// Bytes or elements that do not fill a shape.
    #[error("a tensor {dtype}{shape} has {expected} bytes, got {found}")]
    TensorLength {
        /// Element type.
        dtype: DType,
        /// Extents.
        shape: Shape,
        /// Bytes of such a tensor.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A tensor read as another element type.
    #[error("the tensor holds {found}, asked for {asked}")]
    TensorDType {
        /// Element type asked for.
        asked: DType,
        /// Element type of the tensor.
        found: DType,
    },
    /// A shape whose bytes exceed the address space.
    #[error("a tensor {dtype}{shape} does not fit in memory")]
    TensorTooLarge {
        /// Element type.
        dtype: DType,
        /// Extents.
        shape: Shape,
    },

    // The artifact.
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is no artifact.
    #[error("not a Pavage artifact: {0}")]
    NotAnArtifact(&'static str),
    /// An artifact of a newer format.
    #[error("this artifact is format {found}, this runtime reads {oldest}..={newest}: update pavage-runtime")]
    TooNew {
        /// Format of the artifact.
        found: u32,
        /// Oldest format this runtime reads.
        oldest: u32,
        /// Newest format this runtime reads.
        newest: u32,
    },
    /// An artifact that contradicts itself or was cut off.
    #[error("the artifact is damaged: {0}")]
    Damaged(String),
    /// An artifact whose bytes are not those that were written.
    #[error("the artifact is damaged: the checksum of {0} does not match")]
    Checksum(String),
    /// A weight file that cannot be used.
    #[error("weights of tensor `{tensor}` in `{path}`: {why}")]
    External {
        /// Name of the tensor.
        tensor: String,
        /// The path in the artifact.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// A size of a plan that cannot be computed for this shape.
    #[error("the plan cannot be laid out for this shape: {what}: {source}")]
    Size {
        /// Which size.
        what: String,
        /// Why not.
        source: DimError,
    },
    /// A plan that breaks its own rules for this shape.
    #[error("the plan does not hold for this shape: {0}")]
    Plan(String),

    // The device.
    /// No plan for this device.
    #[error("the artifact has no plan `{plan}` for {device}; it has {have}")]
    NoCode {
        /// Name of the plan.
        plan: String,
        /// The device, with what it can run.
        device: String,
        /// The targets there are.
        have: Names,
    },
    /// Code for a CPU with features that this one lacks.
    #[error("the artifact is compiled for {target}: this CPU lacks {missing}; compile with --target x86-64-v3, or on this machine with --target native")]
    CpuFeatures {
        /// Target of the code.
        target: String,
        /// Features that are missing.
        missing: Names,
    },
    /// Code that cannot be loaded.
    #[error("the code for {target} cannot be loaded: {why}")]
    Load {
        /// Target of the code.
        target: String,
        /// What the loader or the driver's compiler said.
        why: String,
    },
    /// No driver, no GPU, or not in this build.
    #[error("no usable GPU: {0}")]
    NoGpu(String),
    /// Not enough memory.
    #[error("out of memory on {device}: {needed} bytes needed{}", .free.map(|f| format!(", {f} free")).unwrap_or_default())]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        needed: usize,
        /// Bytes free there, where known.
        free: Option<usize>,
    },
    /// The device refused something.
    #[error("{device}: {what}: {why}")]
    Device {
        /// The device.
        device: String,
        /// What was tried.
        what: String,
        /// What the driver said.
        why: String,
    },
    /// The session failed earlier in a way that leaves it unusable.
    #[error("the session is closed: {0}")]
    Closed(String),
}

impl Error {
    /// Exit code for a program: 1 the request, 2 the artifact, 4 the device. (0 is success, 3 is
    /// for results out of tolerance.)
    pub fn exit_code(&self) -> i32 {
        use Error::*;
        match self {
            NoSuchInput { .. }
            | MissingInput(_)
            | RepeatedInput(_)
            | InputDType { .. }
            | InputShape { .. }
            | SizeRange { .. }
            | Guard { .. }
            | WrongDevice { .. }
            | NoSuchPlan { .. }
            | NoSuchDevice(_)
            | TensorLength { .. }
            | TensorDType { .. }
            | TensorTooLarge { .. } => 1,
            Io { .. } | NotAnArtifact(_) | TooNew { .. } | Damaged(_) | Checksum(_) | External { .. } | Size { .. } | Plan(_) => 2,
            NoCode { .. } | CpuFeatures { .. } | Load { .. } | NoGpu(_) | OutOfMemory { .. } | Device { .. } | Closed(_) => 4,
        }
    }
}

/// Names in a message: `a`, `b` and `c`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names(pub Vec<String>);

impl<S: Into<String>> FromIterator<S> for Names {
    fn from_iter<I: IntoIterator<Item = S>>(iter: I) -> Self {
        Names(iter.into_iter().map(Into::into).collect())
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => f.write_str("none"),
            [one] => f.write_str(one),
            [most @ .., last] => write!(f, "{} and {last}", most.join(", ")),
        }
    }
}

/// A shape in a message: `[1 x 3 x 224]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape(pub Vec<usize>);

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.0.iter().map(|d| d.to_string()).collect();
        write!(f, "[{}]", dims.join(" x "))
    }
}
