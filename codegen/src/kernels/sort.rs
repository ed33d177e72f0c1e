//! Selection by value: `topk` and `nonzero`.
//!
//! `topk` finds one element after another: each pass takes the first of the row in order among those that come after the
//! one found before, so a pass is an arg-reduction in vectors, and equal elements keep their order.
//!
//! `nonzero` writes the coordinates of what is not zero. Its output has as many columns as elements found, which the plan
//! counts beforehand (a reduction that binds the symbol): the symbol is a run-time size of this kernel like any other.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, builder, cost,
    expr::{Env, reg},
    fold::Fold,
    native_lanes,
    nest::{THREADS, Walk, split},
    reduce::across_threads,
};
use crate::{
    targets::Target,
    tile::{Buf, Builder, Space, Ty, Val},
};
use pavage_ir::{DType, Dim, Heart, Op, Region, Scalar, ScalarFn, Schedule, attr::ReduceFn, region::StageFn};

/// `topk` of any size.
pub const TOPK: Family = Family { name: "topk", about: "the largest or smallest of a row, one pass for each", schedules: topk_schedules, build: topk };

/// `nonzero`.
pub const NONZERO: Family = Family { name: "nonzero", about: "coordinates of non-zero elements, one pass", schedules: nonzero_schedules, build: nonzero };

fn topk_schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let Heart::Op(Op::TopK { axis, .. }) = &region.heart else { return vec![] };
    let x = &region.args[0];
    let contiguous = x.shape[axis + 1..].iter().all(|d| d.is(1));
    let lanes = if contiguous { native_lanes(target, DType::F32) } else { 1 };
    vec![Schedule::new("topk", &[("lanes", lanes as i64)])]
}

/// What the passes over a row share.
struct Rows {
    fold: Fold,
    lanes: usize,
    n: Val,
    first: Val,
    stride: Val,
    x: Buf,
}

impl Rows {
    /// Fold what comes after (`value`, `position`) in order, from element `lo` on in steps.
    fn pass(&self, b: &mut Builder, before: (Val, Val, Val), lo: Val, step: i64, init: &[Val]) -> Vec<Val> {
        let step_of = |b: &mut Builder, i: Val, acc: &[Val], count: Option<Val>| {
            let at = b.mul(i, self.stride);
            let at = b.add(self.first, at);
            let v = match count {
                Some(n) => b.load_upto(self.x, at, self.lanes, n),
                None => b.load(self.x, at, self.lanes),
            };
            let v = b.cast(v, reg(self.fold.dtype));
            let base = b.cast(i, self.fold.position);
            let position = if self.lanes > 1 {
                let iota = b.iota(self.fold.position, self.lanes);
                b.map(ScalarFn::Add, &[iota, base])
            } else {
                base
            };
            let later = self.later(b, v, position, before);
            let mask = match count {
                Some(n) => {
                    let tail = b.lane_mask(n, self.lanes);
                    b.and(later, tail)
                }
                None => later,
            };
            // Among equals, the earlier; an empty accumulator stands after everything.
            let joined = self.fold.join(b, acc, &[v, position]);
            joined.iter().zip(acc).map(|(new, old)| b.select(mask, *new, *old)).collect()
        };
        if self.lanes == 1 {
            return b.for_(lo, self.n, step, init, |b, i, acc| step_of(b, i, acc, None));
        }
        let rest = b.rem_i(self.n, self.lanes as i64);
        let full = b.sub(self.n, rest);
        let state = b.for_(lo, full, step, init, |b, i, acc| step_of(b, i, acc, None));
        let zero = b.index(0);
        let some = b.gt(rest, zero);
        b.if_(some, |b| step_of(b, full, &state, Some(rest)), |_| state.clone())
    }

    /// Whether (`v`, `at`) comes after what was found before; everything does after nothing.
    fn later(&self, b: &mut Builder, v: Val, at: Val, (value, position, none): (Val, Val, Val)) -> Val {
        let shape = b.ty(v);
        let value = b.splat_to(value, shape);
        let worse = self.fold.beyond(b, value, v);
        let better = self.fold.beyond(b, v, value);
        let equal_or_worse = b.not(better);
        let after = b.gt(at, position);
        let tie = b.and(equal_or_worse, after);
        let later = b.or(worse, tie);
        b.or(later, none)
    }
}

fn topk(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let Heart::Op(Op::TopK { axis, k, largest }) = &region.heart else {
        return Err(KernelError::Unsupported { family: "topk", reason: "not a topk".into() });
    };
    let x = &region.args[0];
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let outer: Dim = x.shape[..*axis].iter().cloned().product();
    let inner: Dim = x.shape[axis + 1..].iter().cloned().product();
    let extent = x.shape[*axis].clone();
    let rows = outer.clone() * inner.clone();
    let f = if *largest { ReduceFn::Max } else { ReduceFn::Min };
    let fold = Fold { f: StageFn::Arg { f, last: false }, dtype: x.dtype, position: DType::I32 };
    let cpu = matches!(target, Target::Cpu(_));
    let lanes = if cpu { schedule.knob("lanes", 1).max(1) as usize } else { 1 };
    let shared: Vec<Buf> = if cpu {
        vec![]
    } else {
        b.launch().threads = THREADS as u32;
        let warps = THREADS as u64 / 32;
        vec![b.alloc(Space::Shared, reg(x.dtype), warps), b.alloc(Space::Shared, DType::I32, warps)]
    };
    let row = |b: &mut Builder, env: &mut Env, row: Val, me: Option<Val>| {
        let (n, stride, count) = (env.size(b, &extent), env.size(b, &inner), env.size(b, k));
        let at = split(b, env, row, &[outer.clone(), inner.clone()]);
        let base = b.mul(at[0], n);
        let base = b.mul(base, stride);
        let first = b.add(base, at[1]);
        let out = b.mul(at[0], count);
        let out = b.mul(out, stride);
        let out = b.add(out, at[1]);
        let rows = Rows { fold, lanes, n, first, stride, x: env.args[0] };
        let nothing = fold.start(b, 1);
        let (zero, yes) = (b.index(0), b.constant(Scalar::B(true), DType::Bool));
        let init = [nothing[0], nothing[1], yes];
        b.for_(zero, count, 1, &init, |b, i, found| {
            let mut start = fold.start(b, lanes);
            start[1] = b.constant_of(Scalar::I(i128::from(i32::MAX)), Ty::of_lanes(DType::I32, lanes));
            let acc = match me {
                None => {
                    let acc = rows.pass(b, (found[0], found[1], found[2]), zero, lanes as i64, &start);
                    fold.lanes(b, &acc)
                }
                Some(me) => {
                    let acc = rows.pass(b, (found[0], found[1], found[2]), me, THREADS, &start);
                    let acc = across_threads(b, &fold, acc, me, THREADS, &shared);
                    b.barrier();
                    acc
                }
            };
            let to = b.mul(i, stride);
            let to = b.add(out, to);
            let write = |b: &mut Builder| {
                let v = b.cast(acc[0], x.dtype);
                b.store(env.outs[0], to, v);
                let p = b.cast(acc[1], DType::I64);
                b.store(env.outs[1], to, p);
            };
            match me {
                None => write(b),
                Some(me) => {
                    let leader = b.eq(me, zero);
                    b.when(leader, write);
                }
            }
            let no = b.constant(Scalar::B(false), DType::Bool);
            vec![acc[0], acc[1], no]
        });
    };
    let walk = if cpu {
        let (lo, hi) = (b.lo(), b.hi());
        b.for_(lo, hi, 1, &[], |b, i, _| {
            row(b, &mut env, i, None);
            vec![]
        });
        let unit_ps = extent * k.clone() * Dim::from(if lanes > 1 { 300i64 } else { 2000 }) + Dim::from(20_000i64);
        Walk { cpu: Some(CpuShape { extent: rows, grain: cost::grain(&unit_ps), unit_ps, scratch: Dim::ZERO }), grid: None }
    } else {
        let (i, me) = (b.block_id(0), b.thread_id());
        row(&mut b, &mut env, i, Some(me));
        Walk { cpu: None, grid: Some([rows, Dim::one(), Dim::one()]) }
    };
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}

fn nonzero_schedules(region: &Region, _: &Target, _: &ArgFacts) -> Vec<Schedule> {
    if matches!(&region.heart, Heart::Op(Op::NonZero { .. })) { vec![Schedule::new("nonzero", &[])] } else { vec![] }
}

fn nonzero(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let x = &region.args[0];
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let total: Dim = x.shape.iter().cloned().product();
    let found = region.outputs[0].ty.shape.get(1).cloned().unwrap_or_default();
    let scan = |b: &mut Builder, env: &mut Env| {
        let (n, columns) = (env.size(b, &total), env.size(b, &found));
        let zero = b.index(0);
        b.for_(zero, n, 1, &[zero], |b, i, at| {
            let v = b.load(env.args[0], i, 1);
            let v = b.cast(v, DType::Bool);
            // Never past the columns there are, whatever the count said.
            let fits = b.lt(at[0], columns);
            let here = b.and(v, fits);
            b.if_(
                here,
                |b| {
                    for (k, c) in split(b, env, i, &x.shape).into_iter().enumerate() {
                        let row = b.mul_i(columns, k as i64);
                        let to = b.add(row, at[0]);
                        b.store(env.outs[0], to, c);
                    }
                    vec![b.add_i(at[0], 1)]
                },
                |_| vec![at[0]],
            )
        });
    };
    let walk = match target {
        Target::Cpu(_) => {
            let (lo, hi) = (b.lo(), b.hi());
            b.for_(lo, hi, 1, &[], |b, _, _| {
                scan(b, &mut env);
                vec![]
            });
            Walk { cpu: Some(CpuShape { extent: Dim::one(), grain: Dim::one(), unit_ps: total * Dim::from(1000i64), scratch: Dim::ZERO }), grid: None }
        }
        Target::Gpu(_) => {
            b.launch().threads = 32;
            let (me, zero) = (b.thread_id(), b.index(0));
            let leader = b.eq(me, zero);
            b.when(leader, |b| scan(b, &mut env));
            Walk { cpu: None, grid: Some([Dim::one(), Dim::one(), Dim::one()]) }
        }
    };
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}
