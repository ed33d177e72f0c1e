//! Resampling of images and volumes, as ONNX `Resize` defines it.
use super::{
    demand,
    elements::{around, fits, out, pick, remap, store},
    float, length_is,
    matmul::axpy,
    number, result, shape_is,
};
use crate::{
    DType, Dim, Real, Tensor, TensorType,
    attr::{CoordMode, NearestMode, ResizeMode},
    op::{EvalArgs, TypeArgs},
};

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn infer(
    args: TypeArgs,
    mode: &ResizeMode,
    coord: &CoordMode,
    _nearest: &NearestMode,
    sizes: &[Dim],
    scales: &[Real],
    _cubic_a: &Real,
    _outside: &Real,
    _antialias: &bool,
    _exclude: &bool,
) -> Result<Vec<TensorType>, String> {
    let x = args.types[0];
    if *mode != ResizeMode::Nearest {
        number("x", x)?;
    }
    length_is("sizes", sizes.len(), x.rank())?;
    length_is("scales", scales.len(), x.rank())?;
    demand(scales.iter().all(|s| s.get() > 0.0 && s.get().is_finite()), || "scales must be positive".to_string())?;
    match (args.types.get(1), coord) {
        (Some(roi), _) => {
            float("roi", roi)?;
            shape_is("roi", roi, &[Dim::from(2 * x.rank())])?;
        }
        (None, CoordMode::TfCrop) => return Err(format!("`{coord}` needs a region of interest")),
        (None, _) => {}
    }
    for (i, (from, to)) in x.shape.iter().zip(sizes).enumerate() {
        demand(!from.is(0) || to.is(0), || format!("axis {i} is empty, cannot become {to}"))?;
    }
    Ok(vec![result(x.dtype, sizes.to_vec())?])
}

#[allow(clippy::too_many_arguments)] // One parameter an attribute of the row.
pub(crate) fn eval(
    args: EvalArgs,
    mode: &ResizeMode,
    coord: &CoordMode,
    nearest: &NearestMode,
    _sizes: &[Dim],
    scales: &[Real],
    cubic_a: &Real,
    outside: &Real,
    antialias: &bool,
    exclude: &bool,
) -> Result<Vec<Tensor>, String> {
    let (x, (dtype, shape)) = (args.tensors[0], out(&args, 0)?);
    let roi = args.tensors.get(1).map_or_else(Vec::new, |t| t.to_f64());
    let rank = shape.len();
    let mut axes = vec![];
    for axis in 0..rank {
        let region = if *coord == CoordMode::TfCrop { (roi[axis], roi[rank + axis]) } else { (0.0, 1.0) };
        let (n, size, scale) = (x.shape()[axis], shape[axis], scales[axis].get());
        let filter = Filter { mode: *mode, nearest: *nearest, a: cubic_a.get(), scale, antialias: *antialias, exclude: *exclude };
        let footprint = filter.footprint();
        demand(footprint <= 1e6, || format!("axis {axis}: a filter of {footprint} elements for scale {scale} is too wide"))?;
        let taps: Vec<Option<Taps>> = (0..size).map(|i| Some(filter.taps(position(*coord, i, n, size, scale, region)?, n))).collect();
        axes.push(taps);
    }
    if *mode == ResizeMode::Nearest && axes.iter().flatten().all(Option::is_some) {
        let maps: Vec<Vec<Option<usize>>> = axes.iter().map(|taps| taps.iter().map(|t| Some(t.as_ref()?.first()?.0)).collect()).collect();
        return Ok(vec![pick(x, shape, remap(x.shape(), &maps).into_iter().flatten())?]);
    }
    demand(dtype.is_float() || dtype.is_int(), || format!("cannot put a number outside a tensor of {dtype}"))?;
    let (mut values, mut now) = (x.to_f64(), x.shape().to_vec());
    for (axis, taps) in axes.iter().enumerate() {
        let (outer, n, inner) = around(&now, axis);
        now[axis] = shape[axis];
        let mut next = vec![0.0; fits(DType::F64, &now)?];
        for (o, (i, taps)) in (0..outer).flat_map(|o| taps.iter().enumerate().map(move |t| (o, t))) {
            let to = &mut next[(o * shape[axis] + i) * inner..][..inner];
            match taps {
                None => to.fill(outside.get()),
                Some(taps) => taps.iter().for_each(|(at, w)| axpy(to, *w, &values[(o * n + at) * inner..][..inner])),
            }
        }
        values = next;
    }
    // Beyond the input on any axis is outside, whatever later axes mixed in.
    for (axis, taps) in axes.iter().enumerate().filter(|(_, taps)| taps.iter().any(Option::is_none)) {
        let (_, n, inner) = around(&shape, axis);
        values.iter_mut().enumerate().filter(|(p, _)| taps[p / inner % n].is_none()).for_each(|(_, v)| *v = outside.get());
    }
    Ok(vec![store(dtype, shape, &values)?])
}

/// Input elements and their weights that make one output element along one axis.
type Taps = Vec<(usize, f64)>;

/// Input coordinate of output element `i` on an axis of `n` elements resized to `size`; `None` outside the
/// input of `tf_crop_and_resize`.
fn position(coord: CoordMode, i: usize, n: usize, size: usize, scale: f64, region: (f64, f64)) -> Option<f64> {
    // The extent that the scale alone would give, before it was rounded to `size`.
    let (i, n, exact) = (i as f64, n as f64, scale * n as f64);
    let half_pixel = (i + 0.5) / scale - 0.5;
    Some(match coord {
        CoordMode::HalfPixel => half_pixel,
        CoordMode::HalfPixelSymmetric => n / 2.0 * (1.0 - size as f64 / exact) + (i + 0.5) / scale - 0.5,
        CoordMode::PytorchHalfPixel => {
            if size == 1 {
                0.0
            } else {
                half_pixel
            }
        }
        CoordMode::AlignCorners => {
            if exact == 1.0 {
                0.0
            } else {
                i * (n - 1.0) / (exact - 1.0)
            }
        }
        CoordMode::Asymmetric => i / scale,
        CoordMode::TfCrop => {
            let (from, to) = region;
            let along = if exact == 1.0 { (to - from) * (n - 1.0) / 2.0 } else { i * (to - from) * (n - 1.0) / (exact - 1.0) };
            let at = along + from * (n - 1.0);
            return (0.0..=n - 1.0).contains(&at).then_some(at);
        }
    })
}

struct Filter {
    mode: ResizeMode,
    nearest: NearestMode,
    a: f64,
    scale: f64,
    antialias: bool,
    exclude: bool,
}

impl Filter {
    /// How far the filter is stretched: by less than 1 when it smooths a smaller output.
    fn stretch(&self) -> f64 {
        if self.antialias { self.scale.min(1.0) } else { 1.0 }
    }

    /// Elements on either side that the filter reads, doubled.
    fn footprint(&self) -> f64 {
        let reach = if self.mode == ResizeMode::Cubic { 2.0 } else { 1.0 };
        2.0 * (reach / self.stretch()).ceil()
    }

    fn taps(&self, at: f64, n: usize) -> Taps {
        // Far outside every element read is the edge, so the exact distance does not matter.
        let at = at.clamp(-1e9, n as f64 + 1e9);
        // The element at or left of the coordinate; a whole coordinate counts from the element before it.
        let left = at.ceil() - 1.0;
        let ratio = at - left;
        let edge = |v: f64| v.clamp(0.0, n as f64 - 1.0) as usize;
        if self.mode == ResizeMode::Nearest {
            let up = ratio == 1.0
                || match self.nearest {
                    NearestMode::RoundPreferFloor => ratio > 0.5,
                    NearestMode::RoundPreferCeil => ratio >= 0.5,
                    NearestMode::Floor => false,
                    NearestMode::Ceil => true,
                };
            return vec![(edge(if up { left + 1.0 } else { left }), 1.0)];
        }
        let half = self.footprint() / 2.0;
        let mut taps = vec![];
        let mut total = 0.0;
        for k in 0..(2.0 * half) as usize {
            let offset = k as f64 + 1.0 - half;
            let inside = (0.0..n as f64).contains(&(left + offset));
            let w = if self.exclude && !inside { 0.0 } else { self.weight((offset - ratio) * self.stretch()) };
            total += w;
            taps.push((edge(left + offset), w));
        }
        if (self.exclude || self.antialias) && total != 0.0 {
            taps.iter_mut().for_each(|(_, w)| *w /= total);
        }
        taps
    }

    fn weight(&self, distance: f64) -> f64 {
        let (d, a) = (distance.abs(), self.a);
        match self.mode {
            ResizeMode::Nearest => 1.0,
            ResizeMode::Linear => (1.0 - d).max(0.0),
            ResizeMode::Cubic if d <= 1.0 => ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0,
            ResizeMode::Cubic if d < 2.0 => ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a,
            ResizeMode::Cubic => 0.0,
        }
    }
}
