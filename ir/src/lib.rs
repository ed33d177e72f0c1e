//! Pavage's graph IR: ops, types, text, verifier, reference evaluator, regions and schedules as plain data.
//!
//! This crate knows no model format, pass or device.
pub mod activation;
pub mod attr;
pub mod dim;
pub mod dtype;
pub mod eval;
pub mod graph;
pub mod minifloat;
pub mod op;
pub mod ops;
pub mod program;
pub mod program_eval;
pub mod region;
pub mod region_eval;
pub mod requirement;
pub mod scalar;
pub mod schedule;
pub mod tensor;
pub mod text;
mod text_parse;
pub mod types;
pub mod verify;
pub mod winograd;

pub use attr::Real;
pub use dim::{Binding, Dim, Sym};
pub use dtype::DType;
pub use eval::{EvalError, eval, eval_graph};
pub use graph::{Graph, Node, NodeId, NodeKind, Output, Value};
pub use op::{Op, OpError};
pub use region::{Expr, ExprId, Heart, Region};
pub use requirement::Requirement;
pub use scalar::{Scalar, ScalarFn};
pub use schedule::Schedule;
pub use tensor::{Tensor, TensorError};
pub use types::TensorType;
pub use verify::{VerifyError, verify};
