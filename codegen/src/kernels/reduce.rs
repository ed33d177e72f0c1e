//! Row programs: reductions in stages and full-row outputs (softmax, normalisations, means, argmax).
//!
//! Where memory runs along the last reduced axis, a row is one unit and vectors run along it with several
//! accumulators; otherwise vectors run across rows and each lane reduces its own. Stages that do not read each other
//! share a pass. On a GPU a warp or a block takes a row in the first case, a thread in the second.
use super::{
    ArgFacts, Built, Family, KernelError, builder, cost,
    elementwise::{pick_axis, vector_lanes, writable},
    expr::{Env, Lanes, Point, VectorAxis, reg},
    fold::Fold,
    nest::{Nest, THREADS, Walk, split},
    space,
};
use crate::{
    targets::Target,
    tile::{Buf, Builder, ShflKind, Space, Val},
};
use pavage_ir::{
    DType, Dim, Expr, ExprId, Heart, Region, Schedule,
    region::{Stage, StageFn},
};

/// Any reduction.
pub const FAMILY: Family = Family { name: "reduce", about: "row programs: stages folded along or across vectors, then row outputs", schedules, build };

fn schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let Heart::Reduce { .. } = &region.heart else { return vec![] };
    if !writable(region) {
        return vec![];
    }
    let flat = space::collapse(region);
    let env = Env::with_bufs(&flat, vec![], vec![]);
    let Heart::Reduce { axes, stages } = &flat.heart else { return vec![] };
    let roots = env.roots();
    let parallel = flat.space.len();
    let row = parallel + axes.len() - 1;
    let lanes = vector_lanes(&flat, target);
    let (axis, across) = pick_axis(&env, &roots, lanes);
    let extent = axes[axes.len() - 1].as_const();
    // Operands that are the same for every row stay in cache: only where there are no others do they decide.
    let per_row = |d: &Dim| env.axes_of_dim(d) & ((1 << parallel) - 1) != 0;
    let in_rows = |d: &Dim| env.axes_of_dim(d) >> parallel != 0;
    let loads = flat.exprs.iter().filter_map(|(e, _)| if let Expr::Load { index, .. } = e { Some(index[0].clone()) } else { None });
    let mut places: Vec<Dim> = loads.chain((0..flat.outputs.len()).map(|i| env.out_address(i))).filter(in_rows).collect();
    if places.iter().any(per_row) {
        places.retain(per_row);
    }
    let contiguous = |k: usize| {
        let steps = places.iter().map(|d| env.lanes_along(d, k, None));
        steps.fold((0, 0), |(good, bad), s| match s {
            Lanes::Step(1) => (good + 1, bad),
            Lanes::Step(0) => (good, bad),
            _ => (good, bad + 1),
        })
    };
    let ((row_good, row_bad), (axis_good, axis_bad)) = (contiguous(row), contiguous(axis));
    let along_pays = row_good > 0 && row_good - row_bad >= axis_good - axis_bad && extent.is_none_or(|n| n >= 4);
    let along_lanes = extent.map_or(lanes, |n| lanes.min((n.max(1) as usize).next_power_of_two()));
    let short = extent.is_some_and(|n| n < 64);
    let along = Schedule::new("reduce", &[("along", 1), ("lanes", along_lanes as i64), ("sets", if short { 1 } else { 4 })]);
    // What a short row waits for, its folds, fills the time of rows beside it.
    let beside = Schedule::new("reduce", &[("along", 1), ("lanes", along_lanes as i64), ("sets", 1), ("rows", ROWS)]);
    let beside_pays = short && stages.len() > 1 && flat.space.last().is_some_and(|d| d.as_const().is_none_or(|n| n >= ROWS));
    // Several vectors of rows side by side, where memory lies so: whole cache lines at each step.
    let wide = if across > 1 && axis_good > 0 && flat.space[axis].as_const().is_none_or(|n| n >= 4 * across as i64) { 4 } else { 1 };
    let across = Schedule::new("reduce", &[("along", 0), ("axis", axis as i64), ("lanes", across as i64), ("wide", wide)]);
    let gpu_row = |threads: i64| Schedule::new("reduce", &[("along", 1), ("threads", threads)]);
    match target {
        Target::Cpu(_) if along_pays && beside_pays => vec![beside, along, across],
        Target::Cpu(_) if along_pays => vec![along, across],
        Target::Cpu(_) => vec![across],
        Target::Gpu(gpu) if along_pays && extent.is_none_or(|n| n >= 16) => {
            let total: Dim = axes.iter().cloned().product();
            let rows = flat.space.iter().map(|d| d.as_const().unwrap_or(16)).product();
            vec![gpu_row(total.as_const().map_or(THREADS, |n| threads_a_row(rows, n, i64::from(gpu.sms)))), across]
        }
        Target::Gpu(gpu) => {
            // A thread a row leaves the machine empty when there are few long rows: threads share a row then, wherever it lies.
            let guess = |dims: &[Dim], size: i64| dims.iter().map(|d| d.as_const().unwrap_or(size)).product::<i64>();
            let (rows, long) = (guess(&flat.space, 1), guess(axes, 256));
            if rows < 64 * i64::from(gpu.sms) && long >= 64 {
                vec![gpu_row(if rows > i64::from(gpu.sms) { 32 } else { THREADS }), across]
            } else {
                vec![across]
            }
        }
    }
}

/// Short rows that a CPU thread takes together.
const ROWS: i64 = 4;

/// Elements of a row that a GPU thread holds in registers at most.
const HELD: i64 = 16;

/// Elements of those that a GPU thread reads all it needs of before the first stage.
const AHEAD: usize = 4;

/// GPU threads that share a row of `n` elements, which each holds a few of: more where `rows` alone would leave units idle.
fn threads_a_row(rows: i64, n: i64, units: i64) -> i64 {
    let mut threads = 32;
    while threads < 1024 && (n > HELD * threads || n > 4 * threads && 2 * threads * rows <= 1024 * units) {
        threads *= 2;
    }
    threads
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let flat = space::collapse(region);
    let Heart::Reduce { axes, stages } = &flat.heart else {
        return Err(KernelError::Unsupported { family: "reduce", reason: "not a reduction".into() });
    };
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, &flat);
    let roots = env.roots();
    let along = schedule.knob("along", 0) == 1;
    let cpu = matches!(target, Target::Cpu(_));
    let mut rows = Rows {
        region: &flat,
        axes,
        stages,
        cache: None,
        along: (along && cpu).then(|| Along { lanes: schedule.knob("lanes", 1).max(1) as usize, sets: schedule.knob("sets", 1).max(1) as usize }),
    };
    let row_points = axes.iter().map(|d| d.as_const().unwrap_or(256)).product::<i64>();
    let point_ps = cost::point_ps(&flat, &roots);
    rows.cache = rows.along.and_then(|_| rows.worth_keeping(&env)).map(|(stage, expr)| Cache { stage, expr, buf: b.scratch(reg(flat.dtype(expr))) });
    if along && !cpu {
        let threads = schedule.knob("threads", THREADS).clamp(32, 1024);
        let grid = rows.on_gpu(&mut b, &mut env, threads);
        return Ok(Built::new(b.finish(), schedule, env.dims, Walk { cpu: None, grid: Some(grid) }));
    }
    let axis = (schedule.knob("axis", flat.space.len() as i64 - 1) as usize).min(flat.space.len() - 1);
    let nest = Nest {
        space: flat.space.clone(),
        vector: if along { None } else { Some(axis) },
        lanes: if along { 1 } else { schedule.knob("lanes", 1).max(1) as usize },
        unroll: 1,
        wide: schedule.knob(if along { "rows" } else { "wide" }, 1).clamp(1, 8) as usize,
        point_ps: point_ps.saturating_mul(row_points),
    };
    let mut walk = nest.emit(&mut b, &mut env, &roots, &mut |b, env, points| rows.row(b, env, points));
    if let (Some(shape), Some(cache), Some(along)) = (&mut walk.cpu, &rows.cache, rows.along) {
        // Whole vectors are kept, the last one too.
        shape.scratch = kept_of_row(axes, along) * Dim::from(nest.wide * reg(flat.dtype(cache.expr)).bits() / 8);
    }
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}

/// Elements of scratch that a row's kept values take.
fn kept_of_row(axes: &[Dim], along: Along) -> Dim {
    axes[0].clone() + Dim::from(along.lanes)
}

/// Vectors along the last reduced axis.
#[derive(Clone, Copy)]
struct Along {
    lanes: usize,
    sets: usize,
}

/// Values of a stage kept in scratch, because they are dear and needed again.
struct Cache {
    stage: usize,
    expr: ExprId,
    buf: Buf,
}

struct Rows<'r> {
    cache: Option<Cache>,
    region: &'r Region,
    axes: &'r [Dim],
    stages: &'r [Stage],
    along: Option<Along>,
}

/// What happens at a point of a row: gets carried values, a mask of the lanes that exist, which set; gives the next ones.
type Visit<'a, 'r> = &'a mut dyn FnMut(&mut Builder, &mut Env<'r>, &mut Point, &[Val], Option<Val>, usize) -> Vec<Val>;

/// A point of a row that a GPU thread keeps what it computes of, and whether it exists where that is not sure.
type Held = (Point, Option<Val>);

impl<'r> Rows<'r> {
    fn first(&self) -> usize {
        self.region.space.len()
    }

    fn inner_bits(&self) -> u64 {
        (0..self.axes.len()).fold(0, |m, k| m | 1 << (self.first() + k))
    }

    fn fold(&self, stage: &Stage) -> Fold {
        let small = self.axes[0].as_const().is_some_and(|n| n < i64::from(i32::MAX));
        Fold { f: stage.f, dtype: self.region.dtype(stage.expr), position: if small { DType::I32 } else { DType::I64 } }
    }

    /// Runs of stages that do not read each other.
    fn groups(&self, env: &Env) -> Vec<&'r [Stage]> {
        let mut groups = vec![];
        let mut from = 0;
        for k in 1..=self.stages.len() {
            if k == self.stages.len() || env.accs_of(self.stages[k].expr) >> from != 0 {
                groups.push(&self.stages[from..k]);
                from = k;
            }
        }
        groups
    }

    /// The dearest stage expression that later stages or outputs ask for again, where a row is one run of elements.
    fn worth_keeping(&self, env: &Env) -> Option<(usize, ExprId)> {
        if self.axes.len() != 1 {
            return None;
        }
        let again = |stage: usize, expr: ExprId| {
            let outputs = self.region.outputs.iter().map(|o| o.expr);
            self.stages[stage + 1..].iter().map(|s| s.expr).chain(outputs).any(|user| uses(self.region, user, expr))
        };
        let dear = |expr: ExprId| env.axes_of(expr) & self.inner_bits() != 0 && cost::point_ps(self.region, &[expr]) > 800;
        let found = self.stages.iter().enumerate().map(|(i, s)| (i, s.expr)).filter(|(i, e)| dear(*e) && again(*i, *e));
        found.max_by_key(|(_, e)| cost::point_ps(self.region, &[*e]))
    }

    /// Outputs written at every point of a row, and those written once.
    fn outputs(&self, env: &Env) -> (Vec<usize>, Vec<usize>) {
        (0..self.region.outputs.len()).partition(|i| env.axes_of_dim(&env.out_address(*i)) & self.inner_bits() != 0)
    }

    /// Everything of one row, or of rows side by side: the lanes of each point.
    fn row(&self, b: &mut Builder, env: &mut Env<'r>, points: &mut [Point]) {
        let mut done = 0;
        for group in self.groups(env) {
            let exprs: Vec<ExprId> = group.iter().map(|s| s.expr).collect();
            for p in points.iter_mut() {
                env.hoist(b, &exprs, p, self.inner_bits());
            }
            let results = self.pass(b, env, points, group, done);
            done += group.len();
            for (p, accs) in points.iter_mut().zip(results) {
                p.accs.extend(accs);
            }
        }
        let (each, once) = self.outputs(env);
        let exprs: Vec<ExprId> = each.iter().map(|i| self.region.outputs[*i].expr).collect();
        if !each.is_empty() {
            for p in points.iter_mut() {
                env.hoist(b, &exprs, p, self.inner_bits());
            }
            self.walk(b, env, points, 0, &[], &mut |b, env, p, _, _, set| {
                self.recall(b, env, p, done, set);
                for &i in &each {
                    env.store(b, i, p);
                }
                vec![]
            });
        }
        for p in points {
            for (k, extent) in self.axes.iter().enumerate() {
                let n = env.size(b, extent);
                p.axes[self.first() + k] = b.add_i(n, -1);
            }
            for &i in &once {
                env.store(b, i, p);
            }
        }
    }

    /// Where in scratch the value at a point is kept, of the row that this set of accumulators belongs to.
    fn kept_at(&self, b: &mut Builder, env: &mut Env<'r>, p: &Point, set: usize) -> Val {
        let at = p.axes[self.first()];
        match self.along.map(|a| (a, set / a.sets)) {
            Some((along, row)) if row > 0 => {
                let each = env.size(b, &kept_of_row(self.axes, along));
                let start = b.mul_i(each, row as i64);
                b.add(start, at)
            }
            _ => at,
        }
    }

    /// Take the kept value at a point, once the stages before `done` have run.
    fn recall(&self, b: &mut Builder, env: &mut Env<'r>, p: &mut Point, done: usize, set: usize) {
        if let Some(cache) = self.cache.as_ref().filter(|c| c.stage < done) {
            let at = self.kept_at(b, env, p, set);
            let v = b.load(cache.buf, at, p.lanes());
            p.know(cache.expr, v);
        }
    }

    /// Fold one group of stages (the first of them number `first`) over the row, for each point.
    fn pass(&self, b: &mut Builder, env: &mut Env<'r>, points: &[Point], group: &[Stage], first: usize) -> Vec<Vec<Val>> {
        // Sets of accumulators: one of each point, or several along its row.
        let (lanes, each) = self.along.map_or((points[0].lanes(), 1), |a| (a.lanes, a.sets));
        let folds: Vec<Fold> = group.iter().map(|s| self.fold(s)).collect();
        let width: usize = folds.iter().map(Fold::width).sum();
        let mut init = vec![];
        for _ in 0..each * points.len() {
            for f in &folds {
                init.extend(f.start(b, lanes));
            }
        }
        let last = self.first() + self.axes.len() - 1;
        let out = self.walk(b, env, points, 0, &init, &mut |b, env, p, carried, mask, set| {
            let mut next = carried.to_vec();
            let mut at = set * width;
            self.recall(b, env, p, first, set);
            for (i, (stage, fold)) in group.iter().zip(&folds).enumerate() {
                let v = env.expr(b, stage.expr, p);
                if let Some(cache) = self.cache.as_ref().filter(|c| c.stage == first + i) {
                    let v = b.splat(v, lanes);
                    let place = self.kept_at(b, env, p, set);
                    b.store(cache.buf, place, v);
                }
                let position = matches!(stage.f, StageFn::Arg { .. }).then(|| {
                    let base = b.cast(p.axes[last], fold.position);
                    if self.along.is_some() && lanes > 1 {
                        let iota = b.iota(fold.position, lanes);
                        b.map(pavage_ir::ScalarFn::Add, &[iota, base])
                    } else {
                        base
                    }
                });
                let acc = fold.step(b, &carried[at..at + fold.width()], v, position, mask);
                next[at..at + fold.width()].copy_from_slice(&acc);
                at += fold.width();
            }
            next
        });
        let mut results = vec![vec![]; points.len()];
        let mut at = 0;
        for fold in &folds {
            let part = |set: usize| out[set * width + at..][..fold.width()].to_vec();
            for (point, result) in results.iter_mut().enumerate() {
                let mut acc = part(point * each);
                for set in 1..each {
                    acc = fold.join(b, &acc, &part(point * each + set));
                }
                if self.along.is_some() {
                    acc = fold.lanes(b, &acc);
                }
                result.push(fold.finish(b, &acc));
            }
            at += fold.width();
        }
        results
    }

    /// Visit the elements of a row from reduced axis `k` on, for each point.
    fn walk(&self, b: &mut Builder, env: &mut Env<'r>, points: &[Point], k: usize, init: &[Val], visit: Visit<'_, 'r>) -> Vec<Val> {
        let axis = self.first() + k;
        let (zero, n) = (b.index(0), env.size(b, &self.axes[k]));
        let moved = |p: &Point, i: Val| {
            let mut p = p.clone();
            p.axes[axis] = i;
            p
        };
        if k + 1 < self.axes.len() {
            return b.for_(zero, n, 1, init, |b, i, carried| {
                let points: Vec<Point> = points.iter().map(|p| moved(p, i)).collect();
                self.walk(b, env, &points, k + 1, carried, visit)
            });
        }
        let Some(Along { lanes, sets }) = self.along else {
            return b.for_(zero, n, 1, init, |b, i, carried| {
                let mut carried = carried.to_vec();
                for (set, p) in points.iter().enumerate() {
                    carried = visit(b, env, &mut moved(p, i), &carried, None, set);
                }
                carried
            });
        };
        let at = |p: &Point, i: Val, count: Option<Val>| moved(p, i).along((lanes > 1).then_some(VectorAxis { axis, lanes, count, aligned: true }));
        let wide = (lanes * sets) as i64;
        let (rest_wide, rest) = (b.rem_i(n, wide), b.rem_i(n, lanes as i64));
        let (full_wide, full) = (b.sub(n, rest_wide), b.sub(n, rest));
        let mut state = b.for_(zero, full_wide, wide, init, |b, i, carried| {
            let mut carried = carried.to_vec();
            for set in 0..sets {
                let i = b.add_i(i, (set * lanes) as i64);
                for (n, p) in points.iter().enumerate() {
                    carried = visit(b, env, &mut at(p, i, None), &carried, None, n * sets + set);
                }
            }
            carried
        });
        // What is left of the rows goes to their first sets.
        let mut left = |b: &mut Builder, i: Val, count: Option<Val>, mask: Option<Val>, carried: &[Val]| {
            let mut carried = carried.to_vec();
            for (n, p) in points.iter().enumerate() {
                carried = visit(b, env, &mut at(p, i, count), &carried, mask, n * sets);
            }
            carried
        };
        if sets > 1 {
            state = b.for_(full_wide, full, lanes as i64, &state, |b, i, carried| left(b, i, None, None, carried));
        }
        if lanes > 1 {
            let some = b.gt(rest, zero);
            state = b.if_(
                some,
                |b| {
                    let mask = b.lane_mask(rest, lanes);
                    left(b, full, Some(rest), Some(mask), &state)
                },
                |_| state.clone(),
            );
        }
        state
    }

    /// `threads` threads a row: 32 make a block of 8 rows, more are one block.
    fn on_gpu(&self, b: &mut Builder, env: &mut Env<'r>, threads: i64) -> [Dim; 3] {
        let per_block = if threads == 32 { THREADS / 32 } else { 1 };
        b.launch().threads = (threads * per_block) as u32;
        let rows: Dim = self.region.space.iter().cloned().product();
        let (block, tid) = (b.block_id(0), b.thread_id());
        let (row, me) = if per_block == 1 {
            (block, tid)
        } else {
            let first = b.mul_i(block, per_block);
            let warp = b.div_i(tid, 32);
            (b.add(first, warp), b.rem_i(tid, 32))
        };
        let groups = self.groups(env);
        // Shared memory of each stage, declared before any branch.
        let mut shared: Vec<Vec<Buf>> = vec![];
        for stage in self.stages {
            let f = self.fold(stage);
            let mut bufs = vec![];
            if per_block == 1 {
                bufs.push(b.alloc(Space::Shared, reg(f.dtype), threads as u64 / 32));
                if f.width() == 2 {
                    bufs.push(b.alloc(Space::Shared, f.position, threads as u64 / 32));
                }
            }
            shared.push(bufs);
        }
        let n = env.size(b, &rows);
        let inside = b.lt(row, n);
        b.when(inside, |b| {
            let zero = b.index(0);
            let mut axes = vec![zero; 64];
            let at = split(b, env, row, &self.region.space);
            axes[..at.len()].copy_from_slice(&at);
            let mut p = Point::new(axes);
            // What no stage has to be done for is read now: threads wait for memory once, not after each stage.
            let roots = env.roots();
            env.hoist(b, &roots, &mut p, self.inner_bits());
            let mut held = self.held(b, env, &p, me, threads);
            for (at, _) in held.iter_mut().flatten().take(AHEAD) {
                env.hoist(b, &roots, at, 0);
            }
            let mut done = 0;
            for group in groups {
                let exprs: Vec<ExprId> = group.iter().map(|s| s.expr).collect();
                env.hoist(b, &exprs, &mut p, self.inner_bits());
                let folds: Vec<Fold> = group.iter().map(|s| self.fold(s)).collect();
                let mut init = vec![];
                for f in &folds {
                    init.extend(f.start(b, 1));
                }
                let last = self.first() + self.axes.len() - 1;
                let mut state = self.stride(b, env, (&p, held.as_deref_mut()), (me, threads), &init, &mut |b, env, p, carried, mask, _| {
                    let mut next = vec![];
                    for (stage, f) in group.iter().zip(&folds) {
                        let v = env.expr(b, stage.expr, p);
                        let position = b.cast(p.axes[last], f.position);
                        next.extend(f.step(b, &carried[next.len()..][..f.width()], v, Some(position), mask));
                    }
                    next
                });
                for (k, f) in folds.iter().enumerate() {
                    let acc: Vec<Val> = state.drain(..f.width()).collect();
                    let acc = across_threads(b, f, acc, me, threads, &shared[done + k]);
                    let v = f.finish(b, &acc);
                    p.accs.push(v);
                }
                done += group.len();
            }
            let (each, once) = self.outputs(env);
            let exprs: Vec<ExprId> = each.iter().map(|i| self.region.outputs[*i].expr).collect();
            env.hoist(b, &exprs, &mut p, self.inner_bits());
            if !each.is_empty() {
                self.stride(b, env, (&p, held.as_deref_mut()), (me, threads), &[], &mut |b, env, p, _, mask, _| {
                    let mut write = |b: &mut Builder| each.iter().for_each(|i| env.store(b, *i, p));
                    match mask {
                        Some(inside) => b.when(inside, write),
                        None => write(b),
                    }
                    vec![]
                });
            }
            if !once.is_empty() {
                let leader = b.eq(me, zero);
                b.when(leader, |b| {
                    for i in once {
                        env.store(b, i, &mut p);
                    }
                });
            }
        });
        [rows.ceil_div(&Dim::from(per_block)), Dim::one(), Dim::one()]
    }

    /// The points of a row that are this thread's, `me`, `me + threads`, ..., where they are so few that what is computed at each stays in
    /// registers from one stage to the next. With the last may come whether it exists; it stands at the end of the row if not.
    fn held(&self, b: &mut Builder, env: &mut Env<'r>, p: &Point, me: Val, threads: i64) -> Option<Vec<Held>> {
        let total = self.axes.iter().cloned().product::<Dim>().as_const().filter(|n| (1..=HELD * threads).contains(n))?;
        let points = (0..(total + threads - 1) / threads).map(|k| {
            let mut i = b.add_i(me, k * threads);
            let inside = ((k + 1) * threads > total).then(|| {
                let (n, last) = (b.index(total), b.index(total - 1));
                let inside = b.lt(i, n);
                i = b.min(i, last);
                inside
            });
            (self.point(b, env, p, i), inside)
        });
        Some(points.collect())
    }

    /// The point at element `i` of a row.
    fn point(&self, b: &mut Builder, env: &mut Env<'r>, row: &Point, i: Val) -> Point {
        let mut p = row.clone();
        let at = split(b, env, i, self.axes);
        p.axes[self.first()..self.first() + at.len()].copy_from_slice(&at);
        p
    }

    /// Visit the points of row `p` that are this thread's: those held, or `me`, `me + threads`, ... in a loop.
    fn stride(
        &self,
        b: &mut Builder,
        env: &mut Env<'r>,
        (p, held): (&Point, Option<&mut [Held]>),
        (me, threads): (Val, i64),
        init: &[Val],
        visit: Visit<'_, 'r>,
    ) -> Vec<Val> {
        if let Some(held) = held {
            let mut state = init.to_vec();
            for (at, inside) in held {
                at.learn(p);
                state = visit(b, env, at, &state, *inside, 0);
            }
            return state;
        }
        let total: Dim = self.axes.iter().cloned().product();
        let n = env.size(b, &total);
        b.for_(me, n, threads, init, |b, i, carried| {
            let mut at = self.point(b, env, p, i);
            visit(b, env, &mut at, carried, None, 0)
        })
    }
}

/// The accumulators of all threads of a row as one, known to each of them; always combined in the same order.
pub fn across_threads(b: &mut Builder, f: &Fold, mut acc: Vec<Val>, me: Val, threads: i64, shared: &[Buf]) -> Vec<Val> {
    for distance in [16, 8, 4, 2, 1] {
        let lane = b.index(distance);
        let other: Vec<Val> = acc.iter().map(|v| b.shfl(ShflKind::Xor, *v, lane)).collect();
        acc = f.join(b, &acc, &other);
    }
    if threads <= 32 {
        return acc;
    }
    let warp = b.div_i(me, 32);
    let lane = b.rem_i(me, 32);
    let zero = b.index(0);
    let leader = b.eq(lane, zero);
    b.when(leader, |b| {
        for (buf, v) in shared.iter().zip(&acc) {
            b.store(*buf, warp, *v);
        }
    });
    b.barrier();
    let read = |b: &mut Builder, w: i64| -> Vec<Val> {
        let at = b.index(w);
        shared.iter().map(|buf| b.load(*buf, at, 1)).collect()
    };
    let mut all = read(b, 0);
    for w in 1..threads / 32 {
        let next = read(b, w);
        all = f.join(b, &all, &next);
    }
    all
}

/// Whether `user` is computed from `what`; operands precede their users in the pool.
fn uses(region: &Region, user: ExprId, what: ExprId) -> bool {
    let mut from = vec![false; region.exprs.len()];
    from[what.0 as usize] = true;
    for i in what.0 as usize + 1..=user.0 as usize {
        from[i] = match &region.exprs[i].0 {
            Expr::Call(_, xs) => xs.iter().any(|x| from[x.0 as usize]),
            Expr::Cast(x) | Expr::Bits(x) => from[x.0 as usize],
            _ => false,
        };
    }
    from[user.0 as usize]
}
