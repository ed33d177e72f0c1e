//! Pavage's graph IR: ops, types, text, verifier, reference evaluator, regions and schedules as plain data.
pub mod dtype;
pub mod scalar;
pub use dtype::DType;
pub use scalar::{Scalar, ScalarFn};
