//! Attention of a few queries on a GPU: a matter of memory, not of matrix units.
//!
//! A block takes up to eight queries of one batch entry and passes over its keys, or over one part of them; keys and values
//! are read once for all of these queries, 16 bytes at a time. The lanes of a warp form groups of as many as a key has pieces:
//! a group takes a key, each lane a piece of it, and of its value. Every group keeps a maximum, a sum and a weighted
//! sum of values of its own for each query, rescaled as the maximum grows; at the end they meet in shared memory.
use super::{
    ArgFacts, Built, Family, KernelError, builder,
    elementwise::writable,
    expr::{Env, Point, VectorAxis, reg, round, zero},
    gemm_mma::pieces,
    hopper_words::ex2,
    nest::{Walk, split},
};
use crate::{
    targets::Target,
    tile::{Builder, ReduceFn, ShflKind, Space, Ty, Val},
};
use pavage_ir::{DType, Dim, ExprId, Heart, Region, ScalarFn, Schedule};

/// Few queries, or parts of the keys.
pub const FAMILY: Family =
    Family { name: "attention_few", about: "attention of few queries, or over parts of the keys: each key read once for all", schedules, build };

/// Queries that are few.
pub const FEW: i64 = 16;
/// Elements of a key or value at most.
const WIDEST: i64 = 256;
/// Queries of a block at most.
const ROWS: i64 = 8;

/// Depth and width, where the family applies.
fn shape(region: &Region) -> Option<(i64, i64)> {
    let Heart::Attention { v, depth, part, .. } = &region.heart else { return None };
    let [.., rows, width] = region.space.as_slice() else { return None };
    let few = part.is_some() || rows.as_const().is_some_and(|n| n <= FEW);
    let width = width.as_const()? - if part.is_some() { 2 } else { 0 };
    let sizes = (depth.as_const()?, width);
    let fits = |n: i64| (1..=WIDEST).contains(&n);
    (few && fits(sizes.0) && fits(sizes.1) && region.dtype(*v).bits() <= 32 && writable(region)).then_some(sizes)
}

fn schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let (Target::Gpu(_), Some(_)) = (target, shape(region)) else { return vec![] };
    let rows = region.space[region.space.len() - 2].as_const().map_or(ROWS, |n| {
        let blocks = ((n + ROWS - 1) / ROWS).max(1);
        ((n + blocks - 1) / blocks).max(1)
    });
    // More queries than four fill the registers.
    let keys = if rows > 4 { 2 } else { 4 };
    [(4, keys), (8, keys), (4, keys / 2), (8, keys / 2)]
        .map(|(warps, keys)| Schedule::new("attention_few", &[("warps", warps), ("rows", rows), ("keys", keys)]))
        .into()
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let unfit = || KernelError::Unsupported { family: "attention_few", reason: format!("`{}` is no attention of few queries", region.name) };
    let Some((depth, width)) = shape(region) else { return Err(unfit()) };
    let Heart::Attention { q, k, v, mask, scale, keys, part, .. } = &region.heart else { return Err(unfit()) };
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let batch = region.space.len() - 2 - usize::from(part.is_some());
    let wide = |id: ExprId, extent: i64| {
        let most = 16 / (region.dtype(id).bits() as i64 / 8);
        [8, 4, 2].into_iter().find(|l| *l <= most && pieces(&env, id, batch + 1, &Dim::from(extent), *l).is_some()).unwrap_or(1)
    };
    let (key, value) = (Run::new(wide(*k, depth), depth), Run::new(wide(*v, width), width));
    let group = key.pieces.max(value.pieces).min(32).next_power_of_two() as i64;
    let few = Few {
        region,
        q: *q,
        k: *k,
        v: *v,
        mask: *mask,
        scale: scale.get(),
        batch,
        key,
        value,
        group,
        warps: schedule.knob("warps", 4).clamp(1, 16),
        rows: schedule.knob("rows", ROWS).clamp(1, ROWS),
        ahead: schedule.knob("keys", 4).clamp(1, 8),
        parts: part.is_some(),
    };
    let grid = few.write(&mut b, &mut env, keys, part.as_ref());
    let dims = env.dims;
    let mut kernel = b.finish();
    // Tensors begin at multiples of 256 bytes.
    kernel.bufs.iter_mut().filter(|x| x.space == Space::Global).for_each(|x| x.align = 16);
    Ok(Built::new(kernel, schedule, dims, Walk { cpu: None, grid: Some(grid) }))
}

/// How the elements of a key or value are taken.
#[derive(Clone, Copy)]
struct Run {
    /// Elements of a piece.
    lanes: usize,
    /// Pieces.
    pieces: usize,
}

impl Run {
    fn new(lanes: i64, extent: i64) -> Run {
        Run { lanes: lanes as usize, pieces: (extent / lanes) as usize }
    }

    /// Pieces that a lane takes.
    fn each(self, group: i64) -> usize {
        self.pieces.div_ceil(group as usize)
    }
}

/// `e^(score - top)`, which is at most 1: a few instructions, within 2^-20 where it is not next to nothing.
fn weight(b: &mut Builder, score: Val, top: Val) -> Val {
    let below = b.sub(score, top);
    let log2e = b.float(std::f64::consts::LOG2_E, DType::F32);
    let below = b.mul(below, log2e);
    ex2(b, below)
}

struct Few<'r> {
    region: &'r Region,
    q: ExprId,
    k: ExprId,
    v: ExprId,
    mask: Option<ExprId>,
    scale: f64,
    /// Batch axes.
    batch: usize,
    key: Run,
    value: Run,
    /// Lanes that share a key.
    group: i64,
    warps: i64,
    rows: i64,
    /// Keys that a group takes at a time.
    ahead: i64,
    /// Whether results are those of parts.
    parts: bool,
}

/// Where a block, and a lane of it, stands.
struct Here {
    batch: Vec<Val>,
    /// The block's queries; those beyond the last are the last once more.
    rows: Vec<Val>,
    /// The lane's place in its group.
    place: Val,
    /// The group's place in its warp.
    group: Val,
    /// Queries, in pieces.
    queries: Vec<Vec<Val>>,
    /// End of the block's keys.
    end: Val,
}

impl<'r> Few<'r> {
    fn write(&self, b: &mut Builder, env: &mut Env<'r>, keys: &Dim, part: Option<&Dim>) -> [Dim; 3] {
        let threads = 32 * self.warps;
        b.launch().threads = threads as u32;
        let groups = threads / self.group;
        let width = (self.value.lanes * self.value.pieces) as i64;
        let each = groups * self.rows;
        let (sums, tops, totals) = (b.shared(DType::F32, (each * width) as u64), b.shared(DType::F32, each as u64), b.shared(DType::F32, each as u64));
        let space = &self.region.space;
        let queries = &space[space.len() - 2];
        let blocks = queries.ceil_div(&Dim::from(self.rows));
        let parts = if self.parts { space[self.batch].clone() } else { Dim::one() };
        let outer: Vec<Dim> = space[..self.batch].iter().cloned().chain([blocks.clone(), parts.clone()]).collect();
        let (block, thread) = (b.block_id(0), b.thread_id());
        let at = split(b, env, block, &outer);
        let (batch, run) = (at[..self.batch].to_vec(), at[self.batch + 1]);
        let (n, s) = (env.size(b, keys), env.size(b, queries));
        let (start, end) = match part {
            Some(part) => {
                let part = env.size(b, part);
                let start = b.mul(run, part);
                let end = b.add(start, part);
                (start, b.min(end, n))
            }
            None => (b.index(0), n),
        };
        let first_row = b.mul_i(at[self.batch], self.rows);
        let last = b.add_i(s, -1);
        let rows: Vec<Val> = (0..self.rows)
            .map(|i| {
                let row = b.add_i(first_row, i);
                b.min(row, last)
            })
            .collect();
        let (warp, lane) = (b.div_i(thread, 32), b.rem_i(thread, 32));
        let mut here = Here { batch, rows, place: b.rem_i(lane, self.group), group: b.div_i(lane, self.group), queries: vec![], end };
        here.queries = (0..self.rows as usize).map(|i| self.pieces(b, env, &here, self.q, here.rows[i], self.key)).collect();

        let per = 32 / self.group * self.ahead;
        let step = per * self.warps;
        let first = b.mul_i(warp, per);
        let first = b.add(start, first);
        // Steps that lie inside the keys come first; one that does not may follow.
        let inside = b.add_i(end, 1 - per);
        let state = self.start(b);
        let state = b.for_(first, inside, step, &state, |b, t, state| self.step(b, env, &here, t, false, state));
        let zero = b.index(0);
        let left = b.sub(inside, first);
        let left = b.add_i(left, step - 1);
        let steps = b.div_i(left, step);
        let steps = b.max(steps, zero);
        let done = b.mul_i(steps, step);
        let next = b.add(first, done);
        let state = b.for_(next, end, step, &state, |b, t, state| self.step(b, env, &here, t, true, state));

        // What each group found, then each thread a result.
        let slot = b.mul_i(warp, 32 / self.group);
        let slot = b.add(slot, here.group);
        let slot = b.mul_i(slot, self.rows);
        let leader = b.eq(here.place, zero);
        for (i, row) in state.chunks(2 + self.value.each(self.group)).enumerate() {
            let slot = b.add_i(slot, i as i64);
            b.when(leader, |b| {
                b.store(tops, slot, row[0]);
                b.store(totals, slot, row[1]);
            });
            let line = b.mul_i(slot, width);
            for (c, sum) in row[2..].iter().enumerate() {
                let piece = b.add_i(here.place, c as i64 * self.group);
                let to = b.mul_i(piece, self.value.lanes as i64);
                let to = b.add(line, to);
                let count = b.index(self.value.pieces as i64);
                let exists = b.lt(piece, count);
                b.when(exists, |b| b.store(sums, to, *sum));
            }
        }
        b.barrier();
        let wide = if self.parts { width + 2 } else { width };
        let all = b.index(self.rows * wide);
        b.for_(thread, all, threads, &[], |b, i, _| {
            let (row, d) = (b.div_i(i, wide), b.rem_i(i, wide));
            let query = b.add(first_row, row);
            let exists = b.lt(query, s);
            b.when(exists, |b| {
                let low = b.float(f64::NEG_INFINITY, DType::F32);
                let nothing = b.float(0.0, DType::F32);
                let slots = b.index(groups * self.rows);
                let top = b.for_(row, slots, self.rows, &[low], |b, slot, top| {
                    let v = b.load(tops, slot, 1);
                    vec![b.max(top[0], v)]
                })[0];
                let hidden = b.eq(top, low);
                let base = b.select(hidden, nothing, top);
                // The columns behind the sums hold none.
                let end = b.index(width - 1);
                let column = b.min(d, end);
                let found = b.for_(row, slots, self.rows, &[nothing, nothing], |b, slot, found| {
                    let v = b.load(tops, slot, 1);
                    let weight = weight(b, v, base);
                    let total = b.load(totals, slot, 1);
                    let at = b.mul_i(slot, width);
                    let at = b.add(at, column);
                    let sum = b.load(sums, at, 1);
                    vec![b.fma(weight, sum, found[0]), b.fma(weight, total, found[1])]
                });
                let mut axes = here.batch.clone();
                let v = if self.parts {
                    axes.push(run);
                    let (behind, second) = (b.gt(d, end), b.index(width));
                    let second = b.gt(d, second);
                    let v = b.select(behind, top, found[0]);
                    b.select(second, found[1], v)
                } else {
                    b.map(ScalarFn::Div, &[found[0], found[1]])
                };
                let dtype = if self.parts { DType::F32 } else { self.region.dtype(self.v) };
                axes.extend([query, d]);
                let mut p = Point::new(axes);
                let v = b.cast(v, reg(dtype));
                p.accs = vec![round(b, v, dtype)];
                for o in 0..self.region.outputs.len() {
                    env.store(b, o, &mut p);
                }
            });
            vec![]
        });
        [outer.into_iter().product(), Dim::one(), Dim::one()]
    }

    /// Nothing seen yet: maximum, sum and weighted values of each query.
    fn start(&self, b: &mut Builder) -> Vec<Val> {
        let low = b.float(f64::NEG_INFINITY, DType::F32);
        let nothing = b.float(0.0, DType::F32);
        let none = zero(b, Ty::of_lanes(DType::F32, self.value.lanes));
        let row: Vec<Val> = [low, nothing].into_iter().chain(std::iter::repeat_n(none, self.value.each(self.group))).collect();
        row.repeat(self.rows as usize)
    }

    /// This lane's pieces of row `i` of an operand, in f32; zeros beyond its end.
    fn pieces(&self, b: &mut Builder, env: &mut Env<'r>, here: &Here, id: ExprId, i: Val, run: Run) -> Vec<Val> {
        (0..run.each(self.group))
            .map(|c| {
                let piece = b.add_i(here.place, c as i64 * self.group);
                let whole = (c as i64 + 1) * self.group <= run.pieces as i64;
                let end = b.index(run.pieces as i64 - 1);
                let kept = if whole { piece } else { b.min(piece, end) };
                let first = b.mul_i(kept, run.lanes as i64);
                let axes = here.batch.iter().copied().chain([i, first]).collect();
                let mut p = Point::vector(axes, VectorAxis { axis: self.batch + 1, lanes: run.lanes, count: None, aligned: true });
                let v = env.expr_lanes(b, id, &mut p);
                let v = b.cast(v, DType::F32);
                if whole {
                    return v;
                }
                let exists = b.eq(piece, kept);
                self.only(b, exists, v)
            })
            .collect()
    }

    /// `v` where `keep` holds, else zeros.
    fn only(&self, b: &mut Builder, keep: Val, v: Val) -> Val {
        let ty = b.ty(v);
        let nothing = zero(b, ty);
        b.select(keep, v, nothing)
    }

    /// The sum over the lanes of a group, in each of them.
    fn across(&self, b: &mut Builder, mut v: Val) -> Val {
        let mut distance = self.group / 2;
        while distance > 0 {
            let lane = b.index(distance);
            let other = b.shfl(ShflKind::Xor, v, lane);
            v = b.add(v, other);
            distance /= 2;
        }
        v
    }

    /// The next keys of each group, the first of the warp's being `t`. `edge`: not all of them need exist.
    fn step(&self, b: &mut Builder, env: &mut Env<'r>, here: &Here, t: Val, edge: bool, state: &[Val]) -> Vec<Val> {
        let low = b.float(f64::NEG_INFINITY, DType::F32);
        let nothing = b.float(0.0, DType::F32);
        let last = b.add_i(here.end, -1);
        let first = b.add(t, here.group);
        let places: Vec<(Val, Option<Val>)> = (0..self.ahead)
            .map(|u| {
                let t = b.add_i(first, u * (32 / self.group));
                if edge { (b.min(t, last), Some(b.lt(t, here.end))) } else { (t, None) }
            })
            .collect();
        let keys: Vec<Vec<Val>> = places.iter().map(|(t, _)| self.pieces(b, env, here, self.k, *t, self.key)).collect();
        let mut values = vec![];
        for (t, exists) in &places {
            let pieces = self.pieces(b, env, here, self.v, *t, self.value);
            values.push(pieces.into_iter().map(|v| exists.map_or(v, |e| self.only(b, e, v))).collect::<Vec<_>>());
        }
        let scale = b.float(self.scale, DType::F32);
        let mut next = vec![];
        for (i, row) in state.chunks(2 + self.value.each(self.group)).enumerate() {
            let mut scores = vec![];
            for ((t, exists), key) in places.iter().zip(&keys) {
                let mut products = b.mul(here.queries[i][0], key[0]);
                for (x, y) in here.queries[i].iter().zip(key).skip(1) {
                    products = b.fma(*x, *y, products);
                }
                let dot = b.reduce(ReduceFn::Add, products);
                let dot = self.across(b, dot);
                let mut score = b.mul(dot, scale);
                if let Some(mask) = self.mask {
                    let mut p = Point::new(here.batch.iter().copied().chain([here.rows[i], *t]).collect());
                    let m = env.expr(b, mask, &mut p);
                    let m = b.cast(m, DType::F32);
                    score = b.add(score, m);
                }
                scores.push(exists.map_or(score, |e| b.select(e, score, low)));
            }
            let top = scores.iter().fold(row[0], |top, s| b.max(top, *s));
            // Where all is masked so far nothing is added.
            let hidden = b.eq(top, low);
            let base = b.select(hidden, nothing, top);
            let back = weight(b, row[0], base);
            let weights: Vec<Val> = scores.iter().map(|s| weight(b, *s, base)).collect();
            let mut total = b.mul(row[1], back);
            for w in &weights {
                total = b.add(total, *w);
            }
            next.extend([top, total]);
            for (c, sum) in row[2..].iter().enumerate() {
                let mut sum = b.mul(*sum, back);
                for (w, value) in weights.iter().zip(&values) {
                    sum = b.fma(*w, value[c], sum);
                }
                next.push(sum);
            }
        }
        next
    }
}
