//! Signals: Fourier transforms as products with a matrix of roots of unity, windows, and mel filters.
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
};
use pavage_ir::{DType, Dim, Op, Scalar, ScalarFn, Sym, Tensor, attr::PadMode, dim::Atom};
use std::f64::consts::PI;

/// Largest transform matrix written into a model, in elements; a longer one is computed when run.
const MATRIX_LIMIT: i64 = 1 << 22;

/// Which transform, along one axis.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Forward,
    /// Only the frequencies up to half: those that a real signal's spectrum is made of.
    ForwardHalf,
    Inverse,
    /// From those of a real signal back to it.
    InverseHalf,
}

impl Kind {
    fn read(cx: &Cx) -> Res<Self> {
        Ok(match (cx.flag("inverse", false)?, cx.flag("onesided", false)?) {
            (false, false) => Kind::Forward,
            (false, true) => Kind::ForwardHalf,
            (true, false) => Kind::Inverse,
            (true, true) => Kind::InverseHalf,
        })
    }

    /// Samples read and given by a transform of length `n`.
    fn extents(self, n: &Dim) -> (Dim, Dim) {
        let half = n.div(&Dim::from(2i64)) + Dim::one();
        match self {
            Kind::ForwardHalf => (n.clone(), half),
            Kind::InverseHalf => (half, n.clone()),
            Kind::Forward | Kind::Inverse => (n.clone(), n.clone()),
        }
    }

    /// The length of a transform that is not told it.
    fn length(self, extent: &Dim) -> Dim {
        if self == Kind::InverseHalf { (extent.clone() - Dim::one()) * Dim::from(2i64) } else { extent.clone() }
    }

    /// Real parts and, but for a real signal, imaginary parts.
    fn parts(self) -> usize {
        if self == Kind::InverseHalf { 1 } else { 2 }
    }

    /// Sign of the exponent.
    fn sign(self) -> f64 {
        if matches!(self, Kind::Forward | Kind::ForwardHalf) { -1.0 } else { 1.0 }
    }
}

/// The matrix `[samples * parts, samples' * parts']` of a transform of known length.
fn matrix(kind: Kind, n: usize, dtype: DType, parts: usize, rows: usize, columns: usize) -> Tensor {
    let to = kind.parts();
    let mut values = vec![0.0; rows * parts * columns * to];
    for (i, o) in (0..rows).flat_map(|i| (0..columns).map(move |o| (i, o))) {
        let angle = 2.0 * PI * ((i * o) % n) as f64 / n as f64;
        let mut scale = if kind.sign() > 0.0 { 1.0 / n as f64 } else { 1.0 };
        // Each frequency between the first and the middle one stands for its mirror too.
        if kind == Kind::InverseHalf && i != 0 && 2 * i != n {
            scale *= 2.0;
        }
        let (re, im) = (angle.cos() * scale, kind.sign() * angle.sin() * scale);
        for (a, b) in (0..parts).flat_map(|a| (0..to).map(move |b| (a, b))) {
            let v = match (a, b) {
                (0, 0) | (1, 1) => re,
                (0, _) => im,
                _ => -im,
            };
            values[(i * parts + a) * columns * to + o * to + b] = v;
        }
    }
    Tensor::from_scalars(dtype, [rows * parts, columns * to], values.into_iter().map(Scalar::F))
}

/// The same for a length that is known when run.
fn matrix_at_run(b: &mut Builder, kind: Kind, n: &Dim, dtype: DType, parts: usize, rows: &Dim, columns: &Dim) -> Res<Val> {
    let shape = vec![rows.clone(), columns.clone()];
    let i = b.emit(Op::Iota { dtype: DType::I64, shape: shape.clone(), axis: 0 }, &[])?;
    let o = b.emit(Op::Iota { dtype: DType::I64, shape, axis: 1 }, &[])?;
    let length = b.known_dims(DType::I64, &[], vec![n.clone()]);
    let turns = b.map(ScalarFn::Mul, &[i, o])?;
    let turns = b.pointwise(ScalarFn::Mod, &[turns, length])?;
    let (turns, width) = (b.cast(turns, dtype)?, b.cast(length, dtype)?);
    let angle = b.with_number(ScalarFn::Mul, turns, 2.0 * PI)?;
    let angle = b.pointwise(ScalarFn::Div, &[angle, width])?;
    let (mut re, mut im) = (b.map(ScalarFn::Cos, &[angle])?, b.map(ScalarFn::Sin, &[angle])?);
    if kind.sign() < 0.0 {
        im = b.map(ScalarFn::Neg, &[im])?;
    } else {
        let mut scale = b.map(ScalarFn::Recip, &[width])?;
        if kind == Kind::InverseHalf {
            let twice = b.with_number(ScalarFn::Mul, i, 2.0)?;
            let first = b.with_number(ScalarFn::Eq, i, 0.0)?;
            let middle = b.pointwise(ScalarFn::Eq, &[twice, length])?;
            let alone = b.map(ScalarFn::Or, &[first, middle])?;
            let double = b.with_number(ScalarFn::Mul, scale, 2.0)?;
            scale = b.pointwise(ScalarFn::Select, &[alone, scale, double])?;
        }
        re = b.pointwise(ScalarFn::Mul, &[re, scale])?;
        im = b.pointwise(ScalarFn::Mul, &[im, scale])?;
    }
    let minus = b.map(ScalarFn::Neg, &[im])?;
    let cell = vec![rows.clone(), Dim::one(), columns.clone(), Dim::one()];
    let mut bands = vec![];
    for of in [[re, im], [minus, re]].iter().take(parts) {
        let of = of.iter().take(kind.parts()).map(|v| b.reshape(*v, cell.clone())).collect::<Res<Vec<_>>>()?;
        bands.push(b.emit(Op::Concat { axis: 3 }, &of)?);
    }
    let all = b.emit(Op::Concat { axis: 1 }, &bands)?;
    b.reshape(all, vec![rows.clone() * Dim::from(parts), columns.clone() * Dim::from(kind.parts())])
}

/// The transform of length `n` of `x[..., samples along axis, ..., parts]`; the signal is cut or goes on with zeros.
fn transform(b: &mut Builder, x: Val, axis: usize, n: &Dim, kind: Kind) -> Res<Val> {
    let rank = b.rank(x);
    let parts = match b.shape(x).last().and_then(Dim::as_const) {
        Some(parts @ 1..=2) => parts as usize,
        _ => return invalid(format!("a signal of type {}: the last axis holds real and imaginary parts", b.ty(x))),
    };
    if axis + 1 >= rank || n.as_const().is_some_and(|n| n < 1) {
        return invalid(format!("a transform of length {n} along axis {axis} of {}", b.ty(x)));
    }
    let (rows, columns) = kind.extents(n);
    let mut perm: Vec<usize> = (0..rank).collect();
    perm.swap(axis, rank - 2);
    let mut v = b.transpose(x, &perm)?;
    let mut shape = b.shape(v);
    if shape[rank - 2] != rows {
        let mut hi = vec![Dim::ZERO; rank];
        hi[rank - 2] = rows.clone() - shape[rank - 2].clone();
        let zero = b.scalar_like(v, 0.0);
        v = b.emit(Op::Pad { lo: vec![Dim::ZERO; rank], hi, mode: PadMode::Constant }, &[v, zero])?;
    }
    let dtype = b.dtype(x);
    let mut work = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let known = (n.as_const(), rows.as_const(), columns.as_const());
    let m = match known {
        (Some(n), Some(rows), Some(columns)) if rows.saturating_mul(columns) <= MATRIX_LIMIT / 4 => {
            b.constant(matrix(kind, n as usize, work, parts, rows as usize, columns as usize))
        }
        _ => {
            // Angles of long transforms need more digits than f32 has.
            work = DType::F64;
            matrix_at_run(b, kind, n, work, parts, &rows, &columns)?
        }
    };
    v = b.cast(v, work)?;
    let lead = shape[..rank - 2].to_vec();
    v = b.reshape(v, [lead.clone(), vec![rows * Dim::from(parts)]].concat())?;
    let y = super::linear::matmul(b, v, m, work)?;
    shape[rank - 2] = columns;
    shape[rank - 1] = Dim::from(kind.parts());
    let y = b.reshape(y, shape)?;
    let y = b.transpose(y, &perm)?;
    b.cast(y, dtype)
}

/// An integer that data decides, within bounds that the run checks, as a size.
pub(crate) fn bounded_size(cx: &mut Cx, v: Val, min: i64, max: Option<i64>) -> Res<Dim> {
    if let Some([d]) = cx.dims(v).as_deref() {
        return Ok(d.clone());
    }
    if !cx.ty(v).count().is(1) {
        return invalid(format!("one size expected, got {}", cx.ty(v)));
    }
    let v = cx.cast(v, DType::I64)?;
    let v = cx.reshape(v, vec![])?;
    let name = cx.name.clone();
    let sym = Sym { min, ..cx.data_symbol(&name, max) };
    cx.emit(Op::BindSize { sym: sym.clone() }, &[v])?;
    Ok(Dim::from(Atom::Sym(sym)))
}

pub(crate) fn dft(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let (rank, kind) = (cx.rank(x), Kind::read(cx)?);
    if rank < 2 {
        return invalid(format!("a signal of type {}", cx.ty(x)));
    }
    let length = match cx.opt(1) {
        Some(v) => Some(bounded_size(cx, v, 1, None)?),
        None => None,
    };
    let given = if cx.since < 20 { Some(cx.int("axis", 1)?) } else { None };
    let axis = match (given, cx.opt(2)) {
        (Some(axis), _) => axis,
        (None, None) => -2,
        (None, Some(v)) => match cx.dims(v).map(|d| d.iter().map(Dim::as_const).collect::<Vec<_>>()).as_deref() {
            Some([Some(axis)]) => *axis,
            _ => return Ok(vec![dft_of_any_axis(cx, x, v, length, kind)?]),
        },
    };
    let axis = cx.axis(axis, rank)?;
    let n = length.unwrap_or_else(|| kind.length(&cx.shape(x)[axis]));
    Ok(vec![transform(cx, x, axis, &n, kind)?])
}

/// The transform along an axis that data names: one along each, of which one is chosen.
fn dft_of_any_axis(cx: &mut Cx, x: Val, axis: Val, length: Option<Dim>, kind: Kind) -> Res<Val> {
    let (rank, shape) = (cx.rank(x), cx.shape(x));
    let axis = cx.cast(axis, DType::I64)?;
    let axis = cx.reshape(axis, vec![])?;
    let below = cx.with_number(ScalarFn::Add, axis, rank as f64)?;
    let negative = cx.with_number(ScalarFn::Lt, axis, 0.0)?;
    let axis = cx.map(ScalarFn::Select, &[negative, below, axis])?;
    // Every candidate is written to the corner of what holds all of them; the chosen one is cut out again.
    let lengths: Vec<Dim> = shape[..rank - 1].iter().map(|d| length.clone().unwrap_or_else(|| kind.length(d))).collect();
    let extents: Vec<Dim> = lengths.iter().map(|n| kind.extents(n).1).collect();
    let canvas: Vec<Dim> = shape.iter().zip(&extents).map(|(a, b)| a.larger(b)).collect();
    let mut chosen = None;
    let mut sizes = vec![];
    for k in 0..rank - 1 {
        let hit = cx.with_number(ScalarFn::Eq, axis, k as f64)?;
        sizes.push(if shape[k] == extents[k] {
            shape[k].clone()
        } else {
            let [to, from] = [&extents[k], &shape[k]].map(|d| cx.known_dims(DType::I64, &[], vec![d.clone()]));
            let size = cx.map(ScalarFn::Select, &[hit, to, from])?;
            bounded_size(cx, size, 0, canvas[k].as_const())?
        });
        // An extent of 1 inverts to no sample: such an axis cannot be the one.
        if lengths[k].as_const().is_some_and(|n| n < 1) {
            continue;
        }
        let y = transform(cx, x, k, &lengths[k], kind)?;
        let own = cx.shape(y);
        let hi = (0..rank).map(|i| if i + 1 == rank { Dim::ZERO } else { canvas[i].clone() - own[i].clone() }).collect();
        let zero = cx.scalar_like(y, 0.0);
        let y = cx.emit(Op::Pad { lo: vec![Dim::ZERO; rank], hi, mode: PadMode::Constant }, &[y, zero])?;
        let whole = [canvas.clone(), vec![Dim::from(kind.parts())]].concat();
        let y = cx.with_shape(y, whole)?;
        chosen = Some(match chosen {
            Some(rest) => cx.pointwise(ScalarFn::Select, &[hit, y, rest])?,
            None => y,
        });
    }
    let Some(y) = chosen else { return invalid(format!("no axis of {} can be transformed", cx.ty(x))) };
    sizes.push(Dim::from(kind.parts()));
    cx.emit(Op::Slice { starts: vec![Dim::ZERO; rank], sizes, steps: vec![1; rank] }, &[y])
}

pub(crate) fn stft(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, step) = (cx.arg(0)?, cx.arg(1)?);
    if cx.rank(x) != 3 {
        return invalid(format!("a signal of type {}", cx.ty(x)));
    }
    let step = bounded_size(cx, step, 1, None)?;
    let window = cx.opt(2);
    let samples = cx.shape(x)[1].clone();
    let length = match (window, cx.opt(3)) {
        (Some(w), _) => cx.ty(w).count(),
        (None, Some(v)) => bounded_size(cx, v, 1, samples.as_const())?,
        (None, None) => samples.clone(),
    };
    if step.as_const().is_some_and(|s| s < 1) {
        return invalid(format!("a frame step of {step}"));
    }
    let frames = (samples - length.clone()).div(&step) + Dim::one();
    if frames.as_const().is_some_and(|f| f < 1) {
        return invalid(format!("frames of {length} samples of a signal of type {}", cx.ty(x)));
    }
    let shape = vec![frames, length.clone()];
    let frame = cx.emit(Op::Iota { dtype: DType::I64, shape: shape.clone(), axis: 0 }, &[])?;
    let within = cx.emit(Op::Iota { dtype: DType::I64, shape, axis: 1 }, &[])?;
    let step = cx.known_dims(DType::I64, &[], vec![step]);
    let start = cx.pointwise(ScalarFn::Mul, &[frame, step])?;
    let at = cx.map(ScalarFn::Add, &[start, within])?;
    let mut framed = cx.emit(Op::Gather { axis: 1 }, &[x, at])?;
    if let Some(w) = window {
        let w = cx.reshape(w, vec![length.clone(), Dim::one()])?;
        framed = cx.pointwise(ScalarFn::Mul, &[framed, w])?;
    }
    let kind = if cx.flag("onesided", true)? { Kind::ForwardHalf } else { Kind::Forward };
    Ok(vec![transform(cx, framed, 2, &length, kind)?])
}

/// A window `a - b cos(2 pi i / n) + c cos(4 pi i / n)`, `n` its length or, symmetric, one less.
pub(crate) fn window(cx: &mut Cx, [a, b, c]: [f64; 3]) -> Res<Vec<Val>> {
    let size = cx.arg(0)?;
    let size = bounded_size(cx, size, 0, None)?;
    let dtype = cx.dtype_attr("output_datatype")?.unwrap_or(DType::F32);
    let work = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let period = if cx.flag("periodic", true)? { size.clone() } else { size.clone() - Dim::one() };
    let period = cx.known_dims(DType::I64, &[], vec![period]);
    let period = cx.cast(period, work)?;
    let i = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![size], axis: 0 }, &[])?;
    let i = cx.cast(i, work)?;
    let mut y = cx.scalar(work, a);
    for (factor, turns) in [(-b, 2.0), (c, 4.0)] {
        if factor != 0.0 {
            let angle = cx.with_number(ScalarFn::Mul, i, turns * PI)?;
            let angle = cx.pointwise(ScalarFn::Div, &[angle, period])?;
            let wave = cx.map(ScalarFn::Cos, &[angle])?;
            let wave = cx.with_number(ScalarFn::Mul, wave, factor)?;
            y = cx.pointwise(ScalarFn::Add, &[y, wave])?;
        }
    }
    Ok(vec![cx.cast(y, dtype)?])
}

/// Triangles over the bins of a spectrum, their corners evenly spaced on the mel scale.
pub(crate) fn mel_weight_matrix(cx: &mut Cx) -> Res<Vec<Val>> {
    let args = [cx.arg(0)?, cx.arg(1)?, cx.arg(2)?, cx.arg(3)?, cx.arg(4)?];
    if args.iter().any(|v| !cx.ty(*v).count().is(1)) {
        return invalid("operands are scalars");
    }
    let dtype = cx.dtype_attr("output_datatype")?.unwrap_or(DType::F32);
    if !dtype.is_float() && !dtype.is_int() {
        return missing(format!("mel weights of {dtype}"));
    }
    let [bands, length, rate, low, high] = args;
    let bands = bounded_size(cx, bands, 0, None)?;
    let wide = |cx: &mut Cx, v: Val| cx.cast(v, DType::F64).and_then(|v| cx.reshape(v, vec![]));
    let spectrum = wide(cx, length)?;
    let length = bounded_size(cx, length, 1, None)?;
    let (rate, low, high) = (wide(cx, rate)?, wide(cx, low)?, wide(cx, high)?);
    let per_octave = 2595.0 / std::f64::consts::LN_10;
    let mel = |cx: &mut Cx, hertz: Val| {
        let v = cx.with_number(ScalarFn::Div, hertz, 700.0)?;
        let v = cx.with_number(ScalarFn::Add, v, 1.0)?;
        let v = cx.map(ScalarFn::Log, &[v])?;
        cx.with_number(ScalarFn::Mul, v, per_octave)
    };
    let (low, high) = (mel(cx, low)?, mel(cx, high)?);
    let corners = bands.clone() + Dim::from(2i64);
    let count = cx.known_dims(DType::I64, &[], vec![corners.clone()]);
    let count = cx.cast(count, DType::F64)?;
    let span = cx.map(ScalarFn::Sub, &[high, low])?;
    let step = cx.map(ScalarFn::Div, &[span, count])?;
    let i = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![corners], axis: 0 }, &[])?;
    let i = cx.cast(i, DType::F64)?;
    let at = cx.pointwise(ScalarFn::Mul, &[i, step])?;
    let at = cx.pointwise(ScalarFn::Add, &[at, low])?;
    let at = cx.with_number(ScalarFn::Div, at, per_octave)?;
    let at = cx.map(ScalarFn::Exp, &[at])?;
    let at = cx.with_number(ScalarFn::Sub, at, 1.0)?;
    let hertz = cx.with_number(ScalarFn::Mul, at, 700.0)?;
    let bins = cx.with_number(ScalarFn::Add, spectrum, 1.0)?;
    let bin = cx.pointwise(ScalarFn::Mul, &[hertz, bins])?;
    let bin = cx.pointwise(ScalarFn::Div, &[bin, rate])?;
    let bin = cx.map(ScalarFn::Floor, &[bin])?;
    let corner = |cx: &mut Cx, k: i64| cx.slice_axis(bin, 0, Dim::from(k), bands.clone());
    let (left, centre, right) = (corner(cx, 0)?, corner(cx, 1)?, corner(cx, 2)?);
    let rows = length.div(&Dim::from(2i64)) + Dim::one();
    let j = cx.emit(Op::Iota { dtype: DType::I64, shape: vec![rows, bands.clone()], axis: 0 }, &[])?;
    let j = cx.cast(j, DType::F64)?;
    let (zero, one) = (cx.scalar(DType::F64, 0.0), cx.scalar(DType::F64, 1.0));
    // Up from the left corner; where the two coincide, the centre alone.
    let rise = cx.pointwise(ScalarFn::Sub, &[centre, left])?;
    let flat = cx.with_number(ScalarFn::Eq, rise, 0.0)?;
    let safe = cx.pointwise(ScalarFn::Select, &[flat, one, rise])?;
    let up = cx.pointwise(ScalarFn::Sub, &[j, left])?;
    let up = cx.pointwise(ScalarFn::Div, &[up, safe])?;
    let up = cx.pointwise(ScalarFn::Select, &[flat, one, up])?;
    let (after, before) = (cx.pointwise(ScalarFn::Ge, &[j, left])?, cx.pointwise(ScalarFn::Le, &[j, centre])?);
    let inside = cx.map(ScalarFn::And, &[after, before])?;
    let up = cx.pointwise(ScalarFn::Select, &[inside, up, zero])?;
    // Down to the right one.
    let fall = cx.pointwise(ScalarFn::Sub, &[right, centre])?;
    let flat = cx.with_number(ScalarFn::Eq, fall, 0.0)?;
    let safe = cx.pointwise(ScalarFn::Select, &[flat, one, fall])?;
    let down = cx.pointwise(ScalarFn::Sub, &[right, j])?;
    let down = cx.pointwise(ScalarFn::Div, &[down, safe])?;
    let (after, before) = (cx.pointwise(ScalarFn::Ge, &[j, centre])?, cx.pointwise(ScalarFn::Lt, &[j, right])?);
    let inside = cx.map(ScalarFn::And, &[after, before])?;
    let out = cx.pointwise(ScalarFn::Select, &[inside, down, up])?;
    Ok(vec![cx.cast(out, dtype)?])
}
