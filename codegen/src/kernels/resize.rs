//! Resampling, written as a map (nearest) or a row program over filter taps (linear, cubic): coordinates and weights are
//! computed in f64 where they are needed.
use super::{ArgFacts, Built, Family, KernelError, elementwise, reduce};
use crate::targets::Target;
use pavage_ir::{
    DType, Dim, Expr, ExprId, Heart, Op, Real, Region, Scalar, ScalarFn, Schedule,
    attr::{CoordMode, NearestMode, ReduceFn, ResizeMode},
    dim::Atom,
    region::{Stage, StageFn},
};

/// Every mode of resize.
pub const FAMILY: Family = Family { name: "resize", about: "resampling as a map or a sum over filter taps", schedules, build };

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    let Some(region) = rewrite(region) else { return vec![] };
    let mut schedules = (inner(&region).schedules)(&region, target, facts);
    schedules.iter_mut().for_each(|s| s.family = "resize".to_owned());
    schedules
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let region = rewrite(region).ok_or(KernelError::Unsupported { family: "resize", reason: "not a resize, or its filter is too wide".into() })?;
    (inner(&region).build)(&region, schedule, target, name, facts)
}

fn inner(region: &Region) -> Family {
    if region.heart == Heart::Map { elementwise::FAMILY } else { reduce::FAMILY }
}

/// f64 expressions of a region.
struct F64<'a>(&'a mut Region);

impl F64<'_> {
    fn real(&mut self, v: f64) -> ExprId {
        self.0.push(Expr::Float(Real::new(v)), DType::F64)
    }
    fn index(&mut self, d: Dim) -> ExprId {
        let i = self.0.push(Expr::Index(d), DType::I64);
        self.0.push(Expr::Cast(i), DType::F64)
    }
    fn call(&mut self, f: ScalarFn, args: &[ExprId]) -> ExprId {
        let dtype = match f {
            ScalarFn::Eq | ScalarFn::Ne | ScalarFn::Lt | ScalarFn::Le | ScalarFn::Gt | ScalarFn::Ge => DType::Bool,
            ScalarFn::Select => self.0.dtype(args[1]),
            _ => self.0.dtype(args[0]),
        };
        self.0.push(Expr::Call(f, args.to_vec()), dtype)
    }
    fn with(&mut self, f: ScalarFn, x: ExprId, v: f64) -> ExprId {
        let v = self.real(v);
        self.call(f, &[x, v])
    }
    fn clamp(&mut self, x: ExprId, lo: f64, hi: ExprId) -> ExprId {
        let x = self.with(ScalarFn::Max, x, lo);
        self.call(ScalarFn::Min, &[x, hi])
    }
    fn position(&mut self, x: ExprId) -> Dim {
        let i = self.0.push(Expr::Cast(x), DType::I64);
        Dim::from(Atom::Value(i.0))
    }
}

/// Where an axis is read: an index, or a tap's index and weight; and whether that is inside the input.
struct Source {
    index: Dim,
    weight: Option<ExprId>,
    inside: Option<ExprId>,
}

fn rewrite(region: &Region) -> Option<Region> {
    let Heart::Op(Op::Resize { mode, coord, nearest, sizes, scales, cubic_a, outside, antialias, exclude }) = &region.heart else { return None };
    let x = &region.args[0];
    let rank = x.rank();
    let mut out = Region::new(region.name.clone(), region.space.clone());
    out.args = region.args.clone();
    let same = |k: usize| scales[k].get() == 1.0 && sizes[k] == x.shape[k] && *coord != CoordMode::TfCrop;
    let filter = Filter { mode: *mode, nearest: *nearest, a: cubic_a.get(), antialias: *antialias, exclude: *exclude };
    let taps: Vec<usize> = (0..rank).map(|k| if same(k) || *mode == ResizeMode::Nearest { 0 } else { filter.footprint(scales[k].get()) }).collect();
    if taps.iter().any(|t| *t > 4096) {
        return None;
    }
    let reduced: Vec<usize> = (0..rank).filter(|k| taps[*k] > 0).collect();
    if !reduced.is_empty() {
        out.heart = Heart::Reduce { axes: reduced.iter().map(|k| Dim::from(taps[*k])).collect(), stages: vec![] };
    }
    let mut sources = vec![];
    for k in 0..rank {
        if same(k) {
            sources.push(Source { index: Dim::axis(k), weight: None, inside: None });
            continue;
        }
        if let Some(index) = whole_steps(region, k) {
            sources.push(Source { index, weight: None, inside: None });
            continue;
        }
        let axis = reduced.iter().position(|r| *r == k).map(|i| rank + i);
        sources.push(source(&mut out, region, k, axis, &filter));
    }
    let inside = sources.iter().filter_map(|s| s.inside).collect::<Vec<_>>();
    let inside = inside.into_iter().reduce(|a, b| out.push(Expr::Call(ScalarFn::And, vec![a, b]), DType::Bool));
    let index = sources.iter().map(|s| s.index.clone()).collect();
    let mut value = out.push(Expr::Load { arg: 0, index, guard: None }, x.dtype);
    if !reduced.is_empty() {
        let acc = if x.dtype == DType::F64 || !x.dtype.is_float() { DType::F64 } else { DType::F32 };
        let weight = sources.iter().filter_map(|s| s.weight).reduce(|a, b| out.push(Expr::Call(ScalarFn::Mul, vec![a, b]), DType::F64))?;
        let weight = if acc == DType::F64 { weight } else { out.push(Expr::Cast(weight), acc) };
        value = if x.dtype == acc { value } else { out.push(Expr::Cast(value), acc) };
        value = out.push(Expr::Call(ScalarFn::Mul, vec![value, weight]), acc);
        let fold = |expr| Stage { f: StageFn::Fold(ReduceFn::Sum), expr };
        let mut all = vec![fold(value)];
        value = out.push(Expr::Acc(0), acc);
        if *antialias || *exclude {
            all.push(fold(weight));
            let total = out.push(Expr::Acc(1), acc);
            let zero = out.constant(Scalar::F(0.0), acc);
            let some = out.push(Expr::Call(ScalarFn::Ne, vec![total, zero]), DType::Bool);
            let part = out.push(Expr::Call(ScalarFn::Div, vec![value, total]), acc);
            value = out.push(Expr::Call(ScalarFn::Select, vec![some, part, value]), acc);
        }
        if let Heart::Reduce { stages, .. } = &mut out.heart {
            *stages = all;
        }
    }
    if let Some(inside) = inside {
        let dtype = out.dtype(value);
        let outside = out.constant(Scalar::F(outside.get()), dtype);
        value = out.push(Expr::Call(ScalarFn::Select, vec![inside, value, outside]), dtype);
    }
    if out.dtype(value) != x.dtype {
        value = out.push(Expr::Cast(value), x.dtype);
    }
    for o in &region.outputs {
        let mut o = o.clone();
        o.expr = value;
        out.outputs.push(o);
    }
    Some(out)
}

/// Nearest by a whole factor: the index is a quotient.
fn whole_steps(region: &Region, k: usize) -> Option<Dim> {
    let Heart::Op(Op::Resize { mode: ResizeMode::Nearest, coord, nearest, sizes, scales, .. }) = &region.heart else { return None };
    let scale = scales[k].get();
    let n = &region.args[0].shape[k];
    let centred = matches!(coord, CoordMode::HalfPixel | CoordMode::HalfPixelSymmetric | CoordMode::PytorchHalfPixel)
        && matches!(nearest, NearestMode::RoundPreferFloor | NearestMode::RoundPreferCeil);
    let floored = *coord == CoordMode::Asymmetric && (*nearest == NearestMode::Floor || (*nearest == NearestMode::RoundPreferFloor && scale == 2.0));
    let whole = scale >= 1.0 && scale.fract() == 0.0 && scale < 1e6;
    let by = Dim::from(scale as i64);
    (whole && (centred || floored) && sizes[k] == n.clone() * by.clone()).then(|| Dim::axis(k).div_in(&by, &region.space))
}

struct Filter {
    mode: ResizeMode,
    nearest: NearestMode,
    a: f64,
    antialias: bool,
    exclude: bool,
}

impl Filter {
    fn stretch(&self, scale: f64) -> f64 {
        if self.antialias { scale.min(1.0) } else { 1.0 }
    }

    /// Elements that the filter reads.
    fn footprint(&self, scale: f64) -> usize {
        let reach = if self.mode == ResizeMode::Cubic { 2.0 } else { 1.0 };
        (2.0 * (reach / self.stretch(scale)).ceil()) as usize
    }

    /// The filter's value at a distance.
    fn weight(&self, e: &mut F64, distance: ExprId) -> ExprId {
        use ScalarFn::{Abs, Add, Le, Lt, Max, Mul, Select, Sub};
        let d = e.call(Abs, &[distance]);
        let one = e.real(1.0);
        if self.mode != ResizeMode::Cubic {
            let v = e.call(Sub, &[one, d]);
            return e.with(Max, v, 0.0);
        }
        let a = self.a;
        let near = e.with(Mul, d, a + 2.0);
        let near = e.with(Sub, near, a + 3.0);
        let near = e.call(Mul, &[near, d]);
        let near = e.call(Mul, &[near, d]);
        let near = e.call(Add, &[near, one]);
        let far = e.with(Mul, d, a);
        let far = e.with(Sub, far, 5.0 * a);
        let far = e.call(Mul, &[far, d]);
        let far = e.with(Add, far, 8.0 * a);
        let far = e.call(Mul, &[far, d]);
        let far = e.with(Sub, far, 4.0 * a);
        let (is_near, is_far) = (e.with(Le, d, 1.0), e.with(Lt, d, 2.0));
        let zero = e.real(0.0);
        let far = e.call(Select, &[is_far, far, zero]);
        e.call(Select, &[is_near, near, far])
    }
}

/// The source of axis `k`; `tap` is the reduced axis over its filter.
fn source(out: &mut Region, region: &Region, k: usize, tap: Option<usize>, filter: &Filter) -> Source {
    use ScalarFn::{Add, And, Ceil, Div, Eq, Ge, Gt, Le, Lt, Max, Min, Mul, Or, Select, Sub};
    let Heart::Op(Op::Resize { coord, sizes, scales, .. }) = &region.heart else { unreachable!("only resizes have sources") };
    let rank = sizes.len();
    let scale = scales[k].get();
    let e = &mut F64(out);
    let i = e.index(Dim::axis(k));
    let n = e.index(region.args[0].shape[k].clone());
    let size = e.index(sizes[k].clone());
    let one = e.real(1.0);
    let last = e.call(Sub, &[n, one]);
    let exact = e.with(Mul, n, scale);
    let half = e.with(Add, i, 0.5);
    let half = e.with(Div, half, scale);
    let half = e.with(Sub, half, 0.5);
    let exact_less = e.call(Sub, &[exact, one]);
    let is_one = e.call(Eq, &[exact, one]);
    let mut inside = None;
    let at = match coord {
        CoordMode::HalfPixel => half,
        CoordMode::HalfPixelSymmetric => {
            let part = e.call(Div, &[size, exact]);
            let part = e.call(Sub, &[one, part]);
            let middle = e.with(Mul, n, 0.5);
            let shift = e.call(Mul, &[middle, part]);
            e.call(Add, &[shift, half])
        }
        CoordMode::PytorchHalfPixel => {
            let single = e.call(Eq, &[size, one]);
            let zero = e.real(0.0);
            e.call(Select, &[single, zero, half])
        }
        CoordMode::AlignCorners => {
            let v = e.call(Mul, &[i, last]);
            let v = e.call(Div, &[v, exact_less]);
            let zero = e.real(0.0);
            e.call(Select, &[is_one, zero, v])
        }
        CoordMode::Asymmetric => e.with(Div, i, scale),
        CoordMode::TfCrop => {
            let mut roi = |at: usize| {
                let v = e.0.push(Expr::Load { arg: 1, index: vec![Dim::from(at)], guard: None }, region.args[1].dtype);
                if region.args[1].dtype == DType::F64 { v } else { e.0.push(Expr::Cast(v), DType::F64) }
            };
            let (from, to) = (roi(k), roi(rank + k));
            let span = e.call(Sub, &[to, from]);
            let span = e.call(Mul, &[span, last]);
            let halved = e.with(Mul, span, 0.5);
            let stepped = e.call(Sub, &[to, from]);
            let stepped = e.call(Mul, &[i, stepped]);
            let stepped = e.call(Mul, &[stepped, last]);
            let stepped = e.call(Div, &[stepped, exact_less]);
            let along = e.call(Select, &[is_one, halved, stepped]);
            let start = e.call(Mul, &[from, last]);
            let at = e.call(Add, &[along, start]);
            let (above, below) = (e.with(Ge, at, 0.0), e.call(Le, &[at, last]));
            inside = Some(e.call(And, &[above, below]));
            at
        }
    };
    let at = e.with(Max, at, -1e9);
    let far = e.with(Add, n, 1e9);
    let at = e.call(Min, &[at, far]);
    let left = e.call(Ceil, &[at]);
    let left = e.call(Sub, &[left, one]);
    let ratio = e.call(Sub, &[at, left]);
    let Some(tap) = tap else {
        let whole = e.call(Eq, &[ratio, one]);
        let up = match filter.nearest {
            NearestMode::RoundPreferFloor => e.with(Gt, ratio, 0.5),
            NearestMode::RoundPreferCeil => e.with(Ge, ratio, 0.5),
            NearestMode::Floor => e.call(Lt, &[one, ratio]),
            NearestMode::Ceil => e.call(Eq, &[one, one]),
        };
        let up = e.call(Or, &[whole, up]);
        let right = e.call(Add, &[left, one]);
        let v = e.call(Select, &[up, right, left]);
        let v = e.clamp(v, 0.0, last);
        return Source { index: e.position(v), weight: None, inside };
    };
    let offset = e.index(Dim::axis(tap));
    let offset = e.with(Add, offset, 1.0 - filter.footprint(scale) as f64 / 2.0);
    let here = e.call(Add, &[left, offset]);
    let distance = e.call(Sub, &[offset, ratio]);
    let distance = e.with(Mul, distance, filter.stretch(scale));
    let mut weight = filter.weight(e, distance);
    if filter.exclude {
        let (above, below) = (e.with(Ge, here, 0.0), e.call(Lt, &[here, n]));
        let within = e.call(And, &[above, below]);
        let zero = e.real(0.0);
        weight = e.call(Select, &[within, weight, zero]);
    }
    let v = e.clamp(here, 0.0, last);
    Source { index: e.position(v), weight: Some(weight), inside }
}
