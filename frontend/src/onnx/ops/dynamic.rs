//! Axes, bounds and shapes that data decides: the rank is known, which axes or how much of them is not.
//!
//! What depends on data is computed as small integer tensors, and extents become symbols by `bind_size`. Axes are one-hot
//! rows ([`Axes`]); elements are found by their linear position. Operands that break the operator's specification make an
//! extent -1, which a symbol refuses when run.
use crate::onnx::build::{Builder, Res, Val, invalid, missing};
use pavage_ir::{DType, Dim, Op, ScalarFn, attr::PadMode, attr::ReduceFn};

/// A vector of axes of a value of `rank` axes.
pub(crate) struct Axes {
    rank: usize,
    count: usize,
    /// `[rank, count]`: 1 where entry `j` names axis `a`.
    hit: Val,
    /// `[rank]`: 1 where some entry names axis `a`.
    pub(crate) mask: Val,
    /// Whether every entry names an axis, each another.
    pub(crate) valid: Val,
}

/// Entries of a vector whose length is known, at most 64.
pub(crate) fn length(b: &Builder, v: Val, what: &str) -> Res<usize> {
    let shape = b.shape(v);
    let n = match shape.as_slice() {
        [] => Some(1),
        [n] => n.as_const(),
        _ => return invalid(format!("{what} of type {}", b.ty(v))),
    };
    match n {
        Some(n @ 0..=64) => Ok(n as usize),
        _ => missing(format!("{what} of unknown count")),
    }
}

/// A scalar or vector of integers as an i64 vector.
pub(crate) fn vector(b: &mut Builder, v: Val) -> Res<Val> {
    let v = b.cast(v, DType::I64)?;
    let n = b.ty(v).count();
    b.reshape(v, vec![n])
}

/// Sizes as an i64 vector.
pub(crate) fn sizes(b: &mut Builder, sizes: &[Dim]) -> Val {
    b.known_dims(DType::I64, &[sizes.len()], sizes.to_vec())
}

fn iota(b: &mut Builder, shape: &[usize], axis: usize) -> Res<Val> {
    b.emit(Op::Iota { dtype: DType::I64, shape: shape.iter().map(|n| Dim::from(*n)).collect(), axis }, &[])
}

/// 0 to `n - 1`.
pub(crate) fn count_to(b: &mut Builder, n: &Dim) -> Res<Val> {
    b.emit(Op::Iota { dtype: DType::I64, shape: vec![n.clone()], axis: 0 }, &[])
}

/// Combine along one axis, which goes.
pub(crate) fn combine(b: &mut Builder, f: ReduceFn, v: Val, axis: usize) -> Res<Val> {
    let out = super::reduce::reduce(b, f, v, &[axis])?;
    super::reduce::drop_axes(b, out, &[axis])
}

/// `yes` where a condition holds, else `no`; all three broadcast.
pub(crate) fn choose(b: &mut Builder, cond: Val, yes: Val, no: Val) -> Res<Val> {
    b.pointwise(ScalarFn::Select, &[cond, yes, no])
}

/// Brings integers into `least..=most`.
fn clamp(b: &mut Builder, v: Val, least: Val, most: Val) -> Res<Val> {
    let v = b.pointwise(ScalarFn::Max, &[v, least])?;
    b.pointwise(ScalarFn::Min, &[v, most])
}

/// The elements of a vector as sizes; all are refused when run where `valid` does not hold.
pub(crate) fn bind(b: &mut Builder, v: Val, valid: Val, name: &str) -> Res<Vec<Dim>> {
    let wrong = b.scalar(DType::I64, -1.0);
    let v = choose(b, valid, v, wrong)?;
    b.sizes(v, name)
}

/// A scalar as a size, refused when run where `valid` does not hold.
pub(crate) fn bind_one(b: &mut Builder, v: Val, valid: Val, name: &str) -> Res<Dim> {
    let wrong = b.scalar(DType::I64, -1.0);
    let v = choose(b, valid, v, wrong)?;
    b.size(v, name)
}

impl Axes {
    /// Axes of a value of `rank` axes, negative ones counted from the end.
    pub(crate) fn new(b: &mut Builder, axes: Val, rank: usize) -> Res<Axes> {
        let count = length(b, axes, "axes")?;
        if count > rank {
            return invalid(format!("{count} axes of a value with {rank} axes"));
        }
        let axes = vector(b, axes)?;
        let wrapped = b.with_number(ScalarFn::Add, axes, rank as f64)?;
        let negative = b.with_number(ScalarFn::Lt, axes, 0.0)?;
        let axes = choose(b, negative, wrapped, axes)?;
        let axes = b.as_row(axes)?;
        let rows = iota(b, &[rank, count], 0)?;
        let hit = b.pointwise(ScalarFn::Eq, &[rows, axes])?;
        let hit = b.cast(hit, DType::I64)?;
        let mask = combine(b, ReduceFn::Sum, hit, 1)?;
        let total = combine(b, ReduceFn::Sum, mask, 0)?;
        let most = combine(b, ReduceFn::Max, mask, 0)?;
        let all = b.with_number(ScalarFn::Eq, total, count as f64)?;
        let once = b.with_number(ScalarFn::Le, most, 1.0)?;
        let valid = b.map(ScalarFn::And, &[all, once])?;
        Ok(Axes { rank, count, hit, mask, valid })
    }

    /// Entry by entry values as axis by axis values, `others` (a vector or scalar) where no entry names the axis.
    pub(crate) fn spread(&self, b: &mut Builder, values: Val, others: Val) -> Res<Val> {
        if length(b, values, "values")? != self.count {
            return invalid(format!("{} entries for {} axes", b.ty(values), self.count));
        }
        let row = b.as_row(values)?;
        let at = b.pointwise(ScalarFn::Mul, &[self.hit, row])?;
        let at = combine(b, ReduceFn::Sum, at, 1)?;
        let named = b.with_number(ScalarFn::Gt, self.mask, 0.0)?;
        choose(b, named, at, others)
    }

    /// `values[axis]` for the only entry.
    fn pick(&self, b: &mut Builder, values: &[Dim]) -> Res<Val> {
        let values = sizes(b, values);
        let at = b.pointwise(ScalarFn::Mul, &[values, self.mask])?;
        combine(b, ReduceFn::Sum, at, 0)
    }

    /// The value under extents `[before, along, after]` around the only axis named.
    pub(crate) fn around(&self, b: &mut Builder, x: Val, name: &str) -> Res<Val> {
        let shape = b.shape(x);
        let before: Vec<Dim> = (0..self.rank).map(|a| shape[..a].iter().cloned().product()).collect();
        let after: Vec<Dim> = (0..self.rank).map(|a| shape[a + 1..].iter().cloned().product()).collect();
        let mut three = vec![];
        for values in [before, shape, after] {
            let v = self.pick(b, &values)?;
            three.push(bind_one(b, v, self.valid, name)?);
        }
        b.reshape(x, three)
    }

    /// `x` with every axis in two: one for those not named, then one for the named; the other of the two has extent 1.
    /// First come all axes not named, in order.
    fn apart(&self, b: &mut Builder, x: Val, name: &str) -> Res<Val> {
        let shape = b.shape(x);
        let (extents, one) = (sizes(b, &shape), b.scalar(DType::I64, 1.0));
        let named = b.with_number(ScalarFn::Gt, self.mask, 0.0)?;
        let kept = choose(b, named, one, extents)?;
        let gone = choose(b, named, extents, one)?;
        let mut grid = vec![];
        for part in [kept, gone] {
            for (a, n) in bind(b, part, self.valid, name)?.into_iter().enumerate() {
                let stride: Dim = shape[a + 1..].iter().cloned().product();
                grid.push((count_to(b, &n)?, stride));
            }
        }
        gather_grid(b, x, &grid)
    }

    /// Positions among the axes not named: `[rank]`, of use where an axis is not named.
    fn places(&self, b: &mut Builder) -> Res<Val> {
        let free = self.free(b)?;
        b.emit(Op::Cumulative { f: ReduceFn::Sum, axis: 0, exclusive: true, reverse: false }, &[free])
    }

    /// `[rank]`: 1 where no entry names axis `a`.
    fn free(&self, b: &mut Builder) -> Res<Val> {
        let one = b.scalar(DType::I64, 1.0);
        b.pointwise(ScalarFn::Sub, &[one, self.mask])
    }

    /// The extents of the axes not named, in order.
    fn kept(&self, b: &mut Builder, shape: &[Dim], valid: Val, name: &str) -> Res<Vec<Dim>> {
        let n = self.rank - self.count;
        // Extent `j` is that of one of the axes `j..=j + count`.
        if (0..n).all(|j| shape[j..=j + self.count].iter().all(|d| *d == shape[j])) {
            return Ok(shape[..n].to_vec());
        }
        let (free, places) = (self.free(b)?, self.places(b)?);
        let (free, places) = (b.as_row(free)?, b.as_row(places)?);
        let rows = iota(b, &[n, self.rank], 0)?;
        let here = b.pointwise(ScalarFn::Eq, &[rows, places])?;
        let here = b.cast(here, DType::I64)?;
        let extents = sizes(b, shape);
        let extents = b.as_row(extents)?;
        let free = b.pointwise(ScalarFn::Mul, &[free, extents])?;
        let here = b.pointwise(ScalarFn::Mul, &[here, free])?;
        let extents = combine(b, ReduceFn::Sum, here, 1)?;
        bind(b, extents, valid, name)
    }
}

/// The elements of `x` on a grid: along each axis of the result positions (a vector) and what one of them is worth in
/// elements of `x`.
fn gather_grid(b: &mut Builder, x: Val, grid: &[(Val, Dim)]) -> Res<Val> {
    let at = linear(b, grid)?;
    let n = b.ty(x).count();
    let flat = b.reshape(x, vec![n])?;
    b.emit(Op::Gather { axis: 0 }, &[flat, at])
}

/// Row-major positions of a grid's elements.
fn linear(b: &mut Builder, grid: &[(Val, Dim)]) -> Res<Val> {
    let rank = grid.len();
    let mut linear: Option<Val> = None;
    for (axis, (at, stride)) in grid.iter().enumerate() {
        let stride = b.known_dims(DType::I64, &[], vec![stride.clone()]);
        let at = b.pointwise(ScalarFn::Mul, &[*at, stride])?;
        let mut shape = vec![Dim::one(); rank];
        shape[axis] = b.ty(at).count();
        let at = b.reshape(at, shape)?;
        linear = Some(match linear {
            Some(sum) => b.pointwise(ScalarFn::Add, &[sum, at])?,
            None => at,
        });
    }
    Ok(linear.unwrap_or_else(|| b.scalar(DType::I64, 0.0)))
}

/// A reduction along known axes.
type Along<'a> = dyn Fn(&mut Builder, Val, &[usize]) -> Res<Val> + 'a;

/// A reduction along axes that data decides; `apply` reduces along known ones.
pub(crate) fn reduce(b: &mut Builder, x: Val, axes: Val, keep: bool, name: &str, apply: &Along) -> Res<Val> {
    let shape = b.shape(x);
    let rank = shape.len();
    let axes = Axes::new(b, axes, rank)?;
    let out = if axes.count == rank {
        let all: Vec<usize> = (0..rank).collect();
        apply(b, x, &all)?
    } else if axes.count == 1 {
        let x = axes.around(b, x, name)?;
        apply(b, x, &[1])?
    } else {
        let x = axes.apart(b, x, name)?;
        let named: Vec<usize> = (rank..2 * rank).collect();
        apply(b, x, &named)?
    };
    let target = if axes.count == rank {
        vec![Dim::one(); if keep { rank } else { 0 }]
    } else if keep {
        let (extents, one) = (sizes(b, &shape), b.scalar(DType::I64, 1.0));
        let named = b.with_number(ScalarFn::Gt, axes.mask, 0.0)?;
        let left = choose(b, named, one, extents)?;
        bind(b, left, axes.valid, name)?
    } else {
        axes.kept(b, &shape, axes.valid, name)?
    };
    b.reshape(out, target)
}

/// A running sum or product along an axis that data decides.
pub(crate) fn cumulative(b: &mut Builder, x: Val, axis: Val, name: &str, op: &dyn Fn(usize) -> Op) -> Res<Val> {
    let shape = b.shape(x);
    let axes = Axes::new(b, axis, shape.len())?;
    if axes.count != 1 {
        return invalid("the axis operand is one integer");
    }
    let x = if shape.len() == 1 { x } else { axes.around(b, x, name)? };
    let out = b.emit(op(usize::from(shape.len() > 1)), &[x])?;
    b.reshape(out, shape)
}

/// `x` without the axes named, which must have extent 1.
pub(crate) fn squeeze(b: &mut Builder, x: Val, axes: Val, name: &str) -> Res<Val> {
    let shape = b.shape(x);
    let axes = Axes::new(b, axes, shape.len())?;
    let extents = sizes(b, &shape);
    let gone = b.pointwise(ScalarFn::Mul, &[extents, axes.mask])?;
    let kept = axes.free(b)?;
    let ones = b.pointwise(ScalarFn::Add, &[gone, kept])?;
    let is = b.with_number(ScalarFn::Eq, ones, 1.0)?;
    let is = b.cast(is, DType::I64)?;
    let all = combine(b, ReduceFn::Min, is, 0)?;
    let all = b.cast(all, DType::Bool)?;
    let valid = b.map(ScalarFn::And, &[axes.valid, all])?;
    let target = axes.kept(b, &shape, valid, name)?;
    b.reshape(x, target)
}

/// `x` with axes of extent 1 where the result has the axes named.
pub(crate) fn unsqueeze(b: &mut Builder, x: Val, axes: Val, name: &str) -> Res<Val> {
    let shape = b.shape(x);
    let rank = shape.len() + length(b, axes, "axes")?;
    let axes = Axes::new(b, axes, rank)?;
    if shape.is_empty() {
        return b.reshape(x, vec![Dim::one(); rank]);
    }
    let places = axes.places(b)?;
    // Past the last axis there is none to look up; such a place is that of a named axis.
    let last = b.scalar(DType::I64, shape.len() as f64 - 1.0);
    let places = b.pointwise(ScalarFn::Min, &[places, last])?;
    let extents = sizes(b, &shape);
    let extents = b.emit(Op::Gather { axis: 0 }, &[extents, places])?;
    let one = b.scalar(DType::I64, 1.0);
    let named = b.with_number(ScalarFn::Gt, axes.mask, 0.0)?;
    let extents = choose(b, named, one, extents)?;
    let target = bind(b, extents, axes.valid, name)?;
    b.reshape(x, target)
}

/// `x` under a shape that data decides: 0 copies an extent unless `keep_zero`, -1 takes what is left.
pub(crate) fn reshape(b: &mut Builder, x: Val, target: Val, keep_zero: bool, name: &str) -> Res<Val> {
    let from = b.shape(x);
    let n = length(b, target, "target extents")?;
    let mut target = vector(b, target)?;
    if !keep_zero {
        // An extent that the input does not have cannot be copied.
        let own: Vec<Dim> = (0..n).map(|i| from.get(i).cloned().unwrap_or(Dim::from(-2i64))).collect();
        let own = sizes(b, &own);
        let copies = b.with_number(ScalarFn::Eq, target, 0.0)?;
        target = choose(b, copies, own, target)?;
    }
    let one = b.scalar(DType::I64, 1.0);
    let total = b.known_dims(DType::I64, &[], vec![from.into_iter().product()]);
    let hole = b.with_number(ScalarFn::Eq, target, -1.0)?;
    let known = choose(b, hole, one, target)?;
    let known = combine(b, ReduceFn::Prod, known, 0)?;
    let holes = b.cast(hole, DType::I64)?;
    let holes = combine(b, ReduceFn::Sum, holes, 0)?;
    let safe = b.pointwise(ScalarFn::Max, &[known, one])?;
    let rest = b.map(ScalarFn::Div, &[total, safe])?;
    let shape = choose(b, hole, rest, target)?;
    let count = combine(b, ReduceFn::Prod, shape, 0)?;
    let least = combine(b, ReduceFn::Min, shape, 0)?;
    let mut valid = b.map(ScalarFn::Eq, &[count, total])?;
    let lone = b.with_number(ScalarFn::Le, holes, 1.0)?;
    let positive = b.with_number(ScalarFn::Ge, least, 0.0)?;
    // Beside an extent of 0 none can be inferred.
    let nonzero = b.with_number(ScalarFn::Gt, known, 0.0)?;
    let given = b.with_number(ScalarFn::Eq, holes, 0.0)?;
    let decided = b.map(ScalarFn::Or, &[nonzero, given])?;
    for condition in [lone, positive, decided] {
        valid = b.map(ScalarFn::And, &[valid, condition])?;
    }
    let shape = bind(b, shape, valid, name)?;
    b.reshape(x, shape)
}

/// Bounds further out than any tensor reaches.
const FAR: f64 = (1i64 << 40) as f64;

/// `x[starts:ends:steps]` along axes, all of them vectors; no axes: the first ones.
pub(crate) fn slice(b: &mut Builder, x: Val, [starts, ends]: [Val; 2], axes: Option<Val>, steps: Option<Val>, name: &str) -> Res<Val> {
    let shape = b.shape(x);
    let count = length(b, starts, "slice bounds")?;
    let axes = match axes {
        Some(axes) => axes,
        None => b.ints(&(0..count as i64).collect::<Vec<_>>()),
    };
    let axes = Axes::new(b, axes, shape.len())?;
    let (zero, one) = (b.scalar(DType::I64, 0.0), b.scalar(DType::I64, 1.0));
    let (far, near) = (b.scalar(DType::I64, FAR), b.scalar(DType::I64, -FAR));
    let n = sizes(b, &shape);
    let mut vectors = vec![];
    for (values, others) in [(Some(starts), zero), (Some(ends), n), (steps, one)] {
        vectors.push(match values {
            Some(v) => {
                let v = vector(b, v)?;
                let v = clamp(b, v, near, far)?;
                axes.spread(b, v, others)?
            }
            None => b.broadcast_to(one, &[Dim::from(shape.len())])?,
        });
    }
    let [start, end, step] = [vectors[0], vectors[1], vectors[2]];
    let backwards = b.with_number(ScalarFn::Lt, step, 0.0)?;
    let last = b.with_number(ScalarFn::Sub, n, 1.0)?;
    let most = choose(b, backwards, last, n)?;
    let least = b.scalar(DType::I64, -1.0);
    let least = choose(b, backwards, least, zero)?;
    let inside = |b: &mut Builder, v: Val, least: Val| -> Res<Val> {
        let negative = b.with_number(ScalarFn::Lt, v, 0.0)?;
        let wrapped = b.map(ScalarFn::Add, &[v, n])?;
        let v = choose(b, negative, wrapped, v)?;
        clamp(b, v, least, most)
    };
    let (start, end) = (inside(b, start, zero)?, inside(b, end, least)?);
    let forth = b.map(ScalarFn::Sub, &[end, start])?;
    let back = b.map(ScalarFn::Sub, &[start, end])?;
    let distance = choose(b, backwards, back, forth)?;
    let stride = b.map(ScalarFn::Abs, &[step])?;
    let whole = b.pointwise(ScalarFn::Max, &[stride, one])?;
    let counted = b.map(ScalarFn::Add, &[distance, whole])?;
    let counted = b.with_number(ScalarFn::Sub, counted, 1.0)?;
    let counted = b.pointwise(ScalarFn::Max, &[counted, zero])?;
    let counts = b.map(ScalarFn::Div, &[counted, whole])?;
    let least_step = combine(b, ReduceFn::Min, stride, 0)?;
    let moves = b.with_number(ScalarFn::Gt, least_step, 0.0)?;
    let valid = b.map(ScalarFn::And, &[axes.valid, moves])?;
    let counts = bind(b, counts, valid, name)?;
    let mut grid = vec![];
    for (axis, count) in counts.iter().enumerate() {
        let (first, step) = (element(b, start, axis)?, element(b, step, axis)?);
        let at = count_to(b, count)?;
        let at = b.pointwise(ScalarFn::Mul, &[at, step])?;
        let at = b.pointwise(ScalarFn::Add, &[at, first])?;
        grid.push((at, shape[axis + 1..].iter().cloned().product()));
    }
    gather_grid(b, x, &grid)
}

/// Element `i` of a vector as a scalar.
pub(crate) fn element(b: &mut Builder, v: Val, i: usize) -> Res<Val> {
    let one = b.slice_axis(v, 0, Dim::from(i), Dim::one())?;
    b.reshape(one, vec![])
}

/// `x` broadcast with a shape that data decides.
pub(crate) fn expand(b: &mut Builder, x: Val, target: Val, name: &str) -> Res<Val> {
    let n = length(b, target, "target extents")?;
    let mut own = b.shape(x);
    let rank = n.max(own.len());
    own.splice(0..0, vec![Dim::one(); rank - own.len()]);
    let mut x = b.reshape(x, own.clone())?;
    let target = vector(b, target)?;
    let mut out = own.clone();
    for axis in rank - n..rank {
        if own[axis].as_const().is_some_and(|n| n != 1) {
            continue;
        }
        let (t, extent) = (element(b, target, axis + n - rank)?, own[axis].clone());
        let have = b.known_dims(DType::I64, &[], vec![extent.clone()]);
        let one = b.with_number(ScalarFn::Eq, t, 1.0)?;
        let same = b.map(ScalarFn::Eq, &[t, have])?;
        let fits = b.map(ScalarFn::Or, &[one, same])?;
        let single = b.with_number(ScalarFn::Eq, have, 1.0)?;
        let fits = b.map(ScalarFn::Or, &[fits, single])?;
        let wide = choose(b, single, t, have)?;
        out[axis] = bind_one(b, wide, fits, &format!("{name}_{axis}"))?;
        if !extent.is(1) {
            // Only now it is known whether this axis is repeated.
            let at = count_to(b, &out[axis])?;
            let zero = b.scalar(DType::I64, 0.0);
            let at = choose(b, single, zero, at)?;
            x = b.emit(Op::Gather { axis }, &[x, at])?;
        }
    }
    b.broadcast_to(x, &out)
}

/// What padding adds, and how.
pub(crate) struct Padding {
    /// Elements before and after, vectors in the order of `axes`; negative amounts cut.
    pub(crate) amounts: [Val; 2],
    /// The axes that change.
    pub(crate) axes: Vec<usize>,
    /// Whether the amounts mean anything.
    pub(crate) valid: Val,
    pub(crate) mode: PadMode,
    /// A scalar, for [`PadMode::Constant`].
    pub(crate) value: Val,
}

/// `x` with more or fewer elements around some axes.
pub(crate) fn pad(b: &mut Builder, x: Val, padding: &Padding, name: &str) -> Res<Val> {
    let shape = b.shape(x);
    let [lo, hi] = padding.amounts;
    let own: Vec<Dim> = padding.axes.iter().map(|a| shape[*a].clone()).collect();
    let own = sizes(b, &own);
    let wide = b.map(ScalarFn::Add, &[lo, hi])?;
    let wide = b.map(ScalarFn::Add, &[wide, own])?;
    let extents = bind(b, wide, padding.valid, name)?;
    let (zero, one) = (b.scalar(DType::I64, 0.0), b.scalar(DType::I64, 1.0));
    let mut grid = vec![];
    let mut inside = vec![];
    for (axis, n) in shape.iter().enumerate() {
        let stride: Dim = shape[axis + 1..].iter().cloned().product();
        let Some(i) = padding.axes.iter().position(|a| *a == axis) else {
            grid.push((count_to(b, n)?, stride));
            continue;
        };
        let (at, first) = (count_to(b, &extents[i])?, element(b, lo, i)?);
        let mut at = b.pointwise(ScalarFn::Sub, &[at, first])?;
        let n = b.known_dims(DType::I64, &[], vec![n.clone()]);
        let last = b.map(ScalarFn::Sub, &[n, one])?;
        match padding.mode {
            PadMode::Constant => {
                let above = b.with_number(ScalarFn::Ge, at, 0.0)?;
                let below = b.pointwise(ScalarFn::Lt, &[at, n])?;
                inside.push((axis, b.map(ScalarFn::And, &[above, below])?));
            }
            PadMode::Wrap => at = b.pointwise(ScalarFn::Mod, &[at, n])?,
            PadMode::Reflect => {
                let period = b.map(ScalarFn::Add, &[last, last])?;
                let period = b.map(ScalarFn::Max, &[period, one])?;
                at = b.pointwise(ScalarFn::Mod, &[at, period])?;
                let mirrored = b.pointwise(ScalarFn::Sub, &[period, at])?;
                at = b.map(ScalarFn::Min, &[at, mirrored])?;
            }
            PadMode::Edge => at = clamp(b, at, zero, last)?,
        }
        grid.push((at, stride));
    }
    if padding.mode != PadMode::Constant {
        return gather_grid(b, x, &grid);
    }
    // The value stands behind the elements of `x`, and is read wherever an axis is outside.
    let count = b.ty(x).count();
    let flat = b.reshape(x, vec![count.clone()])?;
    let value = b.reshape(padding.value, vec![Dim::one()])?;
    let flat = b.emit(Op::Concat { axis: 0 }, &[flat, value])?;
    let mut at = linear(b, &grid)?;
    let rank = grid.len();
    let end = b.known_dims(DType::I64, &[], vec![count]);
    for (axis, holds) in inside {
        let mut along = vec![Dim::one(); rank];
        along[axis] = b.ty(holds).count();
        let holds = b.reshape(holds, along)?;
        at = choose(b, holds, at, end)?;
    }
    b.emit(Op::Gather { axis: 0 }, &[flat, at])
}
