//! `Device`: where a session runs.
use crate::Error;
use std::fmt;
use std::str::FromStr;

/// Where a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// This machine's CPU.
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(u32),
    /// Computes nothing and records what it was asked to do; for tests.
    Null,
}

impl Device {
    /// The GPU of this number; an error when there is none, or no driver for it.
    pub fn cuda(ordinal: u32) -> Result<Device, Error> {
        #[cfg(feature = "cuda")]
        {
            crate::cuda::probe(ordinal)?;
            Ok(Device::Cuda(ordinal))
        }
        #[cfg(not(feature = "cuda"))]
        {
            Err(no_cuda(ordinal))
        }
    }

    /// What GPUs there are, in words (`NVIDIA H200, sm_90, 139 GiB`); empty without a driver.
    pub fn gpus() -> Vec<String> {
        #[cfg(feature = "cuda")]
        {
            crate::cuda::list()
        }
        #[cfg(not(feature = "cuda"))]
        {
            Vec::new()
        }
    }
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn no_cuda(ordinal: u32) -> Error {
    Error::NoGpu(format!("cuda:{ordinal} asked for, but this program was built without cuda"))
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(n) => write!(f, "cuda:{n}"),
            Device::Null => f.write_str("null"),
        }
    }
}

/// `cpu`, `cuda` (the first GPU), `cuda:1`, `null`.
impl FromStr for Device {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "cpu" => Ok(Device::Cpu),
            "null" => Ok(Device::Null),
            "cuda" => Ok(Device::Cuda(0)),
            _ => s.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Device::Cuda).ok_or_else(|| Error::NoSuchDevice(s.into())),
        }
    }
}
