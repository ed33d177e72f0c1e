//! Pavage compiles ML models ahead of time: ONNX in, one artifact out, fast on CPUs and NVIDIA GPUs.
//!
//! ```no_run
//! use pavage::{CompileOptions, Device, Options, Source, Tensor, compile};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let compiled = compile(Source::Path("model.onnx".as_ref()), &CompileOptions::default())?;
//! compiled.save("model.pav".as_ref())?;
//!
//! let mut session = compiled.open()?.session(Device::Cpu, Options::default())?;
//! let x = Tensor::from_slice(&[1, 2], &[0.5f32, -1.0])?;
//! let y = session.run(&[("x", &x)])?;
//! println!("{:?}", y["y"].as_slice::<f32>()?);
//! # Ok(())
//! # }
//! ```
//!
//! A program that only runs artifacts depends on `pavage-runtime` alone, which holds no compiler.
pub mod bisect;
mod calibrate;
mod compile;
mod error;
mod gaps;
mod import;
mod lock;
mod options;
pub mod precision;
pub mod tune;
mod verify;

pub use compile::compile;
pub use error::Error;
pub use gaps::{Gap, gaps};
pub use import::import;
pub use lock::TuneLock;
pub use options::{CompileOptions, Compiled, Emit, Expected, OptLevel, Planning, Progress, ShapeArg, Source, Verify};
pub use pavage_frontend as frontend;
pub use pavage_ir as ir;
pub use pavage_passes as passes;
pub use pavage_runtime::{self as runtime, Artifact, Device, Options, Session, Tensor};
