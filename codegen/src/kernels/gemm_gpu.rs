//! Contractions on any GPU: tiles of both operands in shared memory, `fma` on register tiles.
//!
//! A block of 256 threads makes a tile of `64 * rows` x `64 * cols` results, a thread 4 x 4 in each 64 x 64 quarter, so that its reads of
//! shared memory are 16-byte vectors. Operands are whatever expressions the region has (converted weights, guarded loads, computed
//! values): they are evaluated once per tile on their way into shared memory, while the tile before is multiplied. What no
//! specialised family takes runs here: f32 and f64, odd strides, fused prologues.
use super::expr::{Env, Point, VectorAxis, affine, reg};
use super::gemm_mma::pieces;
use super::implicit::{Product, product};
use super::{ArgFacts, Built, Family, KernelError, builder};
use crate::targets::Target;
use crate::tile::{Buf, Builder, Launch, Space, Ty, Val};
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Region, Scalar, Schedule};

/// Any contraction or convolution whose results are whole bytes.
pub const FAMILY: Family = Family { name: "gemm_gpu", about: "contractions and convolutions in shared-memory tiles on the general cores", schedules, build };

const THREADS: i64 = 256;
/// Contracted elements of a tile where there are tiles enough to hide the way to memory; otherwise more.
const BK: i64 = 16;

/// The sizes a contraction has.
struct Shape<'r> {
    k: &'r Dim,
    lhs: ExprId,
    rhs: ExprId,
    /// Dtype of accumulators in registers.
    acc: DType,
    /// Rank of the space.
    p: usize,
}

fn shape(region: &Region) -> Option<Shape<'_>> {
    let Heart::Contract { k, lhs, rhs, acc } = &region.heart else { return None };
    let p = region.space.len();
    let whole = region.outputs.iter().all(|o| o.ty.dtype.bits() >= 8 && o.ty.dtype != DType::Str);
    (p >= 2 && whole).then_some(Shape { k, lhs: *lhs, rhs: *rhs, acc: reg(*acc), p })
}

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    let Target::Gpu(gpu) = target else { return vec![] };
    let conv = matches!(region.heart, Heart::Conv { .. });
    let Some(Product { region, .. }) = product(region, facts) else { return vec![] };
    let region = &region;
    let Some(s) = shape(region) else { return vec![] };
    let known = |d: &Dim, guess: i64| d.as_const().unwrap_or(guess);
    let (m, n) = (known(&region.space[s.p - 2], 512), known(&region.space[s.p - 1], 512));
    // With a channel or two a group there is nothing to share: plain loops.
    if conv && n < 4 {
        return vec![];
    }
    let batch: i64 = region.space[..s.p - 2].iter().map(|d| known(d, 1)).product();
    let mut found = vec![];
    for (rows, cols) in [(2, 2), (1, 2), (2, 1), (1, 1)] {
        let tiles = batch * ((m + 64 * rows - 1) / (64 * rows)) * ((n + 64 * cols - 1) / (64 * cols));
        // Two blocks share a multiprocessor; a larger tile reads less for what it computes.
        let waves = (tiles + 2 * i64::from(gpu.sms) - 1) / (2 * i64::from(gpu.sms));
        let cost = waves * (rows * cols * 8 + rows + cols);
        let deep = if tiles < 2 * i64::from(gpu.sms) && rows * cols == 1 && known(s.k, 256) >= 8 * BK { 4 * BK } else { BK };
        found.push((cost, Schedule::new("gemm_gpu", &[("rows", rows), ("cols", cols), ("bk", deep)])));
    }
    found.sort_by_key(|f| f.0);
    found.into_iter().map(|f| f.1).collect()
}

/// How one operand gets into shared memory.
struct Side {
    id: ExprId,
    /// Its own axis (m or n) in points of the region.
    axis: usize,
    extent: Val,
    /// Rows of the tile along that axis.
    size: i64,
    /// Whether neighbouring threads take neighbours along the contracted axis.
    along_k: bool,
    lanes: i64,
    /// Contracted elements of a tile.
    bk: i64,
    /// Its two buffers, one after the other: `[k][size + 4]`.
    tile: Buf,
}

impl Side {
    fn pitch(&self) -> i64 {
        self.size + 4
    }

    fn count(&self) -> i64 {
        self.size * self.bk / self.lanes / THREADS
    }

    /// Contracted index and own index of the `i`-th piece of this thread, inside the tile.
    fn piece(&self, b: &mut Builder, thread: Val, i: i64) -> (Val, Val) {
        let q = b.add_i(thread, i * THREADS);
        let row = if self.along_k { self.bk / self.lanes } else { self.size / self.lanes };
        let (slow, fast) = (b.div_i(q, row), b.rem_i(q, row));
        let fast = b.mul_i(fast, self.lanes);
        if self.along_k { (fast, slow) } else { (slow, fast) }
    }
}

/// Whether a load runs along `axis` in aligned pieces of four.
fn fours(env: &Env<'_>, id: ExprId, axis: usize, extent: &Dim) -> bool {
    pieces(env, id, axis, extent, 4).is_some_and(|(arg, ..)| env.region.args[arg].dtype.bits() >= 16)
}

/// Whether `id` steps by one along `axis`.
fn contiguous(region: &Region, id: ExprId, axis: usize) -> bool {
    let Expr::Load { arg, index, .. } = region.expr(id) else { return false };
    affine(&Env::flat(&region.args[*arg as usize].shape, index), axis).is_some_and(|(f, _)| f.is(1))
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let unfit = || KernelError::Unsupported { family: "gemm_gpu", reason: format!("`{}` is no contraction", region.name) };
    let Product { region, packs } = product(region, facts).ok_or_else(unfit)?;
    let region = &region;
    let s = shape(region).ok_or_else(unfit)?;
    let (p, rows, cols, bk) = (s.p, schedule.knob("rows", 1), schedule.knob("cols", 1), schedule.knob("bk", BK));
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    *b.launch() = Launch { threads: THREADS as u32, min_ctas: 1, ..Launch::default() };
    let extent = |b: &mut Builder, env: &mut Env<'_>, d: &Dim| env.size(b, d);
    let (m, n, k) = (extent(&mut b, &mut env, &region.space[p - 2]), extent(&mut b, &mut env, &region.space[p - 1]), extent(&mut b, &mut env, s.k));
    let batch: Vec<Val> = region.space[..p - 2].iter().map(|d| env.size(&mut b, d)).collect();
    for sym in region.symbols() {
        env.sym(&mut b, &sym);
    }
    let side = |b: &mut Builder, env: &Env<'_>, id: ExprId, axis: usize, val: Val, size: i64, natural_k: bool| {
        let along_k = if contiguous(region, id, axis) { false } else { natural_k || contiguous(region, id, p) };
        let (inner, extent) = if along_k { (p, s.k) } else { (axis, &region.space[axis]) };
        let lanes = if fours(env, id, inner, extent) { 4 } else { 1 };
        let tile = b.shared(s.acc, (2 * bk * (size + 4)) as u64);
        Side { id, axis, extent: val, size, along_k, lanes, bk, tile }
    };
    let lhs = side(&mut b, &env, s.lhs, p - 2, m, 64 * rows, true);
    let rhs = side(&mut b, &env, s.rhs, p - 1, n, 64 * cols, false);

    // Tile of this block: rows fastest, then columns, then batches.
    let block = b.block_id(0);
    let (tall, wide) = (up(&mut b, m, lhs.size), up(&mut b, n, rhs.size));
    let (down, rest) = (b.rem(block, tall), b.div(block, tall));
    let (across, mut rest) = (b.rem(rest, wide), b.div(rest, wide));
    let mut at = vec![];
    for size in batch.iter().rev() {
        at.insert(0, b.rem(rest, *size));
        rest = b.div(rest, *size);
    }
    let (m0, n0) = (b.mul_i(down, lhs.size), b.mul_i(across, rhs.size));
    let thread = b.thread_id();
    let zero = b.index(0);
    let axes = |own: (usize, Val), k: Val| -> Vec<Val> {
        let mut axes: Vec<Val> = at.clone();
        axes.resize(p, zero);
        axes[own.0] = own.1;
        axes.push(k);
        axes
    };
    let fetch = |b: &mut Builder, env: &mut Env<'_>, x: &Side, first: Val, k0: Val| -> Vec<Val> {
        (0..x.count())
            .map(|i| {
                let (kk, own) = x.piece(b, thread, i);
                let (kk, own) = (b.add(kk, k0), b.add(own, first));
                let inside = b.lt(kk, k);
                // Beyond the edges the nearest piece that exists is read; along k it counts as 0.
                let edge = |b: &mut Builder, v: Val, end: Val, lanes: i64| {
                    let last = b.add_i(end, -lanes);
                    b.min(v, last)
                };
                let kk = edge(b, kk, k, if x.along_k { x.lanes } else { 1 });
                let own = edge(b, own, x.extent, if x.along_k { 1 } else { x.lanes });
                let axes = axes((x.axis, own), kk);
                let mut point = if x.lanes > 1 {
                    Point::vector(axes, VectorAxis { axis: if x.along_k { p } else { x.axis }, lanes: x.lanes as usize, count: None, aligned: true })
                } else {
                    Point::new(axes)
                };
                let v = env.expr_lanes(b, x.id, &mut point);
                let v = b.cast(v, s.acc);
                let ty = b.ty(v);
                let nothing = b.constant_of(Scalar::F(0.0).cast(s.acc), ty);
                b.select(inside, v, nothing)
            })
            .collect()
    };
    let stash = |b: &mut Builder, x: &Side, half: Val, vals: &[Val]| {
        for (i, v) in vals.iter().enumerate() {
            let (kk, own) = x.piece(b, thread, i as i64);
            let row = b.mul_i(kk, x.pitch());
            let to = b.add(row, own);
            let to = b.add(to, half);
            if x.along_k {
                for l in 0..x.lanes {
                    let (e, to) = (b.extract(*v, l as usize), b.add_i(to, l * x.pitch()));
                    b.store(x.tile, to, e);
                }
            } else {
                b.store(x.tile, to, *v);
            }
        }
    };
    let (ty, tx) = (b.div_i(thread, 16), b.rem_i(thread, 16));
    let (ty, tx) = (b.mul_i(ty, 4), b.mul_i(tx, 4));
    let four = Ty::of_lanes(s.acc, 4);
    let none = b.constant_of(Scalar::F(0.0).cast(s.acc), four);
    let count = (rows * 4 * cols) as usize;
    let (av, bv) = (fetch(&mut b, &mut env, &lhs, m0, zero), fetch(&mut b, &mut env, &rhs, n0, zero));
    stash(&mut b, &lhs, zero, &av);
    stash(&mut b, &rhs, zero, &bv);
    b.barrier();
    let accs = b.for_(zero, k, bk, &vec![none; count], |b, k0, accs| {
        let ahead = b.add_i(k0, bk);
        let (av, bv) = (fetch(b, &mut env, &lhs, m0, ahead), fetch(b, &mut env, &rhs, n0, ahead));
        // Even tiles are in the first half, odd ones in the second.
        let turn = b.div_i(k0, bk);
        let turn = b.rem_i(turn, 2);
        let other = b.index(1);
        let other = b.sub(other, turn);
        let half = |b: &mut Builder, x: &Side, t: Val| b.mul_i(t, bk * x.pitch());
        let (lh, rh) = (half(b, &lhs, turn), half(b, &rhs, turn));
        let (lt, rt) = (b.add(lh, ty), b.add(rh, tx));
        // A deep tile is a loop and no straight line: what runs once is as slow as its instructions are fetched, some 6 ns each.
        let (first, end) = (b.index(0), b.index(bk));
        let accs = b.for_(first, end, BK, accs, |b, k1, accs| {
            let mut accs = accs.to_vec();
            let (lk, rk) = (b.mul_i(k1, lhs.pitch()), b.mul_i(k1, rhs.pitch()));
            let (lk, rk) = (b.add(lt, lk), b.add(rt, rk));
            for kk in 0..BK {
                let mut quarters = |x: &Side, from: Val, count: i64| -> Vec<Val> {
                    let at: Vec<Val> = (0..count).map(|q| b.add_i(from, kk * x.pitch() + 64 * q)).collect();
                    at.into_iter().map(|i| b.load(x.tile, i, 4)).collect()
                };
                let (a, w) = (quarters(&lhs, lk, rows), quarters(&rhs, rk, cols));
                for r in 0..(rows * 4) as usize {
                    let x = b.extract(a[r / 4], r % 4);
                    let x = b.splat(x, 4);
                    for (c, w) in w.iter().enumerate() {
                        let slot = &mut accs[r * cols as usize + c];
                        *slot = if s.acc.is_float() {
                            b.fma(x, *w, *slot)
                        } else {
                            let y = b.mul(x, *w);
                            b.add(*slot, y)
                        };
                    }
                }
            }
            accs
        });
        let (lo, ro) = (half(b, &lhs, other), half(b, &rhs, other));
        stash(b, &lhs, lo, &av);
        stash(b, &rhs, ro, &bv);
        b.barrier();
        accs
    });
    // Columns in fours where they come in fours.
    let lanes = if region.space[p - 1].as_const().is_some_and(|n| n % 4 == 0) { 4 } else { 1 };
    for (i, acc) in accs.iter().enumerate() {
        let (r, c) = ((i / cols as usize) as i64, (i % cols as usize) as i64);
        let (row, col) = (b.add(m0, ty), b.add(n0, tx));
        let (row, col) = (b.add_i(row, r / 4 * 64 + r % 4), b.add_i(col, 64 * c));
        for piece in 0..4 / lanes {
            let col = b.add_i(col, piece);
            let (in_m, in_n) = (b.lt(row, m), b.lt(col, n));
            let inside = b.and(in_m, in_n);
            let value = if lanes == 4 { *acc } else { b.extract(*acc, piece as usize) };
            b.when(inside, |b| {
                let axes: Vec<Val> = at.iter().copied().chain([row, col]).collect();
                let mut point = Point::vector(axes, VectorAxis { axis: p - 1, lanes: lanes as usize, count: None, aligned: true });
                point.accs = vec![value];
                for o in 0..region.outputs.len() {
                    env.store(b, o, &mut point);
                }
            });
        }
    }
    let mut kernel = b.finish();
    // Tensors begin at multiples of 256 bytes.
    kernel.bufs.iter_mut().filter(|x| x.space == Space::Global).for_each(|x| x.align = 16);
    let tiles = region.space[p - 2].ceil_div(&Dim::from(64 * rows)) * region.space[p - 1].ceil_div(&Dim::from(64 * cols));
    let grid = region.space[..p - 2].iter().fold(tiles, |t, d| t * d.clone());
    Ok(Built { kernel, schedule: schedule.clone(), dims: env.dims, cpu: None, grid: Some([grid, Dim::one(), Dim::one()]), packs })
}

/// `ceil(x / by)` for `x >= 0`.
fn up(b: &mut Builder, x: Val, by: i64) -> Val {
    let x = b.add_i(x, by - 1);
    b.div_i(x, by)
}
