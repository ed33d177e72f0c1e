//! Attention on Hopper: `o = softmax(scale * q k^T) v` in one pass over the keys, in the manner of FlashAttention-3.
//!
//! A block owns `64 * consumers` queries of one head at a time. One warp brings K and V through two rings; each consumer
//! warpgroup keeps 64 rows of scores, running maxima and sums, and the result in registers. In the loop the product
//! of the next scores is issued before that of the last probabilities with V, so the softmax of one runs under the other.
//! Keys go from last to first: the ragged tail, and the diagonal of a causal mask, are both in the peeled first step.
//! The result is rescaled only where a row's maximum grew by more than 2^8 since its scale was chosen.
use super::hopper_gemm::Size;
use super::hopper_words::*;
use crate::tile::hopper::{HopperWord as H, Major, Role, TensorMap, size};
use crate::tile::op::{ReduceFn, ShflKind, VoteKind};
use crate::tile::{Access, Buf, Builder, Device, Kernel, Space, Ty, Val};
use pavage_ir::{DType, Dim};

/// The numbers of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashTiles {
    /// Consumer warpgroups: 2 or 3; a block takes 64 queries for each.
    pub consumers: u64,
    /// Keys of a step: a multiple of 16 up to 256.
    pub keys: u64,
    /// Stages of each ring.
    pub stages: u64,
    /// Whether the consumers take turns at the tensor cores.
    pub pingpong: bool,
    /// Heads whose tiles run together when causal.
    pub heads: u64,
}

impl FlashTiles {
    /// What measured best for a head of `depth` elements.
    pub fn best(depth: u64, causal: bool) -> FlashTiles {
        let consumers = if depth == 64 && !causal { 3 } else { 2 };
        FlashTiles { consumers, keys: 128, stages: 2, pingpong: false, heads: 8 }
    }

    /// Queries of a block's tile.
    pub fn queries(&self) -> u64 {
        64 * self.consumers
    }
}

/// An attention to be written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Elements of a head: 64 or 128.
    pub depth: u64,
    /// Factor of the scores.
    pub scale: f64,
    /// Whether query `i` sees keys `0..=i` only; queries and keys are then equally many.
    pub causal: bool,
}

/// Keys' mask: the value added to the scores (before `log2 e`), as an f32 fragment; given the first key of the step and the
/// head. Columns beyond the keys may hold anything.
pub type Bias<'b> = &'b mut dyn FnMut(&mut Builder, BiasAt) -> Val;

/// Where a bias is wanted.
#[derive(Clone, Debug)]
pub struct BiasAt {
    /// First key.
    pub col: Val,
    /// First query of the warpgroup.
    pub row: Val,
    /// Coordinates on the batch axes.
    pub batch: Vec<Val>,
    /// Registers of the fragment.
    pub lanes: u16,
}

/// One operand: rows of `depth` contiguous elements.
#[derive(Clone, Debug)]
pub struct Rows {
    /// The argument.
    pub arg: Buf,
    /// Elements from row to row.
    pub stride: Dim,
    /// Elements from one to the next along each batch axis; none: the same for all.
    pub batch: Vec<Option<Dim>>,
    /// Elements from the argument's start.
    pub offset: Dim,
}

/// Operands and sizes.
#[derive(Clone, Debug)]
pub struct Operands {
    /// Queries, keys, values and the result.
    pub rows: [Rows; 4],
    /// Batch axes (batch, heads, ...), at most 3.
    pub batch: Vec<Size>,
    /// Queries.
    pub queries: Size,
    /// Keys.
    pub keys: Size,
}

struct Rings {
    k: Buf,
    v: Buf,
    full: [Buf; 2],
    empty: [Buf; 2],
}

struct State {
    max: Val,
    sum: Val,
}

/// The arithmetic of the softmax.
struct Softmax {
    att: Attention,
    keys: u64,
    /// From scores to exponents of 2; with a bias the scores are exponents already.
    factor: f64,
    /// Whether all of a row may be masked in some step.
    biased: bool,
}

/// Write the body of a kernel; the builder is fresh but for arguments and sizes.
pub fn write(b: &mut Builder, att: Attention, tiles: FlashTiles, ops: &Operands, mut bias: Option<Bias<'_>>) {
    let [q, k, v, o] = &ops.rows;
    let dtype = b.dtype(q.arg);
    let (d, bm, bn, stages) = (att.depth, tiles.queries(), tiles.keys, tiles.stages);
    let panels = d / PANEL;
    let log2e = std::f64::consts::LOG2_E;
    let w = Softmax { att, keys: bn, factor: if bias.is_some() { 1.0 } else { att.scale * log2e }, biased: bias.is_some() };
    let (producer_regs, consumer_regs) = if tiles.consumers == 2 { (24, 240) } else { (32, 160) };
    let threads = 128 * (tiles.consumers as u32 + 1);
    *b.launch() = crate::tile::Launch { threads, min_ctas: 1, ..Default::default() };

    let sq = b.alloc_aligned(Space::Shared, dtype, bm * d, 1024);
    let rings = Rings {
        k: b.alloc_aligned(Space::Shared, dtype, stages * bn * d, 1024),
        v: b.alloc_aligned(Space::Shared, dtype, stages * bn * d, 1024),
        full: [0, 1].map(|_| b.alloc_aligned(Space::Shared, DType::U64, stages, 8)),
        empty: [0, 1].map(|_| b.alloc_aligned(Space::Shared, DType::U64, stages, 8)),
    };
    let so = b.alloc_aligned(Space::Shared, dtype, bm * d, 1024);
    let q_full = b.alloc_aligned(Space::Shared, DType::U64, 1, 8);
    let q_empty = b.alloc_aligned(Space::Shared, DType::U64, 1, 8);

    let map = |b: &mut Builder, r: &Rows, extent: &Dim, height: u64| {
        let mut t = TensorMap {
            arg: r.arg,
            offset: r.offset.clone(),
            dims: vec![Dim::from(d as i64), extent.clone()],
            strides: vec![r.stride.clone()],
            boxes: vec![PANEL as u32, height as u32],
            swizzle: 128,
        };
        for (size, step) in ops.batch.iter().zip(&r.batch) {
            if let Some(step) = step {
                t.dims.push(size.dim.clone());
                t.strides.push(step.clone());
                t.boxes.push(1);
            }
        }
        b.tensor_map(t) as u8
    };
    let map_q = map(b, q, &ops.queries.dim, bm);
    let map_k = map(b, k, &ops.keys.dim, bn);
    let map_v = map(b, v, &ops.keys.dim, bn);
    let map_o = map(b, o, &ops.queries.dim, 64);
    // Coordinates of a box: column, row, and the batch axes that matter.
    let coords = |col: Val, row: Val, r: &Rows, batch: &[Val]| -> Vec<Val> {
        [col, row].into_iter().chain(batch.iter().zip(&r.batch).filter(|(_, s)| s.is_some()).map(|(i, _)| *i)).collect()
    };

    let zero = b.index(0);
    let thread = b.thread_id();
    let first = b.eq(thread, zero);
    b.when(first, |b| {
        init(b, q_full, 1, 1);
        init(b, q_empty, 1, tiles.consumers as u32);
        for i in 0..2 {
            init(b, rings.full[i], stages as i64, 1);
            init(b, rings.empty[i], stages as i64, tiles.consumers as u32);
        }
        does(b, H::FenceMbarInit, &[], &[]);
    });
    b.barrier();

    let (start, step) = (b.block_id(0), b.grid_dim(0));
    let high = up(b, ops.queries.val, bm as i64);
    let one = b.index(1);
    let heads = ops.batch.iter().fold(one, |n, s| b.mul(n, s.val));
    let total = b.mul(high, heads);
    let all_steps = up(b, ops.keys.val, bn as i64);
    let decode = |b: &mut Builder, mut h: Val| -> Vec<Val> {
        let mut batch = vec![];
        for s in ops.batch.iter().skip(1).rev() {
            batch.insert(0, b.rem(h, s.val));
            h = b.div(h, s.val);
        }
        if !ops.batch.is_empty() {
            batch.insert(0, h);
        }
        batch
    };
    // Tile number to first query, head and steps.
    let tile = |b: &mut Builder, t: Val| -> (Val, Vec<Val>, Val) {
        if !att.causal {
            let (m, h) = (b.rem(t, high), b.div(t, high));
            return (b.mul_i(m, bm as i64), decode(b, h), all_steps);
        }
        // Longest first, within sections of heads that share the cache.
        let g = b.index(tiles.heads as i64);
        let area = b.mul(high, g);
        let (section, r) = (b.div(t, area), b.rem(t, area));
        let h0 = b.mul(section, g);
        let left = b.sub(heads, h0);
        let wide = b.min(left, g);
        let (down, across) = (b.div(r, wide), b.rem(r, wide));
        let m = b.sub(high, down);
        let m = b.add_i(m, -1);
        let row = b.mul_i(m, bm as i64);
        let end = b.add_i(row, bm as i64);
        let steps = up(b, end, bn as i64);
        let h = b.add(h0, across);
        (row, decode(b, h), b.min(steps, all_steps))
    };

    let producer = role(b, |b| {
        let chosen = gives(b, H::Elect, &[], &[], Ty::BOOL);
        b.when(chosen, |b| {
            let bring = |b: &mut Builder, which: usize, s: Stage, block: Val, head: &[Val]| -> Stage {
                let (map, dst, rows) = if which == 0 { (map_k, rings.k, k) } else { (map_v, rings.v, v) };
                let free = s.flipped(b);
                wait(b, rings.empty[which], s.index, free);
                expect(b, rings.full[which], s.index, bn * d * 2);
                let row = b.mul_i(block, bn as i64);
                let base = b.mul_i(s.index, (bn * d) as i64);
                for p in 0..panels {
                    let (at, col) = (b.add_i(base, (p * bn * PANEL) as i64), b.index((p * PANEL) as i64));
                    let args: Vec<Val> = [at, s.index].into_iter().chain(coords(col, row, rows, head)).collect();
                    does(b, H::TmaLoad { map, multicast: 0 }, &args, &[dst, rings.full[which]]);
                }
                s.next(b, stages as i64)
            };
            let s0 = Stage::start(b);
            let init: Vec<Val> = [s0.vals(), s0.vals(), [zero, zero]].concat()[..5].to_vec();
            b.for_step(start, total, step, &init, |b, t, c| {
                let (row, head, steps) = tile(b, t);
                let last = b.add_i(steps, -1);
                let ks = bring(b, 0, Stage::of(&c[..2]), last, &head);
                let free = flip(b, c[4]);
                wait(b, q_empty, zero, free);
                expect(b, q_full, zero, bm * d * 2);
                for p in 0..panels {
                    let (at, col) = (b.index((p * bm * PANEL) as i64), b.index((p * PANEL) as i64));
                    let args: Vec<Val> = [at, zero].into_iter().chain(coords(col, row, q, &head)).collect();
                    does(b, H::TmaLoad { map: map_q, multicast: 0 }, &args, &[sq, q_full]);
                }
                let carried: Vec<Val> = ks.vals().into_iter().chain(c[2..4].iter().copied()).collect();
                let c2 = b.for_(one, steps, 1, &carried, |b, i, c| {
                    let block = b.sub(last, i);
                    let ks = bring(b, 0, Stage::of(&c[..2]), block, &head);
                    let before = b.add_i(block, 1);
                    let vs = bring(b, 1, Stage::of(&c[2..]), before, &head);
                    [ks.vals(), vs.vals()].concat()
                });
                let vs = bring(b, 1, Stage::of(&c2[2..]), zero, &head);
                vec![c2[0], c2[1], vs.index, vs.parity, free]
            });
        });
    });

    let consumer = role(b, |b| {
        let group = gives(b, H::GroupId, &[], &[], Ty::INDEX);
        let lane = gives(b, H::GroupThread, &[], &[], Ty::INDEX);
        let lead = b.eq(lane, zero);
        let turn = b.add_i(group, 1);
        let end = b.index(tiles.consumers as i64 - 1);
        let is_last = b.eq(group, end);
        let next = b.add_i(group, 2);
        let other = b.select(is_last, one, next);
        let meet = b.add_i(group, 1 + tiles.consumers as i64);
        if tiles.pingpong {
            b.when(is_last, |b| does(b, H::NamedArrive { threads: 256 }, &[one], &[]));
        }
        let my_rows = b.mul_i(group, (64 * PANEL) as i64);
        let down = b.mul_i(group, 64);
        let release = |b: &mut Builder, bars: Buf, i: Val| b.when(lead, |b| does(b, H::MbarArrive, &[i], &[bars]));
        let scores = |b: &mut Builder, s: Stage| {
            let at = b.mul_i(s.index, (bn * d) as i64);
            let acc =
                wgmma(b, Operand { buf: sq, index: my_rows, panel: bm * PANEL }, Operand { buf: rings.k, index: at, panel: bn * PANEL }, Major::K, d, bn, None);
            does(b, H::WgmmaCommit, &[], &[]);
            acc
        };
        let weigh = |b: &mut Builder, p: Val, s: Stage, acc: Val| {
            let at = b.mul_i(s.index, (bn * d) as i64);
            let acc = wgmma_frag(b, p, Operand { buf: rings.v, index: at, panel: bn * PANEL }, Major::Mn, bn, d, acc);
            does(b, H::WgmmaCommit, &[], &[]);
            acc
        };
        let s0 = Stage::start(b);
        let init: Vec<Val> = [s0.vals(), s0.vals(), [zero, zero]].concat()[..5].to_vec();
        b.for_step(start, total, step, &init, |b, t, c| {
            let (row, head, steps) = tile(b, t);
            let row = b.add(row, down);
            let (ks, vs, q_parity) = (Stage::of(&c[..2]), Stage::of(&c[2..4]), c[4]);
            let last = b.add_i(steps, -1);
            let mut biased = |b: &mut Builder, s: Val, block: Val| match &mut bias {
                None => s,
                Some(f) => {
                    let col = b.mul_i(block, bn as i64);
                    let add = f(b, BiasAt { col, row, batch: head.clone(), lanes: (bn / 2) as u16 });
                    let (x, y) = (b.float(att.scale * log2e, DType::F32), b.float(log2e, DType::F32));
                    let add = b.mul(add, y);
                    b.fma(s, x, add)
                }
            };
            wait(b, q_full, zero, q_parity);
            wait(b, rings.full[0], ks.index, ks.parity);
            does(b, H::WgmmaFence, &[], &[]);
            let s = scores(b, ks);
            let s = wgmma_wait(b, 0, &[s])[0];
            release(b, rings.empty[0], ks.index);
            let s = biased(b, s, last);
            let s = w.mask(b, s, last, row, ops.keys.val);
            let (p, state) = w.first(b, s);
            let ks = ks.next(b, stages as i64);
            wait(b, rings.full[1], vs.index, vs.parity);
            let p = b.cast(p, dtype);
            let out = zeros(b, acc_ty(d));
            let carried: Vec<Val> = [ks.index, ks.parity, vs.index, vs.parity, state.max, state.sum, p, out].to_vec();
            let c = b.for_(one, steps, 1, &carried, |b, i, c| {
                let (ks, vs) = (Stage::of(&c[..2]), Stage::of(&c[2..4]));
                wait(b, rings.full[0], ks.index, ks.parity);
                if tiles.pingpong {
                    named_sync(b, turn, 256);
                }
                does(b, H::WgmmaFence, &[], &[]);
                let s = scores(b, ks);
                let out = weigh(b, c[6], vs, c[7]);
                if tiles.pingpong {
                    does(b, H::NamedArrive { threads: 256 }, &[other], &[]);
                }
                let s = wgmma_wait(b, 1, &[s])[0];
                release(b, rings.empty[0], ks.index);
                let block = b.sub(last, i);
                let s = biased(b, s, block);
                let (p, state, shrink, grew) = w.next(b, s, &State { max: c[4], sum: c[5] });
                let (k2, v2) = (ks.next(b, stages as i64), vs.next(b, stages as i64));
                // The wait for the next V ends a basic block: without it ptxas would wait for the products before the softmax.
                wait(b, rings.full[1], v2.index, v2.parity);
                let out = wgmma_wait(b, 0, &[out])[0];
                release(b, rings.empty[1], vs.index);
                let p = b.cast(p, dtype);
                let any = b.vote(VoteKind::Any, grew);
                let out = b.if_(
                    any,
                    |b| {
                        let ty = b.ty(out);
                        let f = spread(b, shrink, ty);
                        vec![b.mul(out, f)]
                    },
                    |_| vec![out],
                )[0];
                vec![k2.index, k2.parity, v2.index, v2.parity, state.max, state.sum, p, out]
            });
            b.when(lead, |b| does(b, H::MbarArrive, &[zero], &[q_empty]));
            let vs = Stage::of(&c[2..4]);
            does(b, H::WgmmaFence, &[], &[]);
            let out = weigh(b, c[6], vs, c[7]);
            let out = wgmma_wait(b, 0, &[out])[0];
            release(b, rings.empty[1], vs.index);
            let vs = vs.next(b, stages as i64);
            let sum = over_quad(b, c[5]);
            let inverse = gives(b, H::Rcp, &[sum], &[], Ty::Frag(DType::F32, 2));
            let ty = b.ty(out);
            let inverse = spread(b, inverse, ty);
            let out = b.mul(out, inverse);
            let out = b.cast(out, dtype);
            b.when(lead, |b| does(b, H::BulkWait { pending: 0, read: true }, &[], &[]));
            named_sync(b, meet, 128);
            does(b, H::StMatrix { panel: (bm * PANEL) as u32, col: 0 }, &[my_rows, out], &[so]);
            does(b, H::FenceProxyAsync, &[], &[]);
            named_sync(b, meet, 128);
            b.when(lead, |b| {
                for p in 0..panels {
                    let (at, col) = (b.add_i(my_rows, (p * bm * PANEL) as i64), b.index((p * PANEL) as i64));
                    let args: Vec<Val> = [at].into_iter().chain(coords(col, row, o, &head)).collect();
                    does(b, H::TmaStore { map: map_o }, &args, &[so]);
                }
                does(b, H::BulkCommit, &[], &[]);
            });
            let q_parity = flip(b, q_parity);
            vec![c[0], c[1], vs.index, vs.parity, q_parity]
        });
        b.when(lead, |b| does(b, H::BulkWait { pending: 0, read: false }, &[], &[]));
    });
    let parts = vec![Role { groups: 1, regs: producer_regs }, Role { groups: tiles.consumers as u8, regs: consumer_regs }];
    b.word(crate::tile::Op::Hopper(H::Roles(parts)), &[], &[], vec![producer, consumer], &[]);
}

impl Softmax {
    /// Scores of keys beyond the last one, or hidden by the diagonal, made minus infinity.
    fn mask(&self, b: &mut Builder, s: Val, block: Val, row: Val, keys: Val) -> Val {
        let ty = b.ty(s).with(DType::I32);
        let first = b.mul_i(block, self.keys as i64);
        let cols = gives(b, H::AccCols, &[], &[], ty);
        let left = b.sub(keys, first);
        let left = b.cast(left, DType::I32);
        let mut seen = b.lt(cols, left);
        if self.att.causal {
            let rows = gives(b, H::AccRows, &[], &[], ty);
            let ahead = b.sub(row, first);
            let ahead = b.cast(ahead, DType::I32);
            let diagonal = b.add(rows, ahead);
            let below = b.le(cols, diagonal);
            seen = b.and(seen, below);
        }
        let hidden = b.float(f64::NEG_INFINITY, DType::F32);
        b.select(seen, s, hidden)
    }

    fn guard(&self, b: &mut Builder, max: Val) -> Val {
        if !self.biased {
            return max;
        }
        let low = b.float(-1e30, DType::F32);
        b.max(max, low)
    }

    fn scaled(&self, b: &mut Builder, x: Val) -> Val {
        let f = b.float(self.factor, DType::F32);
        b.mul(x, f)
    }

    /// Exponentials against `max`, and minus the scaled maximum.
    fn exponentials(&self, b: &mut Builder, s: Val, max: Val) -> (Val, Val) {
        let scaled = self.scaled(b, max);
        let minus = b.neg(scaled);
        let ty = b.ty(s);
        let wide = spread(b, minus, ty);
        let f = b.float(self.factor, DType::F32);
        let x = b.fma(s, f, wide);
        (ex2(b, x), minus)
    }

    /// The first step of a tile.
    fn first(&self, b: &mut Builder, s: Val) -> (Val, State) {
        let max = row_reduce(b, ReduceFn::Max, true, s);
        let max = self.guard(b, max);
        let (p, _) = self.exponentials(b, s, max);
        let sum = row_reduce(b, ReduceFn::Add, false, p);
        (p, State { max, sum })
    }

    /// A further step: probabilities, state, the factor by which older results shrink, and whether any row of this thread
    /// has a new maximum at all.
    fn next(&self, b: &mut Builder, s: Val, old: &State) -> (Val, State, Val, Val) {
        let top = row_reduce(b, ReduceFn::Max, true, s);
        let top = b.max(top, old.max);
        let rise = b.sub(top, old.max);
        let rise = self.scaled(b, rise);
        let limit = b.float(8.0, DType::F32);
        let grew = b.gt(rise, limit);
        let max = b.select(grew, top, old.max);
        let (p, minus) = self.exponentials(b, s, max);
        let f = b.float(self.factor, DType::F32);
        let x = b.fma(old.max, f, minus);
        let shrink = ex2(b, x);
        let sum = row_reduce(b, ReduceFn::Add, false, p);
        let sum = b.fma(old.sum, shrink, sum);
        let (g0, g1) = (b.extract(grew, 0), b.extract(grew, 1));
        let any = b.or(g0, g1);
        (p, State { max, sum }, shrink, any)
    }
}

/// A row fragment summed over the four threads that share a row.
fn over_quad(b: &mut Builder, mut x: Val) -> Val {
    for lanes in [1, 2] {
        let l = b.index(lanes);
        let other = b.shfl(ShflKind::Xor, x, l);
        x = b.add(x, other);
    }
    x
}

/// `ceil(x / by)` for `x >= 0`.
fn up(b: &mut Builder, x: Val, by: i64) -> Val {
    let x = b.add_i(x, by - 1);
    b.div_i(x, by)
}

/// Attention over dense `[heads][queries][depth]` operands, sizes given at run time in the order heads, queries, keys.
pub fn plain(name: &str, dtype: DType, att: Attention, tiles: FlashTiles) -> Kernel {
    let mut b = Builder::new(name, Device::Gpu);
    let [q, k, v] = [0; 3].map(|_| b.arg(dtype, Access::Read));
    let o = b.arg(dtype, Access::Write);
    let [heads, queries, keys] = [0, 1, 2].map(|i| Size { dim: size(i), val: b.dim() });
    let depth = Dim::from(att.depth as i64);
    let rows = |arg: Buf, n: &Size| Rows { arg, stride: depth.clone(), batch: vec![Some(depth.clone() * n.dim.clone())], offset: Dim::ZERO };
    let ops = Operands { rows: [rows(q, &queries), rows(k, &keys), rows(v, &keys), rows(o, &queries)], batch: vec![heads], queries, keys };
    write(&mut b, att, tiles, &ops, None);
    b.finish()
}
