//! Resampling.
use super::resample::{self, Resample, Target};
use crate::onnx::{
    build::{Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{
    Dim, Op, Real,
    attr::{CoordMode, NearestMode, ResizeMode},
};

/// Extent after scaling: `floor(extent * scale)`, in size expressions where the scale is a ratio of small integers.
fn scaled(extent: &Dim, scale: f64) -> Res<Dim> {
    if let Some(v) = extent.as_const() {
        return Ok(Dim::from((v as f64 * scale).floor() as i64));
    }
    for denominator in 1..=64i64 {
        let numerator = scale * denominator as f64;
        if (numerator - numerator.round()).abs() < 1e-6 && numerator.round() >= 1.0 {
            return Ok((extent.clone() * Dim::from(numerator.round() as i64)).div(&Dim::from(denominator)));
        }
    }
    missing(format!("an extent that is not known scaled by {scale}"))
}

/// `out / in`, if it does not depend on a size that is not known.
fn ratio(from: &Dim, to: &Dim) -> Option<f64> {
    if let (Some(a), Some(b)) = (from.as_const(), to.as_const()) {
        return Some(if a == 0 { 1.0 } else { b as f64 / a as f64 });
    }
    if from == to {
        return Some(1.0);
    }
    (1..=64i64).find_map(|k| if *to == from.clone() * Dim::from(k) { Some(k as f64) } else { (*from == to.clone() * Dim::from(k)).then(|| 1.0 / k as f64) })
}

fn modes(cx: &Cx) -> Res<(ResizeMode, CoordMode, NearestMode)> {
    let mode = match cx.text("mode", "nearest")?.as_str() {
        "nearest" => ResizeMode::Nearest,
        "linear" | "bilinear" | "trilinear" => ResizeMode::Linear,
        "cubic" => ResizeMode::Cubic,
        other => return invalid(format!("mode `{other}`")),
    };
    // Before operator set 11 coordinates were divided by the scale and rounded down.
    let (coord, nearest) = if cx.since < 11 { ("asymmetric", "floor") } else { ("half_pixel", "round_prefer_floor") };
    let coord = match cx.text("coordinate_transformation_mode", coord)?.as_str() {
        "half_pixel" => CoordMode::HalfPixel,
        "half_pixel_symmetric" => CoordMode::HalfPixelSymmetric,
        "pytorch_half_pixel" => CoordMode::PytorchHalfPixel,
        "align_corners" => CoordMode::AlignCorners,
        "asymmetric" => CoordMode::Asymmetric,
        "tf_crop_and_resize" => CoordMode::TfCrop,
        other => return missing(format!("coordinate_transformation_mode `{other}`")),
    };
    let nearest = match cx.text("nearest_mode", nearest)?.as_str() {
        "round_prefer_floor" => NearestMode::RoundPreferFloor,
        "round_prefer_ceil" => NearestMode::RoundPreferCeil,
        "floor" => NearestMode::Floor,
        "ceil" => NearestMode::Ceil,
        other => return invalid(format!("nearest_mode `{other}`")),
    };
    Ok((mode, coord, nearest))
}

/// Extents and scales of all axes.
type Scaled = (Vec<Dim>, Vec<f64>);

fn by_scales(shape: &[Dim], axes: &[usize], given: &[f64]) -> Res<Scaled> {
    if given.len() != axes.len() || given.iter().any(|s| !s.is_finite() || *s <= 0.0) {
        return invalid(format!("scales {given:?} for {} axes", axes.len()));
    }
    let (mut sizes, mut scales) = (shape.to_vec(), vec![1.0; shape.len()]);
    for (axis, scale) in axes.iter().zip(given) {
        sizes[*axis] = scaled(&shape[*axis], *scale)?;
        scales[*axis] = *scale;
    }
    Ok((sizes, scales))
}

/// None where data decides the sizes, or how they relate to the extents.
fn by_sizes(cx: &Cx, shape: &[Dim], axes: &[usize], target: Val, policy: &str) -> Res<Option<Scaled>> {
    let Some(target) = cx.dims(target) else { return Ok(None) };
    if target.len() != axes.len() {
        return invalid(format!("{} sizes for {} axes", target.len(), axes.len()));
    }
    let (mut sizes, mut scales) = (shape.to_vec(), vec![1.0; shape.len()]);
    for (axis, to) in axes.iter().zip(&target) {
        let Some(scale) = ratio(&shape[*axis], to) else { return Ok(None) };
        scales[*axis] = scale;
        sizes[*axis] = to.clone();
    }
    if policy != "stretch" {
        let pick = if policy == "not_larger" { f64::min } else { f64::max };
        let Some(scale) = axes.iter().map(|a| scales[*a]).reduce(pick) else { return invalid("no axes") };
        for axis in axes {
            let Some(extent) = shape[*axis].as_const() else { return Ok(None) };
            scales[*axis] = scale;
            sizes[*axis] = Dim::from((extent as f64 * scale).round() as i64);
        }
    }
    Ok(Some((sizes, scales)))
}

/// Resampling by what is known only when run.
fn by_data(cx: &mut Cx, x: Val, axes: &[usize], target: &Target, roi_at: usize) -> Res<Vec<Val>> {
    let (mode, coord, nearest) = modes(cx)?;
    let how = Resample {
        mode,
        coord,
        nearest,
        cubic_a: cx.float("cubic_coeff_a", -0.75)?,
        outside: cx.float("extrapolation_value", 0.0)?,
        antialias: cx.flag("antialias", false)?,
        exclude: cx.flag("exclude_outside", false)?,
    };
    let roi = if coord == CoordMode::TfCrop { Some(cx.arg(roi_at)?) } else { None };
    let name = cx.name.clone();
    Ok(vec![resample::resize(cx, x, axes, target, roi, &how, &name)?])
}

pub(crate) fn resize(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let shape = cx.shape(x);
    let rank = shape.len();
    let axes: Vec<usize> = match cx.ints_opt("axes")? {
        Some(axes) => axes.iter().map(|a| cx.axis(*a, rank)).collect::<Res<_>>()?,
        None => (0..rank).collect(),
    };
    // Operands: x, scales (operator set 10); x, roi, scales, sizes since.
    let (roi_at, scales_at, sizes_at) = if cx.since < 11 { (usize::MAX, 1, usize::MAX) } else { (1, 2, 3) };
    let scales = cx.opt(scales_at).filter(|v| !cx.ty(*v).count().is(0));
    let policy = cx.text("keep_aspect_ratio_policy", "stretch")?;
    let (sizes, scales) = match (scales, cx.opt(sizes_at)) {
        (Some(scales), _) => match cx.tensor(scales).map(|t| t.to_f64()) {
            Some(given) => by_scales(&shape, &axes, &given)?,
            None => return by_data(cx, x, &axes, &Target::Scales(scales), roi_at),
        },
        (None, Some(sizes)) => match by_sizes(cx, &shape, &axes, sizes, &policy)? {
            Some(known) => known,
            None if policy == "stretch" => return by_data(cx, x, &axes, &Target::Sizes(sizes), roi_at),
            None => return by_data(cx, x, &axes, &Target::Within(sizes, policy == "not_larger"), roi_at),
        },
        (None, None) => return invalid("neither scales nor sizes are given"),
    };
    let (mode, coord, nearest) = modes(cx)?;
    let mut args = vec![x];
    if coord == CoordMode::TfCrop {
        let Some(roi) = cx.opt(roi_at) else { return invalid("no region of interest is given") };
        args.push(full_roi(cx, roi, &axes, rank)?);
    }
    let op = Op::Resize {
        mode,
        coord,
        nearest,
        sizes,
        scales: scales.into_iter().map(Real::new).collect(),
        cubic_a: Real::new(cx.float("cubic_coeff_a", -0.75)?),
        outside: Real::new(cx.float("extrapolation_value", 0.0)?),
        antialias: cx.flag("antialias", false)?,
        exclude: cx.flag("exclude_outside", false)?,
    };
    Ok(vec![cx.emit(op, &args)?])
}

/// A region of interest over all axes: whole axes where none is given.
fn full_roi(cx: &mut Cx, roi: Val, axes: &[usize], rank: usize) -> Res<Val> {
    if axes.len() == rank && axes.iter().enumerate().all(|(i, a)| i == *a) {
        return Ok(roi);
    }
    let Some(given) = cx.tensor(roi).map(|t| t.to_f64()).filter(|g| g.len() == 2 * axes.len()) else {
        return missing("a region of interest over some axes that is computed from data");
    };
    let mut full: Vec<f32> = std::iter::repeat_n(0.0, rank).chain(std::iter::repeat_n(1.0, rank)).collect();
    for (i, axis) in axes.iter().enumerate() {
        full[*axis] = given[i] as f32;
        full[rank + axis] = given[axes.len() + i] as f32;
    }
    Ok(cx.constant(pavage_ir::Tensor::from_f32([2 * rank], &full)))
}

/// The older form: nearest or linear, by scales given as an attribute or operand.
pub(crate) fn upsample(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let shape = cx.shape(x);
    let scales: Vec<f64> = match cx.floats("scales")? {
        Some(scales) => scales.iter().map(|s| f64::from(*s)).collect(),
        None => {
            let given = cx.arg(1)?;
            match cx.tensor(given) {
                Some(t) => t.to_f64(),
                None => {
                    let axes: Vec<usize> = (0..shape.len()).collect();
                    return by_data(cx, x, &axes, &Target::Scales(given), usize::MAX);
                }
            }
        }
    };
    if scales.len() != shape.len() || scales.iter().any(|s| !s.is_finite() || *s <= 0.0) {
        return invalid(format!("scales {scales:?} of {}", cx.ty(x)));
    }
    let mode = if cx.text("mode", "nearest")? == "nearest" { ResizeMode::Nearest } else { ResizeMode::Linear };
    let sizes = shape.iter().zip(&scales).map(|(d, s)| scaled(d, *s)).collect::<Res<Vec<_>>>()?;
    let op = Op::Resize {
        mode,
        coord: CoordMode::Asymmetric,
        nearest: NearestMode::Floor,
        sizes,
        scales: scales.into_iter().map(Real::new).collect(),
        cubic_a: Real::new(-0.75),
        outside: Real::new(0.0),
        antialias: false,
        exclude: false,
    };
    Ok(vec![cx.emit(op, &[x])?])
}
