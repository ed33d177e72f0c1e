//! Scatters: a unit owns a chunk of the output, copies it, and applies the updates that land in it, in order. So units are
//! independent, and of several updates to one place the last wins.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, builder, cost,
    expr::{Env, convert, reg},
    native_lanes,
    nest::{THREADS, Walk, split},
};
use crate::{
    targets::Target,
    tile::{Access, Builder, Val},
};
use pavage_ir::{DType, Dim, Heart, Op, Region, ScalarFn, Schedule, attr::ScatterFn};

/// `scatter_nd` and `scatter_elements`.
pub const FAMILY: Family = Family { name: "scatter", about: "chunks copied, then updated in order", schedules, build };

fn schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    match &region.heart {
        Heart::Op(Op::ScatterNd { .. } | Op::ScatterElements { .. }) if region.args[0].dtype.bits() >= 8 => {
            let lanes = native_lanes(target, region.args[0].dtype) as i64;
            vec![Schedule::new("scatter", &[("chunk", if matches!(target, Target::Cpu(_)) { 1 << 16 } else { 4096 }), ("lanes", lanes)])]
        }
        _ => vec![],
    }
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let (Heart::Op(Op::ScatterNd { f } | Op::ScatterElements { f, .. }), data) = (&region.heart, &region.args[0]) else {
        return Err(KernelError::Unsupported { family: "scatter", reason: "not a scatter".into() });
    };
    let mut b = builder(name, target);
    let args = region.args.iter().map(|t| b.arg(t.dtype, Access::Read)).collect();
    let out = b.arg(data.dtype, Access::ReadWrite);
    let mut env = Env::with_bufs(region, args, vec![out]);
    let total: Dim = data.shape.iter().cloned().product();
    let chunk = schedule.knob("chunk", 1 << 16).max(1);
    let units = total.ceil_div(&Dim::from(chunk));
    let scatter = Scatter { region, f: *f, lanes: schedule.knob("lanes", 1).max(1) };
    let unit = |b: &mut Builder, env: &mut Env, unit: Val, me: Option<Val>| {
        let n = env.size(b, &total);
        let from = b.mul_i(unit, chunk);
        let to = b.add_i(from, chunk);
        let to = b.min(to, n);
        scatter.copy(b, env, from, to, me);
        scatter.update(b, env, from, to, me);
    };
    let walk = if matches!(target, Target::Cpu(_)) {
        let (lo, hi) = (b.lo(), b.hi());
        b.for_(lo, hi, 1, &[], |b, u, _| {
            unit(b, &mut env, u, None);
            vec![]
        });
        let unit_ps = Dim::from(chunk * data.dtype.bits() as i64 * 12) + scatter.tuples() * Dim::from(3000i64);
        Walk { cpu: Some(CpuShape { extent: units, grain: cost::grain(&unit_ps), unit_ps, scratch: Dim::ZERO }), grid: None }
    } else {
        b.launch().threads = THREADS as u32;
        let (u, me) = (b.block_id(0), b.thread_id());
        unit(&mut b, &mut env, u, Some(me));
        Walk { cpu: None, grid: Some([units, Dim::one(), Dim::one()]) }
    };
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}

struct Scatter<'r> {
    region: &'r Region,
    f: ScatterFn,
    lanes: i64,
}

impl Scatter<'_> {
    /// How many places the indices name.
    fn tuples(&self) -> Dim {
        let shape = &self.region.args[1].shape;
        match &self.region.heart {
            Heart::Op(Op::ScatterNd { .. }) => shape[..shape.len() - 1].iter().cloned().product(),
            _ => shape.iter().cloned().product(),
        }
    }

    /// Elements `from..to` of the output, each always by the same thread: element `from + i` by thread `i % THREADS`.
    fn copy(&self, b: &mut Builder, env: &Env, from: Val, to: Val, me: Option<Val>) {
        let (data, out) = (env.args[0], env.outs[0]);
        if let Some(me) = me {
            let first = b.add(from, me);
            b.for_(first, to, THREADS, &[], |b, i, _| {
                let v = b.load(data, i, 1);
                b.store(out, i, v);
                vec![]
            });
            return;
        }
        let lanes = self.lanes;
        let len = b.sub(to, from);
        let rest = b.rem_i(len, lanes);
        let full = b.sub(to, rest);
        b.for_(from, full, lanes, &[], |b, i, _| {
            let v = b.load(data, i, lanes as usize);
            b.store(out, i, v);
            vec![]
        });
        b.for_(full, to, 1, &[], |b, i, _| {
            let v = b.load(data, i, 1);
            b.store(out, i, v);
            vec![]
        });
    }

    /// An index clamped to its axis, negative ones counted from the end.
    fn position(&self, b: &mut Builder, env: &Env, at: Val, n: Val) -> Val {
        let v = b.load(env.args[1], at, 1);
        let v = b.cast(v, DType::I64);
        let zero = b.index(0);
        let negative = b.lt(v, zero);
        let wrapped = b.add(v, n);
        let v = b.select(negative, wrapped, v);
        let v = b.max(v, zero);
        let last = b.add_i(n, -1);
        b.min(v, last)
    }

    fn update(&self, b: &mut Builder, env: &mut Env, from: Val, to: Val, me: Option<Val>) {
        let shape = &self.region.args[0].shape;
        let (zero, count) = (b.index(0), env.size(b, &self.tuples()));
        match &self.region.heart {
            Heart::Op(Op::ScatterNd { .. }) => {
                let depth = self.region.args[1].shape.last().and_then(Dim::as_const).unwrap_or(0).clamp(0, shape.len() as i64) as usize;
                let slice: Dim = shape[depth..].iter().cloned().product();
                let len = env.size(b, &slice);
                b.for_(zero, count, 1, &[], |b, j, _| {
                    let mut at = b.index(0);
                    for (k, extent) in shape[..depth].iter().enumerate() {
                        let n = env.size(b, extent);
                        let i = b.mul_i(j, depth as i64);
                        let i = b.add_i(i, k as i64);
                        let i = self.position(b, env, i, n);
                        at = b.mul(at, n);
                        at = b.add(at, i);
                    }
                    let at = b.mul(at, len);
                    let source = b.mul(j, len);
                    self.slice(b, env, at, source, len, (from, to), me);
                    vec![]
                });
            }
            Heart::Op(Op::ScatterElements { axis, .. }) => {
                let indices = self.region.args[1].shape.clone();
                let n = env.size(b, &shape[*axis]);
                let one = b.index(1);
                b.for_(zero, count, 1, &[], |b, j, _| {
                    let mut coordinates = split(b, env, j, &indices);
                    coordinates[*axis] = self.position(b, env, j, n);
                    let mut at = b.index(0);
                    for (c, extent) in coordinates.iter().zip(shape) {
                        let n = env.size(b, extent);
                        at = b.mul(at, n);
                        at = b.add(at, *c);
                    }
                    self.slice(b, env, at, j, one, (from, to), me);
                    vec![]
                });
            }
            _ => {}
        }
    }

    /// Combine `len` updates from `source` on into the output from `at` on, as far as they lie in the chunk.
    #[allow(clippy::too_many_arguments)]
    fn slice(&self, b: &mut Builder, env: &Env, at: Val, source: Val, len: Val, (from, to): (Val, Val), me: Option<Val>) {
        let end = b.add(at, len);
        let (first, end) = (b.max(at, from), b.min(end, to));
        let shift = b.sub(source, at);
        let (out, updates) = (env.outs[0], env.args[2]);
        let combine = |b: &mut Builder, i: Val, lanes: usize| {
            let s = b.add(i, shift);
            let v = b.load(updates, s, lanes);
            if self.f == ScatterFn::Replace {
                return b.store(out, i, v);
            }
            let dtype = b.dtype(out);
            let old = b.load(out, i, lanes);
            let (old, v) = (b.cast(old, reg(dtype)), b.cast(v, reg(dtype)));
            let f = match self.f {
                ScatterFn::Add => ScalarFn::Add,
                ScatterFn::Mul => ScalarFn::Mul,
                ScatterFn::Max => ScalarFn::Max,
                _ => ScalarFn::Min,
            };
            let v = b.map(f, &[old, v]);
            let v = convert(b, v, dtype);
            let v = b.cast(v, dtype);
            b.store(out, i, v);
        };
        match me {
            Some(me) => {
                // The thread that owns the element: the first one from `first` on.
                let offset = b.sub(first, from);
                let back = b.sub(me, offset);
                let threads = b.index(THREADS);
                let skip = b.map(ScalarFn::Mod, &[back, threads]);
                let mine = b.add(first, skip);
                b.for_(mine, end, THREADS, &[], |b, i, _| {
                    combine(b, i, 1);
                    vec![]
                });
            }
            None => {
                let len = b.sub(end, first);
                let zero = b.index(0);
                let len = b.max(len, zero);
                let rest = b.rem_i(len, self.lanes);
                let full = b.add(first, len);
                let full = b.sub(full, rest);
                b.for_(first, full, self.lanes, &[], |b, i, _| {
                    combine(b, i, self.lanes as usize);
                    vec![]
                });
                b.for_(full, end, 1, &[], |b, i, _| {
                    combine(b, i, 1);
                    vec![]
                });
            }
        }
    }
}
