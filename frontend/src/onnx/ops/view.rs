//! Views and copies: reshapes, slices, padding, concatenation.
use super::dynamic::{self, Padding};
use crate::onnx::{
    build::{Builder, Res, Val, invalid, missing},
    cx::Cx,
    symbolic::capped,
};
use pavage_ir::{
    DType, Dim, Op, Scalar, ScalarFn, Tensor,
    attr::{PadMode, ReduceFn},
};

pub(crate) fn identity(cx: &mut Cx) -> Res<Vec<Val>> {
    Ok(vec![cx.any(0)?])
}

/// `0` copies an extent (unless `keep_zero`), `-1` takes what is left.
fn resolve_reshape(b: &mut Builder, from: &[Dim], target: &[Dim], keep_zero: bool) -> Res<Vec<Dim>> {
    let mut shape = vec![];
    let mut hole = None;
    for (i, d) in target.iter().enumerate() {
        shape.push(match d.as_const() {
            Some(0) if !keep_zero => match from.get(i) {
                Some(d) => d.clone(),
                None => return invalid(format!("target axis {i} copies an axis that the input does not have")),
            },
            Some(-1) if hole.is_none() => {
                hole = Some(i);
                Dim::one()
            }
            Some(v) if v < 0 => return invalid(format!("target extent {v}")),
            _ => d.clone(),
        });
    }
    if let Some(i) = hole {
        // Extents on both sides cancel first, so that no division is left where none is needed.
        let (mut have, mut want) = (from.to_vec(), shape.clone());
        want.retain(|d| match have.iter().position(|h| h == d) {
            Some(at) => {
                have.remove(at);
                false
            }
            None => true,
        });
        let (have, want): (Dim, Dim) = (have.into_iter().product(), want.into_iter().product());
        if want.is(0) {
            return invalid("an extent cannot be inferred beside an extent of 0");
        }
        if let (Some(h), Some(w)) = (have.as_const(), want.as_const())
            && h.checked_rem(w) != Some(0)
        {
            return invalid(format!("{h} elements do not divide by {w}"));
        }
        let rest = have.modulo(&want);
        if rest.as_const().is_none() {
            b.must_be_equal(rest, Dim::ZERO);
        }
        shape[i] = have.div(&want);
    } else {
        let (have, want): (Dim, Dim) = (from.iter().cloned().product(), shape.iter().cloned().product());
        if have != want {
            b.must_be_equal(have, want);
        }
    }
    Ok(shape)
}

pub(crate) fn reshape(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, target) = (cx.arg(0)?, cx.arg(1)?);
    let (from, keep_zero) = (cx.shape(x), cx.flag("allowzero", false)?);
    let Some(target) = cx.dims(target) else {
        let name = cx.name.clone();
        return Ok(vec![dynamic::reshape(cx, x, target, keep_zero, &name)?]);
    };
    let shape = resolve_reshape(cx, &from, &target, keep_zero)?;
    Ok(vec![cx.reshape(x, shape)?])
}

pub(crate) fn flatten(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let shape = cx.shape(x);
    let axis = cx.int("axis", 1)?;
    let axis = if axis == shape.len() as i64 { shape.len() } else { cx.axis(axis, shape.len().max(1))? };
    let (rows, columns) = (shape[..axis].iter().cloned().product(), shape[axis..].iter().cloned().product());
    Ok(vec![cx.reshape(x, vec![rows, columns])?])
}

/// Axes from the attribute, or since operator set 13 from operand 1.
fn axes_of(cx: &Cx) -> Res<Option<Vec<i64>>> {
    if cx.since < 13 { Ok(cx.ints_opt("axes")?.map(<[i64]>::to_vec)) } else { cx.const_ints(1, "axes") }
}

pub(crate) fn squeeze(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let shape = cx.shape(x);
    if let Some(axes) = cx.data(1).filter(|_| cx.since >= 13) {
        let name = cx.name.clone();
        return Ok(vec![dynamic::squeeze(cx, x, axes, &name)?]);
    }
    let axes = match axes_of(cx)? {
        Some(axes) => cx.axes(&axes, shape.len())?,
        None => (0..shape.len()).filter(|i| shape[*i].is(1)).collect(),
    };
    for axis in &axes {
        cx.same_extent(&Dim::one(), &shape[*axis])?;
    }
    Ok(vec![super::reduce::drop_axes(cx, x, &axes)?])
}

pub(crate) fn unsqueeze(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    if let Some(axes) = cx.data(1).filter(|_| cx.since >= 13) {
        let name = cx.name.clone();
        return Ok(vec![dynamic::unsqueeze(cx, x, axes, &name)?]);
    }
    let Some(axes) = axes_of(cx)? else { return invalid("axes are missing") };
    let mut shape = cx.shape(x);
    for axis in cx.axes(&axes, shape.len() + axes.len())? {
        shape.insert(axis, Dim::one());
    }
    Ok(vec![cx.reshape(x, shape)?])
}

pub(crate) fn transpose(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let rank = cx.rank(x);
    let perm: Vec<usize> = match cx.ints_opt("perm")? {
        Some(perm) => perm.iter().map(|a| cx.axis(*a, rank)).collect::<Res<_>>()?,
        None => (0..rank).rev().collect(),
    };
    let mut sorted = perm.clone();
    sorted.sort_unstable();
    if sorted != (0..rank).collect::<Vec<_>>() {
        return invalid(format!("perm {perm:?} of {rank} axes"));
    }
    Ok(vec![cx.transpose(x, &perm)?])
}

pub(crate) fn expand(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, target) = (cx.arg(0)?, cx.arg(1)?);
    let Some(target) = cx.dims(target) else {
        let name = cx.name.clone();
        return Ok(vec![dynamic::expand(cx, x, target, &name)?]);
    };
    let own = cx.shape(x);
    let shape = cx.common_shape(&[own, target])?;
    Ok(vec![cx.broadcast_to(x, &shape)?])
}

pub(crate) fn concat(cx: &mut Cx) -> Res<Vec<Val>> {
    let args = cx.args()?;
    let Some(first) = args.first() else { return invalid("no operands") };
    let rank = cx.rank(*first);
    if rank == 0 {
        return invalid("scalars cannot be concatenated");
    }
    let axis = cx.axis(cx.int("axis", 1)?, rank)?;
    Ok(vec![concat_along(cx, &args, axis)?])
}

/// Operands one after another; their other extents are made equal.
pub(crate) fn concat_along(b: &mut Builder, args: &[Val], axis: usize) -> Res<Val> {
    let mut shape = b.shape(args[0]);
    for v in &args[1..] {
        let other = b.shape(*v);
        if other.len() != shape.len() {
            return invalid(format!("operands of {} and {} axes", shape.len(), other.len()));
        }
        for i in (0..shape.len()).filter(|i| *i != axis) {
            shape[i] = b.same_extent(&shape[i], &other[i])?;
        }
    }
    let args = args
        .iter()
        .map(|v| {
            let mut own = shape.clone();
            own[axis] = b.shape(*v)[axis].clone();
            b.with_shape(*v, own)
        })
        .collect::<Res<Vec<_>>>()?;
    b.emit(Op::Concat { axis }, &args)
}

pub(crate) fn split(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let axis = cx.axis(cx.int("axis", 0)?, cx.rank(x))?;
    let extent = cx.shape(x)[axis].clone();
    let outputs = cx.node.output.len();
    let given = if cx.since < 13 {
        cx.ints_opt("split")?.map(|s| s.iter().map(|v| Dim::from(*v)).collect())
    } else {
        match cx.opt(1) {
            Some(v) => match cx.dims(v) {
                Some(sizes) => Some(sizes),
                None => return split_by(cx, x, axis, v),
            },
            None => None,
        }
    };
    let sizes: Vec<Dim> = match given {
        Some(sizes) => sizes,
        None => {
            let n = cx.int("num_outputs", outputs as i64)?;
            if !(1..=1 << 16).contains(&n) {
                return invalid(format!("{n} outputs"));
            }
            // Equal parts, the last one smaller when they do not divide.
            let each = extent.ceil_div(&Dim::from(n));
            let mut sizes = vec![each.clone(); n as usize - 1];
            sizes.push(extent.clone() - each * Dim::from(n - 1));
            sizes
        }
    };
    if sizes.len() < outputs || sizes.iter().any(|s| s.as_const().is_some_and(|s| s < 0)) {
        return invalid(format!("{outputs} outputs and {} parts", sizes.len()));
    }
    let total: Dim = sizes.iter().cloned().sum();
    cx.same_extent(&extent, &total)?;
    parts(cx, x, axis, sizes)
}

/// `x` cut into parts of these sizes.
fn parts(b: &mut Builder, x: Val, axis: usize, sizes: Vec<Dim>) -> Res<Vec<Val>> {
    let mut start = Dim::ZERO;
    let mut out = vec![];
    for size in sizes {
        out.push(b.slice_axis(x, axis, start.clone(), size.clone())?);
        start = start + size;
    }
    Ok(out)
}

/// `x` cut into parts whose sizes data decides; together they are all of it.
fn split_by(cx: &mut Cx, x: Val, axis: usize, sizes: Val) -> Res<Vec<Val>> {
    if dynamic::length(cx, sizes, "part sizes")? != cx.node.output.len() {
        return invalid(format!("{} outputs and sizes {}", cx.node.output.len(), cx.ty(sizes)));
    }
    let (sizes, name) = (dynamic::vector(cx, sizes)?, cx.name.clone());
    let total = dynamic::combine(cx, ReduceFn::Sum, sizes, 0)?;
    let extent = cx.shape(x)[axis].clone();
    let extent = cx.known_dims(DType::I64, &[], vec![extent]);
    let all = cx.map(ScalarFn::Eq, &[total, extent])?;
    let sizes = dynamic::bind(cx, sizes, all, &name)?;
    parts(cx, x, axis, sizes)
}

/// `d` counted from the end where negative.
fn from_end(d: &Dim, extent: &Dim) -> Dim {
    match d.as_const() {
        Some(v) if v >= 0 => d.clone(),
        Some(_) => d.clone() + extent.clone(),
        // 1 where d is negative, else 0, in sizes.
        None => d.clone() + extent.clone() * (-d.clone()).larger(&Dim::ZERO).smaller(&Dim::one()),
    }
}

/// Bounds of this size stand for the end of an extent that is not known; exporters write 10^9, 2^31 - 1 or 2^63 - 1.
const FAR: i64 = 1_000_000_000;

/// First element and count of ONNX's `start:end:step` over an extent.
fn range_of(start: &Dim, end: &Dim, step: i64, extent: &Dim) -> (Dim, Dim) {
    let clamp = |d: &Dim, least: i64, most: Dim| match d.as_const() {
        Some(v) if v >= FAR && extent.as_const().is_none_or(|n| n <= v) => most,
        Some(v) if v <= -FAR && extent.as_const().is_none_or(|n| n <= v.saturating_neg()) => Dim::from(least),
        _ => capped(&from_end(d, extent).larger(&Dim::from(least)), &most),
    };
    let one = Dim::one();
    if step > 0 {
        let (start, end) = (clamp(start, 0, extent.clone()), clamp(end, 0, extent.clone()));
        let count = (end - start.clone()).larger(&Dim::ZERO).ceil_div(&Dim::from(step));
        (start, count)
    } else {
        let last = extent.clone() - one;
        let (start, end) = (clamp(start, 0, last.clone()), clamp(end, -1, last));
        let count = (start.clone() - end).larger(&Dim::ZERO).ceil_div(&Dim::from(-step));
        (start, count)
    }
}

pub(crate) fn slice(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let shape = cx.shape(x);
    let rank = shape.len();
    let list = |values: &[i64]| values.iter().map(|v| Dim::from(*v)).collect::<Vec<_>>();
    let (starts, ends, axes, steps) = if cx.since < 10 {
        let (Some(starts), Some(ends)) = (cx.ints_opt("starts")?, cx.ints_opt("ends")?) else { return invalid("starts or ends are missing") };
        (Bounds::Known(list(starts)), Bounds::Known(list(ends)), cx.ints_opt("axes")?.map(<[i64]>::to_vec), None)
    } else {
        let (starts, ends) = (cx.arg(1)?, cx.arg(2)?);
        let back = cx.known_ints(4).is_some_and(|steps| steps.iter().any(|s| *s < 0)) && (cx.dims(starts).is_none() || cx.dims(ends).is_none());
        if back || cx.data(3).is_some() || cx.data(4).is_some() {
            let (axes, steps, name) = (cx.opt(3), cx.opt(4), cx.name.clone());
            return Ok(vec![dynamic::slice(cx, x, [starts, ends], axes, steps, &name)?]);
        }
        (bounds(cx, starts)?, bounds(cx, ends)?, cx.const_ints(3, "slice axes")?, cx.const_ints(4, "slice steps")?)
    };
    let n = starts.count();
    let axes = axes.unwrap_or_else(|| (0..n as i64).collect());
    let steps_given = steps.unwrap_or_else(|| vec![1; n]);
    if [ends.count(), axes.len(), steps_given.len()] != [n; 3] {
        return invalid(format!("{n} starts, {} ends, {} axes, {} steps", ends.count(), axes.len(), steps_given.len()));
    }
    let (mut first, mut sizes, mut steps) = (vec![Dim::ZERO; rank], shape.clone(), vec![1; rank]);
    for (i, axis) in axes.iter().enumerate() {
        let axis = cx.axis(*axis, rank)?;
        let step = steps_given[i].clamp(-FAR, FAR);
        if step == 0 {
            return invalid("a step of 0");
        }
        let (start, end) = (starts.at(cx, i, &shape[axis])?, ends.at(cx, i, &shape[axis])?);
        (first[axis], sizes[axis]) = range_of(&start, &end, step, &shape[axis]);
        steps[axis] = step;
    }
    Ok(vec![cx.emit(Op::Slice { starts: first, sizes, steps }, &[x])?])
}

/// Bounds of a slice.
enum Bounds {
    Known(Vec<Dim>),
    /// An i64 vector of so many, computed when run.
    Data(Val, usize),
}

fn bounds(cx: &mut Cx, v: Val) -> Res<Bounds> {
    if let Some(dims) = cx.dims(v) {
        return Ok(Bounds::Known(dims));
    }
    match cx.shape(v).first().and_then(Dim::as_const) {
        Some(n @ 0..=64) if cx.rank(v) == 1 => Ok(Bounds::Data(cx.cast(v, DType::I64)?, n as usize)),
        _ => missing("slice bounds of unknown count"),
    }
}

impl Bounds {
    fn count(&self) -> usize {
        match self {
            Bounds::Known(dims) => dims.len(),
            Bounds::Data(_, n) => *n,
        }
    }

    /// Bound `i`; one that data decides is brought into the extent there and defines a symbol.
    fn at(&self, cx: &mut Cx, i: usize, extent: &Dim) -> Res<Dim> {
        let v = match self {
            Bounds::Known(dims) => return Ok(dims[i].clone()),
            Bounds::Data(v, _) => *v,
        };
        let one = cx.slice_axis(v, 0, Dim::from(i), Dim::one())?;
        let one = cx.reshape(one, vec![])?;
        let extent = cx.known_dims(DType::I64, &[], vec![extent.clone()]);
        let negative = cx.with_number(ScalarFn::Lt, one, 0.0)?;
        let wrapped = cx.map(ScalarFn::Add, &[one, extent])?;
        let at = cx.map(ScalarFn::Select, &[negative, wrapped, one])?;
        let at = cx.with_number(ScalarFn::Max, at, 0.0)?;
        let at = cx.map(ScalarFn::Min, &[at, extent])?;
        let name = format!("{}_{i}", cx.name);
        cx.size(at, &name)
    }
}

pub(crate) fn pad(cx: &mut Cx) -> Res<Vec<Val>> {
    let x = cx.arg(0)?;
    let (rank, dtype) = (cx.rank(x), cx.dtype(x));
    let (pads, value) = if cx.since < 11 {
        let Some(pads) = cx.ints_opt("pads")? else { return invalid("pads are missing") };
        let (pads, value) = (cx.ints(pads), cx.float("value", 0.0)?);
        (pads, Some(cx.scalar(dtype, value)))
    } else {
        (cx.arg(1)?, cx.opt(2))
    };
    let mode = match cx.text("mode", "constant")?.as_str() {
        "constant" => PadMode::Constant,
        "edge" => PadMode::Edge,
        "reflect" => PadMode::Reflect,
        "wrap" => PadMode::Wrap,
        other => return invalid(format!("mode `{other}`")),
    };
    let value = match value {
        Some(v) => cx.reshape(v, vec![])?,
        None if dtype == DType::Bool => cx.constant(Tensor::scalar(DType::Bool, Scalar::B(false))),
        None => cx.scalar(dtype, 0.0),
    };
    let Some(pads) = cx.dims(pads).filter(|_| cx.data(3).is_none()) else {
        return Ok(vec![pad_by(cx, x, pads, mode, value)?]);
    };
    let axes: Vec<usize> = match cx.const_ints(3, "pad axes")? {
        Some(axes) => axes.iter().map(|a| cx.axis(*a, rank)).collect::<Res<_>>()?,
        None => (0..rank).collect(),
    };
    let n = axes.len();
    if pads.len() != 2 * n {
        return invalid(format!("{} pads for {n} axes", pads.len()));
    }
    let (mut lo, mut hi) = (vec![Dim::ZERO; rank], vec![Dim::ZERO; rank]);
    for (i, axis) in axes.into_iter().enumerate() {
        lo[axis] = pads[i].clone();
        hi[axis] = pads[n + i].clone();
    }
    if lo.iter().chain(&hi).all(|d| d.is(0)) {
        return Ok(vec![x]);
    }
    Ok(vec![cx.emit(Op::Pad { lo, hi, mode }, &[x, value])?])
}

/// Padding by amounts, and perhaps along axes, that data decides.
fn pad_by(cx: &mut Cx, x: Val, pads: Val, mode: PadMode, value: Val) -> Res<Val> {
    let (rank, name, zero) = (cx.rank(x), cx.name.clone(), cx.scalar(DType::I64, 0.0));
    let count = dynamic::length(cx, pads, "pads")?;
    let pads = dynamic::vector(cx, pads)?;
    let half = Dim::from(count / 2);
    let amounts = [cx.slice_axis(pads, 0, Dim::ZERO, half.clone())?, cx.slice_axis(pads, 0, half.clone(), half)?];
    if let Some(axes) = cx.data(3) {
        let axes = dynamic::Axes::new(cx, axes, rank)?;
        let amounts = [axes.spread(cx, amounts[0], zero)?, axes.spread(cx, amounts[1], zero)?];
        let padding = Padding { amounts, axes: (0..rank).collect(), valid: axes.valid, mode, value };
        return dynamic::pad(cx, x, &padding, &name);
    }
    let axes: Vec<usize> = match cx.known_ints(3) {
        Some(axes) => axes.iter().map(|a| cx.axis(*a, rank)).collect::<Res<_>>()?,
        None => (0..rank).collect(),
    };
    if count != 2 * axes.len() {
        return invalid(format!("{count} pads for {} axes", axes.len()));
    }
    let valid = cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
    dynamic::pad(cx, x, &Padding { amounts, axes, valid, mode, value }, &name)
}

/// Crop or pad axes around their middle.
pub(crate) fn center_crop_pad(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, target) = (cx.arg(0)?, cx.arg(1)?);
    let (rank, dtype, name) = (cx.rank(x), cx.dtype(x), cx.name.clone());
    let axes: Vec<usize> = match cx.ints_opt("axes")? {
        Some(axes) => axes.iter().map(|a| cx.axis(*a, rank)).collect::<Res<_>>()?,
        None => (0..rank).collect(),
    };
    if dynamic::length(cx, target, "target extents")? != axes.len() {
        return invalid(format!("target {} for {} axes", cx.ty(target), axes.len()));
    }
    let target = dynamic::vector(cx, target)?;
    let shape = cx.shape(x);
    let own: Vec<Dim> = axes.iter().map(|a| shape[*a].clone()).collect();
    let own = dynamic::sizes(cx, &own);
    let more = cx.map(ScalarFn::Sub, &[target, own])?;
    let lo = cx.with_number(ScalarFn::Div, more, 2.0)?;
    let hi = cx.map(ScalarFn::Sub, &[more, lo])?;
    let value = if dtype == DType::Bool { cx.constant(Tensor::scalar(dtype, Scalar::B(false))) } else { cx.scalar(dtype, 0.0) };
    let valid = cx.constant(Tensor::scalar(DType::Bool, Scalar::B(true)));
    let padding = Padding { amounts: [lo, hi], axes, valid, mode: PadMode::Constant, value };
    Ok(vec![dynamic::pad(cx, x, &padding, &name)?])
}

pub(crate) fn tile(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, repeats) = (cx.arg(0)?, cx.arg(1)?);
    let name = cx.name.clone();
    let repeats = cx.sizes(repeats, &name)?;
    let shape = cx.shape(x);
    if repeats.len() != shape.len() {
        return invalid(format!("{} repeats for {} axes", repeats.len(), shape.len()));
    }
    // Each repeated axis becomes (repeats, extent), broadcast, and one axis again.
    let (mut apart, mut wide, mut out) = (vec![], vec![], vec![]);
    for (d, r) in shape.iter().zip(&repeats) {
        if !r.is(1) {
            apart.push(Dim::one());
            wide.push(r.clone());
        }
        apart.push(d.clone());
        wide.push(d.clone());
        out.push(d.clone() * r.clone());
    }
    let x = cx.reshape(x, apart)?;
    let x = cx.emit(Op::Broadcast { shape: wide }, &[x])?;
    Ok(vec![cx.reshape(x, out)?])
}

/// Split an image's channels into blocks of pixels, or back.
pub(crate) fn depth_to_space(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, s) = (cx.arg(0)?, cx.int("blocksize", 1)?);
    let [n, c, h, w] = image(cx, x, s)?;
    let d = Dim::from(s);
    let out = c.div(&(d.clone() * d.clone()));
    let (split, perm) = if cx.text("mode", "DCR")? == "CRD" {
        (vec![n.clone(), out.clone(), d.clone(), d.clone(), h.clone(), w.clone()], [0, 1, 4, 2, 5, 3])
    } else {
        (vec![n.clone(), d.clone(), d.clone(), out.clone(), h.clone(), w.clone()], [0, 3, 4, 1, 5, 2])
    };
    let x = cx.reshape(x, split)?;
    let x = cx.transpose(x, &perm)?;
    Ok(vec![cx.reshape(x, vec![n, out, h * d.clone(), w * d])?])
}

pub(crate) fn space_to_depth(cx: &mut Cx) -> Res<Vec<Val>> {
    let (x, s) = (cx.arg(0)?, cx.int("blocksize", 1)?);
    let [n, c, h, w] = image(cx, x, s)?;
    let d = Dim::from(s);
    let (h, w) = (h.div(&d), w.div(&d));
    let x = cx.reshape(x, vec![n.clone(), c.clone(), h.clone(), d.clone(), w.clone(), d.clone()])?;
    let perm = if cx.text("mode", "DCR")? == "CRD" { [0, 1, 3, 5, 2, 4] } else { [0, 3, 5, 1, 2, 4] };
    let x = cx.transpose(x, &perm)?;
    Ok(vec![cx.reshape(x, vec![n, c * d.clone() * d, h, w])?])
}

fn image(cx: &Cx, x: Val, block: i64) -> Res<[Dim; 4]> {
    match <[Dim; 4]>::try_from(cx.shape(x)) {
        Ok(shape) if (1..=1 << 16).contains(&block) => Ok(shape),
        _ => invalid(format!("blocks of {block} in {}", cx.ty(x))),
    }
}
