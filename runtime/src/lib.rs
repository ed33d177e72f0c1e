//! Load and run Pavage artifacts: no compiler, no LLVM, no CUDA toolkit.
//!
//! ```no_run
//! use pavage_runtime::{Artifact, Device, Options, Tensor};
//! # fn main() -> Result<(), pavage_runtime::Error> {
//! let artifact = Artifact::open("model.pav")?;
//! let mut session = artifact.session(Device::Cpu, Options::default())?;
//! let picture = Tensor::from_slice(&[1, 1, 8, 8], &[0.5f32; 64])?;
//! let outputs = session.run(&[("image", &picture)])?;
//! for (name, tensor) in outputs.iter() {
//!     println!("{name}: {tensor:?}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `artifact` reads the file, `writer` writes it, [`plan`] is what it says; `session` binds a plan
//! to a device and to shapes; `backend` is what a device does. `FORMAT.md` describes the bytes.
mod analysis;
mod artifact;
mod backend;
mod bytes;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod dim;
mod dtype;
mod error;
mod exec;
mod features;
mod frame;
mod memory;
mod null;
pub mod plan;
mod pool;
mod session;
mod tensor;
#[cfg(test)]
mod testing;
mod validate;
mod value;
mod writer;

pub use artifact::{Artifact, FORMAT_VERSION, OLDEST_FORMAT, Segment, SegmentKind, content_hash};
pub use device::Device;
pub use dim::{DimError, DimExpr};
pub use dtype::DType;
pub use error::{Error, Names, Shape};
pub use exec::{LaunchTime, Observed, Then};
pub use features::{KNOWN_FEATURES, has_feature, host_level};
pub use session::{Graphs, Options, Session};
pub use tensor::{Element, Tensor, TensorRef};
pub use value::{DeviceBuffer, Outputs, Value};
pub use writer::Writer;
