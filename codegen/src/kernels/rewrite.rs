//! Contractions, convolutions (transposed ones too) and pools written as row programs: what runs them when no tuned family does.
use pavage_ir::{
    DType, Dim, Expr, ExprId, Heart, Op, Real, Region, Scalar, ScalarFn,
    attr::{Layout, PoolFn, ReduceFn},
    dim::Atom,
    region::{Stage, StageFn, Window},
    region_eval::neutral,
};
use std::collections::HashMap;

/// The same region with a heart of kind reduce, or `None` for hearts that are none of these.
pub fn as_reduce(region: &Region) -> Option<Region> {
    match &region.heart {
        Heart::Contract { k, lhs, rhs, acc } => {
            let mut out = shell(region, vec![k.clone()]);
            let axes: Vec<Dim> = (0..=region.space.len()).map(Dim::axis).collect();
            let x = copy(region, &mut out, *lhs, &axes, None);
            let y = copy(region, &mut out, *rhs, &axes, None);
            let product = product(&mut out, x, y, *acc);
            Some(finish(region, out, vec![Stage { f: StageFn::Fold(ReduceFn::Sum), expr: product }], &|out| {
                let wide = out.push(Expr::Acc(0), wide(*acc));
                out.push(Expr::Cast(wide), *acc)
            }))
        }
        Heart::Conv { window, groups, x, input, w, weights, acc } => {
            let taps = weights[2..].iter().cloned().chain([weights[1].clone()]).collect();
            let mut out = shell(region, taps);
            let all = out.axes();
            let rank = input.len();
            let channel = if window.layout == Layout::ChannelsFirst { 1 } else { rank - 1 };
            let (mut at, inside) = window_at(&mut out, window, rank, input);
            let c = Dim::axis(region.space.len() + rank - 2);
            let group = if *groups == 1 { Dim::ZERO } else { Dim::axis(channel).div_in(&weights[0].div(&Dim::from(*groups)), &all) };
            at[channel] = group * weights[1].clone() + c.clone();
            let tap: Vec<Dim> = [Dim::axis(channel), c].into_iter().chain((0..rank - 2).map(|i| Dim::axis(region.space.len() + i))).collect();
            let x = copy(region, &mut out, *x, &at, inside);
            let w = copy(region, &mut out, *w, &tap, None);
            let product = product(&mut out, x, w, *acc);
            let product = only_inside(&mut out, inside, product, Scalar::I(0));
            Some(finish(region, out, vec![Stage { f: StageFn::Fold(ReduceFn::Sum), expr: product }], &|out| {
                let wide = out.push(Expr::Acc(0), wide(*acc));
                out.push(Expr::Cast(wide), *acc)
            }))
        }
        Heart::Pool { f, kernel, window, x, input } => {
            let mut out = shell(region, kernel.iter().map(|k| Dim::from(*k)).collect());
            let (at, inside) = window_at(&mut out, window, input.len(), input);
            let dtype = region.dtype(*x);
            let v = copy(region, &mut out, *x, &at, inside);
            if *f == PoolFn::Max {
                let v = only_inside(&mut out, inside, v, neutral(ReduceFn::Max, dtype));
                return Some(finish(region, out, vec![Stage { f: StageFn::Fold(ReduceFn::Max), expr: v }], &|out| out.push(Expr::Acc(0), dtype)));
            }
            let acc = wide(dtype);
            let v = out.push(Expr::Cast(v), acc);
            let v = only_inside(&mut out, inside, v, Scalar::I(0));
            let mut stages = vec![Stage { f: StageFn::Fold(ReduceFn::Sum), expr: v }];
            if *f == PoolFn::Sum {
                return Some(finish(region, out, stages, &|out| {
                    let sum = out.push(Expr::Acc(0), acc);
                    out.push(Expr::Cast(sum), dtype)
                }));
            }
            let counted = if *f == PoolFn::Mean { inside } else { in_padding(&mut out, window, input) };
            let count = match counted {
                Some(_) => {
                    let one = out.constant(Scalar::F(1.0), acc);
                    let one = only_inside(&mut out, counted, one, Scalar::I(0));
                    stages.push(Stage { f: StageFn::Fold(ReduceFn::Sum), expr: one });
                    None
                }
                None => Some(kernel.iter().product::<usize>() as f64),
            };
            Some(finish(region, out, stages, &|out| {
                let sum = out.push(Expr::Acc(0), acc);
                let n = match count {
                    Some(n) => out.push(Expr::Float(Real::new(n)), acc),
                    None => out.push(Expr::Acc(1), acc),
                };
                let mean = out.push(Expr::Call(ScalarFn::Div, vec![sum, n]), acc);
                out.push(Expr::Cast(mean), dtype)
            }))
        }
        Heart::Op(Op::ConvTranspose { strides, dilations, lo, groups, layout, .. }) => {
            let (x, w) = (&region.args[0], &region.args[1]);
            let spatial = x.rank() - 2;
            let kernel: Vec<i64> = w.shape[2..].iter().map(Dim::as_const).collect::<Option<_>>()?;
            let (channel, first) = if *layout == Layout::ChannelsFirst { (1, 2) } else { (x.rank() - 1, 1) };
            let per_group = x.shape[channel].div(&Dim::from(*groups));
            // Without dilation, the taps that meet an output are a stride apart.
            let reach = |i: usize| if dilations[i] == 1 { (kernel[i] + strides[i] as i64 - 1) / strides[i] as i64 } else { kernel[i] };
            let taps = (0..spatial).map(|i| Dim::from(reach(i))).chain([per_group.clone()]).collect();
            let mut out = shell(region, taps);
            let (all, parallel) = (out.axes(), out.space.len());
            let c = Dim::axis(parallel + spatial);
            let group = Dim::axis(channel).div_in(&w.shape[1], &all);
            let from = group * per_group + c;
            let mut at: Vec<Dim> = (0..x.rank()).map(Dim::axis).collect();
            at[channel] = from.clone();
            let mut tap = vec![from, Dim::axis(channel).mod_in(&w.shape[1], &all)];
            let mut inside = None;
            for i in 0..spatial {
                let (stride, t) = (Dim::from(strides[i]), Dim::axis(parallel + i));
                let y = Dim::axis(first + i) + Dim::from(lo[i]);
                let (q, k) = if dilations[i] == 1 {
                    (y.div_in(&stride, &all) - t.clone(), y.mod_in(&stride, &all) + t * stride)
                } else {
                    let meets = y - t.clone() * Dim::from(dilations[i]);
                    let rest = out.push(Expr::Index(meets.mod_in(&stride, &all)), DType::I64);
                    let zero = out.constant(Scalar::I(0), DType::I64);
                    let even = out.push(Expr::Call(ScalarFn::Eq, vec![rest, zero]), DType::Bool);
                    inside = both(&mut out, inside, even);
                    (meets.div_in(&stride, &all), t)
                };
                let extents = out.axes();
                inside = within(&mut out, inside, &q, &x.shape[first + i], &extents);
                inside = within(&mut out, inside, &k, &w.shape[2 + i], &extents);
                at[first + i] = q;
                tap.push(k);
            }
            let acc = if x.dtype.is_float() { wide(x.dtype) } else { region.outputs[0].ty.dtype };
            let (xt, wt) = (x.dtype, w.dtype);
            let x = out.push(Expr::Load { arg: 0, index: at, guard: inside }, xt);
            let w = out.push(Expr::Load { arg: 1, index: tap, guard: inside }, wt);
            let product = product(&mut out, x, w, acc);
            let product = only_inside(&mut out, inside, product, Scalar::I(0));
            let dtype = region.outputs[0].ty.dtype;
            Some(finish(region, out, vec![Stage { f: StageFn::Fold(ReduceFn::Sum), expr: product }], &|out| {
                let sum = out.push(Expr::Acc(0), acc);
                cast(out, sum, dtype)
            }))
        }
        _ => None,
    }
}

/// The dtype sums run in.
fn wide(acc: DType) -> DType {
    super::expr::reg(acc)
}

/// The region without expressions and outputs, with these reduced axes.
fn shell(region: &Region, axes: Vec<Dim>) -> Region {
    let mut out = Region::new(region.name.clone(), region.space.clone());
    out.args = region.args.clone();
    out.heart = Heart::Reduce { axes, stages: vec![] };
    out
}

/// Copy the outputs, `acc0` being what `acc` makes, and set the stages.
fn finish(region: &Region, mut out: Region, stages: Vec<Stage>, acc: &dyn Fn(&mut Region) -> ExprId) -> Region {
    if let Heart::Reduce { stages: s, .. } = &mut out.heart {
        *s = stages;
    }
    let acc = acc(&mut out);
    let axes: Vec<Dim> = (0..region.space.len()).map(Dim::axis).collect();
    let mut copier = Copier { from: region, axes: &axes, guard: None, acc: Some(acc), done: HashMap::new() };
    for o in &region.outputs {
        let mut o = o.clone();
        o.expr = copier.copy(&mut out, o.expr);
        out.outputs.push(o);
    }
    out
}

fn product(out: &mut Region, x: ExprId, y: ExprId, acc: DType) -> ExprId {
    let acc = wide(acc);
    let (x, y) = (cast(out, x, acc), cast(out, y, acc));
    out.push(Expr::Call(ScalarFn::Mul, vec![x, y]), acc)
}

fn cast(out: &mut Region, x: ExprId, dtype: DType) -> ExprId {
    if out.dtype(x) == dtype { x } else { out.push(Expr::Cast(x), dtype) }
}

fn only_inside(out: &mut Region, inside: Option<ExprId>, v: ExprId, otherwise: Scalar) -> ExprId {
    let Some(inside) = inside else { return v };
    let dtype = out.dtype(v);
    let other = out.constant(otherwise, dtype);
    out.push(Expr::Call(ScalarFn::Select, vec![inside, v, other]), dtype)
}

/// Input coordinates of a tap (reduced axes after the parallel ones, in spatial order; channel and batch as in the
/// output), and whether they are inside, where that is not certain.
fn window_at(out: &mut Region, window: &Window, rank: usize, input: &[Dim]) -> (Vec<Dim>, Option<ExprId>) {
    let first = if window.layout == Layout::ChannelsFirst { 2 } else { 1 };
    let parallel = out.space.len();
    let mut at: Vec<Dim> = (0..rank).map(Dim::axis).collect();
    let mut inside = None;
    for i in 0..rank - 2 {
        let pos = Dim::axis(first + i) * Dim::from(window.strides[i]) + Dim::axis(parallel + i) * Dim::from(window.dilations[i]) - Dim::from(window.lo[i]);
        let extents = out.axes();
        inside = within(out, inside, &pos, &input[first + i], &extents);
        at[first + i] = pos;
    }
    (at, inside)
}

/// Whether a tap is inside the padded input, where that is not certain: a last window may reach beyond.
fn in_padding(out: &mut Region, window: &Window, input: &[Dim]) -> Option<ExprId> {
    let first = if window.layout == Layout::ChannelsFirst { 2 } else { 1 };
    let parallel = out.space.len();
    let mut inside = None;
    for i in 0..input.len() - 2 {
        let pos = Dim::axis(first + i) * Dim::from(window.strides[i]) + Dim::axis(parallel + i) * Dim::from(window.dilations[i]);
        let extents = out.axes();
        inside = within(out, inside, &pos, &(input[first + i].clone() + Dim::from(window.lo[i] + window.hi[i])), &extents);
    }
    inside
}

fn both(out: &mut Region, x: Option<ExprId>, y: ExprId) -> Option<ExprId> {
    Some(x.map_or(y, |x| out.push(Expr::Call(ScalarFn::And, vec![x, y]), DType::Bool)))
}

/// `guard`, and whether `0 <= at < n` where that is not certain of axes of these extents.
pub fn within(out: &mut Region, guard: Option<ExprId>, at: &Dim, n: &Dim, extents: &[Dim]) -> Option<ExprId> {
    if at.within(n, extents) {
        return guard;
    }
    let v = out.push(Expr::Index(at.clone()), DType::I64);
    let zero = out.constant(Scalar::I(0), DType::I64);
    let n = out.push(Expr::Index(n.clone()), DType::I64);
    let above = out.push(Expr::Call(ScalarFn::Ge, vec![v, zero]), DType::Bool);
    let below = out.push(Expr::Call(ScalarFn::Lt, vec![v, n]), DType::Bool);
    let guard = both(out, guard, above);
    both(out, guard, below)
}

/// Copy an expression of `from`, its axis `i` being `axes[i]`, every load under `guard` too.
pub fn copy(from: &Region, out: &mut Region, id: ExprId, axes: &[Dim], guard: Option<ExprId>) -> ExprId {
    Copier { from, axes, guard, acc: None, done: HashMap::new() }.copy(out, id)
}

/// Copy the outputs of `from`, its axis `i` being `axes[i]`.
pub fn outputs(from: &Region, out: &mut Region, axes: &[Dim]) {
    let mut copier = Copier { from, axes, guard: None, acc: None, done: HashMap::new() };
    for o in &from.outputs {
        let mut o = o.clone();
        o.expr = copier.copy(out, o.expr);
        o.index = o.index.iter().map(|d| copier.dim(out, d)).collect();
        out.outputs.push(o);
    }
}

struct Copier<'a> {
    from: &'a Region,
    axes: &'a [Dim],
    guard: Option<ExprId>,
    acc: Option<ExprId>,
    done: HashMap<ExprId, ExprId>,
}

impl Copier<'_> {
    fn copy(&mut self, out: &mut Region, id: ExprId) -> ExprId {
        if let Some(done) = self.done.get(&id) {
            return *done;
        }
        let dtype = self.from.dtype(id);
        let new = match self.from.expr(id).clone() {
            Expr::Acc(i) => match self.acc {
                Some(acc) => acc,
                None => out.push(Expr::Acc(i), dtype),
            },
            Expr::Index(d) => {
                let d = self.dim(out, &d);
                out.push(Expr::Index(d), dtype)
            }
            Expr::Load { arg, index, guard } => {
                let guard = guard.map(|g| self.copy(out, g));
                let guard = match (guard, self.guard) {
                    (Some(a), Some(b)) => Some(out.push(Expr::Call(ScalarFn::And, vec![a, b]), DType::Bool)),
                    (a, b) => a.or(b),
                };
                let index = index.iter().map(|d| self.dim(out, d)).collect();
                out.push(Expr::Load { arg, index, guard }, dtype)
            }
            Expr::Call(f, xs) => {
                let xs = xs.iter().map(|x| self.copy(out, *x)).collect();
                out.push(Expr::Call(f, xs), dtype)
            }
            Expr::Cast(x) => {
                let x = self.copy(out, x);
                out.push(Expr::Cast(x), dtype)
            }
            Expr::Bits(x) => {
                let x = self.copy(out, x);
                out.push(Expr::Bits(x), dtype)
            }
            leaf @ (Expr::Float(_) | Expr::Int(_)) => out.push(leaf, dtype),
        };
        self.done.insert(id, new);
        new
    }

    fn dim(&mut self, out: &mut Region, d: &Dim) -> Dim {
        let mut values = vec![];
        super::expr::leaves(d, &mut |atom| {
            if let Atom::Value(v) = atom {
                values.push(ExprId(*v));
            }
        });
        for v in values {
            self.copy(out, v);
        }
        let all = out.axes();
        d.map_atoms_in(
            &|atom| match atom {
                Atom::Axis(k) => self.axes[*k as usize].clone(),
                Atom::Value(v) => Dim::from(Atom::Value(self.done[&ExprId(*v)].0)),
                other => Dim::from(other.clone()),
            },
            &all,
        )
    }
}
