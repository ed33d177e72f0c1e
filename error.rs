//! What a compilation can fail with, sorted by whose move it is.

/// Why a model was not compiled. [`Error::exit_code`] says whose move it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model file, or a name or size that does not fit it.
    #[error(transparent)]
    Model(#[from] pavage_frontend::Error),
    /// A request that makes no sense: a target, plan, pass or size that does not exist.
    #[error("{0}")]
    Request(String),
    /// What the model needs and no kernel covers: all of it.
    #[error("{0}")]
    Unsupported(String),
    /// A compiled kernel disagrees with the reference evaluator.
    #[error("verification failed: {0}")]
    Verification(String),
    /// A mistake of ours: a pass broke the graph, or generated code does not assemble.
    #[error("internal error in {stage}: {why}\nThis is a bug in Pavage. Please report it with the model.")]
    Internal {
        /// Pass or step that failed.
        stage: String,
        /// What is wrong; of a graph, with its text.
        why: String,
    },
    /// The artifact cannot be written or read.
    #[error(transparent)]
    Artifact(#[from] pavage_runtime::Error),
}

impl Error {
    /// Exit code for a program: 1 the request, 2 the model, 3 verification (a bug of ours
    /// included), 4 the device.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Model(pavage_frontend::Error::Request(_)) | Error::Request(_) => 1,
            Error::Model(_) | Error::Unsupported(_) => 2,
            Error::Verification(_) | Error::Internal { .. } => 3,
            Error::Artifact(e) => e.exit_code(),
        }
    }
}

impl From<pavage_passes::PassError> for Error {
    fn from(e: pavage_passes::PassError) -> Self {
        use pavage_passes::PassError::{NoKernel, Unknown};
        match &e {
            Unknown(_) => Error::Request(e.to_string()),
            NoKernel { .. } => Error::Unsupported(e.to_string()),
            // The message names the pass.
            _ => Error::Internal { stage: "the optimiser".into(), why: e.to_string() },
        }
    }
}
