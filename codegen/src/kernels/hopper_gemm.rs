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
    /// Elements from one to the next along each batch axis; none: the same matrix for all.
    pub batch: Vec<Option<Dim>>,
    /// Elements from the argument's start to the first one.
    pub offset: Dim,
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
    /// Batch axes, at most 3.
    pub batch: Vec<Size>,
    /// `[m][k]`, f16 or bf16.
    pub a: Matrix,
    /// `[k][n]` or `[n][k]`, of the same dtype.
    pub b: Matrix,
    /// How B lies.
    pub rhs: Rhs,
    /// How results leave.
    pub out: Out,
}

/// How results leave.
#[derive(Clone, Debug)]
pub enum Out {
    /// Through shared memory and TMA: `[m][n]` of 16-bit elements, rows multiples of 16 bytes.
    Tma(Matrix),
    /// The epilogue writes them.
    Epilogue,
}

/// What the epilogue is given.
#[derive(Clone, Debug)]
pub struct Slice {
    /// 64 x 32 results in f32.
    pub acc: Val,
    /// First row in the matrix.
    pub row: Val,
    /// First column.
    pub col: Val,
    /// Coordinates on the batch axes.
    pub batch: Vec<Val>,
}

struct Tile {
    row: Val,
    col: Val,
    batch: Vec<Val>,
}

/// Write the body of a kernel for `p`; `epilogue` turns a slice of f32 results into what TMA stores, or stores itself and
/// gives nothing. The builder is fresh but for the arguments and sizes.
pub fn write(b: &mut Builder, p: &Problem, tiles: Tiles, epilogue: &mut dyn FnMut(&mut Builder, Slice) -> Option<Val>) {
    let Tiles { bn, stages, cluster, group } = tiles;
    let dtype = b.dtype(p.a.arg);
    let staged = match &p.out {
        Out::Tma(c) => Some((c, b.dtype(c.arg))),
        Out::Epilogue => None,
    };
    *b.launch() =
        crate::tile::Launch { threads: 128 * (CONSUMERS as u32 + 1), cluster: [cluster as u32, 1, 1], min_ctas: 1, max_regs: 168, ..Default::default() };

    let (a_stage, b_stage) = (BM * BK, bn * BK);
    let sa = b.alloc_aligned(Space::Shared, dtype, stages * a_stage, 1024);
    let sb = b.alloc_aligned(Space::Shared, dtype, stages * b_stage, 1024);
    let sc = staged.map(|(_, out)| b.alloc_aligned(Space::Shared, out, BM * bn, 1024));
    let full = b.alloc_aligned(Space::Shared, DType::U64, stages, 8);
    let empty = b.alloc_aligned(Space::Shared, DType::U64, stages, 8);

    let map = |b: &mut Builder, m: &Matrix, inner: &Dim, outer: &Dim, boxes: [u32; 2]| {
        let mut t = TensorMap {
            arg: m.arg,
            offset: m.offset.clone(),
            dims: vec![inner.clone(), outer.clone()],
            strides: vec![m.stride.clone()],
            boxes: boxes.to_vec(),
            swizzle: 128,
        };
        for (size, step) in p.batch.iter().zip(&m.batch) {
            if let Some(step) = step {
                t.dims.push(size.dim.clone());
                t.strides.push(step.clone());
                t.boxes.push(1);
            }
        }
        b.tensor_map(t) as u8
    };
    let (a_rows, b_rows) = (BM as u32, (bn / cluster) as u32);
    let map_a = map(b, &p.a, &p.k.dim, &p.m.dim, [PANEL as u32, a_rows]);
    let map_b = match p.rhs {
        Rhs::Nk => map(b, &p.b, &p.k.dim, &p.n.dim, [PANEL as u32, b_rows]),
        Rhs::Kn => map(b, &p.b, &p.n.dim, &p.k.dim, [PANEL as u32, BK as u32]),
    };
    let map_c = staged.map(|(c, _)| (c, map(b, c, &p.n.dim, &p.m.dim, [PANEL as u32, 64])));

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
    let total = p.batch.iter().fold(per_batch, |t, l| b.mul(t, l.val));
    let steps = ceil(b, p.k.val, BK as i64);
    // Tiles in groups of `group` tile rows, down the rows first, so that what runs together shares operands in L2.
    let tile = |b: &mut Builder, t: Val| -> Tile {
        let (mut batch, mut t) = (vec![], u32_of(b, t));
        if !p.batch.is_empty() {
            let per = u32_of(b, per_batch);
            let mut l = b.div(t, per);
            t = b.rem(t, per);
            for size in p.batch.iter().rev() {
                let size = u32_of(b, size.val);
                let i = b.rem(l, size);
                batch.insert(0, b.cast(i, DType::I64));
                l = b.div(l, size);
            }
        }
        let (height, width) = (u32_of(b, pairs), u32_of(b, columns_of));
        let g = b.constant(pavage_ir::Scalar::I(i128::from(group)), DType::U32);
        let area = b.mul(width, g);
        let (gi, r) = (b.div(t, area), b.rem(t, area));
        let top = b.mul(gi, g);
        let left = b.sub(height, top);
        let tall = b.min(left, g);
        let (down, across) = (b.rem(r, tall), b.div(r, tall));
        let m = b.add(top, down);
        let (m, n) = (b.cast(m, DType::I64), b.cast(across, DType::I64));
        let m = b.mul_i(m, cluster as i64);
        let m = b.add(m, rank);
        Tile { row: b.mul_i(m, BM as i64), col: b.mul_i(n, bn as i64), batch }
    };
    let coords = |inner: Val, outer: Val, m: &Matrix, t: &Tile| -> Vec<Val> {
        let mut c = vec![inner, outer];
        c.extend(t.batch.iter().zip(&m.batch).filter(|(_, step)| step.is_some()).map(|(i, _)| *i));
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
            if sc.is_some() {
                // The stores of the tile before have read the staging.
                b.when(lead, |b| does(b, H::BulkWait { pending: 0, read: true }, &[], &[]));
                named_sync(b, barrier, 128);
            }
            for from in (0..bn).step_by(SLICE as usize) {
                let acc = columns(b, done[2], from, SLICE);
                let col = b.add_i(at.col, from as i64);
                let v = epilogue(b, Slice { acc, row, col, batch: at.batch.clone() });
                if let (Some(sc), Some(v)) = (sc, v) {
                    does(b, H::StMatrix { panel: (64 * PANEL) as u32, col: from as u16 }, &[c_first, v], &[sc]);
                }
            }
            if let (Some(sc), Some((c, map_c))) = (sc, map_c) {
                does(b, H::FenceProxyAsync, &[], &[]);
                named_sync(b, barrier, 128);
                b.when(lead, |b| {
                    for panel in 0..bn / PANEL {
                        let src = b.add_i(c_first, (panel * 64 * PANEL) as i64);
                        let col = b.add_i(at.col, (panel * PANEL) as i64);
                        let args: Vec<Val> = [src].into_iter().chain(coords(col, row, c, &at)).collect();
                        does(b, H::TmaStore { map: map_c }, &args, &[sc]);
                    }
                    does(b, H::BulkCommit, &[], &[]);
                });
            }
            done[..2].to_vec()
        });
        if sc.is_some() {
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

/// A plain product `c = a * b` of dense matrices, sizes given at run time in the order m, n, k and, with `batched`, the batch;
/// rows of all three are multiples of 16 bytes.
pub fn plain(name: &str, dtype: DType, out: DType, rhs: Rhs, tiles: Tiles, batched: bool) -> Kernel {
    let mut b = Builder::new(name, Device::Gpu);
    let (a, w, c) = (b.arg(dtype, Access::Read), b.arg(dtype, Access::Read), b.arg(out, Access::Write));
    let size = |b: &mut Builder, i: usize| Size { dim: crate::tile::hopper::size(i), val: b.dim() };
    let (m, n, k) = (size(&mut b, 0), size(&mut b, 1), size(&mut b, 2));
    let batch: Vec<Size> = batched.then(|| size(&mut b, 3)).into_iter().collect();
    let matrix = |arg: Buf, rows: &Size, cols: &Size| Matrix {
        arg,
        stride: cols.dim.clone(),
        batch: batch.iter().map(|_| Some(rows.dim.clone() * cols.dim.clone())).collect(),
        offset: Dim::ZERO,
    };
    let rhs_matrix = if rhs == Rhs::Kn { matrix(w, &k, &n) } else { matrix(w, &n, &k) };
    let tma = matches!(out, DType::F16 | DType::BF16);
    let (lhs_matrix, out_matrix) = (matrix(a, &m, &k), matrix(c, &m, &n));
    let (rows, cols) = (m.val, n.val);
    let p = Problem { m, n, k, batch, a: lhs_matrix, b: rhs_matrix, rhs, out: if tma { Out::Tma(out_matrix) } else { Out::Epilogue } };
    write(&mut b, &p, tiles, &mut |b, s| {
        let v = b.cast(s.acc, out);
        if tma {
            return Some(v);
        }
        let zero = b.index(0);
        let base = match s.batch.first() {
            Some(l) => {
                let area = b.mul(rows, cols);
                b.mul(*l, area)
            }
            None => zero,
        };
        acc_store(b, c, v, Place { base, row: s.row, col: s.col, rows, cols, stride: cols }, true);
        None
    });
    b.finish()
}
