//! `Value`: an input as it is given to a session, `Outputs`: what comes back.
use crate::error::Shape;
use crate::tensor::{Tensor, TensorRef};
use crate::{DType, Error};
use std::any::Any;
use std::ops::Index;
use std::sync::Arc;

/// An input: in host memory, or in the memory of the session's device.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    /// In host memory.
    Host(TensorRef<'a>),
    /// In device memory.
    Device(&'a DeviceBuffer),
}

impl<'a> Value<'a> {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Value::Host(t) => t.dtype(),
            Value::Device(b) => b.dtype,
        }
    }

    /// The extents.
    pub fn shape(&self) -> &'a [usize] {
        match self {
            Value::Host(t) => t.shape(),
            Value::Device(b) => &b.shape,
        }
    }
}

impl<'a> From<&'a Tensor> for Value<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Value::Host(tensor.view())
    }
}

impl<'a> From<TensorRef<'a>> for Value<'a> {
    fn from(tensor: TensorRef<'a>) -> Self {
        Value::Host(tensor)
    }
}

impl<'a> From<&'a DeviceBuffer> for Value<'a> {
    fn from(buffer: &'a DeviceBuffer) -> Self {
        Value::Device(buffer)
    }
}

/// A dense, row-major tensor in the memory of a device.
pub struct DeviceBuffer {
    pub(crate) device: String,
    pub(crate) address: u64,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) _owner: Option<Box<dyn Any + Send + Sync>>,
}

impl DeviceBuffer {
    /// Memory that somebody else owns, on a device by its name (`cuda:0`).
    ///
    /// # Safety
    /// While the buffer exists, the address holds a tensor of this type and shape in that
    /// device's primary context, and nobody writes to it during a run.
    pub unsafe fn from_raw(device: &str, address: u64, dtype: DType, shape: &[usize]) -> Self {
        DeviceBuffer { device: device.into(), address, dtype, shape: shape.to_vec(), _owner: None }
    }

    /// The device's name: `cuda:0`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The device address.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl std::fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shape = Shape(self.shape.clone());
        write!(f, "DeviceBuffer({}{shape} on {})", self.dtype, self.device)
    }
}

/// The outputs of a run, in the model's order. Reused by `run_into`, its memory is kept.
#[derive(Clone, Debug)]
pub struct Outputs {
    pub(crate) names: Arc<[String]>,
    pub(crate) tensors: Vec<Tensor>,
}

impl Outputs {
    pub(crate) fn new(names: Arc<[String]>) -> Result<Self, Error> {
        let empty = || Tensor::zeros(DType::U8, &[0]);
        let tensors = names.iter().map(|_| empty()).collect::<Result<_, _>>()?;
        Ok(Outputs { names, tensors })
    }

    /// The output of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.names.iter().position(|n| n == name).map(|i| &self.tensors[i])
    }

    /// Names and tensors, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.names.iter().map(String::as_str).zip(&self.tensors)
    }

    /// How many outputs there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The tensors, in order.
    pub fn into_tensors(self) -> Vec<Tensor> {
        self.tensors
    }
}

/// The n-th output; panics when there is none, as a slice does.
impl Index<usize> for Outputs {
    type Output = Tensor;
    fn index(&self, n: usize) -> &Tensor {
        &self.tensors[n]
    }
}

/// The output of this name; panics when there is none, as a map does.
impl Index<&str> for Outputs {
    type Output = Tensor;
    fn index(&self, name: &str) -> &Tensor {
        match self.get(name) {
            Some(tensor) => tensor,
            None => panic!("no output `{name}`"),
        }
    }
}
