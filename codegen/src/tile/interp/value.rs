//! Values of an agent: every lane of every thread.
use crate::tile::Ty;
use pavage_ir::{DType, Scalar};

/// Lanes of a value, thread after thread.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Floats of any width, exactly.
    F(Vec<f64>),
    /// Integers; `u64` as its bits.
    I(Vec<i64>),
    /// Booleans.
    B(Vec<bool>),
}

impl Data {
    /// `n` zeros of a dtype.
    pub fn zeros(dtype: DType, n: usize) -> Data {
        if dtype.is_float() {
            Data::F(vec![0.0; n])
        } else if dtype == DType::Bool {
            Data::B(vec![false; n])
        } else {
            Data::I(vec![0; n])
        }
    }

    /// One element as a scalar of `dtype`.
    pub fn get(&self, i: usize, dtype: DType) -> Scalar {
        match self {
            Data::F(v) => Scalar::F(v[i]),
            Data::I(v) if dtype == DType::U64 => Scalar::I(i128::from(v[i] as u64)),
            Data::I(v) => Scalar::I(i128::from(v[i])),
            Data::B(v) => Scalar::B(v[i]),
        }
    }

    /// Set one element.
    pub fn put(&mut self, i: usize, s: Scalar) {
        match self {
            Data::F(v) => v[i] = s.f(),
            // The low 64 bits, so that a `u64` keeps all of its own.
            Data::I(v) => v[i] = s.i() as i64,
            Data::B(v) => v[i] = s.b(),
        }
    }

    /// One element as an integer.
    pub fn int(&self, i: usize) -> i64 {
        match self {
            Data::I(v) => v[i],
            Data::F(v) => v[i] as i64,
            Data::B(v) => i64::from(v[i]),
        }
    }

    /// One element as a condition.
    pub fn bool(&self, i: usize) -> bool {
        matches!(self, Data::B(v) if v[i])
    }

    /// One element as a float.
    pub fn float(&self, i: usize) -> f64 {
        match self {
            Data::F(v) => v[i],
            Data::I(v) => v[i] as f64,
            Data::B(v) => f64::from(u8::from(v[i])),
        }
    }

    /// Take the lanes of the threads in `mask` from `other`.
    pub(super) fn merge(&mut self, other: &Data, mask: &[bool], lanes: usize) {
        for t in (0..mask.len()).filter(|t| mask[*t]) {
            let span = t * lanes..(t + 1) * lanes;
            match (&mut *self, other) {
                (Data::F(a), Data::F(b)) => a[span.clone()].copy_from_slice(&b[span]),
                (Data::I(a), Data::I(b)) => a[span.clone()].copy_from_slice(&b[span]),
                (Data::B(a), Data::B(b)) => a[span.clone()].copy_from_slice(&b[span]),
                // A value has one type for the whole program.
                _ => {}
            }
        }
    }

    /// `f(thread, lane)` for every lane of a value of `ty` in `threads` threads.
    pub fn build(ty: Ty, threads: usize, mut f: impl FnMut(usize, usize) -> Result<Scalar, String>) -> Result<Data, String> {
        let lanes = ty.lanes();
        let mut out = Data::zeros(ty.dtype(), threads * lanes);
        for t in 0..threads {
            for l in 0..lanes {
                out.put(t * lanes + l, f(t, l)?);
            }
        }
        Ok(out)
    }
}
