//! What a region does, counted for the cost model: operations by how often they run, and how memory is walked.
use super::cost::{Costs, function};
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Region, TensorType, attr::Layout, dim::Atom, region::Window};

/// How an address changes from one point to the next along an axis.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Same,
    Next,
    Stray,
}

/// Work around a heart.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Around {
    /// Simple operations of vector code.
    pub ops: f64,
    /// Simple operations done once for a row of the axis that vectors lie along.
    pub scalar_ops: f64,
    /// Elements read or written one at a time.
    pub strays: f64,
    /// Rows that end in a part of a vector.
    pub tails: f64,
    /// Reductions of one row that vectors lie along; vectors of rows otherwise.
    pub folds: f64,
}

/// A region, and what each of its expressions depends on.
pub(super) struct Counter<'r> {
    region: &'r Region,
    costs: &'r Costs,
    extents: Vec<f64>,
    /// Axes that an expression depends on, as bits.
    axes: Vec<u64>,
    /// Accumulators, as bits.
    accs: Vec<u64>,
}

impl<'r> Counter<'r> {
    pub(super) fn new(region: &'r Region, costs: &'r Costs) -> Self {
        let extents = region.axes().iter().map(|d| costs.size(d)).collect();
        let mut counter = Counter { region, costs, extents, axes: vec![], accs: vec![] };
        let whole = (1u64 << region.space.len().min(63)) - 1;
        for (expr, _) in &region.exprs {
            let (mut axes, mut accs) = (0, 0);
            let mut visit = |id: ExprId| {
                axes |= counter.axes[id.0 as usize];
                accs |= counter.accs[id.0 as usize];
            };
            let mut own = 0;
            match expr {
                Expr::Float(_) | Expr::Int(_) => {}
                Expr::Index(d) => own |= leaves(d, &mut visit),
                Expr::Load { index, guard, .. } => {
                    index.iter().for_each(|d| own |= leaves(d, &mut visit));
                    guard.iter().for_each(|g| visit(*g));
                }
                Expr::Acc(i) => {
                    own |= whole;
                    accs |= 1 << (i & 63);
                }
                Expr::Call(_, xs) => xs.iter().for_each(|x| visit(*x)),
                Expr::Cast(x) | Expr::Bits(x) => visit(*x),
            }
            counter.axes.push(axes | own);
            counter.accs.push(accs);
        }
        counter
    }

    /// Points of all axes, reduced ones too.
    pub(super) fn points(&self) -> f64 {
        self.extents.iter().product()
    }

    /// Everything but the heart's own arithmetic.
    pub(super) fn around(&self) -> Around {
        let outputs: Vec<ExprId> = self.region.outputs.iter().map(|o| o.expr).collect();
        match &self.region.heart {
            Heart::Map => self.map(&outputs),
            Heart::Reduce { .. } => self.reduce(&outputs),
            _ => {
                let mut around = Around::default();
                let inner = self.region.space.len().saturating_sub(1);
                // What depends on no axis is computed once.
                let times = |axes: u64| if axes == 0 { Times::Scalar(1.0) } else { Times::Vector(self.points()) };
                self.add_times(&outputs, &mut vec![false; self.region.exprs.len()], &times, inner, &mut around);
                around.strays += self.stores(inner) * self.points();
                around
            }
        }
    }

    /// An expression in vectors at so many points.
    pub(super) fn of(&self, expr: ExprId, points: f64) -> Around {
        let mut around = Around::default();
        let inner = self.region.space.len().saturating_sub(1);
        self.add_times(&[expr], &mut vec![false; self.region.exprs.len()], &|_| Times::Vector(points), inner, &mut around);
        around
    }

    fn map(&self, outputs: &[ExprId]) -> Around {
        let mut around = Around::default();
        let rank = self.extents.len();
        let Some(inner) = self.best(&mut (0..rank)) else { return self.scalar(outputs) };
        let n = self.extents[inner];
        let rows = self.points() / n.max(1.0);
        // Rows that all operands have alike are one row.
        let long = (0..rank).filter(|k| self.extents[*k] > 1.0).fold(0, |bits, k| bits | 1u64 << k);
        let repeats = self.region.exprs.iter().zip(&self.axes).any(|((e, _), axes)| matches!(e, Expr::Load { .. }) && axes & long != long && axes & long != 0);
        let lanes = self.costs.lanes.min(power_of_two(n));
        // A part of a vector takes as long as a whole one.
        let points = if repeats { rows * (n / lanes).ceil() * self.costs.lanes } else { self.points() };
        if repeats && n > lanes && n % lanes != 0.0 {
            around.tails = rows;
        }
        let times = |axes: u64| if axes >> inner & 1 == 1 { Times::Vector(points) } else { Times::Scalar(self.nested(axes, inner)) };
        self.add_times(outputs, &mut vec![false; self.region.exprs.len()], &times, inner, &mut around);
        around.strays += self.stores(inner) * self.points();
        around
    }

    /// One point at a time.
    fn scalar(&self, outputs: &[ExprId]) -> Around {
        let mut around = Around::default();
        self.add_times(outputs, &mut vec![false; self.region.exprs.len()], &|_| Times::Scalar(self.points()), 0, &mut around);
        around
    }

    fn reduce(&self, outputs: &[ExprId]) -> Around {
        let Heart::Reduce { stages, .. } = &self.region.heart else { return Around::default() };
        let mut around = Around::default();
        let (parallel, rank) = (self.region.space.len(), self.extents.len());
        let row = rank - 1;
        let across = self.best(&mut (0..parallel));
        let along = self.extents[row] >= 4.0 && across.is_none_or(|k| self.misses(row) <= self.misses(k));
        let inner = if along { row } else { across.unwrap_or(row) };
        let lanes = self.costs.lanes.min(power_of_two(self.extents[inner]));
        let points = self.points() / self.extents[inner] * (self.extents[inner] / lanes).ceil() * self.costs.lanes;
        let rows: f64 = self.extents[..parallel].iter().product();
        let reduced = !((1u64 << parallel.min(63)) - 1);
        let times = |axes: u64| match axes & reduced != 0 {
            true => Times::Vector(points),
            false if along => Times::Scalar(self.nested(axes, inner)),
            false => Times::Vector(rows),
        };
        // Stages that do not read each other share a pass over the row; what is dear is kept from one pass to the next.
        let mut from = 0;
        let mut seen = vec![false; self.region.exprs.len()];
        let mut pass: Vec<ExprId> = vec![];
        for (k, stage) in stages.iter().enumerate() {
            if self.accs[stage.expr.0 as usize] >> from != 0 {
                self.add_times(&std::mem::take(&mut pass), &mut seen, &times, inner, &mut around);
                self.keep_some(&mut seen, reduced);
                from = k;
            }
            pass.push(stage.expr);
            // Each step of a fold waits for the one before.
            around.ops += 2.5 * points;
        }
        self.add_times(&pass, &mut seen, &times, inner, &mut around);
        self.keep_some(&mut seen, reduced);
        self.add_times(outputs, &mut seen, &times, inner, &mut around);
        around.strays += self.stores(inner) * rows;
        // Side by side, a thread of a wide device has a row for itself.
        around.folds = stages.len() as f64
            * if along {
                rows
            } else if self.costs.lanes > 1.0 {
                rows / lanes
            } else {
                0.0
            };
        around
    }

    /// Of what a pass computed, the next knows what is dear and what is the same for the whole row.
    fn keep_some(&self, seen: &mut [bool], reduced: u64) {
        for ((seen, (e, _)), axes) in seen.iter_mut().zip(&self.region.exprs).zip(&self.axes) {
            *seen &= axes & reduced == 0 || matches!(e, Expr::Call(f, _) if function(*f) >= 8.0);
        }
    }

    /// How often something runs that depends on these axes, not on `inner`, in loops in their order.
    fn nested(&self, axes: u64, inner: usize) -> f64 {
        let deepest = (0..self.extents.len()).rev().find(|k| axes >> k & 1 == 1);
        deepest.map_or(1.0, |deepest| (0..=deepest).filter(|k| *k != inner).map(|k| self.extents[k]).product())
    }

    /// Work of the expressions that `roots` need and that are not `seen`.
    fn add_times(&self, roots: &[ExprId], seen: &mut [bool], times: &dyn Fn(u64) -> Times, inner: usize, into: &mut Around) {
        let mut stack = roots.to_vec();
        while let Some(id) = stack.pop() {
            let at = id.0 as usize;
            if std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let times = times(self.axes[at]);
            let mut weight = 0.0;
            match self.region.expr(id) {
                Expr::Call(f, args) => {
                    weight += function(*f);
                    stack.extend(args);
                }
                Expr::Cast(x) | Expr::Bits(x) => {
                    weight += 1.0;
                    stack.push(*x);
                }
                Expr::Load { arg, index, guard } => {
                    weight += 0.5 + self.splits(index);
                    if self.step(&self.region.args[*arg as usize], index, inner) == Step::Stray {
                        into.strays += if let Times::Scalar(n) = times { n } else { self.points() };
                    }
                    stack.extend(guard);
                    index.iter().for_each(|d| {
                        leaves(d, &mut |v| stack.push(v));
                    });
                }
                Expr::Index(d) => {
                    leaves(d, &mut |v| stack.push(v));
                }
                Expr::Float(_) | Expr::Int(_) | Expr::Acc(_) => {}
            }
            if matches!(self.region.dtype(id), DType::F64 | DType::I64) {
                weight += 0.5;
            }
            match times {
                Times::Vector(n) => into.ops += n * weight,
                Times::Scalar(n) => into.scalar_ops += n * weight,
            }
        }
    }

    /// Operations of divisions in an index: a wide device makes them anew for each point, a core once for many.
    fn splits(&self, index: &[Dim]) -> f64 {
        fn count(d: &Dim) -> f64 {
            let of = |a: &Atom| match a {
                Atom::Div(x, _) | Atom::Mod(x, _) => 3.0 + count(x),
                Atom::Max(a, b) | Atom::Min(a, b) => count(a) + count(b),
                Atom::Axis(_) | Atom::Sym(_) | Atom::Value(_) => 0.0,
            };
            d.terms().iter().flat_map(|(atoms, _)| atoms).map(of).sum()
        }
        if self.costs.lanes > 1.0 { 0.0 } else { index.iter().map(count).sum() }
    }

    /// The axis that vectors lie along best, of those longer than 1; the last of equals.
    fn best(&self, axes: &mut dyn DoubleEndedIterator<Item = usize>) -> Option<usize> {
        axes.rev().filter(|k| self.extents[*k] > 1.0).min_by_key(|k| self.misses(*k))
    }

    /// Accesses that are neither the same nor neighbours along an axis.
    fn misses(&self, axis: usize) -> usize {
        let loads = self.region.exprs.iter().filter(|(e, _)| match e {
            Expr::Load { arg, index, .. } => self.step(&self.region.args[*arg as usize], index, axis) == Step::Stray,
            _ => false,
        });
        loads.count() + self.stores(axis) as usize
    }

    /// Outputs whose neighbours along an axis lie apart.
    fn stores(&self, axis: usize) -> f64 {
        self.region.outputs.iter().filter(|o| self.step(&o.ty, &o.index, axis) == Step::Stray).count() as f64
    }

    /// Whether the elements of a load are neighbours along an axis, in runs of so many at least.
    pub(super) fn in_pieces(&self, load: ExprId, axis: usize, run: i64) -> bool {
        let Expr::Load { arg, index, .. } = self.region.expr(load) else { return false };
        let at = index.iter().zip(&self.region.args[*arg as usize].shape).fold(Dim::ZERO, |at, (i, n)| at * n.clone() + i.clone());
        walk(&at.recombine(), axis, run) == Some(1)
    }

    fn step(&self, ty: &TensorType, index: &[Dim], axis: usize) -> Step {
        let mut through = 0;
        let on = |d: &Dim, through: &mut u64| leaves(d, &mut |v| *through |= self.axes[v.0 as usize]) >> axis & 1 == 1;
        let at: Vec<usize> = (0..index.len()).filter(|i| on(&index[*i], &mut through)).collect();
        if through >> axis & 1 == 1 {
            return Step::Stray;
        }
        // Vectors need runs of eight; threads side by side read shorter ones together.
        let run = if self.costs.lanes > 1.0 { 8 } else { 2 };
        let stride = match at[..] {
            [] => return Step::Same,
            [one] if ty.shape[one + 1..].iter().all(|n| n.is(1)) => walk(&index[one], axis, run),
            [one] => walk(&index[one], axis, run).map(|s| 2 * s),
            _ => walk(&index.iter().zip(&ty.shape).fold(Dim::ZERO, |at, (i, n)| at * n.clone() + i.clone()).recombine(), axis, run),
        };
        match stride {
            Some(0) => Step::Same,
            Some(1) => Step::Next,
            _ => Step::Stray,
        }
    }
}

/// How often something runs, and whether in vectors.
#[derive(Clone, Copy)]
enum Times {
    Vector(f64),
    Scalar(f64),
}

/// The axes named in `d`, as bits; `value` is called for every value of the pool in it.
fn leaves(d: &Dim, value: &mut dyn FnMut(ExprId)) -> u64 {
    let mut found = 0;
    for atom in d.terms().iter().flat_map(|(atoms, _)| atoms) {
        match atom {
            Atom::Axis(k) => found |= 1u64 << (k & 63),
            Atom::Value(v) => value(ExprId(*v)),
            Atom::Div(a, b) | Atom::Mod(a, b) | Atom::Max(a, b) | Atom::Min(a, b) => found |= leaves(a, value) | leaves(b, value),
            Atom::Sym(_) => {}
        }
    }
    found
}

/// By how much `d` grows from one point of an axis to the next; within runs of `run` where it is split.
fn walk(d: &Dim, axis: usize, run: i64) -> Option<i64> {
    let mut step = 0;
    for (atoms, c) in d.terms() {
        for atom in atoms {
            let by = match atom {
                Atom::Axis(k) => i64::from(*k as usize == axis),
                Atom::Sym(_) | Atom::Value(_) => 0,
                Atom::Div(x, n) | Atom::Mod(x, n) => match (walk(x, axis, run)?, n.as_const()) {
                    (0, _) => 0,
                    (s, Some(n)) if n >= run => {
                        if matches!(atom, Atom::Mod(..)) {
                            s
                        } else {
                            0
                        }
                    }
                    _ => return None,
                },
                Atom::Max(a, b) | Atom::Min(a, b) => match (walk(a, axis, run)?, walk(b, axis, run)?) {
                    (0, 0) => 0,
                    _ => return None,
                },
            };
            match by {
                0 => {}
                by if atoms.len() == 1 => step += c * by,
                _ => return None,
            }
        }
    }
    Some(step)
}

fn power_of_two(n: f64) -> f64 {
    (n.clamp(1.0, 1e6) as usize).next_power_of_two() as f64
}

/// Share of the taps of a window that lie inside the input, over all outputs.
pub(super) fn inside(window: &Window, input: &[Dim], output: &[Dim], kernel: &[f64]) -> f64 {
    let first = if window.layout == Layout::ChannelsLast { 1 } else { 2 };
    let mut share = 1.0;
    for (i, taps) in kernel.iter().enumerate() {
        let (Some(from), Some(to)) = (input.get(first + i).and_then(Dim::as_const), output.get(first + i).and_then(Dim::as_const)) else { continue };
        let (stride, lo) = (window.strides[i] as i64, window.lo[i]);
        let within = |tap: i64| {
            // Outputs o with 0 <= o * stride + tap - lo < from.
            let least = (lo - tap).max(0).div_euclid(stride) + i64::from((lo - tap).max(0) % stride != 0);
            let most = (from - 1 + lo - tap).div_euclid(stride).min(to - 1);
            (most - least + 1).max(0)
        };
        let all: i64 = (0..*taps as i64).map(|t| within(t * window.dilations[i] as i64)).sum();
        share *= all as f64 / (to as f64 * taps).max(1.0);
    }
    share
}
