//! Elements of tensors as typed vectors, and the walks over shapes that evaluators share.
use crate::{
    DType, Scalar, Tensor,
    op::EvalArgs,
    tensor::{count_of, read, write},
};

/// Most bytes one result of the evaluator takes: a declared shape alone must not exhaust memory.
const MAX_BYTES: usize = 1 << 32;

/// A number type that evaluators compute in: f64 for floats; i128 for integers, so that intermediate
/// values keep their sign and order; i64 for long integer sums of products, which wrap anyway.
pub(super) trait Num: Copy + PartialOrd + 'static {
    const ZERO: Self;
    const ONE: Self;
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn scalar(self) -> Scalar;
    fn from_scalar(v: Scalar) -> Self;
    fn load(t: &Tensor) -> Vec<Self> {
        (0..t.count()).map(|i| Self::from_scalar(t.get(i))).collect()
    }
    fn larger(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
    fn smaller(self, other: Self) -> Self {
        if other < self { other } else { self }
    }
}

impl Num for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    fn add(self, other: f64) -> f64 {
        self + other
    }
    fn mul(self, other: f64) -> f64 {
        self * other
    }
    fn scalar(self) -> Scalar {
        Scalar::F(self)
    }
    fn from_scalar(v: Scalar) -> f64 {
        v.f()
    }
    fn load(t: &Tensor) -> Vec<f64> {
        t.to_f64()
    }
    fn larger(self, other: f64) -> f64 {
        if self.is_nan() || other.is_nan() { f64::NAN } else { self.max(other) }
    }
    fn smaller(self, other: f64) -> f64 {
        if self.is_nan() || other.is_nan() { f64::NAN } else { self.min(other) }
    }
}

macro_rules! integer_num {
    ($($t:ty),*) => { $( impl Num for $t {
        const ZERO: $t = 0;
        const ONE: $t = 1;
        fn add(self, other: $t) -> $t { self.wrapping_add(other) }
        fn mul(self, other: $t) -> $t { self.wrapping_mul(other) }
        fn scalar(self) -> Scalar { Scalar::I(self.into()) }
        fn from_scalar(v: Scalar) -> $t { v.i() as $t }
    } )* };
}
integer_num!(i64, i128);

/// Dtype and extents of result `i`.
pub(super) fn out(args: &EvalArgs, i: usize) -> Result<(DType, Vec<usize>), String> {
    let ty = args.results.get(i).ok_or("a result type is missing")?;
    let shape = ty.const_shape().ok_or_else(|| format!("the result type {ty} is not bound"))?;
    fits(ty.dtype, &shape)?;
    Ok((ty.dtype, shape))
}

/// Number of elements of a shape that may be allocated and walked over. An empty tensor must be small
/// without its empty axes too: then products over some of the axes neither overflow nor take forever.
pub(super) fn fits(dtype: DType, shape: &[usize]) -> Result<usize, String> {
    let solid: Vec<usize> = shape.iter().map(|n| (*n).max(1)).collect();
    let fits = count_of(&solid).is_some_and(|n| n.saturating_mul(dtype.bits().max(8)) / 8 <= MAX_BYTES);
    if fits { Ok(shape.iter().product()) } else { Err(format!("{dtype}{shape:?} is too large to evaluate")) }
}

/// A tensor of numbers, each rounded or wrapped once to `dtype`.
pub(super) fn store<T: Num>(dtype: DType, shape: Vec<usize>, values: &[T]) -> Result<Tensor, String> {
    if fits(dtype, &shape)? != values.len() {
        return Err(format!("{} elements for shape {shape:?}", values.len()));
    }
    let mut bytes = vec![0u8; dtype.bytes(values.len())];
    match dtype {
        DType::F32 => {
            for (to, v) in bytes.chunks_exact_mut(4).zip(values) {
                to.copy_from_slice(&(v.scalar().f() as f32).to_le_bytes());
            }
        }
        _ => values.iter().enumerate().for_each(|(i, v)| write(&mut bytes, dtype, i, v.scalar())),
    }
    Tensor::new(dtype, shape, bytes).map_err(|e| e.to_string())
}

/// A tensor of raw bytes in row-major order.
pub(super) fn raw(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Tensor, String> {
    Tensor::new(dtype, shape, bytes).map_err(|e| e.to_string())
}

/// Copy element `from` of `src` to element `to` of `dst`, bit for bit.
pub(super) fn move_element(dst: &mut [u8], to: usize, src: &[u8], from: usize, dtype: DType) {
    match dtype.bits() / 8 {
        0 if dtype == DType::Str => {}
        0 => write(dst, dtype, to, read(src, dtype, from)),
        w => dst[to * w..(to + 1) * w].copy_from_slice(&src[from * w..(from + 1) * w]),
    }
}

/// The elements of `x` at `sources`, bit for bit, as a tensor of `shape`.
pub(super) fn pick(x: &Tensor, shape: Vec<usize>, sources: impl Iterator<Item = usize>) -> Result<Tensor, String> {
    let n = fits(x.dtype(), &shape)?;
    let mut dst = vec![0u8; x.dtype().bytes(n)];
    let src = x.bytes();
    if x.dtype().bits() == 32 {
        for (to, from) in dst.chunks_exact_mut(4).zip(sources) {
            to.copy_from_slice(&src[from * 4..from * 4 + 4]);
        }
    } else {
        sources.take(n).enumerate().for_each(|(to, from)| move_element(&mut dst, to, src, from, x.dtype()));
    }
    raw(x.dtype(), shape, dst)
}

/// Distance between neighbours along each axis of a row-major shape.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i].max(1);
    }
    out
}

/// Offsets `base + sum(i[axis] * stride[axis])` for every index of a shape, in row-major order.
pub(super) struct Walk<'a> {
    shape: &'a [usize],
    strides: Vec<i64>,
    index: Vec<usize>,
    at: i64,
    left: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(shape: &'a [usize], strides: Vec<i64>, base: i64) -> Self {
        Self { shape, strides, index: vec![0; shape.len()], at: base, left: shape.iter().product() }
    }
}

impl Iterator for Walk<'_> {
    type Item = usize;
    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        let at = self.at as usize;
        for axis in (0..self.shape.len()).rev() {
            self.index[axis] += 1;
            self.at = self.at.wrapping_add(self.strides[axis]);
            if self.index[axis] < self.shape[axis] {
                break;
            }
            self.at = self.at.wrapping_sub(self.strides[axis].wrapping_mul(self.shape[axis] as i64));
            self.index[axis] = 0;
        }
        Some(at)
    }
}

/// A shape seen from one axis: extents before it multiplied, its own, and those after it multiplied.
pub(super) fn around(shape: &[usize], axis: usize) -> (usize, usize, usize) {
    (shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product())
}

/// For every output element the input element it takes, axis by axis; `None` where an axis has none.
pub(super) fn remap(shape: &[usize], maps: &[Vec<Option<usize>>]) -> Vec<Option<usize>> {
    let strides = strides(shape);
    let mut sources = vec![Some(0)];
    for (map, stride) in maps.iter().zip(strides) {
        sources = sources.iter().flat_map(|s| map.iter().map(move |m| Some((*s)? + (*m)? * stride))).collect();
    }
    sources
}
