//! Model files to graphs: ONNX and safetensors.
//!
//! Reading starts at [`onnx::load`] and [`safetensors::load`]. Model files are untrusted: no input may make a
//! reader panic, hang, read outside the model's folder, or allocate more than the file justifies.
pub mod error;
mod files;
pub mod onnx;
pub mod safetensors;

pub use error::{Error, Problem};
