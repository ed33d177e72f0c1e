//! What a region means: the reference every kernel is checked against.
//!
//! Points are visited one by one and expressions evaluated by [`ScalarFn::eval`], each rounded to its dtype.
//! Sums and contractions accumulate in f64 (floats) or wrap (integers) and are rounded once to the stage's
//! or accumulator's dtype.
use crate::{
    Binding, DType, Dim, Op, Scalar, Tensor, TensorType,
    attr::{Layout, PoolFn, ReduceFn},
    dim::{Atom, Env},
    op::{EvalArgs, TypeArgs},
    region::{Expr, ExprId, Heart, Region, StageFn, Window},
    tensor,
    winograd::Transforms,
};

/// Evaluate `region` on `args`, symbols being bound by `binding`. Elements that no point writes are taken
/// from `outputs` where given (a region may write part of a tensor), else they are zero.
pub fn eval_region(region: &Region, args: &[Tensor], binding: &Binding, outputs: Option<&[Tensor]>) -> Result<Vec<Tensor>, String> {
    let extents = |dims: &[Dim]| -> Result<Vec<usize>, String> {
        dims.iter().map(|d| d.eval(binding).and_then(|v| usize::try_from(v).ok()).ok_or_else(|| format!("size {d} has no value"))).collect()
    };
    for (i, (t, ty)) in args.iter().zip(&region.args).enumerate() {
        if t.dtype() != ty.dtype || t.shape() != extents(&ty.shape)? {
            return Err(format!("argument {i} is {}, the region reads {ty}", t.ty()));
        }
    }
    let mut results = vec![];
    for (i, out) in region.outputs.iter().enumerate() {
        let shape = extents(&out.ty.shape)?;
        results.push(match outputs {
            Some(have) => (have[i].bytes().to_vec(), shape),
            None => (vec![0u8; out.ty.dtype.bytes(shape.iter().product())], shape),
        });
    }
    let run = Run { region, args, binding };
    if let Heart::Op(op) = &region.heart {
        let made = run.op(op)?;
        if !region.writes_anywhere() {
            return Ok(made);
        }
        for ((out, (bytes, shape)), t) in region.outputs.iter().zip(&mut results).zip(&made) {
            let mut next = 0;
            for_each_point(t.shape(), &mut |point| {
                let at = run.index(&out.index, point, &vec![])?;
                let at = flat(&at, shape).ok_or_else(|| format!("output index {at:?} outside {shape:?}"))?;
                tensor::write(bytes, out.ty.dtype, at, t.get(next));
                next += 1;
                Ok(())
            })?;
        }
        return finish(region, results);
    }
    let space = extents(&region.space)?;
    let reduced = match &region.heart {
        Heart::Reduce { axes, .. } => extents(axes)?,
        _ => vec![],
    };
    for_each_point(&space, &mut |point| {
        let accs = run.heart(point, &reduced)?;
        let rows: &[usize] = if reduced.is_empty() { &[] } else { &reduced };
        for (out, (bytes, shape)) in region.outputs.iter().zip(&mut results) {
            for_each_point(rows, &mut |row| {
                let full: Vec<usize> = point.iter().chain(row).copied().collect();
                let at = run.index(&out.index, &full, &accs)?;
                let at = flat(&at, shape).ok_or_else(|| format!("output index {at:?} outside {shape:?}"))?;
                tensor::write(bytes, out.ty.dtype, at, run.expr(out.expr, &full, &accs)?);
                Ok(())
            })?;
        }
        Ok(())
    })?;
    finish(region, results)
}

fn finish(region: &Region, results: Vec<(Vec<u8>, Vec<usize>)>) -> Result<Vec<Tensor>, String> {
    results.into_iter().zip(&region.outputs).map(|((bytes, shape), out)| Tensor::new(out.ty.dtype, shape, bytes).map_err(|e| e.to_string())).collect()
}

struct Run<'a> {
    region: &'a Region,
    args: &'a [Tensor],
    binding: &'a Binding,
}

type Accs = Vec<Scalar>;

impl Run<'_> {
    fn extents(&self, dims: &[Dim]) -> Result<Vec<usize>, String> {
        dims.iter().map(|d| d.eval(self.binding).and_then(|v| usize::try_from(v).ok()).ok_or_else(|| format!("size {d} has no value"))).collect()
    }

    fn op(&self, op: &Op) -> Result<Vec<Tensor>, String> {
        let op = op.bind(self.binding);
        let types: Vec<TensorType> = self.args.iter().map(Tensor::ty).collect();
        let types: Vec<&TensorType> = types.iter().collect();
        let results = op.infer(TypeArgs { types: &types, bodies: &[] }).map_err(|e| e.to_string())?;
        let results: Vec<_> = results.iter().map(|t| t.bind(self.binding)).collect();
        let tensors: Vec<&Tensor> = self.args.iter().collect();
        op.eval(EvalArgs { tensors: &tensors, bodies: &[], results: &results }).map_err(|e| e.to_string())
    }

    /// Values of the heart's accumulators at a point of the parallel space.
    fn heart(&self, point: &[usize], reduced: &[usize]) -> Result<Accs, String> {
        match &self.region.heart {
            Heart::Map | Heart::Op(_) => Ok(vec![]),
            Heart::Reduce { stages, .. } => {
                let mut accs: Accs = vec![];
                for stage in stages {
                    let dtype = self.region.dtype(stage.expr);
                    let mut fold = Fold::new(stage.f, dtype);
                    for_each_point(reduced, &mut |row| {
                        let full: Vec<usize> = point.iter().chain(row).copied().collect();
                        fold.push(self.expr(stage.expr, &full, &accs)?, row.first().copied().unwrap_or(0));
                        Ok(())
                    })?;
                    accs.push(fold.finish());
                }
                Ok(accs)
            }
            Heart::Contract { k, lhs, rhs, acc } => {
                let k = self.extents(std::slice::from_ref(k))?[0];
                let mut sum = Dot::new(*acc);
                let mut full = point.to_vec();
                full.push(0);
                for i in 0..k {
                    full[point.len()] = i;
                    sum.push(self.expr(*lhs, &full, &vec![])?, self.expr(*rhs, &full, &vec![])?);
                }
                Ok(vec![sum.finish()])
            }
            Heart::Conv { window, groups, x, input, w, weights, acc } => {
                let (input, weights) = (self.extents(input)?, self.extents(weights)?);
                let rank = input.len();
                let channel = channel_axis(window, rank);
                let out_channels = weights[0] / groups;
                let o = point[channel];
                let mut sum = Dot::new(*acc);
                for_each_point(&weights[2..], &mut |tap| {
                    let Some(mut at) = window_at(window, point, tap, &input) else { return Ok(()) };
                    for c in 0..weights[1] {
                        at[channel] = o / out_channels * weights[1] + c;
                        let tap_at: Vec<usize> = [o, c].into_iter().chain(tap.iter().copied()).collect();
                        sum.push(self.expr(*x, &at, &vec![])?, self.expr(*w, &tap_at, &vec![])?);
                    }
                    Ok(())
                })?;
                Ok(vec![sum.finish()])
            }
            Heart::Separable { window, x, input, w, weights, mid, point: filter, filters, acc } => {
                let (input, weights, filters) = (self.extents(input)?, self.extents(weights)?, self.extents(filters)?);
                let (last, mut product) = (point.len() - 1, Dot::new(*acc));
                for c in 0..filters[1] {
                    let mut here = point.to_vec();
                    here[last] = c;
                    let mut sum = Dot::new(*acc);
                    for_each_point(&weights[2..], &mut |tap| {
                        let Some(at) = window_at(window, &here, tap, &input) else { return Ok(()) };
                        let tap_at: Vec<usize> = [c, 0].into_iter().chain(tap.iter().copied()).collect();
                        sum.push(self.expr(*x, &at, &vec![])?, self.expr(*w, &tap_at, &vec![])?);
                        Ok(())
                    })?;
                    let accs = vec![Scalar::I(0).cast(*acc), sum.finish()];
                    let mut filter_at = vec![0; filters.len()];
                    (filter_at[0], filter_at[1]) = (point[last], c);
                    product.push(self.expr(*mid, &here, &accs)?, self.expr(*filter, &filter_at, &vec![])?);
                }
                Ok(vec![product.finish()])
            }
            Heart::Pool { f, kernel, window, x, input } => {
                let input = self.extents(input)?;
                let dtype = self.region.dtype(*x);
                let g = if *f == PoolFn::Max { ReduceFn::Max } else { ReduceFn::Sum };
                let mut fold = Fold::new(StageFn::Fold(g), dtype);
                let mut inside = 0usize;
                let mut padded = 0usize;
                let first = if window.layout == Layout::ChannelsFirst { 2 } else { 1 };
                for_each_point(kernel, &mut |tap| {
                    let reached = |i: usize| (point[first + i] * window.strides[i] + tap[i] * window.dilations[i]) as i64;
                    padded += usize::from((0..tap.len()).all(|i| reached(i) < input[first + i] as i64 + window.lo[i] + window.hi[i]));
                    if let Some(at) = window_at(window, point, tap, &input) {
                        fold.push(self.expr(*x, &at, &vec![])?, 0);
                        inside += 1;
                    }
                    Ok(())
                })?;
                let n = match f {
                    PoolFn::Max | PoolFn::Sum => return Ok(vec![fold.finish()]),
                    PoolFn::Mean => inside,
                    PoolFn::MeanPadded => padded,
                };
                Ok(vec![Scalar::F(fold.sum / n as f64).cast(dtype)])
            }
            Heart::WinogradOutput { m, x, .. } => {
                let t = Transforms::of(*m).ok_or_else(|| format!("there are no transforms for tiles of {m}"))?;
                let space = self.extents(&self.region.space)?;
                let [down, across] = [space[1], space[2]].map(|n| n.div_ceil(*m));
                let tile = (point[0] * down + point[1] / m) * across + point[2] / m;
                let (rows, columns) = (t.output[point[1] % m], t.output[point[2] % m]);
                let mut sum = 0.0;
                for (i, row) in rows.iter().enumerate() {
                    for (j, column) in columns.iter().enumerate() {
                        sum += row * column * self.expr(*x, &[i * t.side() + j, tile, point[3]], &vec![])?.f();
                    }
                }
                Ok(vec![Scalar::F(sum).cast(self.region.dtype(*x))])
            }
            Heart::Attention { q, k, v, mask, scale, keys, depth, part } => {
                let size = |d: &Dim| self.extents(std::slice::from_ref(d)).map(|n| n[0]);
                let (mut keys, depth) = (0..size(keys)?, size(depth)?);
                let (mut batch, s, d) = (&point[..point.len() - 2], point[point.len() - 2], point[point.len() - 1]);
                if let (Some(part), [outer @ .., p]) = (part, batch) {
                    let part = size(part)?;
                    (keys, batch) = (p * part..(p * part + part).min(keys.end), outer);
                }
                let at = |i: usize, j: usize| -> Vec<usize> { batch.iter().copied().chain([i, j]).collect() };
                let none = vec![];
                let mut scores = vec![];
                for t in keys.clone() {
                    let mut dot = 0.0;
                    for e in 0..depth {
                        dot += self.expr(*q, &at(s, e), &none)?.f() * self.expr(*k, &at(t, e), &none)?.f();
                    }
                    let add = mask.map_or(Ok(0.0), |m| self.expr(m, &at(s, t), &none).map(Scalar::f))?;
                    scores.push(dot * scale.get() + add);
                }
                let top = scores.iter().fold(f64::NEG_INFINITY, |top, x| if *x > top || x.is_nan() { *x } else { top });
                let total: f64 = scores.iter().map(|score| libm::exp(score - top)).sum();
                let dtype = if part.is_some() { crate::ops::attention::partial(self.region.dtype(*v)) } else { self.region.dtype(*v) };
                let hidden = part.is_some() && scores.iter().all(|score| *score == f64::NEG_INFINITY);
                let behind = if part.is_some() { size(&self.region.space[point.len() - 1])? - d } else { usize::MAX };
                if behind <= 2 {
                    return Ok(vec![
                        Scalar::F(if behind == 2 {
                            top
                        } else if hidden {
                            0.0
                        } else {
                            total
                        })
                        .cast(dtype),
                    ]);
                }
                let mut num = 0.0;
                for (t, score) in keys.zip(&scores).filter(|_| !hidden) {
                    num += libm::exp(score - top) * self.expr(*v, &at(t, d), &none)?.f();
                }
                Ok(vec![Scalar::F(if part.is_some() { num } else { num / total }).cast(dtype)])
            }
        }
    }

    fn index(&self, index: &[Dim], point: &[usize], accs: &Accs) -> Result<Vec<i64>, String> {
        index.iter().map(|d| self.dim(d, point, accs)).collect()
    }

    fn dim(&self, d: &Dim, point: &[usize], accs: &Accs) -> Result<i64, String> {
        // Values are evaluated first: `Dim::eval` itself cannot fail half-way.
        let value = |atom: &Atom| match atom {
            Atom::Axis(k) => point.get(*k as usize).map(|v| *v as i64),
            Atom::Value(v) => self.expr(ExprId(*v), point, accs).ok().map(|s| s.i() as i64),
            other => self.binding.value(other),
        };
        d.eval(&value).ok_or_else(|| format!("index {d} has no value at {point:?}"))
    }

    fn expr(&self, id: ExprId, point: &[usize], accs: &Accs) -> Result<Scalar, String> {
        let dtype = self.region.dtype(id);
        Ok(match self.region.expr(id) {
            Expr::Float(v) => Scalar::F(v.get()),
            Expr::Int(v) => if dtype == DType::Bool { Scalar::B(*v != 0) } else { Scalar::I(i128::from(*v)) }.cast(dtype),
            Expr::Index(d) => Scalar::I(i128::from(self.dim(d, point, accs)?)),
            Expr::Load { arg, index, guard } => {
                if let Some(g) = guard
                    && !self.expr(*g, point, accs)?.b()
                {
                    return Ok(Scalar::I(0).cast(dtype));
                }
                let t = &self.args[*arg as usize];
                let at = self.index(index, point, accs)?;
                let at = flat(&at, t.shape()).ok_or_else(|| format!("load of argument {arg} at {at:?} outside {:?}", t.shape()))?;
                t.get(at)
            }
            Expr::Acc(i) => accs.get(*i as usize).copied().ok_or_else(|| format!("acc{i} is not computed yet"))?,
            Expr::Call(f, operands) => {
                let values = operands.iter().map(|o| self.expr(*o, point, accs)).collect::<Result<Vec<_>, _>>()?;
                let of = self.region.dtype(*operands.last().ok_or("a call without operands")?);
                f.eval(of, &values)
            }
            Expr::Cast(x) => self.expr(*x, point, accs)?.cast(dtype),
            Expr::Bits(x) => crate::tensor::reinterpret(self.expr(*x, point, accs)?, self.region.dtype(*x), dtype),
        })
    }
}

/// Coordinates of a tap in the input, channel left as in `point`; `None` in the padding.
fn window_at(window: &Window, point: &[usize], tap: &[usize], input: &[usize]) -> Option<Vec<usize>> {
    let mut at = point.to_vec();
    let first = first_spatial(window);
    for (i, &t) in tap.iter().enumerate() {
        let pos = (point[first + i] * window.strides[i] + t * window.dilations[i]) as i64 - window.lo[i];
        at[first + i] = usize::try_from(pos).ok().filter(|p| *p < input[first + i])?;
    }
    Some(at)
}

fn first_spatial(window: &Window) -> usize {
    if window.layout == Layout::ChannelsFirst { 2 } else { 1 }
}

fn channel_axis(window: &Window, rank: usize) -> usize {
    if window.layout == Layout::ChannelsFirst { 1 } else { rank - 1 }
}

/// Sum of products: f64 for floats, wrapping for integers.
struct Dot {
    dtype: DType,
    float: f64,
    int: i128,
}

impl Dot {
    fn new(dtype: DType) -> Self {
        Self { dtype, float: 0.0, int: 0 }
    }
    fn push(&mut self, a: Scalar, b: Scalar) {
        if self.dtype.is_float() {
            self.float += a.f() * b.f();
        } else {
            self.int = self.int.wrapping_add(a.i().wrapping_mul(b.i()));
        }
    }
    fn finish(self) -> Scalar {
        if self.dtype.is_float() { Scalar::F(self.float) } else { Scalar::I(self.int) }.cast(self.dtype)
    }
}

struct Fold {
    f: StageFn,
    dtype: DType,
    best: Option<(Scalar, usize)>,
    sum: f64,
    int: i128,
}

impl Fold {
    fn new(f: StageFn, dtype: DType) -> Self {
        let one = matches!(f, StageFn::Fold(ReduceFn::Prod));
        Self { f, dtype, best: None, sum: f64::from(u8::from(one)), int: i128::from(one) }
    }

    fn push(&mut self, v: Scalar, at: usize) {
        match self.f {
            StageFn::Fold(ReduceFn::Sum) => {
                self.sum += v.f();
                self.int = self.int.wrapping_add(v.i());
            }
            StageFn::Fold(ReduceFn::Prod) => {
                self.sum *= v.f();
                self.int = crate::scalar::wrap_int(self.int.wrapping_mul(v.i()), self.dtype);
            }
            StageFn::Fold(f) | StageFn::Arg { f, .. } => {
                let last = matches!(self.f, StageFn::Arg { last: true, .. });
                let better = match self.best {
                    None => true,
                    Some((b, _)) => {
                        let o = order(v, b);
                        let o = if f == ReduceFn::Min && !nan(v) && !nan(b) { o.reverse() } else { o };
                        o.is_gt() || (last && o.is_eq())
                    }
                };
                if better {
                    self.best = Some((v, at));
                }
            }
        }
    }

    fn finish(self) -> Scalar {
        match self.f {
            StageFn::Fold(ReduceFn::Sum | ReduceFn::Prod) => if self.dtype.is_float() { Scalar::F(self.sum) } else { Scalar::I(self.int) }.cast(self.dtype),
            StageFn::Fold(f) => self.best.map_or_else(|| neutral(f, self.dtype), |(v, _)| v),
            StageFn::Arg { .. } => Scalar::I(self.best.map_or(0, |(_, at)| at as i128)),
        }
    }
}

/// The result of an empty reduction.
pub fn neutral(f: ReduceFn, dtype: DType) -> Scalar {
    let (lo, hi) = dtype.int_range();
    match (f, dtype.is_float()) {
        (ReduceFn::Sum, true) => Scalar::F(0.0),
        (ReduceFn::Prod, true) => Scalar::F(1.0),
        (ReduceFn::Max, true) => Scalar::F(f64::NEG_INFINITY),
        (ReduceFn::Min, true) => Scalar::F(f64::INFINITY),
        (ReduceFn::Sum, false) => Scalar::I(0).cast(dtype),
        (ReduceFn::Prod, false) => Scalar::I(1).cast(dtype),
        (ReduceFn::Max, false) => Scalar::I(lo).cast(dtype),
        (ReduceFn::Min, false) => Scalar::I(hi).cast(dtype),
    }
}

fn nan(v: Scalar) -> bool {
    matches!(v, Scalar::F(x) if x.is_nan())
}

/// Numeric order; NaN is beyond everything, and equal to itself.
fn order(a: Scalar, b: Scalar) -> std::cmp::Ordering {
    match (nan(a), nan(b)) {
        (true, true) => std::cmp::Ordering::Equal,
        (true, false) => std::cmp::Ordering::Greater,
        (false, true) => std::cmp::Ordering::Less,
        _ => match (a, b) {
            (Scalar::F(x), Scalar::F(y)) => x.partial_cmp(&y).unwrap_or(std::cmp::Ordering::Equal),
            _ => a.i().cmp(&b.i()),
        },
    }
}

fn flat(at: &[i64], shape: &[usize]) -> Option<usize> {
    let mut index = 0;
    for (&i, &n) in at.iter().zip(shape) {
        let i = usize::try_from(i).ok().filter(|i| *i < n)?;
        index = index * n + i;
    }
    (at.len() == shape.len()).then_some(index)
}

/// Visit every point of a box in row-major order; a box without axes has one point.
pub fn for_each_point(extents: &[usize], visit: &mut dyn FnMut(&[usize]) -> Result<(), String>) -> Result<(), String> {
    if extents.contains(&0) {
        return Ok(());
    }
    let mut point = vec![0; extents.len()];
    loop {
        visit(&point)?;
        let mut axis = extents.len();
        loop {
            if axis == 0 {
                return Ok(());
            }
            axis -= 1;
            point[axis] += 1;
            if point[axis] < extents[axis] {
                break;
            }
            point[axis] = 0;
        }
    }
}
