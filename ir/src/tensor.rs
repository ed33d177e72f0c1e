//! Tensors on the host: constants of graphs, and what the evaluator computes with.
use crate::{DType, Scalar, TensorType, dtype::Class, minifloat, scalar};
use memmap2::Mmap;
use std::{fmt, ops::Range, sync::Arc};

/// Where a tensor's bytes live. Cloning shares them.
#[derive(Clone)]
enum Bytes {
    Owned(Arc<Vec<u8>>),
    Mapped(Arc<Mmap>, Range<usize>),
}

/// A dense row-major array, little-endian. Elements narrower than a byte share bytes, the first in the lowest bits.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Bytes,
}

/// A tensor that cannot be: its bytes and shape disagree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// More elements than memory addresses.
    #[error("shape {0:?} has too many elements")]
    TooLarge(Vec<usize>),
    /// Byte count and shape disagree.
    #[error("{dtype}{shape:?} takes {expected} bytes, got {got}")]
    Size {
        /// Element type.
        dtype: DType,
        /// Extents.
        shape: Vec<usize>,
        /// Bytes that type and shape take.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
}

/// Number of elements of a shape, or `None` if it overflows.
pub fn count_of(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|n| *n <= isize::MAX as usize / 8)
}

impl Tensor {
    /// A tensor that owns its bytes.
    pub fn new(dtype: DType, shape: impl Into<Vec<usize>>, bytes: Vec<u8>) -> Result<Self, TensorError> {
        let shape = shape.into();
        check(dtype, &shape, bytes.len())?;
        Ok(Self { dtype, shape, bytes: Bytes::Owned(Arc::new(bytes)) })
    }

    /// A tensor whose bytes are a range of a mapped file; nothing is copied.
    pub fn mapped(dtype: DType, shape: impl Into<Vec<usize>>, map: Arc<Mmap>, range: Range<usize>) -> Result<Self, TensorError> {
        let shape = shape.into();
        let available = map.get(range.clone()).map_or(0, <[u8]>::len);
        check(dtype, &shape, available)?;
        Ok(Self { dtype, shape, bytes: Bytes::Mapped(map, range) })
    }

    /// A tensor of scalars in row-major order, each stored as `dtype` stores it.
    ///
    /// # Panics
    /// If the count does not fit the shape.
    pub fn from_scalars(dtype: DType, shape: impl Into<Vec<usize>>, values: impl IntoIterator<Item = Scalar>) -> Self {
        let shape = shape.into();
        let n = count_of(&shape).expect("shape fits memory");
        let mut bytes = vec![0u8; dtype.bytes(n)];
        let mut written = 0;
        for (i, v) in values.into_iter().enumerate() {
            assert!(i < n, "more than {n} scalars for shape {shape:?}");
            write(&mut bytes, dtype, i, v);
            written += 1;
        }
        assert_eq!(written, n, "scalars for shape {shape:?}");
        Self { dtype, shape, bytes: Bytes::Owned(Arc::new(bytes)) }
    }

    /// An f32 tensor.
    ///
    /// # Panics
    /// If the count does not fit the shape.
    pub fn from_f32(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(DType::F32, shape, bytes).expect("as many values as the shape has")
    }

    /// An i64 tensor.
    ///
    /// # Panics
    /// If the count does not fit the shape.
    pub fn from_i64(shape: impl Into<Vec<usize>>, values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(DType::I64, shape, bytes).expect("as many values as the shape has")
    }

    /// Every element equal.
    pub fn full(dtype: DType, shape: impl Into<Vec<usize>>, value: Scalar) -> Self {
        let shape = shape.into();
        let n = count_of(&shape).expect("shape fits memory");
        Self::from_scalars(dtype, shape, std::iter::repeat_n(value, n))
    }

    /// A tensor of rank 0.
    pub fn scalar(dtype: DType, value: Scalar) -> Self {
        Self::full(dtype, [], value)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its type.
    pub fn ty(&self) -> TensorType {
        TensorType::new(self.dtype, self.shape.iter().copied())
    }

    /// The raw bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Owned(v) => v,
            Bytes::Mapped(map, range) => &map[range.clone()],
        }
    }

    /// Whether the bytes are part of a mapped file.
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped(..))
    }

    /// The same bytes under another shape of as many elements.
    pub fn reshaped(&self, shape: impl Into<Vec<usize>>) -> Result<Self, TensorError> {
        let shape = shape.into();
        check(self.dtype, &shape, self.bytes().len())?;
        Ok(Self { dtype: self.dtype, shape, bytes: self.bytes.clone() })
    }

    /// Element `i` in row-major order.
    ///
    /// # Panics
    /// If `i` is not below [`Tensor::count`].
    pub fn get(&self, i: usize) -> Scalar {
        read(self.bytes(), self.dtype, i)
    }

    /// All elements as f64, in row-major order.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            DType::F32 => self.bytes().chunks_exact(4).map(|c| f64::from(f32::from_le_bytes(c.try_into().expect("4 bytes")))).collect(),
            _ => (0..self.count()).map(|i| self.get(i).f()).collect(),
        }
    }

    /// All elements as i64 (wrapping u64), in row-major order.
    pub fn to_i64(&self) -> Vec<i64> {
        (0..self.count()).map(|i| self.get(i).i() as i64).collect()
    }

    /// Whether both hold the same bits.
    pub fn same_bits(&self, other: &Tensor) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.bytes() == other.bytes()
    }

    /// A 64-bit content hash (FNV-1a over dtype, shape and bytes), equal on every machine.
    pub fn content_hash(&self) -> u64 {
        let mut h = 0xcbf2_9ce4_8422_2325u64;
        let mut eat = |b: u8| h = (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
        self.dtype.name().bytes().for_each(&mut eat);
        self.shape.iter().flat_map(|d| d.to_le_bytes()).for_each(&mut eat);
        self.bytes().iter().copied().for_each(&mut eat);
        h
    }
}

fn check(dtype: DType, shape: &[usize], got: usize) -> Result<(), TensorError> {
    let n = count_of(shape).ok_or_else(|| TensorError::TooLarge(shape.to_vec()))?;
    let expected = dtype.bytes(n);
    if got == expected { Ok(()) } else { Err(TensorError::Size { dtype, shape: shape.to_vec(), expected, got }) }
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Self) -> bool {
        self.same_bits(other)
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.ty())?;
        let shown: Vec<_> = (0..self.count().min(16)).map(|i| show(self.get(i))).collect();
        write!(f, " {{{}{}}}", shown.join(", "), if self.count() > 16 { ", ..." } else { "" })
    }
}

/// A scalar as text that parses back to the same bits.
pub fn show(v: Scalar) -> String {
    match v {
        Scalar::F(v) if v.is_nan() => "nan".into(),
        Scalar::F(v) if v.is_infinite() => {
            if v > 0.0 {
                "inf".into()
            } else {
                "-inf".into()
            }
        }
        Scalar::F(v) => format!("{v:?}"),
        Scalar::I(v) => v.to_string(),
        Scalar::B(v) => v.to_string(),
    }
}

/// Parse what [`show`] prints, for an element of `dtype`.
pub fn parse_scalar(text: &str, dtype: DType) -> Result<Scalar, String> {
    let bad = || format!("`{text}` is not a {dtype}");
    match dtype.class() {
        Class::Float => text.parse::<f64>().map(Scalar::F).map_err(|_| bad()),
        Class::Bool => text.parse::<bool>().map(Scalar::B).map_err(|_| bad()),
        Class::Signed | Class::Unsigned => text.parse::<i128>().map(Scalar::I).map_err(|_| bad()),
        Class::String => Err(bad()),
    }
}

/// The bits of an element of `from` as an element of `to`, a dtype of the same width.
pub fn reinterpret(v: Scalar, from: DType, to: DType) -> Scalar {
    let mut bytes = [0; 8];
    write(&mut bytes, from, 0, v);
    read(&bytes, to, 0)
}

/// Read element `i` of packed elements.
pub fn read(bytes: &[u8], dtype: DType, i: usize) -> Scalar {
    macro_rules! le {
        ($t:ty) => {{
            const N: usize = size_of::<$t>();
            <$t>::from_le_bytes(bytes[i * N..i * N + N].try_into().expect("element width"))
        }};
    }
    match dtype {
        DType::F64 => Scalar::F(le!(f64)),
        DType::F32 => Scalar::F(f64::from(le!(f32))),
        DType::F16 => Scalar::F(half::f16::from_bits(le!(u16)).to_f64()),
        DType::BF16 => Scalar::F(half::bf16::from_bits(le!(u16)).to_f64()),
        DType::F8E4M3 | DType::F8E5M2 | DType::F8E4M3Fnuz | DType::F8E5M2Fnuz | DType::F8E8M0 => Scalar::F(minifloat::decode(bytes[i], dtype)),
        DType::F4E2M1 => Scalar::F(minifloat::decode(minifloat::packed(bytes, dtype, i), dtype)),
        DType::I64 => Scalar::I(i128::from(le!(i64))),
        DType::I32 => Scalar::I(i128::from(le!(i32))),
        DType::I16 => Scalar::I(i128::from(le!(i16))),
        DType::I8 => Scalar::I(i128::from(bytes[i] as i8)),
        DType::U64 => Scalar::I(i128::from(le!(u64))),
        DType::U32 => Scalar::I(i128::from(le!(u32))),
        DType::U16 => Scalar::I(i128::from(le!(u16))),
        DType::U8 => Scalar::I(i128::from(bytes[i])),
        DType::I4 | DType::U4 | DType::I2 | DType::U2 => Scalar::I(scalar::wrap_int(minifloat::packed(bytes, dtype, i).into(), dtype)),
        DType::Bool => Scalar::B(bytes[i] != 0),
        DType::Str => Scalar::I(0),
    }
}

/// Write element `i` of packed elements, converting as [`Scalar::cast`] does.
pub fn write(bytes: &mut [u8], dtype: DType, i: usize, v: Scalar) {
    let v = v.cast(dtype);
    macro_rules! le {
        ($v:expr) => {{
            let raw = $v.to_le_bytes();
            bytes[i * raw.len()..(i + 1) * raw.len()].copy_from_slice(&raw);
        }};
    }
    match dtype {
        DType::F64 => le!(v.f()),
        DType::F32 => le!((v.f() as f32)),
        DType::F16 => le!(half::f16::from_f64(v.f()).to_bits()),
        DType::BF16 => le!(half::bf16::from_f64(v.f()).to_bits()),
        DType::F8E4M3 | DType::F8E5M2 | DType::F8E4M3Fnuz | DType::F8E5M2Fnuz | DType::F8E8M0 | DType::F4E2M1 => {
            minifloat::pack(bytes, dtype, i, minifloat::encode(v.f(), dtype));
        }
        DType::I64 => le!((v.i() as i64)),
        DType::I32 => le!((v.i() as i32)),
        DType::I16 => le!((v.i() as i16)),
        DType::I8 => bytes[i] = v.i() as i8 as u8,
        DType::U64 => le!((v.i() as u64)),
        DType::U32 => le!((v.i() as u32)),
        DType::U16 => le!((v.i() as u16)),
        DType::U8 => bytes[i] = v.i() as u8,
        DType::I4 | DType::U4 | DType::I2 | DType::U2 => minifloat::pack(bytes, dtype, i, v.i() as u8),
        DType::Bool => bytes[i] = u8::from(v.b()),
        DType::Str => {}
    }
}
