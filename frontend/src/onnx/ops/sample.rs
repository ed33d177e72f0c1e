//! Sampling between pixels: grids, regions of interest, deformable convolutions.
use super::{linear, reduce, signal::bounded_size};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn, Tensor, attr::ReduceFn};

/// How a value between pixels is made from those around it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Nearest,
    Linear,
    Cubic,
}

/// What stands outside an image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outside {
    Zeros,
    /// The nearest pixel of the edge, for each pixel that a sample is made of: what PyTorch, to which ONNX refers, and
    /// onnxruntime do. (ONNX's reference implementation moves the whole sample to the edge: cubic ones differ.)
    Border,
    /// The image mirrored about its first and last pixel, or with `corners` off, about the outer edges of these.
    Reflection {
        corners: bool,
    },
}

/// The `k` pixels that each of `p` samples is made of, each `[n, k, p]`: where (i64), their weights where they have any but
/// 1, and where it matters whether they are there at all.
struct Taps {
    at: Val,
    weight: Option<Val>,
    inside: Option<Val>,
}

fn float_dim(b: &mut Builder, d: &Dim, dtype: DType) -> Res<Val> {
    let v = b.known_dims(DType::I64, &[], vec![d.clone()]);
    b.cast(v, dtype)
}

/// `0, 1, ...` along one axis of a value of `rank` axes, whose other extents are 1.
fn ramp(b: &mut Builder, n: &Dim, axis: usize, rank: usize, dtype: DType) -> Res<Val> {
    let mut shape = vec![Dim::one(); rank];
    shape[axis] = n.clone();
    let v = b.emit(Op::Iota { dtype: DType::I64, shape, axis }, &[])?;
    b.cast(v, dtype)
}

/// `v` within `0..=n-1`; floats.
fn clamp(b: &mut Builder, v: Val, n: &Dim) -> Res<Val> {
    let dtype = b.dtype(v);
    let last = float_dim(b, &(n.clone() - Dim::one()), dtype)?;
    let v = b.with_number(ScalarFn::Max, v, 0.0)?;
    b.pointwise(ScalarFn::Min, &[v, last])
}

/// A coordinate folded back into `[min, max]` as often as it takes.
fn reflect(b: &mut Builder, v: Val, n: &Dim, corners: bool) -> Res<Val> {
    let dtype = b.dtype(v);
    let low = if corners { 0.0 } else { -0.5 };
    let last = float_dim(b, &(n.clone() - Dim::one()), dtype)?;
    let range = if corners {
        // A single pixel is its own mirror image, whatever the range.
        b.with_number(ScalarFn::Max, last, 1.0)?
    } else {
        b.with_number(ScalarFn::Add, last, 1.0)?
    };
    let from_low = b.with_number(ScalarFn::Sub, v, low)?;
    let distance = b.map(ScalarFn::Abs, &[from_low])?;
    let folds = b.pointwise(ScalarFn::Div, &[distance, range])?;
    let folds = b.map(ScalarFn::Floor, &[folds])?;
    let whole = b.pointwise(ScalarFn::Mul, &[folds, range])?;
    let rest = b.map(ScalarFn::Sub, &[distance, whole])?;
    let odd = b.with_number(ScalarFn::Mod, folds, 2.0)?;
    let odd = b.with_number(ScalarFn::Gt, odd, 0.5)?;
    let back = b.pointwise(ScalarFn::Sub, &[range, rest])?;
    let v = b.map(ScalarFn::Select, &[odd, back, rest])?;
    b.with_number(ScalarFn::Add, v, low)
}

/// A number for each of several taps: `[1, k, 1]`.
fn each_tap(b: &mut Builder, dtype: DType, numbers: &[f64]) -> Val {
    b.constant(Tensor::from_scalars(dtype, [1, numbers.len(), 1], numbers.iter().map(|v| Scalar::F(*v))))
}

/// `((c3 d + c2) d + c1) d + c0` with coefficients `[c3, c2, c1, c0]` of each tap.
fn polynomial(b: &mut Builder, d: Val, coefficients: &[[f64; 4]]) -> Res<Val> {
    let dtype = b.dtype(d);
    let mut column = |i: usize| each_tap(b, dtype, &coefficients.iter().map(|c| c[i]).collect::<Vec<_>>());
    let [c3, c2, c1, c0] = [column(0), column(1), column(2), column(3)];
    let mut v = b.pointwise(ScalarFn::Mul, &[d, c3])?;
    for c in [c2, c1] {
        v = b.pointwise(ScalarFn::Add, &[v, c])?;
        v = b.map(ScalarFn::Mul, &[v, d])?;
    }
    b.pointwise(ScalarFn::Add, &[v, c0])
}

/// Weights of the pixels below and above a sample that lies `t`, `[n, 1, p]`, above the first: `[n, 2, p]`.
fn between(b: &mut Builder, t: Val) -> Res<Val> {
    let (slope, start) = (each_tap(b, b.dtype(t), &[-1.0, 1.0]), each_tap(b, b.dtype(t), &[1.0, 0.0]));
    let v = b.pointwise(ScalarFn::Mul, &[t, slope])?;
    b.pointwise(ScalarFn::Add, &[v, start])
}

/// The pixels that samples at coordinates `x`, `[n, p]`, of an axis of `n` pixels read.
fn taps(b: &mut Builder, x: Val, n: &Dim, mode: Mode, outside: Outside) -> Res<Taps> {
    let (dtype, points) = (b.dtype(x), b.shape(x));
    let mut x = b.reshape(x, vec![points[0].clone(), Dim::one(), points[1].clone()])?;
    if mode == Mode::Nearest {
        x = b.map(ScalarFn::Round, &[x])?;
    }
    if let Outside::Reflection { corners } = outside {
        let slack = if corners { 0.0 } else { 0.5 };
        let end = float_dim(b, &(n.clone() - Dim::one()), dtype)?;
        let end = b.with_number(ScalarFn::Add, end, slack)?;
        let (below, above) = (b.with_number(ScalarFn::Lt, x, -slack)?, b.pointwise(ScalarFn::Gt, &[x, end])?);
        let out = b.map(ScalarFn::Or, &[below, above])?;
        let back = reflect(b, x, n, corners)?;
        x = b.map(ScalarFn::Select, &[out, back, x])?;
    }
    let base = if mode == Mode::Nearest { x } else { b.map(ScalarFn::Floor, &[x])? };
    let offsets: &[f64] = match mode {
        Mode::Nearest => &[0.0],
        Mode::Linear => &[0.0, 1.0],
        Mode::Cubic => &[-1.0, 0.0, 1.0, 2.0],
    };
    let offsets = each_tap(b, dtype, offsets);
    let at = b.pointwise(ScalarFn::Add, &[base, offsets])?;
    let inside = if outside == Outside::Zeros {
        let end = float_dim(b, n, dtype)?;
        let (from, to) = (b.with_number(ScalarFn::Ge, at, 0.0)?, b.pointwise(ScalarFn::Lt, &[at, end])?);
        Some(b.map(ScalarFn::And, &[from, to])?)
    } else {
        None
    };
    let at = match outside {
        Outside::Reflection { corners } => reflect(b, at, n, corners)?,
        _ => at,
    };
    let at = clamp(b, at, n)?;
    let at = b.cast(at, DType::I64)?;
    let t = b.map(ScalarFn::Sub, &[x, base])?;
    let weight = match mode {
        Mode::Nearest => None,
        Mode::Linear => Some(between(b, t)?),
        Mode::Cubic => {
            let d = b.pointwise(ScalarFn::Sub, &[t, offsets])?;
            let d = b.map(ScalarFn::Abs, &[d])?;
            // Keys' kernel with a = -0.75, its part near the centre and the one beyond.
            let a = -0.75;
            let (near, far) = ([a + 2.0, -(a + 3.0), 0.0, 1.0], [a, -5.0 * a, 8.0 * a, -4.0 * a]);
            Some(polynomial(b, d, &[far, near, near, far])?)
        }
    };
    Ok(Taps { at, weight, inside })
}

/// Every way to take one tap of `major` and one of `minor`, an axis of `extent` pixels, where their samples are the same.
fn crossed(b: &mut Builder, major: &Taps, minor: &Taps, extent: &Dim) -> Res<Taps> {
    let extent = b.known_dims(DType::I64, &[], vec![extent.clone()]);
    let row = b.pointwise(ScalarFn::Mul, &[major.at, extent])?;
    let mut cross = |f: ScalarFn, x: Val, y: Val| {
        let (a, z) = (b.shape(x), b.shape(y));
        let x = b.reshape(x, vec![a[0].clone(), a[1].clone(), Dim::one(), a[2].clone()])?;
        let y = b.reshape(y, vec![z[0].clone(), Dim::one(), z[1].clone(), z[2].clone()])?;
        let v = b.pointwise(f, &[x, y])?;
        b.reshape(v, vec![a[0].clone(), a[1].clone() * z[1].clone(), a[2].clone()])
    };
    let at = cross(ScalarFn::Add, row, minor.at)?;
    let mut both = |f: ScalarFn, x: Option<Val>, y: Option<Val>| match (x, y) {
        (Some(x), Some(y)) => cross(f, x, y).map(Some),
        (x, y) => Ok(x.or(y)),
    };
    let weight = both(ScalarFn::Mul, major.weight, minor.weight)?;
    let inside = both(ScalarFn::And, major.inside, minor.inside)?;
    Ok(Taps { at, weight, inside })
}

/// What `f` makes of the pixels of `x[n, c, spatial...]` that samples are made of, by their weights: `[n, c, p]`.
fn combine(b: &mut Builder, x: Val, taps: &Taps, f: ReduceFn) -> Res<Val> {
    let (shape, tapped) = (b.shape(x), b.shape(taps.at));
    let area: Dim = shape[2..].iter().cloned().product();
    let flat = b.reshape(x, vec![shape[0].clone(), shape[1].clone(), area])?;
    let reads = tapped[1].clone() * tapped[2].clone();
    let at = b.reshape(taps.at, vec![tapped[0].clone(), Dim::one(), reads.clone()])?;
    let at = b.broadcast_to(at, &[shape[0].clone(), shape[1].clone(), reads])?;
    let v = b.emit(Op::GatherElements { axis: 2 }, &[flat, at])?;
    let mut v = b.reshape(v, vec![shape[0].clone(), shape[1].clone(), tapped[1].clone(), tapped[2].clone()])?;
    let across = |b: &mut Builder, v: Val| {
        let shape = b.shape(v);
        b.reshape(v, vec![shape[0].clone(), Dim::one(), shape[1].clone(), shape[2].clone()])
    };
    if let Some(weight) = taps.weight {
        let weight = across(b, weight)?;
        v = b.pointwise(ScalarFn::Mul, &[v, weight])?;
    }
    if let Some(inside) = taps.inside {
        let inside = across(b, inside)?;
        let zero = b.scalar_like(v, 0.0);
        v = b.pointwise(ScalarFn::Select, &[inside, v, zero])?;
    }
    if !tapped[1].is(1) {
        v = reduce::reduce(b, f, v, &[2])?;
    }
    b.reshape(v, vec![shape[0].clone(), shape[1].clone(), tapped[2].clone()])
}

/// `x[n, c, spatial...]` at pixel coordinates, one `[n, p]` a spatial axis: `[n, c, p]`.
fn sample(b: &mut Builder, x: Val, coords: &[Val], mode: Mode, outside: Outside) -> Res<Val> {
    let extents = b.shape(x)[2..].to_vec();
    let mut all: Option<Taps> = None;
    for (c, n) in coords.iter().zip(&extents) {
        let own = taps(b, *c, n, mode, outside)?;
        all = Some(match all {
            Some(before) => crossed(b, &before, &own, n)?,
            None => own,
        });
    }
    match all {
        Some(taps) => combine(b, x, &taps, ReduceFn::Sum),
        None => invalid("an image without spatial axes"),
    }
}

/// The type that samples are computed in.
fn work(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

pub(crate) fn grid_sample(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, grid) = (cx.arg(0)?, cx.arg(1)?);
    let (dtype, rank) = (cx.dtype(x), cx.rank(x));
    let spatial = rank.saturating_sub(2);
    let points = cx.shape(grid);
    if spatial == 0 || points.len() != rank || !points[rank - 1].is(spatial as i64) || !dtype.is_float() {
        return invalid(format!("an image of type {} and a grid of type {}", cx.ty(x), cx.ty(grid)));
    }
    let mode = match cx.text("mode", "linear")?.as_str() {
        "nearest" => Mode::Nearest,
        "linear" | "bilinear" => Mode::Linear,
        "cubic" | "bicubic" => Mode::Cubic,
        other => return invalid(format!("mode `{other}`")),
    };
    if mode == Mode::Cubic && spatial > 3 {
        return missing(format!("cubic samples of {spatial} axes"));
    }
    let corners = cx.flag("align_corners", false)?;
    let outside = match cx.text("padding_mode", "zeros")?.as_str() {
        "zeros" => Outside::Zeros,
        "border" => Outside::Border,
        "reflection" => Outside::Reflection { corners },
        other => return invalid(format!("padding_mode `{other}`")),
    };
    let mut shape = cx.shape(x);
    shape[0] = cx.same_extent(&shape[0], &points[0])?;
    let work = work(dtype);
    let x = cx.with_shape(x, shape.clone())?;
    let x = cx.cast(x, work)?;
    let count: Dim = points[1..rank - 1].iter().cloned().product();
    let grid = cx.cast(grid, work)?;
    let flat = cx.reshape(grid, vec![shape[0].clone(), count.clone(), Dim::from(spatial)])?;
    let mut coords = vec![];
    for k in 0..spatial {
        // The grid names the last axis first.
        let v = cx.slice_axis(flat, 2, Dim::from(spatial - 1 - k), Dim::one())?;
        let v = cx.reshape(v, vec![shape[0].clone(), count.clone()])?;
        let v = cx.with_number(ScalarFn::Add, v, 1.0)?;
        let extent = float_dim(cx, &(if corners { shape[k + 2].clone() - Dim::one() } else { shape[k + 2].clone() }), work)?;
        let v = cx.pointwise(ScalarFn::Mul, &[v, extent])?;
        let v = if corners { v } else { cx.with_number(ScalarFn::Sub, v, 1.0)? };
        coords.push(cx.with_number(ScalarFn::Mul, v, 0.5)?);
    }
    let y = sample(cx, x, &coords, mode, outside)?;
    let y = cx.reshape(y, [&shape[..2], &points[1..rank - 1]].concat())?;
    Ok(vec![cx.cast(y, dtype)?])
}

/// Normalised coordinates of every pixel of a target, through an affine map each batch.
pub(crate) fn affine_grid(cx: &mut Cx) -> Res<Vec<Val>> {
    let (theta, size) = (cx.arg(0)?, cx.arg(1)?);
    let name = cx.name.clone();
    let size = cx.sizes(size, &name)?;
    let own = cx.shape(theta);
    let spatial = size.len().saturating_sub(2);
    if !(2..=3).contains(&spatial) || own.len() != 3 || !own[1].is(spatial as i64) || !own[2].is(spatial as i64 + 1) {
        return invalid(format!("{} sizes and maps of type {}", size.len(), cx.ty(theta)));
    }
    let corners = cx.flag("align_corners", false)?;
    let dtype = cx.dtype(theta);
    let work = work(dtype);
    let extents = &size[2..];
    let cell = [extents, &[Dim::one()]].concat();
    let mut columns = vec![];
    for k in (0..spatial).rev() {
        // From -1 to 1 over the centres of the outer pixels, or over their outer edges.
        let i = ramp(cx, &extents[k], k, spatial + 1, work)?;
        let twice = cx.with_number(ScalarFn::Mul, i, 2.0)?;
        let last = float_dim(cx, &(extents[k].clone() - Dim::one()), work)?;
        let centred = cx.pointwise(ScalarFn::Sub, &[twice, last])?;
        let width = if corners { cx.with_number(ScalarFn::Max, last, 1.0)? } else { cx.with_number(ScalarFn::Add, last, 1.0)? };
        let v = cx.pointwise(ScalarFn::Div, &[centred, width])?;
        columns.push(cx.broadcast_to(v, &cell)?);
    }
    let one = cx.scalar(work, 1.0);
    columns.push(cx.broadcast_to(one, &cell)?);
    let base = cx.emit(Op::Concat { axis: spatial }, &columns)?;
    let count: Dim = extents.iter().cloned().product();
    let base = cx.reshape(base, vec![Dim::one(), count, Dim::from(spatial + 1)])?;
    let theta = cx.cast(theta, work)?;
    let maps = cx.transpose(theta, &[0, 2, 1])?;
    let y = linear::matmul(cx, base, maps, work)?;
    let y = cx.reshape(y, [&own[..1], extents, &[Dim::from(spatial)]].concat())?;
    Ok(vec![cx.cast(y, dtype)?])
}

/// Samples along one axis of the regions: `p = bins * samples` of two pixels each, whether they lie inside, `[r, p]`, and how
/// many of them count, `[r]`, if not all.
struct Bins {
    taps: Taps,
    inside: Val,
    samples: Dim,
    counts: Option<Val>,
}

/// Positions in the bins of regions from `start` to `end`, both `[r]`, and the two pixels each reads.
fn bins(cx: &mut Cx, [start, end]: [Val; 2], bins: i64, extent: &Dim, ratio: i64, half_pixel: bool) -> Res<Bins> {
    let (work, regions) = (cx.dtype(start), cx.shape(start)[0].clone());
    let mut length = cx.map(ScalarFn::Sub, &[end, start])?;
    if !half_pixel {
        length = cx.with_number(ScalarFn::Max, length, 1.0)?;
    }
    let width = cx.with_number(ScalarFn::Div, length, bins as f64)?;
    let (samples, counts) = if ratio > 0 {
        (Dim::from(ratio), None)
    } else {
        // As many samples a bin as it has pixels; the widest decides how many are computed.
        let counts = cx.map(ScalarFn::Ceil, &[width])?;
        let counts = cx.with_number(ScalarFn::Max, counts, 0.0)?;
        let one = cx.scalar(work, 1.0);
        let first = cx.reshape(one, vec![Dim::one()])?;
        let all = cx.emit(Op::Concat { axis: 0 }, &[counts, first])?;
        let most = reduce::reduce(cx, ReduceFn::Max, all, &[0])?;
        (bounded_size(cx, most, 1, None)?, Some(counts))
    };
    let column = |cx: &mut Cx, v: Val| cx.reshape(v, vec![regions.clone(), Dim::one(), Dim::one()]);
    let (start, width) = (column(cx, start)?, column(cx, width)?);
    let i = ramp(cx, &samples, 2, 3, work)?;
    let i = cx.with_number(ScalarFn::Add, i, 0.5)?;
    let part = match counts {
        Some(counts) => {
            let counts = column(cx, counts)?;
            cx.pointwise(ScalarFn::Div, &[i, counts])?
        }
        None => cx.with_number(ScalarFn::Div, i, ratio as f64)?,
    };
    let bin = ramp(cx, &Dim::from(bins), 1, 3, work)?;
    let at = cx.pointwise(ScalarFn::Mul, &[bin, width])?;
    let step = cx.pointwise(ScalarFn::Mul, &[part, width])?;
    let at = cx.pointwise(ScalarFn::Add, &[at, start])?;
    let at = cx.pointwise(ScalarFn::Add, &[at, step])?;
    let at = cx.reshape(at, vec![regions, Dim::one(), Dim::from(bins) * samples.clone()])?;
    let end = float_dim(cx, extent, work)?;
    let (from, to) = (cx.with_number(ScalarFn::Ge, at, -1.0)?, cx.pointwise(ScalarFn::Le, &[at, end])?);
    let inside = cx.map(ScalarFn::And, &[from, to])?;
    let at = clamp(cx, at, extent)?;
    let low = cx.map(ScalarFn::Floor, &[at])?;
    let t = cx.map(ScalarFn::Sub, &[at, low])?;
    let weight = between(cx, t)?;
    let above = each_tap(cx, work, &[0.0, 1.0]);
    let at = cx.pointwise(ScalarFn::Add, &[low, above])?;
    let at = clamp(cx, at, extent)?;
    let at = cx.cast(at, DType::I64)?;
    Ok(Bins { taps: Taps { at, weight: Some(weight), inside: None }, inside, samples, counts })
}

pub(crate) fn roi_align(cx: &mut Cx) -> Res<Vec<Val>> {
    let [x, rois, batch] = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    let (shape, own) = (cx.shape(x), cx.shape(rois));
    if shape.len() != 4 || own.len() != 2 || !own[1].is(4) || cx.rank(batch) != 1 {
        return invalid(format!("an image of type {} and regions of type {}", cx.ty(x), cx.ty(rois)));
    }
    let named = cx.shape(batch);
    let regions = cx.same_extent(&own[0], &named[0])?;
    let dtype = cx.dtype(x);
    let work = work(dtype);
    let half_pixel = match cx.text("coordinate_transformation_mode", if cx.since < 16 { "output_half_pixel" } else { "half_pixel" })?.as_str() {
        "half_pixel" => true,
        "output_half_pixel" => false,
        other => return invalid(format!("coordinate_transformation_mode `{other}`")),
    };
    let mean = match cx.text("mode", "avg")?.as_str() {
        "avg" => true,
        "max" => false,
        other => return invalid(format!("mode `{other}`")),
    };
    let (height, width, ratio) = (cx.int("output_height", 1)?, cx.int("output_width", 1)?, cx.int("sampling_ratio", 0)?);
    if !(1..=1 << 16).contains(&height) || !(1..=1 << 16).contains(&width) || !(0..=1 << 10).contains(&ratio) {
        return invalid(format!("{height} by {width} bins of {ratio} samples"));
    }
    let scale = cx.float("spatial_scale", 1.0)?;
    let rois = cx.cast(rois, work)?;
    let rois = cx.with_shape(rois, vec![regions.clone(), Dim::from(4i64)])?;
    let mut corner = |k: usize| {
        let v = cx.slice_axis(rois, 1, Dim::from(k), Dim::one())?;
        let v = cx.reshape(v, vec![regions.clone()])?;
        let v = cx.with_number(ScalarFn::Mul, v, scale)?;
        if half_pixel { cx.with_number(ScalarFn::Sub, v, 0.5) } else { Ok(v) }
    };
    let [x0, y0, x1, y1] = [corner(0)?, corner(1)?, corner(2)?, corner(3)?];
    let rows = bins(cx, [y0, y1], height, &shape[2], ratio, half_pixel)?;
    let columns = bins(cx, [x0, x1], width, &shape[3], ratio, half_pixel)?;
    let x = cx.cast(x, work)?;
    let batch = cx.with_shape(batch, vec![regions.clone()])?;
    let image = cx.emit(Op::Gather { axis: 0 }, &[x, batch])?;
    let (down, right) = (Dim::from(height) * rows.samples.clone(), Dim::from(width) * columns.samples.clone());
    let points = down.clone() * right.clone();
    // Rows and columns cross: each sample down with each to the right.
    let spread = |cx: &mut Cx, v: Val, of_row: bool| {
        let own = cx.shape(v);
        let (i, j) = if of_row { (down.clone(), Dim::one()) } else { (Dim::one(), right.clone()) };
        let v = cx.reshape(v, vec![own[0].clone(), own[1].clone(), i, j])?;
        let v = cx.broadcast_to(v, &[own[0].clone(), own[1].clone(), down.clone(), right.clone()])?;
        cx.reshape(v, vec![own[0].clone(), own[1].clone(), points.clone()])
    };
    let on_points = |cx: &mut Cx, taps: &Taps, of_row: bool| -> Res<Taps> {
        let weight = taps.weight.map(|v| spread(cx, v, of_row)).transpose()?;
        Ok(Taps { at: spread(cx, taps.at, of_row)?, weight, inside: None })
    };
    let (major, minor) = (on_points(cx, &rows.taps, true)?, on_points(cx, &columns.taps, false)?);
    let taps = crossed(cx, &major, &minor, &shape[3])?;
    let mut v = combine(cx, image, &taps, if mean { ReduceFn::Sum } else { ReduceFn::Max })?;
    let (a, b) = (spread(cx, rows.inside, true)?, spread(cx, columns.inside, false)?);
    let inside = cx.map(ScalarFn::And, &[a, b])?;
    let zero = cx.scalar(work, 0.0);
    v = cx.pointwise(ScalarFn::Select, &[inside, v, zero])?;
    let full = [regions.clone(), shape[1].clone(), Dim::from(height), rows.samples.clone(), Dim::from(width), columns.samples.clone()];
    v = cx.reshape(v, full.to_vec())?;
    let counts = match (rows.counts, columns.counts) {
        (Some(down), Some(right)) => {
            let column = |cx: &mut Cx, v: Val| cx.reshape(v, [vec![regions.clone()], vec![Dim::one(); 5]].concat());
            let (down, right) = (column(cx, down)?, column(cx, right)?);
            let (i, j) = (ramp(cx, &rows.samples, 3, 6, work)?, ramp(cx, &columns.samples, 5, 6, work)?);
            let (i, j) = (cx.pointwise(ScalarFn::Lt, &[i, down])?, cx.pointwise(ScalarFn::Lt, &[j, right])?);
            let counted = cx.pointwise(ScalarFn::And, &[i, j])?;
            let neutral = cx.scalar(work, if mean { 0.0 } else { f64::NEG_INFINITY });
            v = cx.pointwise(ScalarFn::Select, &[counted, v, neutral])?;
            Some(cx.map(ScalarFn::Mul, &[down, right])?)
        }
        _ => None,
    };
    let mut y = reduce::reduce(cx, if mean { ReduceFn::Sum } else { ReduceFn::Max }, v, &[3, 5])?;
    y = match counts {
        Some(counts) if mean => {
            let counts = cx.with_number(ScalarFn::Max, counts, 1.0)?;
            cx.pointwise(ScalarFn::Div, &[y, counts])?
        }
        // A bin without samples is 0.
        Some(counts) => {
            let some = cx.with_number(ScalarFn::Gt, counts, 0.0)?;
            cx.pointwise(ScalarFn::Select, &[some, y, zero])?
        }
        None if mean => cx.with_number(ScalarFn::Div, y, (ratio * ratio) as f64)?,
        None => y,
    };
    let y = reduce::drop_axes(cx, y, &[3, 5])?;
    Ok(vec![cx.cast(y, dtype)?])
}

/// A convolution whose every tap is sampled where an offset moves it: columns of samples, then a product.
pub(crate) fn deform_conv(cx: &mut Cx) -> Res<Vec<Val>> {
    let [x, w, offset] = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?];
    let (shape, kernel, moved) = (cx.shape(x), cx.shape(w), cx.shape(offset));
    let spatial = shape.len().saturating_sub(2);
    if spatial == 0 || kernel.len() != shape.len() || moved.len() != shape.len() {
        return invalid(format!("an image of type {}, a kernel of type {}, offsets of type {}", cx.ty(x), cx.ty(w), cx.ty(offset)));
    }
    let (groups, offset_groups) = (cx.int("group", 1)?, cx.int("offset_group", 1)?);
    if groups < 1 || offset_groups < 1 {
        return invalid(format!("{groups} groups, {offset_groups} groups of offsets"));
    }
    let (groups, offset_groups) = (Dim::from(groups), Dim::from(offset_groups));
    let (strides, dilations) = (cx.ints_of("strides", spatial, 1)?, cx.ints_of("dilations", spatial, 1)?);
    let pads = cx.ints_of("pads", 2 * spatial, 0)?;
    let dtype = cx.dtype(x);
    let work = work(dtype);
    let (batch, out) = (shape[0].clone(), &moved[2..]);
    let channels = cx.same_extent(&(kernel[1].clone() * groups.clone()), &shape[1])?;
    let taps: Dim = kernel[2..].iter().cloned().product();
    let points: Dim = out.iter().cloned().product();
    let lead = batch.clone() * offset_groups.clone();
    let samples = taps.clone() * points.clone();
    let offset = cx.cast(offset, work)?;
    let offset = cx.reshape(offset, vec![lead.clone(), taps.clone(), Dim::from(spatial), points.clone()])?;
    let cell = [&kernel[2..], out].concat();
    let mut coords = vec![];
    for k in 0..spatial {
        let i = ramp(cx, &out[k], spatial + k, 2 * spatial, work)?;
        let i = cx.with_number(ScalarFn::Mul, i, strides[k] as f64)?;
        let j = ramp(cx, &kernel[2 + k], k, 2 * spatial, work)?;
        let j = cx.with_number(ScalarFn::Mul, j, dilations[k] as f64)?;
        let at = cx.pointwise(ScalarFn::Add, &[i, j])?;
        let at = cx.with_number(ScalarFn::Sub, at, pads[k] as f64)?;
        let at = cx.broadcast_to(at, &cell)?;
        let at = cx.reshape(at, vec![taps.clone(), points.clone()])?;
        let by = cx.slice_axis(offset, 2, Dim::from(k), Dim::one())?;
        let by = cx.reshape(by, vec![lead.clone(), taps.clone(), points.clone()])?;
        let at = cx.pointwise(ScalarFn::Add, &[at, by])?;
        coords.push(cx.reshape(at, vec![lead.clone(), samples.clone()])?);
    }
    let x = cx.cast(x, work)?;
    let each = channels.div(&offset_groups);
    let image = cx.reshape(x, [&[lead.clone(), each], &shape[2..]].concat())?;
    let mut columns = sample(cx, image, &coords, Mode::Linear, Outside::Zeros)?;
    if let Some(mask) = cx.opt(4) {
        let mask = cx.cast(mask, work)?;
        let mask = cx.reshape(mask, vec![lead, Dim::one(), samples])?;
        columns = cx.pointwise(ScalarFn::Mul, &[columns, mask])?;
    }
    let depth = kernel[1].clone() * taps;
    let columns = cx.reshape(columns, vec![batch.clone(), groups.clone(), depth.clone(), points])?;
    let w = cx.cast(w, work)?;
    let w = cx.reshape(w, vec![Dim::one(), groups.clone(), kernel[0].div(&groups), depth])?;
    let mut y = linear::matmul(cx, w, columns, work)?;
    y = cx.reshape(y, [&[batch, kernel[0].clone()], out].concat())?;
    if let Some(bias) = cx.opt(3) {
        let bias = cx.cast(bias, work)?;
        let bias = cx.reshape(bias, [vec![kernel[0].clone()], vec![Dim::one(); spatial]].concat())?;
        y = cx.pointwise(ScalarFn::Add, &[y, bias])?;
    }
    Ok(vec![cx.cast(y, dtype)?])
}
