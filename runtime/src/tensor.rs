//! Tensors in host memory.
use crate::bytes::AlignedBytes;
use crate::error::Shape;
use crate::{DType, Error};
use half::{bf16, f16};
use std::fmt;

/// A tensor in host memory: dense, row-major, its first byte at a multiple of 256.
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: AlignedBytes,
}

/// A Rust type that is an element type.
///
/// # Safety
/// Any bit pattern is a value, and its size is that of `DTYPE`.
pub unsafe trait Element: Copy + 'static {
    /// The element type.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($Rust:ty = $Name:ident),*) => { $(
        // SAFETY: a plain number of that width.
        unsafe impl Element for $Rust { const DTYPE: DType = DType::$Name; }
    )* };
}
elements!(f64 = F64, f32 = F32, f16 = F16, bf16 = BF16, i64 = I64, i32 = I32, i16 = I16, i8 = I8, u64 = U64, u32 = U32, u16 = U16, u8 = U8);

/// Bytes of a dense tensor.
pub(crate) fn byte_len(dtype: DType, shape: &[usize]) -> Result<usize, Error> {
    shape
        .iter()
        .try_fold(1usize, |n, d| n.checked_mul(*d))
        .and_then(|count| dtype.bytes(count))
        .filter(|bytes| isize::try_from(*bytes).is_ok())
        .ok_or_else(|| Error::TensorTooLarge { dtype, shape: Shape(shape.to_vec()) })
}

fn check_len(dtype: DType, shape: &[usize], found: usize) -> Result<(), Error> {
    let expected = byte_len(dtype, shape)?;
    if expected == found {
        return Ok(());
    }
    Err(Error::TensorLength { dtype, shape: Shape(shape.to_vec()), expected, found })
}

impl Tensor {
    /// A tensor of zeros.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Self, Error> {
        let bytes = AlignedBytes::zeroed(byte_len(dtype, shape)?)?;
        Ok(Tensor { dtype, shape: shape.to_vec(), bytes })
    }

    /// A tensor with these elements, row-major.
    pub fn from_slice<T: Element>(shape: &[usize], elements: &[T]) -> Result<Self, Error> {
        // SAFETY: an `Element` is plain bytes.
        let bytes = unsafe { std::slice::from_raw_parts(elements.as_ptr().cast::<u8>(), size_of_val(elements)) };
        Tensor::from_bytes(T::DTYPE, shape, bytes)
    }

    /// A tensor with these bytes, row-major, little-endian.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Self, Error> {
        check_len(dtype, shape, bytes.len())?;
        Ok(Tensor { dtype, shape: shape.to_vec(), bytes: AlignedBytes::copy_of(bytes)? })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The bytes, row-major, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The elements; an error when they are not of this type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], Error> {
        if T::DTYPE != self.dtype {
            return Err(Error::TensorDType { asked: T::DTYPE, found: self.dtype });
        }
        let count = self.bytes.len() / size_of::<T>();
        // SAFETY: aligned to 256, `count` elements long, any bit pattern is a value.
        Ok(unsafe { std::slice::from_raw_parts(self.bytes.as_ptr().cast::<T>(), count) })
    }

    /// The elements, to be written; an error when they are not of this type.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T], Error> {
        if T::DTYPE != self.dtype {
            return Err(Error::TensorDType { asked: T::DTYPE, found: self.dtype });
        }
        let count = self.bytes.len() / size_of::<T>();
        // SAFETY: aligned to 256, `count` elements long, ours alone, any bit pattern is a value.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.bytes.as_mut_ptr().cast::<T>(), count) })
    }

    /// The tensor by reference.
    pub fn view(&self) -> TensorRef<'_> {
        TensorRef { dtype: self.dtype, shape: &self.shape, bytes: &self.bytes }
    }

    /// Gives it another type and shape. Memory is kept when it suffices; what it then holds is
    /// unspecified, unless type and shape are as before.
    pub fn reset(&mut self, dtype: DType, shape: &[usize]) -> Result<(), Error> {
        self.bytes.reset(byte_len(dtype, shape)?)?;
        self.dtype = dtype;
        self.shape.clear();
        self.shape.extend_from_slice(shape);
        Ok(())
    }
}

impl Tensor {
    /// [`Tensor::reset`] with a shape of computed sizes, none negative.
    pub(crate) fn reset_i64(&mut self, dtype: DType, shape: &[i64]) -> Result<(), Error> {
        if self.dtype == dtype && self.shape.iter().map(|d| *d as i64).eq(shape.iter().copied()) {
            return Ok(());
        }
        let shape: Vec<usize> = shape.iter().map(|d| *d as usize).collect();
        self.reset(dtype, &shape)
    }
}

impl Clone for Tensor {
    fn clone(&self) -> Self {
        match Tensor::from_bytes(self.dtype, &self.shape, &self.bytes) {
            Ok(copy) => copy,
            // Out of memory, where `clone` of any collection aborts.
            Err(_) => std::alloc::handle_alloc_error(std::alloc::Layout::new::<Tensor>()),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}{})", self.dtype, Shape(self.shape.clone()))
    }
}

/// A dense, row-major tensor in somebody's host memory.
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    dtype: DType,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl<'a> TensorRef<'a> {
    /// The bytes as a tensor; an error when they are too few or too many.
    pub fn new(dtype: DType, shape: &'a [usize], bytes: &'a [u8]) -> Result<Self, Error> {
        check_len(dtype, shape, bytes.len())?;
        Ok(TensorRef { dtype, shape, bytes })
    }

    /// The elements as a tensor; an error when they are too few or too many.
    pub fn from_slice<T: Element>(shape: &'a [usize], elements: &'a [T]) -> Result<Self, Error> {
        // SAFETY: an `Element` is plain bytes.
        let bytes = unsafe { std::slice::from_raw_parts(elements.as_ptr().cast::<u8>(), size_of_val(elements)) };
        TensorRef::new(T::DTYPE, shape, bytes)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The extents.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// The bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl fmt::Debug for TensorRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorRef({}{})", self.dtype, Shape(self.shape.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_come_back_and_lengths_are_checked() {
        let t = Tensor::from_slice(&[2, 3], &[1f32, -2.5, 3.0, 4.0, 5.5, f32::MAX]).unwrap();
        assert_eq!(t.as_slice::<f32>().unwrap()[5], f32::MAX);
        assert_eq!(t.bytes().as_ptr() as usize % 256, 0);
        let wrong = t.as_slice::<i32>().unwrap_err();
        assert_eq!(wrong.to_string(), "the tensor holds f32, asked for i32");
        let short = Tensor::from_slice(&[7], &[1i64; 6]).unwrap_err();
        assert_eq!(short.to_string(), "a tensor i64[7] has 56 bytes, got 48");
        assert_eq!(short.exit_code(), 1);
        let huge = Tensor::zeros(DType::F64, &[usize::MAX, 2]).unwrap_err();
        assert!(huge.to_string().contains("does not fit in memory"));
        assert_eq!(Tensor::zeros(DType::U4, &[5]).unwrap().bytes().len(), 3);
        assert_eq!(Tensor::zeros(DType::F32, &[0, 9]).unwrap().bytes().len(), 0);
    }
}
