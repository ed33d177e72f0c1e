//! What can be wrong with a model file, or with what was asked of it.
use std::{fmt, path::PathBuf};

/// Why a model was not imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are not a well-formed file of its format.
    #[error("not a valid {format} file: {reason}")]
    Format {
        /// `ONNX` or `safetensors`.
        format: &'static str,
        /// What is broken, with the byte offset where known.
        reason: String,
    },
    /// The model needs an operator set that this reader does not know.
    #[error("operator set {version} of `{domain}` is not supported: Pavage reads {least} to {most}")]
    Opset {
        /// Domain name (`ai.onnx` for the default one).
        domain: String,
        /// Version that the model imports.
        version: i64,
        /// Oldest version read.
        least: i64,
        /// Newest version read.
        most: i64,
    },
    /// A tensor's data and description disagree.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What disagrees.
        reason: String,
    },
    /// Data kept outside the model file is missing or not where it may be.
    #[error("tensor `{tensor}`: external data `{location}` {reason}")]
    ExternalData {
        /// Tensor name.
        tensor: String,
        /// Where the model says the data is.
        location: String,
        /// Why it is refused.
        reason: String,
    },
    /// Nodes that need each other.
    #[error("the graph has a cycle through {}", .0.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(" -> "))]
    Cycle(Vec<String>),
    /// A name is read that nothing defines.
    #[error("{reader} reads `{name}`, which no node, input or initializer defines")]
    Undefined {
        /// Who reads it.
        reader: String,
        /// The name.
        name: String,
    },
    /// A name is defined twice.
    #[error("`{0}` is defined twice in one graph")]
    Duplicate(String),
    /// A node breaks its operator's specification.
    #[error("node `{node}` ({op}): {reason}")]
    Node {
        /// Node name.
        node: String,
        /// Operator.
        op: String,
        /// The broken requirement.
        reason: String,
    },
    /// The model is larger or deeper than any real one.
    #[error("{0}")]
    Limit(String),
    /// An option names something that the model does not have, or a size that does not fit.
    #[error("{0}")]
    Request(String),
    /// The model is well-formed and needs things that Pavage does not have: all of them.
    #[error("{}", Problems(.0))]
    Unsupported(Vec<Problem>),
}

/// One thing that a model needs and Pavage lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Operator.
    pub op: String,
    /// Its domain (`ai.onnx` for the default one).
    pub domain: String,
    /// Operator set version that the model imports of that domain.
    pub opset: i64,
    /// How many nodes have the problem.
    pub count: usize,
    /// Names of the first few of them.
    pub nodes: Vec<String>,
    /// What is missing, in the reader's words.
    pub missing: String,
    /// What is nearest to it, or that it is out of scope; empty where there is nothing to say.
    pub nearest: String,
}

struct Problems<'a>(&'a [Problem]);

impl fmt::Display for Problems<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0.len();
        write!(f, "this model needs {n} thing{} that Pavage lacks:", if n == 1 { "" } else { "s" })?;
        for p in self.0 {
            let more = if p.count > p.nodes.len() { ", ..." } else { "" };
            write!(f, "\n  {}::{} (opset {}, {}x): {} [{}{more}]", p.domain, p.op, p.opset, p.count, p.missing, p.nodes.join(", "))?;
            if !p.nearest.is_empty() {
                write!(f, "; {}", p.nearest)?;
            }
        }
        Ok(())
    }
}
