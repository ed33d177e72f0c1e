//! Load and run Pavage artifacts: no compiler, no LLVM, no CUDA toolkit.
mod dim;
mod dtype;
pub mod plan;

pub use dim::{DimError, DimExpr};
pub use dtype::DType;
