//! `Backend`: what a device does for a session. Addresses are the device's, as integers.
use crate::plan::KernelId;
use crate::tensor::{Tensor, TensorRef};
use crate::value::{DeviceBuffer, Value};
use crate::{DType, Error};
use std::any::Any;

/// Memory of a device; freed when dropped.
pub(crate) struct Block {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
    /// Frees the memory.
    pub(crate) _owner: Box<dyn Any + Send>,
}

/// A launch with all sizes computed.
pub(crate) struct Launch {
    pub(crate) kernel: KernelId,
    pub(crate) dims: Vec<i64>,
    pub(crate) shape: LaunchShape,
}

/// How a launch is spread over the device.
pub(crate) enum LaunchShape {
    Cpu(CpuShape),
    Gpu(GpuShape),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuShape {
    pub(crate) extent: i64,
    pub(crate) grain: i64,
    pub(crate) unit_ps: i64,
    pub(crate) scratch: usize,
    /// Whether the kernel takes a scratch pointer at all.
    pub(crate) takes_scratch: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct GpuShape {
    pub(crate) grid: [u32; 3],
    pub(crate) maps: Vec<MapShape>,
}

/// Sizes of a tensor map: bytes from the argument's start, extents, strides in bytes.
#[derive(Clone, Debug)]
pub(crate) struct MapShape {
    pub(crate) byte_offset: u64,
    pub(crate) dims: Vec<u64>,
    pub(crate) strides: Vec<u64>,
}

/// What became of a run that may be recorded.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) enum Replay {
    /// This run is already on its way: nothing to do.
    Done,
    /// Do the steps; they are being recorded.
    Record,
    /// Do the steps.
    Off,
}

/// A device as a session uses it. Work is in order; only `read` and `finish` wait for it.
pub(crate) trait Backend: Send {
    /// The device in messages: `cpu`, `cuda:0`.
    fn name(&self) -> &str;
    /// Fresh memory, content unspecified.
    fn alloc(&mut self, bytes: usize) -> Result<Block, Error>;
    /// A run begins. `parallel`: some launch is worth more than one thread.
    fn begin(&mut self, parallel: bool) -> Result<(), Error>;
    /// Where kernels find the n-th input during this run.
    fn input(&mut self, n: usize, value: &Value) -> Result<u64, Error>;
    /// Where kernels put the n-th output during this run; gives the tensor, if any, its shape.
    fn output(&mut self, n: usize, dtype: DType, shape: &[i64], tensor: Option<&mut Tensor>) -> Result<u64, Error>;
    /// Runs a kernel on buffers at these addresses.
    fn launch(&mut self, launch: &Launch, args: &[u64]) -> Result<(), Error>;
    /// Copies; source and destination do not overlap, or are the same.
    fn copy(&mut self, from: u64, to: u64, bytes: usize) -> Result<(), Error>;
    /// Reads a few bytes back, after all work before.
    fn read(&mut self, from: u64, into: &mut [u8]) -> Result<(), Error>;
    /// Writes a few bytes, before all work after.
    fn write(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error>;
    /// The run is over: waits, and fills the output tensors where kernels could not.
    fn finish(&mut self, outputs: &mut [Tensor]) -> Result<(), Error>;
    /// The run failed: whatever was begun is given up.
    fn abandon(&mut self);
    /// Runs a kernel and says how many nanoseconds it took.
    fn launch_timed(&mut self, launch: &Launch, args: &[u64]) -> Result<f64, Error>;
    /// Asks to replay the steps of a run with the same sizes and places, known by `key`.
    fn record(&mut self, _key: u64) -> Result<Replay, Error> {
        Ok(Replay::Off)
    }
    /// The steps asked for by [`Replay::Record`] are done.
    fn recorded(&mut self, _key: u64) -> Result<(), Error> {
        Ok(())
    }
    /// A recording failed: its steps were not done, and no other is begun.
    fn stop_recording(&mut self) {}
    /// Most iterations of a loop: devices that compute nothing cannot know when it ends.
    fn max_trips(&self) -> i64 {
        i64::MAX
    }
    /// Whether outputs can stay in memory of the device.
    fn keeps_outputs(&self) -> bool {
        false
    }
    /// The outputs of the last run, in the memory of the device.
    fn kept_outputs(&mut self) -> Vec<DeviceBuffer> {
        Vec::new()
    }
    /// Copies a tensor from the device's memory.
    fn download(&mut self, buffer: &DeviceBuffer) -> Result<Tensor, Error> {
        Err(Error::NoGpu(format!("{} cannot read the memory of {}", self.name(), buffer.device)))
    }
    /// Puts a tensor in the device's memory, where the device has one of its own.
    fn upload(&mut self, _tensor: &TensorRef) -> Result<DeviceBuffer, Error> {
        Err(Error::NoGpu(format!("{} takes inputs from host memory", self.name())))
    }
    /// What was launched, in text, on devices that keep it.
    fn take_log(&mut self) -> Vec<String> {
        Vec::new()
    }
}
