//! Model files to graphs: ONNX and safetensors.
//!
//! Reading starts at [`onnx::load`]. Model files are untrusted: no input may make a
//! reader panic, hang, read outside the model's folder, or allocate more than the file justifies.
pub mod error;
pub mod onnx;

pub use error::{Error, Problem};
