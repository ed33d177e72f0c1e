//! Regions on Hopper: which of them `hopper_gemm` and `flash` run, and how their views and epilogues are taken in.
//!
//! Operands are read by TMA, so an operand is a load whose address is affine in its axes, contiguous along one of the two
//! matrix axes, with strides that are multiples of 16 bytes: transposes, slices and batch broadcasts cost nothing.
//! An epilogue runs on fragments where its loads are affine too (a bias, a residual, a scalar), held in f32 throughout;
//! anything else runs element by element, with the meaning every other family gives it.
use super::expr::{Env, Point, affine, call, reg};
use super::flash::{self, Attention, BiasAt, FlashTiles, Operands, Rows};
use super::hopper_gemm::{self, Matrix, Out, Problem, Rhs, Size, Slice, Tiles};
use super::hopper_words::{Place, acc_load, acc_store, ex2, gives};
use super::{ArgFacts, Built, Family, KernelError, builder};
use crate::targets::{Gpu, Target};
use crate::tile::hopper::{HopperWord as H, Vary, size};
use crate::tile::{Builder, Ty, Val};
use pavage_ir::dim::Atom;
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Region, Scalar, ScalarFn, Schedule};
use std::collections::HashMap;

/// Contractions of 16-bit operands.
pub const GEMM: Family = Family {
    name: "hopper_gemm",
    about: "16-bit contractions on sm_90a: TMA operands, wgmma, f32 accumulation, epilogue in registers",
    schedules: gemm_schedules,
    build: build_gemm,
};

/// Attention with heads of 64 or 128 elements.
pub const FLASH: Family = Family {
    name: "flash",
    about: "16-bit attention on sm_90a in one pass over the keys, probabilities never in memory",
    schedules: flash_schedules,
    build: build_flash,
};

/// Rows of a tile.
const BM: i64 = 128;

/// The Hopper target, if it is one.
pub(super) fn hopper(target: &Target) -> Option<&Gpu> {
    match target {
        Target::Gpu(g) if g.hopper => Some(g),
        _ => None,
    }
}

/// Whether every value of `d` is a multiple of `by`.
pub(super) fn multiple(d: &Dim, by: i64) -> bool {
    d.terms().iter().all(|(_, c)| c % by == 0)
}

fn has_axes(d: &Dim) -> bool {
    d.any_atom(&|a| matches!(a, Atom::Axis(_) | Atom::Value(_)))
}

/// A load as TMA sees it.
pub(super) struct Tensor {
    pub(super) arg: usize,
    /// Strides of the axes asked for, in their order.
    pub(super) strides: Vec<Dim>,
    pub(super) offset: Dim,
}

/// The address of load `id` as strides of these axes and an offset, if it is that.
pub(super) fn strided(region: &Region, id: ExprId, axes: &[usize]) -> Option<Tensor> {
    let Expr::Load { arg, index, guard: None } = region.expr(id) else { return None };
    let mut rest = Env::flat(&region.args[*arg as usize].shape, index);
    let mut strides = vec![];
    for &axis in axes {
        let (factor, left) = affine(&rest, axis)?;
        if has_axes(&factor) {
            return None;
        }
        strides.push(factor);
        rest = left;
    }
    if has_axes(&rest) { None } else { Some(Tensor { arg: *arg as usize, strides, offset: rest }) }
}

/// A 16-bit operand with contiguous axis `inner` and strided axis `outer`.
fn operand(region: &Region, id: ExprId, inner: usize, outer: usize, batch: usize) -> Option<Tensor> {
    if !matches!(region.dtype(id), DType::F16 | DType::BF16) {
        return None;
    }
    let axes: Vec<usize> = [inner, outer].into_iter().chain(0..batch).collect();
    let t = strided(region, id, &axes)?;
    let aligned = t.strides[1..].iter().chain([&t.offset]).all(|d| multiple(d, 8));
    (t.strides[0].is(1) && aligned && !t.strides[1].is(0)).then_some(t)
}

struct Shape<'r> {
    lhs: Tensor,
    rhs: Tensor,
    how: Rhs,
    k: &'r Dim,
    /// Rank of the space.
    p: usize,
}

fn contraction(region: &Region) -> Option<Shape<'_>> {
    let Heart::Contract { k, lhs, rhs, acc } = &region.heart else { return None };
    let p = region.space.len();
    if !(2..=5).contains(&p) || *acc != DType::F32 || region.dtype(*lhs) != region.dtype(*rhs) {
        return None;
    }
    let batch = p - 2;
    let a = operand(region, *lhs, p, p - 2, batch)?;
    let (b, how) = match operand(region, *rhs, p - 1, p, batch) {
        Some(b) => (b, Rhs::Kn),
        None => (operand(region, *rhs, p, p - 1, batch)?, Rhs::Nk),
    };
    // Every 16-bit element has a byte of its own, so outputs of any dtype but nibbles can be written.
    let writable = region.outputs.iter().all(|o| o.ty.dtype.bits() >= 8 && o.ty.dtype != DType::Str);
    writable.then_some(Shape { lhs: a, rhs: b, how, k, p })
}

fn gemm_schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let (Some(gpu), Some(shape)) = (hopper(target), contraction(region)) else { return vec![] };
    // A matrix of a few rows is a matter of memory, not of tensor cores.
    if region.space[shape.p - 2].as_const().is_some_and(|m| m < 16) || region.space[shape.p - 1].as_const().is_some_and(|n| n < 16) {
        return vec![];
    }
    let staged = tma_output(region, shape.p).is_some();
    let known = |d: &Dim, guess: i64| d.as_const().unwrap_or(guess);
    let (m, n) = (known(&region.space[shape.p - 2], 4096), known(&region.space[shape.p - 1], 4096));
    let batch: i64 = region.space[..shape.p - 2].iter().map(|d| known(d, 1)).product();
    let mut found = vec![];
    for (bn, rate) in [(256i64, 1.0), (192, 0.95), (128, 0.88), (64, 0.6)] {
        for (cluster, gain) in [(1i64, 1.0), (2, 0.98)] {
            // With B as [k][n] each block of the cluster loads whole panels.
            if cluster == 2 && (bn / 2) % 64 != 0 {
                continue;
            }
            let rows = (m + BM * cluster - 1) / (BM * cluster) * cluster;
            let tiles = rows * ((n + bn - 1) / bn) * batch;
            let slots = i64::from(gpu.sms) / cluster * cluster;
            let waves = (tiles + slots - 1) / slots;
            let cost = waves as f64 * bn as f64 / (rate * gain);
            let stages = Tiles::most_stages(bn as u64, staged) as i64;
            found.push((cost, Schedule::new("hopper_gemm", &[("bn", bn), ("cluster", cluster), ("stages", stages.min(6)), ("group", 8)])));
        }
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    found.into_iter().map(|(_, s)| s).collect()
}

struct Flash {
    rows: [Tensor; 4],
    mask: Option<ExprId>,
    att: Attention,
    keys: Dim,
}

fn attention(region: &Region) -> Option<Flash> {
    let Heart::Attention { q, k, v, mask, scale, keys, depth, part: None } = &region.heart else { return None };
    let p = region.space.len();
    let d = depth.as_const()?;
    if !(2..=5).contains(&p) || !matches!(d, 64 | 128) || !region.space[p - 1].is(d) {
        return None;
    }
    // The result leaves as it is, rounded to its dtype.
    let [out] = region.outputs.as_slice() else { return None };
    let mut e = out.expr;
    while let Expr::Cast(x) = region.expr(e) {
        e = *x;
    }
    if *region.expr(e) != Expr::Acc(0) || out.ty.dtype != region.dtype(*q) || region.dtype(*k) != region.dtype(*q) || region.dtype(*v) != region.dtype(*q) {
        return None;
    }
    let rows = |id: ExprId| operand(region, id, p - 1, p - 2, p - 2);
    let rows = [rows(*q)?, rows(*k)?, rows(*v)?, tma_output(region, p)?];
    let causal = region.space[p - 2] == *keys && mask.is_some_and(|m| is_causal(region, m, p));
    let mask = mask.filter(|_| !causal);
    if mask.is_some_and(|m| !Fragments::fits(region, m, p)) {
        return None;
    }
    Some(Flash { rows, mask, att: Attention { depth: d as u64, scale: scale.get(), causal }, keys: keys.clone() })
}

/// Whether a mask is 0 where the key is not after the query, and minus infinity elsewhere.
fn is_causal(region: &Region, mask: ExprId, p: usize) -> bool {
    let Expr::Call(ScalarFn::Select, parts) = region.expr(mask) else { return false };
    let [test, then, other] = parts.as_slice() else { return false };
    let value = |id: &ExprId| {
        let mut e = region.expr(*id);
        while let Expr::Cast(x) = e {
            e = region.expr(*x);
        }
        match e {
            Expr::Float(f) => Some(f.get()),
            Expr::Int(i) => Some(*i as f64),
            _ => None,
        }
    };
    let place = |id: &ExprId| match region.expr(*id) {
        Expr::Index(d) => Some(d.clone()),
        Expr::Int(c) => Some(Dim::from(*c)),
        _ => None,
    };
    let Expr::Call(f, sides) = region.expr(*test) else { return false };
    let [Some(a), Some(b)] = [sides.first().and_then(place), sides.get(1).and_then(place)] else { return false };
    let hides = match (value(then), value(other)) {
        (Some(0.0), Some(f64::NEG_INFINITY)) => false,
        (Some(f64::NEG_INFINITY), Some(0.0)) => true,
        _ => return false,
    };
    // What is not negative where the mask shows the key.
    let ahead = match (f, hides) {
        (ScalarFn::Le, false) | (ScalarFn::Gt, true) => b - a,
        (ScalarFn::Ge, false) | (ScalarFn::Lt, true) => a - b,
        (ScalarFn::Lt, false) | (ScalarFn::Ge, true) => b - a - Dim::one(),
        (ScalarFn::Gt, false) | (ScalarFn::Le, true) => a - b - Dim::one(),
        _ => return false,
    };
    ahead == Dim::axis(p - 2) - Dim::axis(p - 1)
}

fn flash_schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    let (Some(_), Some(f)) = (hopper(target), attention(region)) else { return vec![] };
    let best = FlashTiles::best(f.att.depth, f.att.causal);
    let knobs = |t: FlashTiles| {
        Schedule::new("flash", &[("consumers", t.consumers as i64), ("keys", t.keys as i64), ("stages", t.stages as i64), ("turns", i64::from(t.pingpong))])
    };
    // A mask takes registers of its own.
    let best = if f.mask.is_some() { FlashTiles { consumers: 2, keys: 64, ..best } } else { best };
    vec![knobs(best), knobs(FlashTiles { consumers: 2, ..best }), knobs(FlashTiles { pingpong: !best.pingpong, ..best })]
}

fn build_flash(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let unfit = || KernelError::Unsupported { family: "flash", reason: format!("`{}` is not an attention TMA can feed", region.name) };
    let (Some(gpu), Some(f)) = (hopper(target), attention(region)) else { return Err(unfit()) };
    let p = region.space.len();
    let tiles = FlashTiles {
        consumers: schedule.knob("consumers", 2) as u64,
        keys: schedule.knob("keys", 128) as u64,
        stages: schedule.knob("stages", 2) as u64,
        pingpong: schedule.knob("turns", 0) != 0,
        heads: 8,
    };
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let bufs = [env.args[f.rows[0].arg], env.args[f.rows[1].arg], env.args[f.rows[2].arg], env.outs[0]];
    let mut rows = |b: &mut Builder, i: usize| Rows {
        arg: bufs[i],
        stride: Params::dim(b, &mut env, &f.rows[i].strides[1]),
        batch: f.rows[i].strides[2..].iter().map(|s| if s.is(0) { None } else { Some(Params::dim(b, &mut env, s)) }).collect(),
        offset: Params::dim(b, &mut env, &f.rows[i].offset),
    };
    let rows = [rows(&mut b, 0), rows(&mut b, 1), rows(&mut b, 2), rows(&mut b, 3)];
    let batch: Vec<Size> = region.space[..p - 2].iter().map(|d| Params::size(&mut b, &mut env, d)).collect();
    let queries = Params::size(&mut b, &mut env, &region.space[p - 2]);
    let keys = Params::size(&mut b, &mut env, &f.keys);
    for s in region.symbols() {
        env.sym(&mut b, &s);
    }
    let ops = Operands { rows, batch, queries, keys };
    let (n_rows, n_cols) = (ops.queries.val, ops.keys.val);
    let mut masked = |b: &mut Builder, at: BiasAt| {
        let zero = b.float(0.0, DType::F32);
        let Some(mask) = f.mask else { return zero };
        let mut fr = Fragments {
            p,
            acc: None,
            lanes: at.lanes,
            row: at.row,
            col: at.col,
            batch: &at.batch,
            rows: n_rows,
            cols: n_cols,
            width: f.keys.clone(),
            known: HashMap::new(),
            env: &mut env,
        };
        let v = fr.value(b, mask);
        let v = b.cast(v, DType::F32);
        b.splat_to(v, Ty::Frag(DType::F32, at.lanes))
    };
    let bias: Option<flash::Bias<'_>> = if f.mask.is_some() { Some(&mut masked) } else { None };
    flash::write(&mut b, f.att, tiles, &ops, bias);
    let heads = region.space[..p - 2].iter().fold(Dim::one(), |n, d| n * d.clone());
    let all = region.space[p - 2].ceil_div(&Dim::from(tiles.queries() as i64)) * heads;
    let grid = all.smaller(&Dim::from(i64::from(gpu.sms)));
    Ok(Built { kernel: b.finish(), schedule: schedule.clone(), dims: env.dims, cpu: None, grid: Some([grid, Dim::one(), Dim::one()]), packs: vec![] })
}

/// Strides of the single 16-bit output that TMA can write: row stride, batch strides, offset.
fn tma_output(region: &Region, p: usize) -> Option<Tensor> {
    let [out] = region.outputs.as_slice() else { return None };
    if !matches!(out.ty.dtype, DType::F16 | DType::BF16) {
        return None;
    }
    let mut rest = Env::flat(&out.ty.shape, &out.index);
    let mut strides = vec![];
    for axis in [p - 1, p - 2].into_iter().chain(0..p - 2) {
        let (factor, left) = affine(&rest, axis)?;
        if has_axes(&factor) {
            return None;
        }
        strides.push(factor);
        rest = left;
    }
    let aligned = strides[1..].iter().chain([&rest]).all(|d| multiple(d, 8));
    // Without a stride of its own an axis of extent 1 has no place in a tensor map.
    let spread = strides[1..].iter().all(|d| !d.is(0));
    (strides[0].is(1) && aligned && spread && !has_axes(&rest)).then_some(Tensor { arg: 0, strides, offset: rest })
}

/// Sizes of a region as kernel parameters and as expressions of tensor maps.
pub(super) struct Params;

impl Params {
    /// `d`, free of axes, over the kernel's sizes.
    pub(super) fn dim(b: &mut Builder, env: &mut Env<'_>, d: &Dim) -> Dim {
        for s in d.symbols() {
            env.sym(b, &s);
        }
        let dims = env.dims.clone();
        d.map_atoms(&|a| match dims.iter().position(|x| *x == Dim::from(a.clone())) {
            Some(i) => size(i),
            None => Dim::from(a.clone()),
        })
    }

    /// `d` as both.
    pub(super) fn size(b: &mut Builder, env: &mut Env<'_>, d: &Dim) -> Size {
        Size { dim: Self::dim(b, env, d), val: env.size(b, d) }
    }
}

fn build_gemm(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let unfit = || KernelError::Unsupported { family: "hopper_gemm", reason: format!("`{}` is not a contraction TMA can feed", region.name) };
    let (Some(gpu), Some(shape)) = (hopper(target), contraction(region)) else { return Err(unfit()) };
    let p = shape.p;
    let tiles = Tiles {
        bn: schedule.knob("bn", 128) as u64,
        stages: schedule.knob("stages", 4) as u64,
        cluster: schedule.knob("cluster", 1) as u64,
        group: schedule.knob("group", 8) as u64,
    };
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let matrix = |b: &mut Builder, env: &mut Env<'_>, t: &Tensor, arg| Matrix {
        arg,
        stride: Params::dim(b, env, &t.strides[1]),
        batch: t.strides[2..].iter().map(|s| if s.is(0) { None } else { Some(Params::dim(b, env, s)) }).collect(),
        offset: Params::dim(b, env, &t.offset),
    };
    let m = Params::size(&mut b, &mut env, &region.space[p - 2]);
    let n = Params::size(&mut b, &mut env, &region.space[p - 1]);
    let k = Params::size(&mut b, &mut env, shape.k);
    let batch: Vec<Size> = region.space[..p - 2].iter().map(|d| Params::size(&mut b, &mut env, d)).collect();
    let (lhs_buf, rhs_buf) = (env.args[shape.lhs.arg], env.args[shape.rhs.arg]);
    let a = matrix(&mut b, &mut env, &shape.lhs, lhs_buf);
    let w = matrix(&mut b, &mut env, &shape.rhs, rhs_buf);
    let fragments = Fragments::can(region, p);
    let tma = tma_output(region, p).filter(|_| fragments);
    let out = match &tma {
        Some(t) => {
            let buf = env.outs[0];
            Out::Tma(matrix(&mut b, &mut env, t, buf))
        }
        None => Out::Epilogue,
    };
    // Sizes that the epilogue needs become parameters now, before the roles part.
    for s in region.symbols() {
        env.sym(&mut b, &s);
    }
    let (rows, cols) = (m.val, n.val);
    let problem = Problem { m, n, k, batch, a, b: w, rhs: shape.how, out };
    hopper_gemm::write(&mut b, &problem, tiles, &mut |b, slice| {
        if !fragments {
            one_by_one(b, &mut env, &slice, rows, cols);
            return None;
        }
        let lanes = b.ty(slice.acc).lanes() as u16;
        Fragments::new(&mut env, p, lanes, &slice, (rows, cols)).finish(b, tma.is_some())
    });
    let tile_rows = region.space[p - 2].ceil_div(&Dim::from(BM * tiles.cluster as i64));
    let tile_cols = region.space[p - 1].ceil_div(&Dim::from(tiles.bn as i64));
    let all = region.space[..p - 2].iter().fold(tile_rows * tile_cols * Dim::from(tiles.cluster as i64), |t, d| t * d.clone());
    let most = i64::from(gpu.sms) / tiles.cluster as i64 * tiles.cluster as i64;
    let grid = all.smaller(&Dim::from(most));
    Ok(Built { kernel: b.finish(), schedule: schedule.clone(), dims: env.dims, cpu: None, grid: Some([grid, Dim::one(), Dim::one()]), packs: vec![] })
}

/// Coordinates of register `i` of this thread in a slice.
pub(super) fn one_by_one(b: &mut Builder, env: &mut Env<'_>, slice: &Slice, rows: Val, cols: Val) {
    let like = b.ty(slice.acc).with(DType::I32);
    let (r, c) = (gives(b, H::AccRows, &[], &[], like), gives(b, H::AccCols, &[], &[], like));
    let (last_row, last_col) = (b.add_i(rows, -1), b.add_i(cols, -1));
    for i in 0..like.lanes() {
        let (r, c) = (b.extract(r, i), b.extract(c, i));
        let (r, c) = (b.cast(r, DType::I64), b.cast(c, DType::I64));
        let (m, n) = (b.add(slice.row, r), b.add(slice.col, c));
        let (in_m, in_n) = (b.lt(m, rows), b.lt(n, cols));
        let inside = b.and(in_m, in_n);
        let acc = b.extract(slice.acc, i);
        // Loads happen at the nearest element that exists, so that they need no branch of their own.
        let (m, n) = (b.min(m, last_row), b.min(n, last_col));
        let mut point = Point::new(slice.batch.iter().copied().chain([m, n]).collect());
        point.accs = vec![acc];
        let values: Vec<Val> = (0..env.region.outputs.len()).map(|o| env.expr(b, env.region.outputs[o].expr, &mut point)).collect();
        b.when(inside, |b| {
            for (o, v) in values.iter().enumerate() {
                let mut at = point.clone();
                env.store_value(b, o, *v, &mut at);
            }
        });
    }
}

/// Expressions over a fragment: rows are axis `p - 2`, columns axis `p - 1`.
pub(super) struct Fragments<'e, 'r> {
    env: &'e mut Env<'r>,
    p: usize,
    /// The heart's result.
    acc: Option<Val>,
    lanes: u16,
    row: Val,
    col: Val,
    batch: &'e [Val],
    rows: Val,
    cols: Val,
    /// Extent of the columns.
    width: Dim,
    known: HashMap<ExprId, Val>,
}

/// Whether fragments of this dtype are read and written.
const fn in_fragments(d: DType) -> bool {
    matches!(d, DType::F16 | DType::BF16 | DType::F32 | DType::I32 | DType::U8 | DType::I8)
}

/// How an address depends on row and column.
struct Pattern {
    vary: Option<Vary>,
    row: Dim,
    base: Dim,
}

/// `base(batch) + row * stride + col`, with either part possibly missing.
fn pattern(d: &Dim, p: usize) -> Option<Pattern> {
    let (col, rest) = affine(d, p - 1)?;
    let (row, base) = affine(&rest, p - 2)?;
    if has_axes(&row) || base.any_atom(&|a| matches!(a, Atom::Value(_))) {
        return None;
    }
    let vary = match (col.as_const(), row.as_const()) {
        (Some(0), Some(0)) => None,
        (Some(0), Some(1)) => Some(Vary::Rows),
        (Some(1), Some(0)) => Some(Vary::Cols),
        (Some(1), _) => Some(Vary::Both),
        _ => return None,
    };
    Some(Pattern { vary, row, base })
}

/// `base(batch) + row * a + col * b` with constant steps: `(a, b, base)`.
fn steps(d: &Dim, p: usize) -> Option<(i64, i64, Dim)> {
    let (col, rest) = affine(d, p - 1)?;
    let (row, base) = affine(&rest, p - 2)?;
    (!base.any_atom(&|a| matches!(a, Atom::Value(_)))).then_some((row.as_const()?, col.as_const()?, base))
}

impl<'e, 'r> Fragments<'e, 'r> {
    /// The epilogue of a slice of a matrix of this many rows and columns.
    pub(super) fn new(env: &'e mut Env<'r>, p: usize, lanes: u16, slice: &'e Slice, (rows, cols): (Val, Val)) -> Fragments<'e, 'r> {
        let width = env.region.space[p - 1].clone();
        Fragments { env, p, acc: Some(slice.acc), lanes, row: slice.row, col: slice.col, batch: &slice.batch, rows, cols, width, known: HashMap::new() }
    }

    /// Whether a region's outputs can be computed so.
    pub(super) fn can(region: &Region, p: usize) -> bool {
        let [out] = region.outputs.as_slice() else { return false };
        if !in_fragments(out.ty.dtype) {
            return false;
        }
        let place = pattern(&Env::flat(&out.ty.shape, &out.index), p);
        if !place.is_some_and(|q| q.vary == Some(Vary::Both)) {
            return false;
        }
        Self::fits(region, out.expr, p)
    }

    /// Whether an expression can be computed so.
    fn fits(region: &Region, root: ExprId, p: usize) -> bool {
        let mut todo = vec![root];
        while let Some(id) = todo.pop() {
            match region.expr(id) {
                Expr::Float(_) | Expr::Acc(0) => {}
                // Positions are counted in 32 bits.
                Expr::Int(v) if region.dtype(id) != DType::I64 || i32::try_from(*v).is_ok() => {}
                Expr::Index(d) if steps(d, p).is_some() => {}
                // Other arithmetic of theirs would need 64.
                Expr::Call(..) | Expr::Load { .. } if region.dtype(id) == DType::I64 => return false,
                Expr::Load { arg, index, guard: None } => {
                    let t = &region.args[*arg as usize];
                    let Some(q) = pattern(&Env::flat(&t.shape, index), p) else { return false };
                    if q.vary.is_some() && !in_fragments(t.dtype) {
                        return false;
                    }
                }
                Expr::Call(_, xs) => todo.extend(xs),
                Expr::Cast(x) => todo.push(*x),
                _ => return false,
            }
        }
        true
    }

    fn base(&mut self, b: &mut Builder, d: &Dim) -> Val {
        let zero = b.index(0);
        let mut point = Point::new(self.batch.iter().copied().chain([zero, zero]).collect());
        self.env.index(b, d, &mut point)
    }

    /// An index at every element, in 32 bits.
    fn position(&mut self, b: &mut Builder, d: &Dim) -> Val {
        let Some((row, col, base)) = steps(d, self.p) else { return self.zero(b) };
        let ty = Ty::Frag(DType::I32, self.lanes);
        let mut at = self.base(b, &base);
        for (step, first) in [(row, self.row), (col, self.col)] {
            let first = b.mul_i(first, step);
            at = b.add(at, first);
        }
        let mut v = b.cast(at, DType::I32);
        for (step, word) in [(row, H::AccRows), (col, H::AccCols)].into_iter().filter(|(step, _)| *step != 0) {
            let inside = gives(b, word, &[], &[], ty);
            let step = b.constant(Scalar::I(i128::from(step)), DType::I32);
            let inside = b.mul(inside, step);
            v = b.add(v, inside);
        }
        v
    }

    fn place(&mut self, b: &mut Builder, q: &Pattern) -> Place {
        Place { base: self.base(b, &q.base), row: self.row, col: self.col, rows: self.rows, cols: self.cols, stride: self.env.size(b, &q.row) }
    }

    /// Whether two neighbouring columns can be moved at once.
    fn paired(&self, q: &Pattern) -> bool {
        let even_cols = multiple(&self.width, 2);
        even_cols && multiple(&q.base, 2) && (q.vary == Some(Vary::Cols) || multiple(&q.row, 2))
    }

    fn value(&mut self, b: &mut Builder, id: ExprId) -> Val {
        if let Some(v) = self.known.get(&id) {
            return *v;
        }
        let dtype = self.env.region.dtype(id);
        let v = match self.env.region.expr(id).clone() {
            Expr::Float(v) => b.float(v.get(), reg(dtype)),
            Expr::Int(v) if dtype == DType::Bool => b.constant(Scalar::B(v != 0), dtype),
            Expr::Int(v) => b.constant(Scalar::I(i128::from(v)), if dtype == DType::I64 { DType::I32 } else { reg(dtype) }),
            Expr::Index(d) => self.position(b, &d),
            Expr::Load { arg, index, .. } => {
                let buf = self.env.args[arg as usize];
                let t = &self.env.region.args[arg as usize];
                let Some(q) = pattern(&Env::flat(&t.shape, &index), self.p) else { return self.zero(b) };
                let v = match q.vary {
                    Some(vary) => {
                        let place = self.place(b, &q);
                        let pairs = self.paired(&q);
                        acc_load(b, buf, place, vary, pairs, self.lanes)
                    }
                    None => {
                        let at = self.base(b, &q.base);
                        b.load(buf, at, 1)
                    }
                };
                b.cast(v, reg(dtype))
            }
            Expr::Call(f, xs) => {
                let of = xs.last().map_or(dtype, |x| self.env.region.dtype(*x));
                let args: Vec<Val> = xs.iter().map(|x| self.value(b, *x)).collect();
                self.call(b, f, of, &args)
            }
            Expr::Cast(x) => {
                let (v, from) = (self.value(b, x), self.env.region.dtype(x));
                // Between floats nothing is rounded before the end.
                if from.is_float() && dtype.is_float() && reg(from) == reg(dtype) { v } else { b.cast(v, reg(dtype)) }
            }
            _ => match self.acc {
                Some(v) => v,
                None => self.zero(b),
            },
        };
        self.known.insert(id, v);
        v
    }

    fn zero(&self, b: &mut Builder) -> Val {
        b.float(0.0, DType::F32)
    }

    /// Fragments of 16-bit floats are kept in f32 and not rounded between functions.
    fn call(&mut self, b: &mut Builder, f: ScalarFn, dtype: DType, args: &[Val]) -> Val {
        let half = matches!(self.env.region.outputs[0].ty.dtype, DType::F16 | DType::BF16);
        if half
            && reg(dtype) == DType::F32
            && args.len() == 1
            && let Some(v) = quick(b, f, args[0])
        {
            return v;
        }
        if reg(dtype) != dtype && dtype.is_float() { b.map(f, args) } else { call(b, f, dtype, args) }
    }

    /// The output: handed to TMA, or stored here.
    pub(super) fn finish(&mut self, b: &mut Builder, tma: bool) -> Option<Val> {
        let out = self.env.region.outputs[0].clone();
        let v = self.value(b, out.expr);
        let ty = Ty::Frag(b.ty(v).dtype(), self.lanes);
        let v = b.splat_to(v, ty);
        let v = b.cast(v, out.ty.dtype);
        if tma {
            return Some(v);
        }
        let q = pattern(&Env::flat(&out.ty.shape, &out.index), self.p)?;
        let place = self.place(b, &q);
        let pairs = self.paired(&q);
        acc_store(b, self.env.outs[0], v, place, pairs);
        None
    }
}

/// Functions for results that are rounded to 16 bits: absolute error below 2e-7 (`erf`, `tanh`), relative error below 2^-18 (the others),
/// at a third of the instructions of the exact ones.
fn quick(b: &mut Builder, f: ScalarFn, x: Val) -> Option<Val> {
    let k = |b: &mut Builder, v: f64| b.float(v, DType::F32);
    let log2e = std::f64::consts::LOG2_E;
    let rcp = |b: &mut Builder, x: Val| {
        let ty = b.ty(x);
        gives(b, H::Rcp, &[x], &[], ty)
    };
    // 2^(x * c)
    let power = |b: &mut Builder, x: Val, c: f64| {
        let c = k(b, c);
        let x = b.mul(x, c);
        ex2(b, x)
    };
    Some(match f {
        ScalarFn::Exp => power(b, x, log2e),
        ScalarFn::Sigmoid => {
            let e = power(b, x, -log2e);
            let one = k(b, 1.0);
            let d = b.add(e, one);
            rcp(b, d)
        }
        ScalarFn::Tanh => {
            // 1 - 2 / (1 + e^2x)
            let e = power(b, x, 2.0 * log2e);
            let (one, two) = (k(b, 1.0), k(b, -2.0));
            let d = b.add(e, one);
            let r = rcp(b, d);
            b.fma(r, two, one)
        }
        ScalarFn::Erf => {
            // Abramowitz and Stegun 7.1.26: 1 - t (a1 + ... + a5 t^4) e^-x^2 for x >= 0.
            let a = b.map(ScalarFn::Abs, &[x]);
            let (p, one) = (k(b, 0.327_591_1), k(b, 1.0));
            let d = b.fma(a, p, one);
            let t = rcp(b, d);
            let mut q = k(b, 1.061_405_429);
            for c in [-1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592] {
                let c = k(b, c);
                q = b.fma(q, t, c);
            }
            let q = b.mul(q, t);
            let s = b.mul(a, a);
            let e = power(b, s, -log2e);
            let minus = b.neg(q);
            let r = b.fma(minus, e, one);
            let n = b.neg(r);
            let zero = k(b, 0.0);
            let below = b.lt(x, zero);
            b.select(below, n, r)
        }
        _ => return None,
    })
}
