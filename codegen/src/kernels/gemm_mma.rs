//! Contractions and convolutions of 16-bit floats and of bytes on the matrix units of any GPU from sm_80 on: `mma.sync` fed by
//! asynchronous copies.
//!
//! A block makes a tile of `bm` x `bn` results, a warp `wm` x `wn` of them. Operands pass through a ring of `stages` tiles in
//! shared memory, `bk` contracted elements each; fragments for the next 16 of them (32 of bytes) are loaded while the present
//! ones are multiplied, so that one barrier a tile is enough. An operand whose address runs in aligned pieces of 16 bytes is
//! copied by `cp.async`, filled with zeros beyond edges and where its guard is false (the padding of a convolution); anything
//! else is evaluated on its way. Tiles are kept in chunks of 16 bytes, permuted within a row so that neither copies nor
//! `ldmatrix` meet in a bank. The epilogue runs on accumulators, as that of the Hopper family does.
//!
//! Bytes are summed in i32, exactly. `ldmatrix` cannot turn them round, so their tiles run along the contracted axis: constant
//! weights are laid out so, and where neighbours along it are apart in memory they are gathered.
use super::expr::{Env, Lanes, Point, VectorAxis, zero as zero_of};
use super::hopper_gemm::Slice;
use super::hopper_region::{Fragments, one_by_one};
use super::implicit::{Product, product};
use super::{ArgFacts, Built, Family, KernelError, builder};
use crate::targets::Target;
use crate::tile::mma::MmaWord as M;
use crate::tile::{Buf, Builder, Launch, Op, Space, Ty, Val};
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Region, Schedule, dim::Atom};

/// Contractions and convolutions of operands of 16 bits, and of bytes.
pub const FAMILY: Family =
    Family { name: "gemm_mma", about: "contractions and convolutions of 16-bit floats and bytes by mma.sync from a ring of shared tiles", schedules, build };

/// Bytes of a chunk.
const CHUNK: i64 = 16;

/// The sizes of a tile.
#[derive(Clone, Copy, Debug)]
struct Tile {
    bm: i64,
    bn: i64,
    wm: i64,
    wn: i64,
    bk: i64,
    stages: i64,
}

impl Tile {
    fn threads(self) -> i64 {
        self.bm / self.wm * (self.bn / self.wn) * 32
    }

    /// Bytes of shared memory, of operands of this dtype.
    fn bytes(self, dtype: DType) -> u64 {
        dtype.bytes(((self.bm + self.bn) * self.bk * self.stages) as usize) as u64
    }
}

/// Tiles worth trying, with blocks that share a multiprocessor and the pace of each relative to the fastest.
const TILES: [(Tile, u32, f64); 5] = [
    (Tile { bm: 128, bn: 256, wm: 64, wn: 64, bk: 64, stages: 3 }, 1, 1.0),
    (Tile { bm: 128, bn: 128, wm: 64, wn: 64, bk: 32, stages: 4 }, 2, 0.92),
    (Tile { bm: 128, bn: 64, wm: 64, wn: 32, bk: 32, stages: 4 }, 2, 0.75),
    (Tile { bm: 64, bn: 64, wm: 32, wn: 32, bk: 32, stages: 4 }, 3, 0.5),
    (Tile { bm: 32, bn: 64, wm: 16, wn: 32, bk: 64, stages: 4 }, 3, 0.3),
];

/// The same for bytes, twice as deep; and one for a few columns.
const BYTE_TILES: [(Tile, u32, f64); 6] = [
    (Tile { bm: 128, bn: 256, wm: 64, wn: 64, bk: 128, stages: 3 }, 1, 1.0),
    (Tile { bm: 128, bn: 128, wm: 64, wn: 64, bk: 64, stages: 4 }, 2, 0.92),
    (Tile { bm: 128, bn: 64, wm: 64, wn: 32, bk: 64, stages: 4 }, 2, 0.75),
    (Tile { bm: 128, bn: 32, wm: 32, wn: 32, bk: 64, stages: 4 }, 3, 0.5),
    (Tile { bm: 64, bn: 64, wm: 32, wn: 32, bk: 64, stages: 4 }, 3, 0.5),
    (Tile { bm: 32, bn: 64, wm: 16, wn: 32, bk: 128, stages: 4 }, 3, 0.3),
];

struct Shape<'r> {
    lhs: ExprId,
    rhs: ExprId,
    k: &'r Dim,
    acc: DType,
    /// Rank of the space.
    p: usize,
}

impl Shape<'_> {
    fn is_bytes(&self) -> bool {
        self.acc == DType::I32
    }
}

fn shape(region: &Region) -> Option<Shape<'_>> {
    let Heart::Contract { k, lhs, rhs, acc } = &region.heart else { return None };
    let d = region.dtype(*lhs);
    let p = region.space.len();
    let writable = region.outputs.iter().all(|o| o.ty.dtype.bits() >= 8 && o.ty.dtype != DType::Str);
    if p < 2 || !writable {
        return None;
    }
    match acc {
        DType::F32 if matches!(d, DType::F16 | DType::BF16) && region.dtype(*rhs) == d => Some(Shape { lhs: *lhs, rhs: *rhs, k, acc: *acc, p }),
        DType::I32 => Some(Shape { lhs: byte(region, *lhs)?, rhs: byte(region, *rhs)?, k, acc: *acc, p }),
        _ => None,
    }
}

/// The bytes that an integer expression widens, if it is that or bytes themselves.
fn byte(region: &Region, id: ExprId) -> Option<ExprId> {
    match (region.expr(id), region.dtype(id)) {
        (_, DType::U8 | DType::I8) => Some(id),
        (Expr::Cast(x), DType::I16 | DType::I32) => byte(region, *x),
        _ => None,
    }
}

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    let Target::Gpu(gpu) = target else { return vec![] };
    let Some(product) = product(region, facts) else { return vec![] };
    let Some(s) = shape(&product.region) else { return vec![] };
    let space = &product.region.space;
    let known = |d: &Dim, guess: i64| d.as_const().unwrap_or(guess);
    let (m, n) = (known(&space[s.p - 2], 1024), known(&space[s.p - 1], 1024));
    // Convolutions of a channel or two a group are no matter of matrix units.
    if matches!(region.heart, Heart::Conv { .. }) && (n < 8 || known(s.k, 64) < 16) {
        return vec![];
    }
    let batch: i64 = space[..s.p - 2].iter().map(|d| known(d, 1)).product();
    let (dtype, tiles) = if s.is_bytes() { (DType::I8, &BYTE_TILES[..]) } else { (DType::F16, &TILES[..]) };
    let mut found: Vec<(f64, Schedule)> = tiles
        .iter()
        .filter(|(t, ..)| t.bytes(dtype) <= gpu.shared_bytes && (!s.is_bytes() || t.bn <= 64 || t.bn < 2 * n))
        .map(|(t, ctas, rate)| {
            let tiles = batch * ((m + t.bm - 1) / t.bm) * ((n + t.bn - 1) / t.bn);
            let waves = (tiles + i64::from(gpu.sms) - 1) / i64::from(gpu.sms);
            let cost = waves as f64 * (t.bm * t.bn) as f64 / rate;
            let knobs = [("bm", t.bm), ("bn", t.bn), ("wm", t.wm), ("wn", t.wn), ("bk", t.bk), ("stages", t.stages), ("ctas", i64::from(*ctas)), ("group", 8)];
            (cost, Schedule::new("gemm_mma", &knobs))
        })
        .collect();
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    found.into_iter().map(|(_, s)| s).collect()
}

/// How a chunk of an operand gets into shared memory.
enum How {
    /// By asynchronous copies of so many elements of this argument, at this address, where this holds.
    Copied { buf: Buf, at: Dim, guard: Option<ExprId>, lanes: i64 },
    /// Evaluated this many elements at a time.
    Evaluated(usize),
}

/// One operand.
struct Side {
    id: ExprId,
    /// Its own axis: m or n.
    axis: usize,
    extent: Val,
    /// Elements of the tile along its own axis.
    size: i64,
    /// Whether chunks run along the contracted axis: the tile is `[size][bk]`, else `[bk][size]`.
    along_k: bool,
    /// Whether neighbouring threads evaluate chunks of neighbours along its own axis all the same: so they lie in memory.
    across: bool,
    how: How,
    tile: Buf,
    dtype: DType,
}

impl Side {
    fn row_len(&self, t: Tile) -> i64 {
        if self.along_k { t.bk } else { self.size }
    }

    /// Elements of a chunk.
    fn chunk(&self) -> i64 {
        8 * CHUNK / self.dtype.bits() as i64
    }

    /// Elements of one stage.
    fn len(&self, t: Tile) -> i64 {
        self.size * t.bk
    }

    /// What the chunks of a row are permuted by.
    fn swizzle(&self, b: &mut Builder, row: Val, t: Tile) -> Val {
        if self.row_len(t) == 4 * self.chunk() {
            let half = b.div_i(row, 2);
            b.rem_i(half, 4)
        } else {
            b.rem_i(row, 8)
        }
    }

    /// Element index of a chunk in a stage.
    fn place(&self, b: &mut Builder, row: Val, chunk: Val, t: Tile) -> Val {
        let s = self.swizzle(b, row, t);
        let chunk = b.xor(chunk, s);
        let (row, chunk) = (b.mul_i(row, self.row_len(t)), b.mul_i(chunk, self.chunk()));
        b.add(row, chunk)
    }
}

/// Whether `d` is a multiple of `by` wherever `axis` is.
fn aligned(d: &Dim, axis: usize, by: i64) -> bool {
    fn atom(a: &Atom, axis: usize, by: i64) -> bool {
        match a {
            Atom::Axis(k) => *k as usize == axis,
            Atom::Mod(x, y) => y.as_const().is_some_and(|y| y % by == 0) && aligned(x, axis, by),
            Atom::Max(x, y) | Atom::Min(x, y) => aligned(x, axis, by) && aligned(y, axis, by),
            _ => false,
        }
    }
    d.terms().iter().all(|(atoms, c)| c % by == 0 || atoms.iter().any(|a| atom(a, axis, by)))
}

/// Whether an expression is of axes and sizes alone and the same for `lanes` aligned points of `axis`.
fn uniform(env: &Env<'_>, id: ExprId, axis: usize, lanes: i64) -> bool {
    match env.region.expr(id) {
        Expr::Float(_) | Expr::Int(_) => true,
        Expr::Index(d) => !d.any_atom(&|a| matches!(a, Atom::Value(_))) && env.lanes_along(d, axis, Some(lanes)) == Lanes::Step(0),
        Expr::Call(_, xs) => xs.iter().all(|x| uniform(env, *x, axis, lanes)),
        Expr::Cast(x) | Expr::Bits(x) => uniform(env, *x, axis, lanes),
        Expr::Load { .. } | Expr::Acc(_) => false,
    }
}

/// The argument, address and guard of an operand that comes in aligned pieces of `lanes` along `axis`.
pub(super) fn pieces(env: &Env<'_>, id: ExprId, axis: usize, extent: &Dim, lanes: i64) -> Option<(usize, Dim, Option<ExprId>)> {
    let Expr::Load { arg, index, guard } = env.region.expr(id) else { return None };
    let at = Env::flat(&env.region.args[*arg as usize].shape, index);
    let whole = extent.as_const().is_some_and(|n| n % lanes == 0);
    let plain = !at.any_atom(&|a| matches!(a, Atom::Value(_)));
    let steps = env.lanes_along(&at, axis, Some(lanes)) == Lanes::Step(1) && aligned(&at, axis, lanes);
    let even = guard.is_none_or(|g| uniform(env, g, axis, lanes));
    (whole && plain && steps && even).then_some((*arg as usize, at, *guard))
}

/// Whether what an expression loads runs along `axis`.
fn along(env: &Env<'_>, id: ExprId, axis: usize) -> bool {
    match env.region.expr(id) {
        Expr::Load { arg, index, .. } => {
            let at = Env::flat(&env.region.args[*arg as usize].shape, index);
            env.lanes_along(&at, axis, Some(2)) == Lanes::Step(1)
        }
        Expr::Call(_, xs) => xs.iter().any(|x| along(env, *x, axis)),
        Expr::Cast(x) | Expr::Bits(x) => along(env, *x, axis),
        Expr::Float(_) | Expr::Int(_) | Expr::Index(_) | Expr::Acc(_) => false,
    }
}

/// Fragments of one step: of 16 contracted elements, or 32 bytes.
struct Frags {
    a: Vec<Val>,
    b: Vec<Val>,
}

impl Frags {
    fn vals(&self) -> Vec<Val> {
        self.a.iter().chain(&self.b).copied().collect()
    }

    fn of(vals: &[Val], count: usize) -> Frags {
        Frags { a: vals[..count].to_vec(), b: vals[count..].to_vec() }
    }
}

/// A kernel being written.
struct Writer<'r> {
    env: Env<'r>,
    t: Tile,
    p: usize,
    k: Val,
    acc: DType,
    lhs: Side,
    rhs: Side,
    /// Batch coordinates, first row and column of the tile.
    batch: Vec<Val>,
    m0: Val,
    n0: Val,
    thread: Val,
    lane: Val,
    /// First row and column of the warp in the tile.
    warp_m: Val,
    warp_n: Val,
}

impl Writer<'_> {
    fn side(&self, left: bool) -> (&Side, Val) {
        if left { (&self.lhs, self.m0) } else { (&self.rhs, self.n0) }
    }

    /// Row and chunk of this thread's first piece of a tile, and the rows from one piece to the next: a multiple of 8, so that
    /// all have the same permutation.
    fn piece(&self, b: &mut Builder, x: &Side) -> (Val, Val, i64) {
        let per = x.row_len(self.t) / x.chunk();
        (b.div_i(self.thread, per), b.rem_i(self.thread, per), self.t.threads() / per)
    }

    /// Row and chunk of this thread's `i`-th piece where neighbouring threads are in neighbouring rows.
    fn piece_across(&self, b: &mut Builder, x: &Side, i: i64) -> (Val, Val) {
        let q = b.add_i(self.thread, i * self.t.threads());
        (b.rem_i(q, x.size), b.div_i(q, x.size))
    }

    fn pieces_of(&self, x: &Side) -> i64 {
        x.len(self.t) / x.chunk() / self.t.threads()
    }

    fn axes(&self, b: &mut Builder, x: &Side, own: Val, k: Val) -> Vec<Val> {
        let mut axes = self.batch.clone();
        let none = b.index(0);
        axes.resize(self.p, none);
        axes[x.axis] = own;
        axes.push(k);
        axes
    }

    /// Start the copies of the tile at `k0` into a stage.
    fn copy(&mut self, b: &mut Builder, left: bool, k0: Val, stage: Val) {
        let (x, first) = self.side(left);
        let How::Copied { buf, at, guard, lanes } = &x.how else { return };
        let (buf, at, guard, lanes, tile, extent, elements) = (*buf, at.clone(), *guard, *lanes, x.tile, x.extent, x.chunk());
        let base = b.mul_i(stage, x.len(self.t));
        let (row, chunk, rows) = self.piece(b, x);
        let to = x.place(b, row, chunk, self.t);
        let to = b.add(base, to);
        let start = b.mul_i(chunk, elements);
        for (i, part) in (0..self.pieces_of(x)).flat_map(|i| (0..elements).step_by(lanes as usize).map(move |part| (i, part))) {
            let (x, _) = self.side(left);
            let offset = i * rows * x.row_len(self.t) + part;
            let (row, along) = (b.add_i(row, i * rows), b.add_i(start, part));
            let (own, kk) = if x.along_k { (row, along) } else { (along, row) };
            let (own, kk) = (b.add(own, first), b.add(kk, k0));
            let (in_own, in_k) = (b.lt(own, extent), b.lt(kk, self.k));
            let mut inside = b.and(in_own, in_k);
            let axes = self.axes(b, x, own, kk);
            let mut point = Point::new(axes);
            if let Some(g) = guard {
                let g = self.env.expr(b, g, &mut point);
                inside = b.and(inside, g);
            }
            let from = self.env.index(b, &at, &mut point);
            b.word(Op::Mma(M::CpAsync { n: lanes as u8, offset }), &[to, from, inside], &[tile, buf], vec![], &[]);
        }
    }

    /// Evaluate this thread's chunks of the tile at `k0`.
    fn fetch(&mut self, b: &mut Builder, left: bool, k0: Val) -> Vec<Val> {
        let (x, first) = self.side(left);
        let How::Evaluated(lanes) = x.how else { return vec![] };
        let (dtype, along_k, own_axis, elements) = (x.dtype, x.along_k, x.axis, x.chunk());
        let mut chunks = vec![];
        let (row, chunk, rows) = self.piece(b, x);
        let start = b.mul_i(chunk, elements);
        for i in 0..self.pieces_of(x) {
            let (x, _) = self.side(left);
            let (row, start) = if x.across {
                let (row, chunk) = self.piece_across(b, x, i);
                (row, b.mul_i(chunk, elements))
            } else {
                (b.add_i(row, i * rows), start)
            };
            let (extent, id) = (x.extent, x.id);
            let mut elems = vec![];
            for part in (0..elements).step_by(lanes) {
                let along = b.add_i(start, part);
                let (own, kk) = if along_k { (row, along) } else { (along, row) };
                let (own, kk) = (b.add(own, first), b.add(kk, k0));
                let inside = b.lt(kk, self.k);
                // Beyond the edges the nearest piece that exists is read; along k it counts as 0.
                let mut edge = |v: Val, end: Val, n: usize| {
                    let last = b.add_i(end, -(n as i64));
                    b.min(v, last)
                };
                let own = edge(own, extent, if along_k { 1 } else { lanes });
                let kk = edge(kk, self.k, if along_k { lanes } else { 1 });
                let (x, _) = self.side(left);
                let axes = self.axes(b, x, own, kk);
                let axis = if along_k { self.p } else { own_axis };
                let mut point = Point::vector(axes, VectorAxis { axis, lanes, count: None, aligned: true });
                let v = self.env.expr_lanes(b, id, &mut point);
                let v = b.cast(v, dtype);
                let ty = b.ty(v);
                let nothing = zero_of(b, ty);
                let v = b.select(inside, v, nothing);
                elems.extend((0..lanes).map(|l| b.extract(v, l)));
            }
            chunks.push(b.pack(&elems, Ty::Vec(dtype, elements as u16)));
        }
        chunks
    }

    /// Store what [`Writer::fetch`] gave into a stage.
    fn stash(&self, b: &mut Builder, left: bool, stage: Val, chunks: &[Val]) {
        let (x, _) = self.side(left);
        let base = b.mul_i(stage, x.len(self.t));
        let (row, chunk, rows) = self.piece(b, x);
        let to = x.place(b, row, chunk, self.t);
        let to = b.add(base, to);
        for (i, v) in chunks.iter().enumerate() {
            if x.across {
                let (row, chunk) = self.piece_across(b, x, i as i64);
                let to = x.place(b, row, chunk, self.t);
                let to = b.add(base, to);
                b.store(x.tile, to, *v);
                continue;
            }
            let to = b.add_i(to, i as i64 * rows * x.row_len(self.t));
            b.store(x.tile, to, *v);
        }
    }

    /// Fragments of an operand: 16 of its own elements each, at step `step` (two chunks) of a stage.
    fn load(&self, b: &mut Builder, left: bool, stage: Val, step: i64) -> Vec<Val> {
        let (x, _) = self.side(left);
        let (warp, count) = if left { (self.warp_m, self.t.wm / 16) } else { (self.warp_n, self.t.wn / 16) };
        let base = b.mul_i(stage, x.len(self.t));
        // Which row of which matrix this thread points at: matrices 0 and 1 differ in the own axis for the first operand, in
        // k for the second.
        let (low, high) = (b.rem_i(self.lane, 8), b.div_i(self.lane, 16));
        let middle = b.div_i(self.lane, 8);
        let middle = b.rem_i(middle, 2);
        let (own8, k8) = if left { (middle, high) } else { (high, middle) };
        // Sixteen rows further on the permutation is the same.
        let s = x.swizzle(b, low, self.t);
        let up = b.mul_i(if x.along_k { own8 } else { k8 }, 8);
        let row = b.add(low, up);
        let row = if x.along_k { b.add(row, warp) } else { row };
        let row = b.mul_i(row, x.row_len(self.t));
        (0..count)
            .map(|j| {
                let (chunk, rows) = if x.along_k {
                    (b.add_i(k8, 2 * step), 16 * j)
                } else {
                    let chunk = b.div_i(warp, x.chunk());
                    let chunk = b.add(chunk, own8);
                    (b.add_i(chunk, 2 * j), 16 * step)
                };
                let chunk = b.xor(chunk, s);
                let chunk = b.mul_i(chunk, x.chunk());
                let at = b.add(row, chunk);
                let at = b.add(base, at);
                let word = M::LdMatrix { trans: !x.along_k, offset: rows * x.row_len(self.t) };
                let ty = if x.dtype.bits() == 8 { Ty::Frag(DType::I32, 4) } else { Ty::Frag(x.dtype, 8) };
                b.word(Op::Mma(word), &[at], &[x.tile], vec![], &[ty])[0]
            })
            .collect()
    }

    fn frags(&self, b: &mut Builder, stage: Val, step: i64) -> Frags {
        Frags { a: self.load(b, true, stage, step), b: self.load(b, false, stage, step) }
    }

    /// The products of the whole contraction: strips of 16 rows.
    fn multiply(&mut self, b: &mut Builder) -> Vec<Val> {
        let t = self.t;
        let (strips, steps) = ((t.wm / 16) as usize, t.bk / (2 * self.lhs.chunk()));
        let word = if self.acc == DType::I32 { M::MmaBytes { a: self.lhs.dtype, b: self.rhs.dtype } } else { M::Mma };
        let zero = b.index(0);
        let commit = |b: &mut Builder| b.word(Op::Mma(M::CpAsyncCommit), &[], &[], vec![], &[]);
        let wait = |b: &mut Builder, pending: i64| b.word(Op::Mma(M::CpAsyncWait { pending: pending as u8 }), &[], &[], vec![], &[]);
        for s in 0..t.stages - 1 {
            let (stage, k0) = (b.index(s), b.index(s * t.bk));
            for left in [true, false] {
                self.copy(b, left, k0, stage);
                let chunks = self.fetch(b, left, k0);
                self.stash(b, left, stage, &chunks);
            }
            commit(b);
        }
        wait(b, t.stages - 2);
        b.barrier();
        let first = self.frags(b, zero, 0);
        let acc = Ty::Frag(self.acc, (t.wn / 2) as u16);
        let nothing = zero_of(b, acc);
        let mut carried = vec![zero, b.index(t.stages - 1)];
        carried.extend(vec![nothing; strips]);
        carried.extend(first.vals());
        let k = self.k;
        let done = b.for_(zero, k, t.bk, &carried, |b, k0, vals| {
            let (mut read, write) = (vals[0], vals[1]);
            let mut accs = vals[2..2 + strips].to_vec();
            let mut now = Frags::of(&vals[2 + strips..], strips);
            let ahead = b.add_i(k0, (t.stages - 1) * t.bk);
            let mut chunks = [vec![], vec![]];
            for step in 0..steps {
                let last = step + 1 == steps;
                if last {
                    self.stash(b, true, write, &chunks[0]);
                    self.stash(b, false, write, &chunks[1]);
                    commit(b);
                    wait(b, t.stages - 2);
                    b.barrier();
                    read = following(b, read, t.stages);
                }
                let next = self.frags(b, read, if last { 0 } else { step + 1 });
                if step == 0 {
                    for (i, left) in [true, false].into_iter().enumerate() {
                        self.copy(b, left, ahead, write);
                        chunks[i] = self.fetch(b, left, ahead);
                    }
                }
                for (acc, a) in accs.iter_mut().zip(&now.a) {
                    let args: Vec<Val> = [*acc, *a].into_iter().chain(now.b.iter().copied()).collect();
                    let ty = b.ty(*acc);
                    *acc = b.word(Op::Mma(word.clone()), &args, &[], vec![], &[ty])[0];
                }
                now = next;
            }
            let write = following(b, write, t.stages);
            let mut out = vec![read, write];
            out.extend(accs);
            out.extend(now.vals());
            out
        });
        wait(b, 0);
        done[2..2 + strips].to_vec()
    }
}

/// The stage after this one.
fn following(b: &mut Builder, stage: Val, stages: i64) -> Val {
    let next = b.add_i(stage, 1);
    let (end, zero) = (b.index(stages), b.index(0));
    let wrap = b.eq(next, end);
    b.select(wrap, zero, next)
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let unfit = || KernelError::Unsupported { family: "gemm_mma", reason: format!("`{}` is no contraction of 16-bit floats or bytes", region.name) };
    let Product { region, packs } = product(region, facts).ok_or_else(unfit)?;
    let region = &region;
    let s = shape(region).ok_or_else(unfit)?;
    let p = s.p;
    let knob = |key: &str, default: i64| schedule.knob(key, default);
    let t = Tile { bm: knob("bm", 128), bn: knob("bn", 128), wm: knob("wm", 64), wn: knob("wn", 64), bk: knob("bk", 32), stages: knob("stages", 4) };
    let mut builder = builder(name, target);
    let b = &mut builder;
    let mut env = Env::new(b, region);
    *b.launch() = Launch { threads: t.threads() as u32, min_ctas: knob("ctas", 1) as u32, ..Launch::default() };
    let (m, n) = (env.size(b, &region.space[p - 2]), env.size(b, &region.space[p - 1]));
    let k = env.size(b, s.k);
    let sizes: Vec<Val> = region.space[..p - 2].iter().map(|d| env.size(b, d)).collect();
    for sym in region.symbols() {
        env.sym(b, &sym);
    }
    let side = |b: &mut Builder, env: &Env<'_>, id: ExprId, axis: usize, extent: Val, size: i64| {
        let dtype = region.dtype(id);
        let tile = b.shared(dtype, (size * t.bk * t.stages) as u64);
        let found = |along_k: bool, lanes: i64| {
            let (inner, end) = if along_k { (p, s.k) } else { (axis, &region.space[axis]) };
            pieces(env, id, inner, end, lanes).map(|at| (along_k, at))
        };
        // Bytes come in shorter copies too, and never across.
        let copied = if s.is_bytes() {
            [16, 8, 4].into_iter().find_map(|l| Some((l, found(true, l)?)))
        } else {
            found(true, 8).or_else(|| found(false, 8)).map(|at| (8, at))
        };
        if let Some((lanes, (along_k, (arg, at, guard)))) = copied {
            return Side { id, axis, extent, size, along_k, across: false, how: How::Copied { buf: env.args[arg], at, guard, lanes }, tile, dtype };
        }
        // Evaluated along whichever axis its loads run, in pieces where those are even.
        let along_k = s.is_bytes() || along(env, id, p) || !along(env, id, axis);
        let lanes = [4i64, 2].into_iter().find(|l| found(along_k, *l).is_some()).unwrap_or(1);
        let across = s.is_bytes() && along(env, id, axis) && !along(env, id, p);
        Side { id, axis, extent, size, along_k, across, how: How::Evaluated(lanes as usize), tile, dtype }
    };
    let lhs = side(b, &env, s.lhs, p - 2, m, t.bm);
    let rhs = side(b, &env, s.rhs, p - 1, n, t.bn);

    // Tile of this block: `group` rows of tiles at a time, so that blocks which run together share operands.
    let block = b.block_id(0);
    let (tall, wide) = (up(b, m, t.bm), up(b, n, t.bn));
    let per = b.mul(tall, wide);
    let (mut rest, tile) = (b.div(block, per), b.rem(block, per));
    let mut batch = vec![];
    for size in sizes.iter().rev() {
        batch.insert(0, b.rem(rest, *size));
        rest = b.div(rest, *size);
    }
    let band = b.mul_i(wide, knob("group", 8));
    let (g, inner) = (b.div(tile, band), b.rem(tile, band));
    let first = b.mul_i(g, knob("group", 8));
    let left = b.sub(tall, first);
    let most = b.index(knob("group", 8));
    let rows = b.min(left, most);
    let (down, across) = (b.rem(inner, rows), b.div(inner, rows));
    let down = b.add(first, down);
    let (m0, n0) = (b.mul_i(down, t.bm), b.mul_i(across, t.bn));
    let (thread, lane) = (b.thread_id(), b.lane_id());
    let warp = b.div_i(thread, 32);
    let (warp_m, warp_n) = (b.rem_i(warp, t.bm / t.wm), b.div_i(warp, t.bm / t.wm));
    let (warp_m, warp_n) = (b.mul_i(warp_m, t.wm), b.mul_i(warp_n, t.wn));
    let mut w = Writer { env, t, p, k, acc: s.acc, lhs, rhs, batch, m0, n0, thread, lane, warp_m, warp_n };
    let strips = w.multiply(b);

    // Rows of fragments are counted from the warp's place in its warpgroup.
    let own = b.rem_i(warp, 4);
    let own = b.mul_i(own, 16);
    let (row, col) = (b.add(m0, warp_m), b.add(n0, warp_n));
    let row = b.sub(row, own);
    let fragments = Fragments::can(region, p);
    for (i, acc) in strips.into_iter().enumerate() {
        let slice = Slice { acc, row: b.add_i(row, 16 * i as i64), col, batch: w.batch.clone() };
        if fragments {
            Fragments::new(&mut w.env, p, b.ty(acc).lanes() as u16, &slice, (m, n)).finish(b, false);
        } else {
            one_by_one(b, &mut w.env, &slice, m, n);
        }
    }
    let dims = w.env.dims;
    let mut kernel = builder.finish();
    // Tensors begin at multiples of 256 bytes.
    kernel.bufs.iter_mut().filter(|x| x.space == Space::Global).for_each(|x| x.align = 16);
    let tiles = region.space[p - 2].ceil_div(&Dim::from(t.bm)) * region.space[p - 1].ceil_div(&Dim::from(t.bn));
    let grid = region.space[..p - 2].iter().fold(tiles, |t, d| t * d.clone());
    Ok(Built { kernel, schedule: schedule.clone(), dims, cpu: None, grid: Some([grid, Dim::one(), Dim::one()]), packs })
}

/// `ceil(x / by)` for `x >= 0`.
fn up(b: &mut Builder, x: Val, by: i64) -> Val {
    let x = b.add_i(x, by - 1);
    b.div_i(x, by)
}
