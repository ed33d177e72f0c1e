//! Matrix products on Hopper: persistent blocks, one TMA producer warp, two consumer warpgroups on `wgmma`.
//!
//! A block works on tiles of 128 x `bn`. The producer fills a ring of stages (128 x 64 of A, 64 x `bn` of B); each
//! consumer multiplies its 64 rows and releases the stage when its products are done. A cluster of two blocks takes two
//! tiles below each other and loads each half of B once for both. The epilogue runs on the accumulator in registers,
//! 32 columns at a time; 16-bit results leave through shared memory and TMA, which clips them at the matrix's edge, so
//! that the stores of one tile run under the products of the next.
use super::hopper_words::*;
use crate::tile::hopper::{HopperWord as H, Major, Role, TensorMap};
use crate::tile::{Access, Buf, Builder, Device, Kernel, Space, Ty, Val};
use pavage_ir::{DType, Dim};

/// Rows of a block's tile.
const BM: u64 = 128;
/// Contracted elements of a stage: one panel.
const BK: u64 = PANEL;
const CONSUMERS: u64 = 2;
/// Columns that the epilogue handles at a time.
const SLICE: u64 = 32;
/// Shared bytes a block may take on sm_90.
const SHARED: u64 = 227 << 10;

/// How B lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rhs {
    /// `[k][n]`.
    Kn,
    /// `[n][k]`.
    Nk,
}

/// The numbers of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Columns of a tile: a multiple of 64 up to 256, of 128 with a cluster of two and B as `[k][n]`.
    pub bn: u64,
    /// Stages of the ring.
    pub stages: u64,
    /// Blocks of a cluster: 1 or 2.
    pub cluster: u64,
    /// Tile rows that a group of the raster covers.
    pub group: u64,
}

impl Tiles {
    /// The most stages that fit beside the result's staging.
    pub fn most_stages(bn: u64, staged: bool) -> u64 {
        let stage = (BM + bn) * BK * 2;
        let out = if staged { BM * bn * 2 } else { 0 };
        ((SHARED - 1024 - out) / stage).min(8)
    }
}

/// A size of the problem: its expression over kernel sizes, for tensor maps, and its value.
#[derive(Clone, Debug)]
pub struct Size {
    /// Over `d0`, `d1`, ...; see [`crate::tile::hopper::size`].
    pub dim: Dim,
    /// As `i64`.
    pub val: Val,
}

/// One operand matrix in memory.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The argument.
    pub arg: Buf,
    /// Elements from row to row.
    pub stride: Dim,
    /// Elements from batch to batch; none: the same matrix for every batch.
    pub batch: Option<Dim>,
}

/// A matrix product to be written.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Rows.
    pub m: Size,
    /// Columns.
    pub n: Size,
    /// Contracted extent.
    pub k: Size,
    /// Batches.
    pub batch: Option<Size>,
    /// `[m][k]`, f16 or bf16.
    pub a: Matrix,
    /// `[k][n]` or `[n][k]`, of the same dtype.
    pub b: Matrix,
    /// How B lies.
    pub rhs: Rhs,
    /// `[m][n]`.
    pub c: Matrix,
    /// Whether rows of the result are multiples of 16 bytes, so that TMA can write them.
    pub tma_out: bool,
}

/// What the epilogue is given.
#[derive(Clone, Copy)]
pub struct Slice {
    /// 64 x 32 results in f32.
    pub acc: Val,
    /// First row in the matrix.
    pub row: Val,
    /// First column.
    pub col: Val,
    /// Batch.
    pub batch: Val,
}

struct Tile {
    row: Val,
    col: Val,
    batch: Val,
}

/// Write the body of a kernel for `p`; `epilogue` turns a slice of f32 results into what is stored, of the result's dtype.
/// The builder is fresh but for the arguments and sizes.
pub fn write(b: &mut Builder, p: &Problem, tiles: Tiles, epilogue: &mut dyn FnMut(&mut Builder, Slice) -> Val) {
    let Tiles { bn, stages, cluster, group } = tiles;
    let (dtype, out) = (b.dtype(p.a.arg), b.dtype(p.c.arg));
    let staged = p.tma_out && matches!(out, DType::F16 | DType::BF16);
    *b.launch() = crate::tile::Launch { threads: 128 * (CONSUMERS as u32 + 1), cluster: [cluster as u32, 1, 1], min_ctas: 1, max_regs: 168, pdl: false };

    let (a_stage, b_stage) = (BM * BK, bn * BK);
    let sa = b.alloc_aligned(Space::Shared, dtype, stages * a_stage, 1024);
    let sb = b.alloc_aligned(Space::Shared, dtype, stages * b_stage, 1024);
    let sc = staged.then(|| b.alloc_aligned(Space::Shared, out, BM * bn, 1024));
    let full = b.alloc_aligned(Space::Shared, DType::U64, stages, 8);
    let empty = b.alloc_aligned(Space::Shared, DType::U64, stages, 8);

    let batched = p.batch.is_some();
    let map = |b: &mut Builder, m: &Matrix, inner: &Dim, outer: &Dim, boxes: [u32; 2]| {
        let mut t = TensorMap { arg: m.arg, dims: vec![inner.clone(), outer.clone()], strides: vec![m.stride.clone()], boxes: boxes.to_vec(), swizzle: 128 };
        if let (Some(size), Some(step)) = (&p.batch, &m.batch) {
            t.dims.push(size.dim.clone());
            t.strides.push(step.clone());
            t.boxes.push(1);
        }
        b.tensor_map(t) as u8
    };
    let (a_rows, b_rows) = (BM as u32, (bn / cluster) as u32);
    let map_a = map(b, &p.a, &p.k.dim, &p.m.dim, [PANEL as u32, a_rows]);
    let map_b = match p.rhs {
        Rhs::Nk => map(b, &p.b, &p.k.dim, &p.n.dim, [PANEL as u32, b_rows]),
        Rhs::Kn => map(b, &p.b, &p.n.dim, &p.k.dim, [PANEL as u32, BK as u32]),
    };
    let map_c = staged.then(|| map(b, &p.c, &p.n.dim, &p.m.dim, [PANEL as u32, 64]));

    let thread = b.thread_id();
    let zero = b.index(0);
    let first = b.eq(thread, zero);
    b.when(first, |b| {
        init(b, full, stages as i64, 1);
        init(b, empty, stages as i64, (CONSUMERS * cluster) as u32);
        does(b, H::FenceMbarInit, &[], &[]);
    });
    let (rank, start, step) = if cluster > 1 {
        does(b, H::ClusterSync, &[], &[]);
        let id = |b: &mut Builder, w: H| gives(b, w, &[], &[], Ty::INDEX);
        (id(b, H::ClusterRank), id(b, H::ClusterId), id(b, H::ClusterCount))
    } else {
        b.barrier();
        (zero, b.block_id(0), b.grid_dim(0))
    };

    let pairs = ceil(b, p.m.val, (BM * cluster) as i64);
    let columns_of = ceil(b, p.n.val, bn as i64);
    let per_batch = b.mul(pairs, columns_of);
    let total = match &p.batch {
        Some(l) => b.mul(per_batch, l.val),
        None => per_batch,
    };
    let steps = ceil(b, p.k.val, BK as i64);
    // Tiles in groups of `group` tile rows, down the rows first, so that what runs together shares operands in L2.
    let tile = |b: &mut Builder, t: Val| -> Tile {
        let (t, l) = if batched {
            let (t, per) = (u32_of(b, t), u32_of(b, per_batch));
            (b.rem(t, per), b.div(t, per))
        } else {
            (u32_of(b, t), u32_of(b, zero))
        };
        let (height, width) = (u32_of(b, pairs), u32_of(b, columns_of));
        let g = b.constant(pavage_ir::Scalar::I(i128::from(group)), DType::U32);
        let area = b.mul(width, g);
        let (gi, r) = (b.div(t, area), b.rem(t, area));
        let top = b.mul(gi, g);
        let left = b.sub(height, top);
        let tall = b.min(left, g);
        let (down, across) = (b.rem(r, tall), b.div(r, tall));
        let m = b.add(top, down);
        let (m, n, l) = (b.cast(m, DType::I64), b.cast(across, DType::I64), b.cast(l, DType::I64));
        let m = b.mul_i(m, cluster as i64);
        let m = b.add(m, rank);
        Tile { row: b.mul_i(m, BM as i64), col: b.mul_i(n, bn as i64), batch: l }
    };
    let coords = |inner: Val, outer: Val, m: &Matrix, t: &Tile| -> Vec<Val> {
        let mut c = vec![inner, outer];
        if batched && m.batch.is_some() {
            c.push(t.batch);
        }
        c
    };

    let producer = role(b, |b| {
        let one = gives(b, H::Elect, &[], &[], Ty::BOOL);
        b.when(one, |b| {
            let s0 = Stage::start(b);
            b.for_step(start, total, step, &s0.vals(), |b, t, s| {
                let at = tile(b, t);
                b.for_(zero, steps, 1, s, |b, k, s| {
                    let s = Stage::of(s);
                    let free = s.flipped(b);
                    wait(b, empty, s.index, free);
                    expect(b, full, s.index, (a_stage + b_stage) * 2);
                    let k0 = b.mul_i(k, BK as i64);
                    let dst = b.mul_i(s.index, a_stage as i64);
                    let args: Vec<Val> = [dst, s.index].into_iter().chain(coords(k0, at.row, &p.a, &at)).collect();
                    does(b, H::TmaLoad { map: map_a, multicast: 0 }, &args, &[sa, full]);
                    // Each block of the cluster brings its share of B to all.
                    let multicast = if cluster > 1 { (1u16 << cluster) - 1 } else { 0 };
                    let base = b.mul_i(s.index, b_stage as i64);
                    let share = b.mul_i(rank, (b_stage / cluster) as i64);
                    let base = b.add(base, share);
                    let skip = b.mul_i(rank, (bn / cluster) as i64);
                    let col = b.add(at.col, skip);
                    let boxes: Vec<(Val, Vec<Val>)> = match p.rhs {
                        Rhs::Nk => vec![(base, coords(k0, col, &p.b, &at))],
                        Rhs::Kn => (0..bn / cluster / PANEL)
                            .map(|i| {
                                let c = b.add_i(col, (i * PANEL) as i64);
                                (b.add_i(base, (i * PANEL * BK) as i64), coords(c, k0, &p.b, &at))
                            })
                            .collect(),
                    };
                    for (dst, c) in boxes {
                        let args: Vec<Val> = [dst, s.index].into_iter().chain(c).collect();
                        does(b, H::TmaLoad { map: map_b, multicast }, &args, &[sb, full]);
                    }
                    s.next(b, stages as i64).vals().to_vec()
                })
            });
        });
    });

    let consumer = role(b, |b| {
        let group_id = gives(b, H::GroupId, &[], &[], Ty::INDEX);
        let lane = gives(b, H::GroupThread, &[], &[], Ty::INDEX);
        let lead = b.eq(lane, zero);
        let peers = b.index(cluster as i64);
        let releases = b.lt(lane, peers);
        let a_first = b.mul_i(group_id, (64 * BK) as i64);
        let c_first = b.mul_i(group_id, (64 * bn) as i64);
        let barrier = b.add_i(group_id, 1);
        let s0 = Stage::start(b);
        b.for_step(start, total, step, &s0.vals(), |b, t, s| {
            let at = tile(b, t);
            let acc = zeros(b, acc_ty(bn));
            let carried: Vec<Val> = s.iter().copied().chain([acc]).collect();
            let done = b.for_(zero, steps, 1, &carried, |b, _, v| {
                let s = Stage::of(v);
                wait(b, full, s.index, s.parity);
                let a_at = b.mul_i(s.index, a_stage as i64);
                let a_at = b.add(a_at, a_first);
                let b_at = b.mul_i(s.index, b_stage as i64);
                does(b, H::WgmmaFence, &[], &[]);
                let (major, b_panel) = match p.rhs {
                    Rhs::Nk => (Major::K, bn * PANEL),
                    Rhs::Kn => (Major::Mn, BK * PANEL),
                };
                let acc =
                    wgmma(b, Operand { buf: sa, index: a_at, panel: BM * PANEL }, Operand { buf: sb, index: b_at, panel: b_panel }, major, BK, bn, Some(v[2]));
                does(b, H::WgmmaCommit, &[], &[]);
                let acc = wgmma_wait(b, 0, &[acc])[0];
                b.when(releases, |b| {
                    let args = if cluster > 1 { vec![s.index, lane] } else { vec![s.index] };
                    does(b, H::MbarArrive, &args, &[empty]);
                });
                let [i, ph] = s.next(b, stages as i64).vals();
                vec![i, ph, acc]
            });
            let below = b.mul_i(group_id, 64);
            let row = b.add(at.row, below);
            if staged {
                // The stores of the tile before have read the staging.
                b.when(lead, |b| does(b, H::BulkWait { pending: 0, read: true }, &[], &[]));
                named_sync(b, barrier, 128);
            }
            for from in (0..bn).step_by(SLICE as usize) {
                let acc = columns(b, done[2], from, SLICE);
                let col = b.add_i(at.col, from as i64);
                let v = epilogue(b, Slice { acc, row, col, batch: at.batch });
                match sc {
                    Some(sc) => does(b, H::StMatrix { panel: (64 * PANEL) as u32, col: from as u16 }, &[c_first, v], &[sc]),
                    None => {
                        let base = match &p.c.batch {
                            Some(step) => {
                                let step = value_of(b, step, p);
                                b.mul(at.batch, step)
                            }
                            None => zero,
                        };
                        let stride = value_of(b, &p.c.stride, p);
                        let place = Place { base, row, col, rows: p.m.val, cols: p.n.val, stride };
                        acc_store(b, p.c.arg, v, place, p.tma_out);
                    }
                }
            }
            if let (Some(sc), Some(map_c)) = (sc, map_c) {
                does(b, H::FenceProxyAsync, &[], &[]);
                named_sync(b, barrier, 128);
                b.when(lead, |b| {
                    for panel in 0..bn / PANEL {
                        let src = b.add_i(c_first, (panel * 64 * PANEL) as i64);
                        let col = b.add_i(at.col, (panel * PANEL) as i64);
                        let args: Vec<Val> = [src].into_iter().chain(coords(col, row, &p.c, &at)).collect();
                        does(b, H::TmaStore { map: map_c }, &args, &[sc]);
                    }
                    does(b, H::BulkCommit, &[], &[]);
                });
            }
            done[..2].to_vec()
        });
        if staged {
            b.when(lead, |b| does(b, H::BulkWait { pending: 0, read: false }, &[], &[]));
        }
    });
    let parts = vec![Role { groups: 1, regs: 40 }, Role { groups: CONSUMERS as u8, regs: 232 }];
    b.word(crate::tile::Op::Hopper(H::Roles(parts)), &[], &[], vec![producer, consumer], &[]);
    if cluster > 1 {
        does(b, H::ClusterSync, &[], &[]);
    }
}

/// `ceil(x / by)` for `x >= 0`.
fn ceil(b: &mut Builder, x: Val, by: i64) -> Val {
    let x = b.add_i(x, by - 1);
    b.div_i(x, by)
}

fn u32_of(b: &mut Builder, x: Val) -> Val {
    b.cast(x, DType::U32)
}

/// A stride's value: a constant, one of the problem's sizes, or a product of two.
fn value_of(b: &mut Builder, d: &Dim, p: &Problem) -> Val {
    if let Some(c) = d.as_const() {
        return b.index(c);
    }
    let sizes = [&p.m, &p.n, &p.k];
    for x in sizes {
        if x.dim == *d {
            return x.val;
        }
        for y in sizes {
            if x.dim.clone() * y.dim.clone() == *d {
                return b.mul(x.val, y.val);
            }
        }
    }
    p.n.val
}

/// A plain product `c = a * b`, sizes given at run time in the order m, n, k and, with `batched`, the batch.
pub fn plain(name: &str, dtype: DType, out: DType, rhs: Rhs, tiles: Tiles, batched: bool) -> Kernel {
    let mut b = Builder::new(name, Device::Gpu);
    let (a, w, c) = (b.arg(dtype, Access::Read), b.arg(dtype, Access::Read), b.arg(out, Access::Write));
    let p = run_time_problem(&mut b, a, w, c, rhs, batched);
    write(&mut b, &p, tiles, &mut |b, s| b.cast(s.acc, out));
    b.finish()
}

/// A problem of dense matrices with all sizes at run time.
pub fn run_time_problem(b: &mut Builder, a: Buf, w: Buf, c: Buf, rhs: Rhs, batched: bool) -> Problem {
    let size = |b: &mut Builder, i: usize| Size { dim: crate::tile::hopper::size(i), val: b.dim() };
    let (m, n, k) = (size(b, 0), size(b, 1), size(b, 2));
    let batch = batched.then(|| size(b, 3));
    let step = |x: &Size, y: &Size| batched.then(|| x.dim.clone() * y.dim.clone());
    let ldb = if rhs == Rhs::Kn { &n } else { &k };
    Problem {
        a: Matrix { arg: a, stride: k.dim.clone(), batch: step(&m, &k) },
        b: Matrix { arg: w, stride: ldb.dim.clone(), batch: step(&n, &k) },
        c: Matrix { arg: c, stride: n.dim.clone(), batch: step(&m, &n) },
        rhs,
        tma_out: true,
        m,
        n,
        k,
        batch,
    }
}
