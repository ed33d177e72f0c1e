//! `Resize` by scales or sizes that are known only when run: coordinates and weights are computed as data, axis by axis.
//!
//! The meaning is that of the op `resize`, which wants its scales known. An output element is a weighted sum of input
//! elements along each axis: one (nearest), two (linear) or four (cubic), or, with antialiasing, as many as the
//! stretched filter reaches.
use super::dynamic::{choose, count_to, element, vector};
use crate::onnx::build::{Builder, Res, Val, invalid};
use pavage_ir::{
    DType, Dim, Op, Scalar, ScalarFn, Tensor,
    attr::{CoordMode, NearestMode, ReduceFn, ResizeMode},
};

/// How to resample.
pub(crate) struct Resample {
    pub(crate) mode: ResizeMode,
    pub(crate) coord: CoordMode,
    pub(crate) nearest: NearestMode,
    pub(crate) cubic_a: f64,
    pub(crate) outside: f64,
    pub(crate) antialias: bool,
    pub(crate) exclude: bool,
}

/// One axis: its extent after, and what the extent is multiplied by (an f64 scalar).
struct Along {
    axis: usize,
    size: Dim,
    scale: Val,
    /// The part of the input that is read, of `tf_crop_and_resize`: f64 scalars, from 0 to 1.
    region: Option<[Val; 2]>,
}

/// What the model says of the result.
pub(crate) enum Target {
    /// What each extent is multiplied by: a vector.
    Scales(Val),
    /// The extents: a vector of integers.
    Sizes(Val),
    /// Bounds on the extents, which keep their proportions: no larger (`true`) or no smaller.
    Within(Val, bool),
}

/// `x` with `axes` resampled; `roi` is a vector of starts, then ends, one an axis of `axes`.
pub(crate) fn resize(b: &mut Builder, x: Val, axes: &[usize], target: &Target, roi: Option<Val>, how: &Resample, name: &str) -> Res<Val> {
    let (Target::Scales(given) | Target::Sizes(given) | Target::Within(given, _)) = target;
    if super::dynamic::length(b, *given, "scales or sizes")? != axes.len() {
        return invalid(format!("{} for {} axes", b.ty(*given), axes.len()));
    }
    let shape = b.shape(x);
    let extents: Vec<Dim> = axes.iter().map(|a| shape[*a].clone()).collect();
    let own = super::dynamic::sizes(b, &extents);
    let own = b.cast(own, DType::F64)?;
    let (sizes, scales) = match target {
        Target::Scales(scales) => {
            let scales = b.cast(*scales, DType::F64)?;
            let sizes = b.map(ScalarFn::Mul, &[own, scales])?;
            (b.map(ScalarFn::Floor, &[sizes])?, scales)
        }
        Target::Sizes(sizes) => {
            let sizes = b.cast(*sizes, DType::F64)?;
            (sizes, b.map(ScalarFn::Div, &[sizes, own])?)
        }
        Target::Within(bounds, larger) => {
            let bounds = b.cast(*bounds, DType::F64)?;
            let scales = b.map(ScalarFn::Div, &[bounds, own])?;
            let scale = super::reduce::reduce(b, if *larger { ReduceFn::Min } else { ReduceFn::Max }, scales, &[0])?;
            let scales = b.broadcast_to(scale, &[Dim::from(axes.len())])?;
            let sizes = b.map(ScalarFn::Mul, &[own, scales])?;
            let sizes = b.with_number(ScalarFn::Add, sizes, 0.5)?;
            (b.map(ScalarFn::Floor, &[sizes])?, scales)
        }
    };
    let known = match target {
        Target::Sizes(sizes) => b.dims(*sizes),
        _ => None,
    };
    let sizes = match known {
        Some(dims) => dims,
        None => {
            let sizes = vector(b, sizes)?;
            b.sizes(sizes, name)?
        }
    };
    let roi = match roi {
        Some(roi) => Some(b.cast(roi, DType::F64)?),
        None => None,
    };
    let dtype = b.dtype(x);
    let moves = how.mode == ResizeMode::Nearest;
    let work = if dtype.is_float() && dtype.bits() <= 32 { DType::F32 } else { DType::F64 };
    let mut y = if moves { x } else { b.cast(x, work)? };
    let mut inside = vec![];
    for (i, (axis, size)) in axes.iter().zip(sizes).enumerate() {
        let region = match roi {
            Some(roi) => Some([element(b, roi, i)?, element(b, roi, axes.len() + i)?]),
            None => None,
        };
        let along = Along { axis: *axis, size, scale: element(b, scales, i)?, region };
        let at = along.positions(b, how.coord, &shape[*axis])?;
        if how.coord == CoordMode::TfCrop {
            let holds = within(b, at, &shape[*axis])?;
            inside.push((*axis, holds));
        }
        y = if shape[*axis].is(1) {
            // However it is read, an axis of one element gives that.
            let mut wide = b.shape(y);
            wide[*axis] = along.size.clone();
            b.broadcast_to(y, &wide)?
        } else if moves {
            nearest(b, y, *axis, at, how.nearest)?
        } else if how.antialias {
            along.smooth(b, y, at, how, name)?
        } else {
            taps(b, y, *axis, at, how)?
        };
    }
    if !inside.is_empty() {
        let outside = b.scalar(b.dtype(y), how.outside);
        for (axis, holds) in inside {
            let mut wide = vec![Dim::one(); shape.len()];
            wide[axis] = b.ty(holds).count();
            let holds = b.reshape(holds, wide)?;
            y = choose(b, holds, y, outside)?;
        }
    }
    b.cast(y, dtype)
}

/// An extent as an f64 scalar.
fn extent(b: &mut Builder, n: &Dim) -> Res<Val> {
    let n = b.known_dims(DType::I64, &[], vec![n.clone()]);
    b.cast(n, DType::F64)
}

/// Whether positions lie in `0..=n - 1`.
fn within(b: &mut Builder, at: Val, n: &Dim) -> Res<Val> {
    let last = extent(b, &(n.clone() - Dim::one()))?;
    let above = b.with_number(ScalarFn::Ge, at, 0.0)?;
    let below = b.pointwise(ScalarFn::Le, &[at, last])?;
    b.map(ScalarFn::And, &[above, below])
}

impl Along {
    /// The input coordinate of every output element: an f64 vector.
    fn positions(&self, b: &mut Builder, coord: CoordMode, from: &Dim) -> Res<Val> {
        let i = count_to(b, &self.size)?;
        let i = b.cast(i, DType::F64)?;
        let n = extent(b, from)?;
        let size = extent(b, &self.size)?;
        // The extent that the scale alone would give, before it was rounded to a whole one.
        let exact = b.map(ScalarFn::Mul, &[self.scale, n])?;
        let last = b.with_number(ScalarFn::Sub, n, 1.0)?;
        let zero = b.scalar(DType::F64, 0.0);
        let half_pixel = |b: &mut Builder| -> Res<Val> {
            let at = b.with_number(ScalarFn::Add, i, 0.5)?;
            let at = b.pointwise(ScalarFn::Div, &[at, self.scale])?;
            b.with_number(ScalarFn::Sub, at, 0.5)
        };
        // From corner to corner: over `exact - 1` steps, none of which there are where the result is one element.
        let single = b.with_number(ScalarFn::Eq, exact, 1.0)?;
        let steps = b.with_number(ScalarFn::Sub, exact, 1.0)?;
        match (coord, self.region) {
            (CoordMode::HalfPixel, _) => half_pixel(b),
            (CoordMode::HalfPixelSymmetric, _) => {
                let ratio = b.map(ScalarFn::Div, &[size, exact])?;
                let one = b.scalar(DType::F64, 1.0);
                let rest = b.map(ScalarFn::Sub, &[one, ratio])?;
                let middle = b.with_number(ScalarFn::Mul, n, 0.5)?;
                let shift = b.map(ScalarFn::Mul, &[middle, rest])?;
                let at = half_pixel(b)?;
                b.pointwise(ScalarFn::Add, &[at, shift])
            }
            (CoordMode::PytorchHalfPixel, _) => {
                let single = b.with_number(ScalarFn::Eq, size, 1.0)?;
                let at = half_pixel(b)?;
                choose(b, single, zero, at)
            }
            (CoordMode::AlignCorners, _) => {
                let at = b.pointwise(ScalarFn::Mul, &[i, last])?;
                let at = b.pointwise(ScalarFn::Div, &[at, steps])?;
                choose(b, single, zero, at)
            }
            (CoordMode::Asymmetric, _) => b.pointwise(ScalarFn::Div, &[i, self.scale]),
            (CoordMode::TfCrop, Some([from, to])) => {
                let span = b.map(ScalarFn::Sub, &[to, from])?;
                let span = b.map(ScalarFn::Mul, &[span, last])?;
                let at = b.pointwise(ScalarFn::Mul, &[i, span])?;
                let at = b.pointwise(ScalarFn::Div, &[at, steps])?;
                let middle = b.with_number(ScalarFn::Mul, span, 0.5)?;
                let at = choose(b, single, middle, at)?;
                let first = b.map(ScalarFn::Mul, &[from, last])?;
                b.pointwise(ScalarFn::Add, &[at, first])
            }
            (CoordMode::TfCrop, None) => invalid("no region of interest is given"),
        }
    }

    /// A filter stretched as the output shrinks: weights of all input elements, and of its edges repeated, as a matrix.
    fn smooth(&self, b: &mut Builder, x: Val, at: Val, how: &Resample, name: &str) -> Res<Val> {
        let shape = b.shape(x);
        let n = shape[self.axis].clone();
        let stretch = b.with_number(ScalarFn::Min, self.scale, 1.0)?;
        let reach = b.scalar(DType::F64, if how.mode == ResizeMode::Cubic { 2.0 } else { 1.0 });
        let reach = b.map(ScalarFn::Div, &[reach, stretch])?;
        let reach = b.map(ScalarFn::Ceil, &[reach])?;
        let beyond = b.with_number(ScalarFn::Add, reach, 2.0)?;
        let beyond = b.cast(beyond, DType::I64)?;
        let beyond = b.size(beyond, name)?;
        let width = n.clone() + beyond.clone() + beyond.clone();
        let places = count_to(b, &width)?;
        let beyond = b.known_dims(DType::I64, &[], vec![beyond]);
        let places = b.pointwise(ScalarFn::Sub, &[places, beyond])?;
        let place = b.cast(places, DType::F64)?;
        let (row, column) = (b.as_row(place)?, b.reshape(at, vec![self.size.clone(), Dim::one()])?);
        let distance = b.pointwise(ScalarFn::Sub, &[row, column])?;
        let distance = b.pointwise(ScalarFn::Mul, &[distance, stretch])?;
        let mut weights = weight(b, how, distance)?;
        if how.exclude {
            let holds = within(b, row, &n)?;
            let zero = b.scalar(DType::F64, 0.0);
            weights = choose(b, holds, weights, zero)?;
        }
        let total = super::reduce::reduce(b, ReduceFn::Sum, weights, &[1])?;
        let weights = b.pointwise(ScalarFn::Div, &[weights, total])?;
        let weights = b.cast(weights, b.dtype(x))?;
        // Elements beyond the input are its edges.
        let (zero, last) = (b.scalar(DType::I64, 0.0), b.known_dims(DType::I64, &[], vec![n - Dim::one()]));
        let places = b.pointwise(ScalarFn::Max, &[places, zero])?;
        let places = b.pointwise(ScalarFn::Min, &[places, last])?;
        let x = b.emit(Op::Gather { axis: self.axis }, &[x, places])?;
        let outer: Dim = shape[..self.axis].iter().cloned().product();
        let inner: Dim = shape[self.axis + 1..].iter().cloned().product();
        let x = b.reshape(x, vec![outer.clone(), width.clone(), inner])?;
        let weights = b.broadcast_to(weights, &[outer, self.size.clone(), width])?;
        let y = b.emit(Op::MatMul { out: b.dtype(x) }, &[weights, x])?;
        let mut shape = shape;
        shape[self.axis] = self.size.clone();
        b.reshape(y, shape)
    }
}

/// The element at or left of a coordinate (a whole coordinate counts from the element before it), and how far right of
/// that it lies.
fn split(b: &mut Builder, at: Val) -> Res<(Val, Val)> {
    let left = b.map(ScalarFn::Ceil, &[at])?;
    let left = b.with_number(ScalarFn::Sub, left, 1.0)?;
    Ok((left, b.map(ScalarFn::Sub, &[at, left])?))
}

/// Elements of `x` along `axis` at positions brought to the edge where they lie outside.
fn read(b: &mut Builder, x: Val, axis: usize, at: Val) -> Res<Val> {
    let last = b.shape(x)[axis].clone() - Dim::one();
    let last = extent(b, &last)?;
    let at = b.with_number(ScalarFn::Max, at, 0.0)?;
    let at = b.pointwise(ScalarFn::Min, &[at, last])?;
    let at = b.cast(at, DType::I64)?;
    b.emit(Op::Gather { axis }, &[x, at])
}

fn nearest(b: &mut Builder, x: Val, axis: usize, at: Val, mode: NearestMode) -> Res<Val> {
    let (left, ratio) = split(b, at)?;
    let up = match mode {
        NearestMode::RoundPreferFloor => b.with_number(ScalarFn::Gt, ratio, 0.5)?,
        NearestMode::RoundPreferCeil => b.with_number(ScalarFn::Ge, ratio, 0.5)?,
        NearestMode::Floor => b.with_number(ScalarFn::Eq, ratio, 1.0)?,
        NearestMode::Ceil => b.with_number(ScalarFn::Gt, ratio, 0.0)?,
    };
    let up = b.cast(up, DType::F64)?;
    let at = b.map(ScalarFn::Add, &[left, up])?;
    read(b, x, axis, at)
}

/// Two or four elements around each coordinate, weighted: summed over an axis of their own.
fn taps(b: &mut Builder, x: Val, axis: usize, at: Val, how: &Resample) -> Res<Val> {
    let n = b.shape(x)[axis].clone();
    let size = b.ty(at).count();
    let at = b.reshape(at, vec![size.clone(), Dim::one()])?;
    let (left, ratio) = split(b, at)?;
    let offsets: &[f64] = if how.mode == ResizeMode::Cubic { &[-1.0, 0.0, 1.0, 2.0] } else { &[0.0, 1.0] };
    let offsets = b.constant(Tensor::from_scalars(DType::F64, [1, offsets.len()], offsets.iter().map(|v| Scalar::F(*v))));
    let places = b.pointwise(ScalarFn::Add, &[left, offsets])?;
    let distance = b.pointwise(ScalarFn::Sub, &[offsets, ratio])?;
    let mut w = weight(b, how, distance)?;
    if how.exclude {
        let holds = within(b, places, &n)?;
        let zero = b.scalar(DType::F64, 0.0);
        w = choose(b, holds, w, zero)?;
        let total = super::reduce::reduce(b, ReduceFn::Sum, w, &[1])?;
        w = b.pointwise(ScalarFn::Div, &[w, total])?;
    }
    let w = b.cast(w, b.dtype(x))?;
    let mut along = vec![Dim::one(); b.rank(x) + 1];
    let wide = b.shape(w);
    along[axis..axis + 2].clone_from_slice(&wide);
    let w = b.reshape(w, along)?;
    let v = read(b, x, axis, places)?;
    let v = b.pointwise(ScalarFn::Mul, &[v, w])?;
    super::dynamic::combine(b, ReduceFn::Sum, v, axis + 1)
}

/// The filter's weight at a distance: linear or cubic.
fn weight(b: &mut Builder, how: &Resample, distance: Val) -> Res<Val> {
    let d = b.map(ScalarFn::Abs, &[distance])?;
    if how.mode == ResizeMode::Linear {
        let one = b.scalar(DType::F64, 1.0);
        let w = b.pointwise(ScalarFn::Sub, &[one, d])?;
        return b.with_number(ScalarFn::Max, w, 0.0);
    }
    let a = how.cubic_a;
    // Horner's scheme from the highest coefficient.
    let polynomial = |b: &mut Builder, c: [f64; 4]| -> Res<Val> {
        let mut sum = b.with_number(ScalarFn::Mul, d, c[0])?;
        for (i, c) in c[1..].iter().enumerate() {
            sum = b.with_number(ScalarFn::Add, sum, *c)?;
            if i < 2 {
                sum = b.map(ScalarFn::Mul, &[sum, d])?;
            }
        }
        Ok(sum)
    };
    let near = polynomial(b, [a + 2.0, -(a + 3.0), 0.0, 1.0])?;
    let far = polynomial(b, [a, -5.0 * a, 8.0 * a, -4.0 * a])?;
    let zero = b.scalar(DType::F64, 0.0);
    let reached = b.with_number(ScalarFn::Lt, d, 2.0)?;
    let far = choose(b, reached, far, zero)?;
    let close = b.with_number(ScalarFn::Le, d, 1.0)?;
    choose(b, close, near, far)
}
