//! Attention without the matrix units.
//!
//! On a CPU a unit is a block of queries of one batch entry: its keys are transposed into scratch once, then rows go four at a time
//! through scores, softmax and the weighted sum of values, each in register tiles. On a GPU a block of threads takes a row and
//! passes over the keys in chunks, keeping a running maximum.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, builder, cost,
    elementwise::writable,
    expr::{Env, Lanes, Point, VectorAxis, read, reg, round, write},
    fold::Fold,
    native_lanes,
    nest::{Walk, split},
    reduce::across_threads,
};
use crate::{
    targets::Target,
    tile::{self, Buf, Builder, Space, Ty, Val},
};
use pavage_ir::{DType, Dim, ExprId, Heart, Region, Scalar, ScalarFn, Schedule, attr::ReduceFn, region::StageFn};

/// Attention of any size on a CPU; of a known value width on a GPU.
pub const FAMILY: Family = Family { name: "attention", about: "softmax of scores kept in cache, rows in register tiles", schedules, build };

/// Threads of a GPU block.
const THREADS: i64 = 128;
/// Keys that a GPU block holds scores of.
const CHUNK: i64 = 1024;

fn schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let Heart::Attention { v, part: None, .. } = &region.heart else { return vec![] };
    if !writable(region) {
        return vec![];
    }
    match target {
        Target::Cpu(_) => {
            let lanes = native_lanes(target, if region.dtype(*v) == DType::F64 { DType::F64 } else { DType::F32 });
            vec![Schedule::new("attention", &[("lanes", lanes as i64), ("queries", 64), ("rows", 4)])]
        }
        Target::Gpu(_) => match region.space.last().and_then(Dim::as_const) {
            Some(d) if d <= 1024 => vec![Schedule::new("attention", &[("chunk", CHUNK)])],
            _ => vec![],
        },
    }
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let Heart::Attention { q, k, v, mask, scale, keys, depth, part: None } = &region.heart else {
        return Err(KernelError::Unsupported { family: "attention", reason: "not attention".into() });
    };
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let acc = if region.dtype(*v) == DType::F64 { DType::F64 } else { DType::F32 };
    let a = Attention { region, q: *q, k: *k, v: *v, mask: *mask, scale: scale.get(), keys: keys.clone(), depth: depth.clone(), acc };
    let walk = match target {
        Target::Cpu(_) => {
            let lanes = schedule.knob("lanes", 8).max(1);
            let work = Cpu { a: &a, lanes, rows: schedule.knob("rows", 4).clamp(1, 8), scratch: b.scratch(acc) };
            Walk { cpu: Some(work.emit(&mut b, &mut env, schedule.knob("queries", 64).max(1))), grid: None }
        }
        Target::Gpu(_) => Walk { cpu: None, grid: Some(a.on_gpu(&mut b, &mut env, schedule.knob("chunk", CHUNK).max(THREADS))) },
    };
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}

struct Attention<'r> {
    region: &'r Region,
    q: ExprId,
    k: ExprId,
    v: ExprId,
    mask: Option<ExprId>,
    scale: f64,
    keys: Dim,
    depth: Dim,
    acc: DType,
}

impl<'r> Attention<'r> {
    fn rank(&self) -> usize {
        self.region.space.len()
    }

    /// The point `[batch..., i, j]`.
    fn at(&self, batch: &[Val], i: Val, j: Val) -> Point {
        Point::new(batch.iter().copied().chain([i, j]).collect())
    }

    fn value(&self, b: &mut Builder, env: &mut Env<'r>, id: ExprId, p: &mut Point) -> Val {
        let v = env.expr(b, id, p);
        b.cast(v, self.acc)
    }

    /// `sum * scale + mask` at a point `[batch..., s, t]`.
    fn score(&self, b: &mut Builder, env: &mut Env<'r>, sum: Val, p: &mut Point) -> Val {
        let scale = b.float(self.scale, self.acc);
        let scaled = b.map(ScalarFn::Mul, &[sum, scale]);
        match self.mask {
            Some(mask) => {
                let m = self.value(b, env, mask, p);
                b.map(ScalarFn::Add, &[scaled, m])
            }
            None => scaled,
        }
    }

    /// Write the outputs at `[batch..., s, d]`, `p`'s coordinates.
    fn finish(&self, b: &mut Builder, env: &mut Env<'r>, sum: Val, total: Val, p: &mut Point) {
        let dtype = self.region.dtype(self.v);
        let v = b.map(ScalarFn::Div, &[sum, total]);
        let v = b.cast(v, reg(dtype));
        p.accs = vec![round(b, v, dtype)];
        for i in 0..self.region.outputs.len() {
            env.store(b, i, p);
        }
    }

    fn on_gpu(&self, b: &mut Builder, env: &mut Env<'r>, chunk: i64) -> [Dim; 3] {
        b.launch().threads = THREADS as u32;
        let warps = THREADS as u64 / 32;
        let (scores, tops, sums) =
            (b.alloc(Space::Shared, self.acc, chunk as u64), b.alloc(Space::Shared, self.acc, warps), b.alloc(Space::Shared, self.acc, warps));
        let fold = |f| Fold { f: StageFn::Fold(f), dtype: self.acc, position: DType::I32 };
        let (max, sum) = (fold(ReduceFn::Max), fold(ReduceFn::Sum));
        let outer = &self.region.space[..self.rank() - 1];
        let rows: Dim = outer.iter().cloned().product();
        let (row, me) = (b.block_id(0), b.thread_id());
        let at = split(b, env, row, outer);
        let (s, batch) = (at[at.len() - 1], &at[..at.len() - 1]);
        let (n, depth) = (env.size(b, &self.keys), env.size(b, &self.depth));
        let width = self.region.space[self.rank() - 1].as_const().unwrap_or(0);
        let mine = (width as usize).div_ceil(THREADS as usize);
        let zero = b.index(0);
        let low = b.float(f64::NEG_INFINITY, self.acc);
        let nothing = b.float(0.0, self.acc);
        let mut init = vec![low, nothing];
        init.extend(std::iter::repeat_n(nothing, mine));
        let state = b.for_(zero, n, chunk, &init, |b, first, state| {
            let end = b.add_i(first, chunk);
            let end = b.min(end, n);
            let start = b.add(first, me);
            // Scores of this thread's keys.
            let top = b.for_(start, end, THREADS, &[low], |b, t, top| {
                let dot = b.for_(zero, depth, 1, &[nothing], |b, e, dot| {
                    let x = self.value(b, env, self.q, &mut self.at(batch, s, e));
                    let y = self.value(b, env, self.k, &mut self.at(batch, t, e));
                    vec![b.fma(x, y, dot[0])]
                });
                let v = self.score(b, env, dot[0], &mut self.at(batch, s, t));
                let to = b.sub(t, first);
                b.store(scores, to, v);
                vec![b.max(top[0], v)]
            });
            let top = across_threads(b, &max, top, me, THREADS, &[tops])[0];
            let top = b.max(top, state[0]);
            // Where all is masked so far nothing is added; a row masked throughout ends as 0 / 0.
            let masked = b.eq(top, low);
            let base = b.select(masked, nothing, top);
            let part = b.for_(start, end, THREADS, &[nothing], |b, t, part| {
                let at = b.sub(t, first);
                let v = b.load(scores, at, 1);
                let v = b.sub(v, base);
                let p = b.map(ScalarFn::Exp, &[v]);
                b.store(scores, at, p);
                vec![b.add(part[0], p)]
            });
            let part = across_threads(b, &sum, part, me, THREADS, &[sums])[0];
            let back = b.sub(state[0], base);
            let back = b.map(ScalarFn::Exp, &[back]);
            let total = b.fma(state[1], back, part);
            let mut next = vec![top, total];
            for i in 0..mine {
                let d = b.add_i(me, i as i64 * THREADS);
                let old = b.mul(state[2 + i], back);
                let w = b.index(width);
                let here = b.lt(d, w);
                let v = b.if_(
                    here,
                    |b| {
                        b.for_(first, end, 1, &[old], |b, t, sum| {
                            let at = b.sub(t, first);
                            let p = b.load(scores, at, 1);
                            let v = self.value(b, env, self.v, &mut self.at(batch, t, d));
                            vec![b.fma(p, v, sum[0])]
                        })
                    },
                    |_| vec![old],
                );
                next.push(v[0]);
            }
            b.barrier();
            next
        });
        for i in 0..mine {
            let d = b.add_i(me, i as i64 * THREADS);
            let w = b.index(width);
            let here = b.lt(d, w);
            b.when(here, |b| self.finish(b, env, state[2 + i], state[1], &mut self.at(batch, s, d)));
        }
        [rows, Dim::one(), Dim::one()]
    }
}

struct Cpu<'a, 'r> {
    a: &'a Attention<'r>,
    lanes: i64,
    rows: i64,
    /// Transposed keys `[depth, padded]`, then scores `[rows, padded]`.
    scratch: Buf,
}

/// What happens at a vector of a run: gets its start, its axis and the carried values; gives the next ones.
type Visit<'a> = &'a mut dyn FnMut(&mut Builder, Val, Option<VectorAxis>, &[Val]) -> Vec<Val>;

/// What is fixed in a unit.
struct Unit {
    batch: Vec<Val>,
    keys: Val,
    /// Keys rounded up to whole vectors.
    padded: Val,
    depth: Val,
}

impl<'r> Cpu<'_, 'r> {
    fn emit(&self, b: &mut Builder, env: &mut Env<'r>, queries: i64) -> CpuShape {
        let a = self.a;
        let space = &a.region.space;
        let rank = a.rank();
        let batch: Vec<Dim> = space[..rank - 2].to_vec();
        let blocks = space[rank - 2].ceil_div(&Dim::from(queries));
        let (lo, hi) = (b.lo(), b.hi());
        let padded = a.keys.ceil_div(&Dim::from(self.lanes)) * Dim::from(self.lanes);
        b.for_(lo, hi, 1, &[], |b, u, _| {
            let parts: Vec<Dim> = batch.iter().cloned().chain([blocks.clone()]).collect();
            let at = split(b, env, u, &parts);
            let (block, at) = (at[at.len() - 1], &at[..at.len() - 1]);
            let unit = Unit { batch: at.to_vec(), keys: env.size(b, &a.keys), padded: env.size(b, &padded), depth: env.size(b, &a.depth) };
            self.transpose(b, env, &unit);
            let n = env.size(b, &space[rank - 2]);
            let from = b.mul_i(block, queries);
            let to = b.add_i(from, queries);
            let to = b.min(to, n);
            let len = b.sub(to, from);
            let rest = b.rem_i(len, self.rows);
            let full = b.sub(to, rest);
            b.for_(from, full, self.rows, &[], |b, s, _| {
                self.tile(b, env, &unit, s, self.rows as usize);
                vec![]
            });
            if self.rows > 1 {
                b.for_(full, to, 1, &[], |b, s, _| {
                    self.tile(b, env, &unit, s, 1);
                    vec![]
                });
            }
            vec![]
        });
        let queries = space[rank - 2].smaller(&Dim::from(queries));
        let flops = queries * a.keys.clone() * (a.depth.clone() + space[rank - 1].clone() + Dim::from(16i64));
        let unit_ps = flops * Dim::from(30i64) + Dim::from(20_000i64);
        let scratch = padded * (a.depth.clone() + Dim::from(self.rows)) * Dim::from(a.acc.bits() as i64 / 8);
        let extent = batch.iter().cloned().product::<Dim>() * blocks;
        CpuShape { extent, grain: cost::grain(&unit_ps), unit_ps, scratch }
    }

    /// Steps of a vector over `0..n` along axis `axis` of points; the last is a masked one.
    fn vectors(&self, b: &mut Builder, n: Val, axis: usize, init: &[Val], visit: Visit<'_>) -> Vec<Val> {
        let lanes = self.lanes as usize;
        let at = |count| (lanes > 1).then_some(VectorAxis { axis, lanes, count, aligned: true });
        let zero = b.index(0);
        let rest = b.rem_i(n, self.lanes);
        let full = b.sub(n, rest);
        let state = b.for_(zero, full, self.lanes, init, |b, i, state| visit(b, i, at(None), state));
        if lanes == 1 {
            return state;
        }
        let some = b.gt(rest, zero);
        b.if_(some, |b| visit(b, full, at(Some(rest)), &state), |_| state.clone())
    }

    fn transpose(&self, b: &mut Builder, env: &mut Env<'r>, unit: &Unit) {
        let a = self.a;
        let (zero, rank) = (b.index(0), a.rank());
        let along_depth = env.address(a.k).is_some_and(|(_, at)| env.lanes_along(&at, rank - 1, None) == Lanes::Step(1));
        if along_depth {
            b.for_(zero, unit.keys, 1, &[], |b, t, _| {
                self.vectors(b, unit.depth, rank - 1, &[], &mut |b, e, vector, _| {
                    let mut p = a.at(&unit.batch, t, e).along(vector);
                    let v = a.value(b, env, a.k, &mut p);
                    let first = b.mul(e, unit.padded);
                    let first = b.add(first, t);
                    let Some(VectorAxis { lanes, count, .. }) = vector else {
                        b.store(self.scratch, first, v);
                        return vec![];
                    };
                    let iota = b.iota(DType::I64, lanes);
                    let to = b.map(ScalarFn::Mul, &[iota, unit.padded]);
                    let to = b.map(ScalarFn::Add, &[to, first]);
                    let mask = count.map(|n| b.lane_mask(n, lanes));
                    b.scatter(self.scratch, to, v, mask);
                    vec![]
                });
                vec![]
            });
            return;
        }
        b.for_(zero, unit.depth, 1, &[], |b, e, _| {
            let row = b.mul(e, unit.padded);
            self.vectors(b, unit.keys, rank - 2, &[], &mut |b, t, vector, _| {
                let mut p = a.at(&unit.batch, t, e).along(vector);
                let v = a.value(b, env, a.k, &mut p);
                let to = b.add(row, t);
                write(b, self.scratch, to, v, &p);
                vec![]
            });
            vec![]
        });
    }

    /// Queries `s..s + rows`, through to the outputs.
    fn tile(&self, b: &mut Builder, env: &mut Env<'r>, unit: &Unit, s: Val, rows: usize) {
        let a = self.a;
        let (zero, rank, lanes) = (b.index(0), a.rank(), self.lanes as usize);
        let ty = Ty::of_lanes(a.acc, lanes);
        let queries: Vec<Val> = (0..rows as i64).map(|i| b.add_i(s, i)).collect();
        let base = b.mul(unit.depth, unit.padded);
        let lines: Vec<Val> = (0..rows as i64)
            .map(|i| {
                let line = b.mul_i(unit.padded, i);
                b.add(base, line)
            })
            .collect();
        let (low, nothing) = (b.constant_of(Scalar::F(f64::NEG_INFINITY), ty), b.constant_of(Scalar::F(0.0), ty));
        // Scores, two vectors of keys at a time.
        let scores = |b: &mut Builder, env: &mut Env<'r>, t: Val, vectors: &[Option<VectorAxis>], tops: &[Val]| {
            let init = vec![nothing; rows * vectors.len()];
            let sums = b.for_(zero, unit.depth, 1, &init, |b, e, sums| {
                let row = b.mul(e, unit.padded);
                let row = b.add(row, t);
                let keys: Vec<Val> = (0..vectors.len())
                    .map(|j| {
                        let at = b.add_i(row, (j * lanes) as i64);
                        b.load(self.scratch, at, lanes)
                    })
                    .collect();
                let mut next = vec![];
                for (i, q) in queries.iter().enumerate() {
                    let x = a.value(b, env, a.q, &mut a.at(&unit.batch, *q, e));
                    for (j, y) in keys.iter().enumerate() {
                        next.push(b.fma(x, *y, sums[i * vectors.len() + j]));
                    }
                }
                next
            });
            let mut next = vec![];
            for (i, q) in queries.iter().enumerate() {
                let mut top = tops[i];
                for (j, vector) in vectors.iter().enumerate() {
                    let t = b.add_i(t, (j * lanes) as i64);
                    let mut p = a.at(&unit.batch, *q, t).along(*vector);
                    let mut v = a.score(b, env, sums[i * vectors.len() + j], &mut p);
                    v = b.splat(v, lanes);
                    if let Some(VectorAxis { count: Some(n), .. }) = vector {
                        let mask = b.lane_mask(*n, lanes);
                        v = b.select(mask, v, low);
                    }
                    let to = b.add(lines[i], t);
                    b.store(self.scratch, to, v);
                    top = b.max(top, v);
                }
                next.push(top);
            }
            next
        };
        let whole = (lanes > 1).then_some(VectorAxis { axis: rank - 1, lanes, count: None, aligned: true });
        let wide = 2 * self.lanes;
        let rest = b.rem_i(unit.keys, wide);
        let full = b.sub(unit.keys, rest);
        let tops = b.for_(zero, full, wide, &vec![low; rows], |b, t, tops| scores(b, env, t, &[whole, whole], tops));
        let tops = b.for_(full, unit.keys, self.lanes, &tops, |b, t, tops| {
            let left = b.sub(unit.keys, t);
            let tail = whole.map(|w| VectorAxis { count: Some(left), ..w });
            scores(b, env, t, &[tail], tops)
        });
        // Softmax, unscaled; lanes beyond the keys hold minus infinity and add nothing.
        let mut totals = vec![];
        for (line, top) in lines.iter().zip(tops) {
            let top = b.reduce(tile::ReduceFn::Max, top);
            let sum = b.for_(zero, unit.padded, self.lanes, &[nothing], |b, t, sum| {
                let at = b.add(*line, t);
                let v = b.load(self.scratch, at, lanes);
                let v = b.map(ScalarFn::Sub, &[v, top]);
                let p = b.map(ScalarFn::Exp, &[v]);
                b.store(self.scratch, at, p);
                vec![b.add(sum[0], p)]
            });
            totals.push(b.reduce(tile::ReduceFn::Add, sum[0]));
        }
        // Weighted values.
        let width = env.size(b, &a.region.space[rank - 1]);
        let values = |b: &mut Builder, env: &mut Env<'r>, d: Val, vectors: &[Option<VectorAxis>]| {
            let init = vec![nothing; rows * vectors.len()];
            let sums = b.for_(zero, unit.keys, 1, &init, |b, t, sums| {
                let vs: Vec<Val> = vectors
                    .iter()
                    .enumerate()
                    .map(|(j, vector)| {
                        let d = b.add_i(d, (j * lanes) as i64);
                        let v = a.value(b, env, a.v, &mut a.at(&unit.batch, t, d).along(*vector));
                        b.splat(v, lanes)
                    })
                    .collect();
                let mut next = vec![];
                for (i, line) in lines.iter().enumerate() {
                    let at = b.add(*line, t);
                    let p = read(b, self.scratch, at, &Point::default());
                    for (j, v) in vs.iter().enumerate() {
                        next.push(b.fma(p, *v, sums[i * vectors.len() + j]));
                    }
                }
                next
            });
            for (i, q) in queries.iter().enumerate() {
                for (j, vector) in vectors.iter().enumerate() {
                    let d = b.add_i(d, (j * lanes) as i64);
                    let mut p = a.at(&unit.batch, *q, d).along(*vector);
                    a.finish(b, env, sums[i * vectors.len() + j], totals[i], &mut p);
                }
            }
        };
        let rest_wide = b.rem_i(width, wide);
        let full_wide = b.sub(width, rest_wide);
        let rest = b.rem_i(width, self.lanes);
        let full = b.sub(width, rest);
        b.for_(zero, full_wide, wide, &[], |b, d, _| {
            values(b, env, d, &[whole, whole]);
            vec![]
        });
        b.for_(full_wide, full, self.lanes, &[], |b, d, _| {
            values(b, env, d, &[whole]);
            vec![]
        });
        if let Some(w) = whole {
            let some = b.gt(rest, zero);
            b.when(some, |b| values(b, env, full, &[Some(VectorAxis { count: Some(rest), ..w })]));
        }
    }
}
