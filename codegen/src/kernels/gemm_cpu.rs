//! Matrix products on the CPU, and the convolutions that are ones: 1x1 windows over channels-last tensors, and transposed
//! convolutions whose windows do not overlap.
//!
//! Columns are cut into vectors and those into groups of `nv`; rows into blocks of `mc` and those into tiles of `mr`. The
//! parallel dimension counts (batch, row block, column group), groups fastest. A tile's accumulators stay in registers over
//! the whole of k and go through the region's output expressions before they are stored.
//!
//! The left operand is read in place, one scalar a multiply-add row, when it is an `f32` load with affine addresses;
//! anything else (prologue expressions, narrow floats, integers) is evaluated once a row block into scratch rows. The right
//! operand is a constant packed into panels, or rows of memory contiguous in n, or is packed panel by panel at run time.
use super::{
    ArgFacts, Built, CpuShape, Family, KernelError, Pack,
    expr::{Env, Point, VectorAxis, affine},
    flat::{self, Linear},
    micro::{self, Columns, End, Left, Math, Right, Rows, Tile},
    pack::{Cells, Walk},
    weights::Weights,
};
use crate::{
    targets::{Cpu, Target},
    tile::{Access, Buf, Builder, Ty, Val},
};
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Op, Region, Schedule, attr::Layout, dim::Atom, region::RegionOutput};

/// The family.
pub const FAMILY: Family =
    Family { name: "gemm_cpu", about: "matrix products and 1x1 convolutions in register tiles, outputs computed on the accumulators", schedules, build };

mod packed;

const NAME: &str = "gemm_cpu";

/// A contraction over flat memory.
struct Gemm {
    /// The region with flat arguments and merged axes; the heart is a `Contract`.
    region: Region,
    k: Dim,
    lhs: ExprId,
    rhs: ExprId,
    math: Math,
}

impl Gemm {
    fn batch(&self) -> &[Dim] {
        &self.region.space[..self.region.space.len() - 2]
    }
    fn m(&self) -> &Dim {
        &self.region.space[self.region.space.len() - 2]
    }
    fn n(&self) -> &Dim {
        &self.region.space[self.region.space.len() - 1]
    }
    /// Number of the contracted axis.
    fn k_axis(&self) -> usize {
        self.region.space.len()
    }
}

/// Where the left operand is read.
enum LeftFrom {
    /// In place.
    Memory { arg: usize, at: Linear },
    /// From scratch rows.
    Scratch,
}

/// Where the right operand is read.
enum RightFrom {
    /// Panels made at compile time.
    Panels { arg: usize, walk: Walk, batch: Vec<usize> },
    /// Panels of packed weights, made at compile time.
    Packed { weights: Weights, walk: Walk, batch: Vec<usize> },
    /// In place, contiguous in n.
    Memory { arg: usize, at: Linear },
    /// Panels made in scratch for each group; where the operand is contiguous in k, by transposing vectors.
    Scratch { along_k: Option<(usize, Linear)> },
}

/// The region as a contraction, if it is one this family takes.
fn contraction(region: &Region) -> Option<Gemm> {
    let (flat, k, lhs, rhs, acc) = match &region.heart {
        Heart::Contract { k, lhs, rhs, acc } => {
            let rank = region.space.len();
            let axes: Vec<Dim> = (0..=rank).map(Dim::axis).collect();
            let mut to = flat::flat_over(region, region.space.clone(), &axes);
            let mut copy = flat::Rewrite::new(region, &mut to, axes);
            let (lhs, rhs) = (copy.expr(*lhs), copy.expr(*rhs));
            (to, k.clone(), lhs, rhs, *acc)
        }
        Heart::Conv { window, groups: 1, x, input, w, weights, acc } if window.layout == Layout::ChannelsLast => {
            let rank = region.space.len();
            let point = weights[2..].iter().all(|d| d.is(1));
            if !point || window.lo.iter().chain(&window.hi).any(|p| *p != 0) {
                return None;
            }
            let axes: Vec<Dim> = (0..rank).map(Dim::axis).collect();
            let mut to = flat::flat_over(region, region.space.clone(), &axes);
            // The input's channel is the contracted axis, its place on a spatial axis a multiple of the output's.
            let mut x_axes = axes.clone();
            for (i, stride) in window.strides.iter().enumerate() {
                x_axes[1 + i] = Dim::axis(1 + i) * Dim::from(*stride);
            }
            x_axes[rank - 1] = Dim::axis(rank);
            let lhs = flat::Rewrite::new(region, &mut to, x_axes).expr(*x);
            let mut w_axes = vec![Dim::ZERO; rank];
            w_axes[0] = Dim::axis(rank - 1);
            w_axes[1] = Dim::axis(rank);
            let rhs = flat::Rewrite::new(region, &mut to, w_axes).expr(*w);
            (to, input[rank - 1].clone(), lhs, rhs, *acc)
        }
        Heart::Op(Op::ConvTranspose { strides, dilations, lo, hi, extra, groups: 1, layout: Layout::ChannelsLast }) => {
            let apart = lo.iter().chain(hi).all(|p| *p == 0) && extra.iter().all(|e| *e == 0) && dilations.iter().all(|d| *d == 1);
            if !apart {
                return None;
            }
            spread(region, strides)?
        }
        _ => return None,
    };
    let math = match acc {
        DType::F32 => [lhs, rhs].iter().all(|e| matches!(flat.dtype(*e), DType::F32 | DType::F16 | DType::BF16)).then_some(Math::F32)?,
        DType::I32 => [lhs, rhs].iter().all(|e| fits_i16(&flat, *e)).then_some(Math::I16Pairs)?,
        _ => return None,
    };
    let mut gemm = Gemm { region: flat, k, lhs, rhs, math };
    gemm.region.heart = Heart::Contract { k: gemm.k.clone(), lhs, rhs, acc };
    while let Some(merged) = merge_rows(&gemm) {
        gemm = merged;
    }
    Some(gemm)
}

/// A transposed convolution whose windows do not overlap: each tap is a product of its own, `[pixels, c]` by `[c, o]`, and
/// the taps are batch axes.
fn spread(region: &Region, strides: &[usize]) -> Option<(Region, Dim, ExprId, ExprId, DType)> {
    let [x, w] = region.args.as_slice() else { return None };
    let (taps, out) = (&w.shape[2..], region.outputs.first()?);
    if taps.iter().zip(strides).any(|(k, s)| !k.is(*s as i64)) || x.dtype != DType::F32 || out.ty.dtype != DType::F32 {
        return None;
    }
    let (spatial, rank) = (taps.len(), x.shape.len());
    // Axes: taps, then n and pixels, then output channels; the contracted one follows.
    let pixels = &x.shape[..rank - 1];
    let space: Vec<Dim> = taps.iter().chain(pixels).cloned().chain([w.shape[1].clone()]).collect();
    let p = space.len();
    let mut to = Region::new(region.name.clone(), space);
    to.args = region.args.clone();
    let mut index: Vec<Dim> = (spatial..p - 1).map(Dim::axis).collect();
    let place: Vec<Dim> = (0..rank)
        .map(|i| match i {
            0 => index[0].clone(),
            i if i + 1 == rank => Dim::axis(p - 1),
            i => index[i].clone() * Dim::from(strides[i - 1]) + Dim::axis(i - 1),
        })
        .collect();
    index.push(Dim::axis(p));
    let lhs = to.push(Expr::Load { arg: 0, index, guard: None }, x.dtype);
    let index: Vec<Dim> = [Dim::axis(p), Dim::axis(p - 1)].into_iter().chain((0..spatial).map(Dim::axis)).collect();
    let rhs = to.push(Expr::Load { arg: 1, index, guard: None }, w.dtype);
    let expr = to.push(Expr::Acc(0), DType::F32);
    // The output may be a slice of something larger.
    let at = |a: &Atom| match a {
        Atom::Axis(k) => place[*k as usize].clone(),
        other => Dim::from(other.clone()),
    };
    to.outputs = vec![RegionOutput { ty: out.ty.clone(), expr, index: out.index.iter().map(|d| d.map_atoms(&at)).collect() }];
    let axes: Vec<Dim> = (0..=p).map(Dim::axis).collect();
    let mut flat = flat::flat_over(&to, to.space.clone(), &axes);
    let mut copy = flat::Rewrite::new(&to, &mut flat, axes);
    let (lhs, rhs) = (copy.expr(lhs), copy.expr(rhs));
    Some((flat, x.shape[rank - 1].clone(), lhs, rhs, DType::F32))
}

/// Whether the left operand of an integer contraction is plain `u8` and the right one plain `i8`.
pub(super) fn quads(region: &Region, lhs: ExprId, rhs: ExprId) -> bool {
    fn plain(region: &Region, id: ExprId, dtype: DType) -> bool {
        match region.expr(id) {
            Expr::Cast(x) if region.dtype(id).is_int() && region.dtype(id).bits() >= 16 => plain(region, *x, dtype),
            _ => region.dtype(id) == dtype,
        }
    }
    plain(region, lhs, DType::U8) && plain(region, rhs, DType::I8)
}

/// Whether an integer expression stays within `i16`: 8-bit values and differences of them.
pub(super) fn fits_i16(region: &Region, id: ExprId) -> bool {
    fn byte(region: &Region, id: ExprId) -> bool {
        match region.expr(id) {
            Expr::Cast(x) if region.dtype(id).is_int() && region.dtype(id).bits() >= 16 => byte(region, *x),
            Expr::Int(v) => (-256..=255).contains(v),
            _ => region.dtype(id).is_int() && region.dtype(id).bits() <= 8,
        }
    }
    match region.expr(id) {
        _ if region.dtype(id) == DType::I16 => true,
        Expr::Call(pavage_ir::ScalarFn::Sub | pavage_ir::ScalarFn::Add, xs) if region.dtype(id).bits() >= 16 => xs.iter().all(|x| byte(region, *x)),
        _ => byte(region, id),
    }
}

/// The same contraction with the innermost batch axis and the rows as one axis, where memory does not tell them apart.
fn merge_rows(gemm: &Gemm) -> Option<Gemm> {
    let rank = gemm.region.space.len();
    if rank < 3 {
        return None;
    }
    let (outer, rows) = (rank - 3, rank - 2);
    let (outer_extent, extent) = (gemm.region.space[outer].clone(), gemm.region.space[rows].clone());
    // Enough rows of a known number are cut into even tiles, which an unknown factor would spoil.
    if outer_extent.as_const().is_none() && extent.as_const().is_some_and(|n| n >= 32) {
        return None;
    }
    let uses = |d: &Dim| d.any_atom(&|a| matches!(a, Atom::Axis(k) if *k as usize == outer || *k as usize == rows));
    let one = |d: &Dim| d.is(1);
    let alike = |d: &Dim| {
        if !uses(d) || one(&outer_extent) {
            return true;
        }
        let steps = affine(d, outer).and_then(|(o, rest)| Some((o, affine(&rest, rows)?.0)));
        steps.is_some_and(|(o, r)| !uses(&o) && (one(&extent) || o == r * extent.clone()))
    };
    let mut all = gemm.region.outputs.iter().flat_map(|o| &o.index).all(alike);
    for (expr, _) in &gemm.region.exprs {
        all &= match expr {
            Expr::Index(d) => !uses(d) || one(&outer_extent),
            Expr::Load { index, .. } => index.iter().all(alike),
            _ => true,
        };
    }
    // The right operand has no rows.
    let apart = |d: &Dim| !one(&outer_extent) && d.any_atom(&|a| matches!(a, Atom::Axis(k) if *k as usize == outer));
    if !all || flat::any_index(&gemm.region, gemm.rhs, &apart) {
        return None;
    }
    let mut axes: Vec<Dim> = (0..outer).map(Dim::axis).collect();
    if one(&outer_extent) || !one(&extent) {
        axes.extend([Dim::ZERO, Dim::axis(outer)]);
    } else {
        axes.extend([Dim::axis(outer), Dim::ZERO]);
    }
    axes.extend([Dim::axis(rows), Dim::axis(rows + 1)]);
    let mut space = gemm.region.space.clone();
    space.remove(outer);
    space[outer] = outer_extent * extent;
    let mut to = flat::flat_over(&gemm.region, space, &axes);
    let mut copy = flat::Rewrite::new(&gemm.region, &mut to, axes);
    let (lhs, rhs) = (copy.expr(gemm.lhs), copy.expr(gemm.rhs));
    let acc = gemm.math.acc();
    to.heart = Heart::Contract { k: gemm.k.clone(), lhs, rhs, acc };
    Some(Gemm { region: to, k: gemm.k.clone(), lhs, rhs, math: gemm.math })
}

/// An unguarded load behind exact conversions, with its address.
pub(super) fn plain_load(region: &Region, id: ExprId, axes: usize) -> Option<(usize, Linear)> {
    match region.expr(id) {
        Expr::Cast(x) => {
            let (from, to) = (region.dtype(*x), region.dtype(id));
            let exact = (from.is_int() && to.is_int() && to.bits() > from.bits()) || (from.is_float() && to.is_float() && to.bits() > from.bits());
            if exact { plain_load(region, *x, axes) } else { None }
        }
        Expr::Load { arg, index, guard: None } => {
            let shape = &region.args[*arg as usize].shape;
            Some((*arg as usize, flat::linear(&flat::offset(index, shape), axes)?))
        }
        _ => None,
    }
}

fn left_from(gemm: &Gemm) -> LeftFrom {
    match plain_load(&gemm.region, gemm.lhs, gemm.k_axis() + 1) {
        Some((arg, at)) if gemm.math == Math::F32 && gemm.region.args[arg].dtype == DType::F32 => LeftFrom::Memory { arg, at },
        _ => LeftFrom::Scratch,
    }
}

fn right_from(gemm: &Gemm, lanes: usize, facts: &ArgFacts) -> RightFrom {
    let k_axis = gemm.k_axis();
    let loads_of = |arg: usize| gemm.region.exprs.iter().filter(|(e, _)| matches!(e, Expr::Load { arg: a, .. } if *a as usize == arg)).count();
    if gemm.math == Math::F32
        && let Some(weights) = Weights::of(&gemm.region, gemm.rhs, k_axis, &gemm.k)
        && facts.constant(weights.arg).is_some()
        && loads_of(weights.arg) == 1
        && let Some((walk, batch)) = walk(gemm, &weights.at, weights.arg, lanes)
    {
        return RightFrom::Packed { weights, walk, batch };
    }
    let Some((arg, at)) = plain_load(&gemm.region, gemm.rhs, k_axis + 1) else { return RightFrom::Scratch { along_k: None } };
    if facts.constant(arg).is_some()
        && loads_of(arg) == 1
        && let Some((walk, batch)) = walk(gemm, &at, arg, lanes)
    {
        return RightFrom::Panels { arg, walk, batch };
    }
    let dtype = gemm.region.args[arg].dtype;
    if gemm.math == Math::F32 && at.strides[k_axis - 1].is(1) && matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return RightFrom::Memory { arg, at };
    }
    let along_k = (gemm.math == Math::F32 && dtype == DType::F32 && at.strides[k_axis].is(1)).then_some((arg, at));
    RightFrom::Scratch { along_k }
}

/// How to pack a constant right operand, and the batch axes it has.
fn walk(gemm: &Gemm, at: &Linear, arg: usize, lanes: usize) -> Option<(Walk, Vec<usize>)> {
    let size = |d: &Dim| d.as_const().and_then(|v| usize::try_from(v).ok());
    let k_axis = gemm.k_axis();
    let mut batch = vec![];
    let mut axes = vec![];
    for (i, extent) in gemm.batch().iter().enumerate() {
        let stride = at.strides[i].as_const()?;
        if stride != 0 {
            batch.push((size(extent)?, stride));
            axes.push(i);
        }
    }
    let own = gemm.region.args[arg].dtype;
    let cells = if own.bits() == 4 { Cells::Nibbles } else { Cells::Whole };
    let (dtype, group) = if cells == Cells::Nibbles { (DType::U8, 2) } else { (gemm.math.packed(own), gemm.math.group()) };
    let walk = Walk {
        batch,
        n: (size(gemm.n())?, at.strides[k_axis - 1].as_const()?),
        k: vec![(size(&gemm.k)?, at.strides[k_axis].as_const()?)],
        start: at.rest.as_const()?,
        width: lanes,
        group,
        dtype,
        cells,
    };
    Some((walk, axes))
}

/// How rows are cut into blocks.
enum Blocks {
    /// Blocks of this many rows exactly.
    Even(usize),
    /// Blocks of this many rows, the last one smaller.
    Ragged(Dim),
}

fn blocks(gemm: &Gemm, cpu: &Cpu, mc: usize, staged: bool, right: &RightFrom) -> Blocks {
    let k = gemm.k.as_const().unwrap_or(512).max(1) as usize;
    // Half the second-level cache for a block of the left operand.
    let fit = (cpu.l2_bytes as usize / 2 / (4 * k)).clamp(24, 256);
    if let Some(m) = gemm.m().as_const().and_then(|m| usize::try_from(m).ok()) {
        if m <= fit.max(64) {
            return Blocks::Even(m);
        }
        let most = if mc > 0 { mc } else { fit.min(128) };
        if let Some(d) = (most / 3..=most).rev().find(|d| *d > 0 && m % d == 0) {
            return Blocks::Even(d);
        }
    }
    if matches!(right, RightFrom::Scratch { .. }) && !staged {
        return Blocks::Ragged(gemm.m().clone());
    }
    Blocks::Ragged(Dim::from(if mc > 0 { mc } else { fit.min(96) }))
}

fn schedules(region: &Region, target: &Target, facts: &ArgFacts) -> Vec<Schedule> {
    let Target::Cpu(cpu) = target else { return vec![] };
    let Some(gemm) = contraction(region) else { return vec![] };
    let _ = facts;
    let mut all = vec![];
    let m = gemm.m().as_const().unwrap_or(1 << 20).max(1) as usize;
    let vectors = (gemm.n().as_const().unwrap_or(1 << 20).max(1) as usize).div_ceil(cpu.lanes.into());
    let best = micro::cut(cpu, vectors, m, 0, 0);
    let nv = best.classes.first().map_or(1, |c| c.0);
    for nv in [nv, 2, 1, 3, 4] {
        for mc in [0, 48, 192] {
            let s = Schedule::new(NAME, &[("nv", nv as i64), ("mc", mc)]);
            if nv <= vectors && !all.contains(&s) {
                all.push(s);
            }
        }
    }
    all
}

/// Column groups of one width: how many, and the tile.
struct Class {
    nv: usize,
    mr: usize,
    groups: Dim,
    first_group: Dim,
    first_vector: Dim,
}

fn classes(gemm: &Gemm, cpu: &Cpu, blocks: &Blocks, nv: usize, mr: usize) -> Vec<Class> {
    let lanes = usize::from(cpu.lanes);
    let vectors = gemm.n().ceil_div(&Dim::from(lanes));
    let mut out: Vec<Class> = vec![];
    let rows = match blocks {
        Blocks::Even(n) => *n,
        Blocks::Ragged(d) => d.as_const().unwrap_or(96) as usize,
    };
    let counted = matches!(blocks, Blocks::Ragged(_));
    let mut push = |nv: usize, mr: usize, groups: Dim| {
        // Remainders of a counted number of rows are covered by halves: blocks are multiples of 12 and 8.
        let mr = if counted && mr >= 8 { mr / 4 * 4 } else { mr };
        let (first_group, first_vector) = out
            .last()
            .map_or((Dim::ZERO, Dim::ZERO), |c| (c.first_group.clone() + c.groups.clone(), c.first_vector.clone() + c.groups.clone() * Dim::from(c.nv)));
        out.push(Class { nv, mr, groups, first_group, first_vector });
    };
    if let Some(v) = vectors.as_const() {
        let Columns { classes } = micro::cut(cpu, v as usize, rows, nv, mr);
        classes.into_iter().for_each(|(nv, mr, groups)| push(nv, mr, Dim::from(groups)));
    } else {
        let nv = if nv > 0 { nv } else { 2 };
        let mr = if mr > 0 { mr.min(micro::max_rows(cpu, nv)) } else { micro::max_rows(cpu, nv) };
        let whole = vectors.div(&Dim::from(nv));
        push(nv, mr, whole.clone());
        if nv > 1 {
            push(1, mr, vectors - whole * Dim::from(nv));
        }
    }
    out
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, facts: &ArgFacts) -> Result<Built, KernelError> {
    let no = |reason: &str| KernelError::Unsupported { family: NAME, reason: reason.to_owned() };
    let Target::Cpu(cpu) = target else { return Err(no("not a CPU")) };
    let mut gemm = contraction(region).ok_or_else(|| no("not a contraction it takes"))?;
    let packed = |gemm: &Gemm| matches!(right_from(gemm, cpu.lanes.into(), facts), RightFrom::Panels { .. });
    if gemm.math == Math::I16Pairs && cpu.vnni && quads(&gemm.region, gemm.lhs, gemm.rhs) && packed(&gemm) {
        gemm.math = Math::Quads;
    }
    let lanes = usize::from(cpu.lanes);
    let knob = |name: &str, default: i64| usize::try_from(schedule.knob(name, default)).unwrap_or(0);
    let left = left_from(&gemm);
    let right = right_from(&gemm, lanes, facts);
    let staged = matches!(left, LeftFrom::Scratch);
    let blocks = blocks(&gemm, cpu, knob("mc", 0), staged, &right);
    let classes = classes(&gemm, cpu, &blocks, knob("nv", 0), knob("mr", 0));
    let mut b = super::builder(name, target);

    // Arguments: a packed constant takes the place, and the dtype, of its own.
    let packed = match &right {
        RightFrom::Panels { arg, walk, .. } => Some((*arg, walk.clone())),
        RightFrom::Packed { weights, walk, .. } => Some((weights.arg, walk.clone())),
        RightFrom::Memory { .. } | RightFrom::Scratch { .. } => None,
    };
    let dtype = |i: usize| packed.as_ref().filter(|(a, _)| *a == i).map_or(region.args[i].dtype, |(_, w)| w.dtype);
    let args: Vec<Buf> = (0..region.args.len()).map(|i| b.arg(dtype(i), Access::Read)).collect();
    let outs: Vec<Buf> = region.outputs.iter().map(|o| b.arg(o.ty.dtype, Access::Write)).collect();
    let mut env = Env::with_bufs(&gemm.region, args, outs);

    // Scratch: rows of the left operand, then a panel of the right one.
    let needs_panel = match &right {
        RightFrom::Scratch { .. } => true,
        RightFrom::Packed { weights, .. } => !matches!(blocks, Blocks::Even(n) if n <= weights.few_rows()),
        RightFrom::Panels { .. } | RightFrom::Memory { .. } => false,
    };
    let unit = Dim::from(gemm.math.staged().bits() / 8);
    let pad = |d: &Dim| d.ceil_div(&Dim::from(lanes)) * Dim::from(lanes);
    let mut row_stride = pad(&gemm.k);
    if row_stride.as_const().is_some_and(|s| s % 256 == 0) {
        row_stride = row_stride + Dim::from(lanes);
    }
    let block_rows = match &blocks {
        Blocks::Even(n) => Dim::from(*n),
        Blocks::Ragged(d) => d.clone(),
    };
    let staged_len = if staged { block_rows.clone() * row_stride.clone() } else { Dim::ZERO };
    let widest = classes.iter().map(|c| c.nv).max().unwrap_or(1);
    let group = gemm.math.group();
    let steps = gemm.k.ceil_div(&Dim::from(group));
    let panel_len = if needs_panel { steps.clone() * Dim::from(widest * lanes * group) } else { Dim::ZERO };
    let scratch = (staged || needs_panel).then(|| b.scratch(gemm.math.staged()));

    let k = env.size(&mut b, &gemm.k);
    let n = env.size(&mut b, gemm.n());
    let m = env.size(&mut b, gemm.m());
    let row_blocks = gemm.m().ceil_div(&block_rows);
    let groups: Dim = classes.iter().map(|c| c.groups.clone()).sum();
    let outer: Dim = gemm.batch().iter().cloned().product::<Dim>() * row_blocks.clone();
    let extent = outer * groups.clone();

    let (lo, hi) = (b.lo(), b.hi());
    let groups_v = env.size(&mut b, &groups);
    let row_blocks_v = env.size(&mut b, &row_blocks);
    let block_rows_v = env.size(&mut b, &block_rows);
    let first = b.div(lo, groups_v);
    let one = b.index(1);
    let last = b.add(hi, groups_v);
    let last = b.sub(last, one);
    let last = b.div(last, groups_v);
    let cx = Cx {
        gemm: &gemm,
        lanes,
        k,
        n,
        left,
        right,
        scratch,
        row_stride: row_stride.clone(),
        staged_len: staged_len.clone(),
        unroll: knob("unroll", 4),
        prefetch: knob("prefetch", 1) != 0,
    };
    b.for_(first, last, 1, &[], |b, outer, _| {
        let start = b.mul(outer, groups_v);
        let zero = b.index(0);
        let from = b.sub(lo, start);
        let from = b.max(from, zero);
        let to = b.sub(hi, start);
        let to = b.min(to, groups_v);
        // Which batch, which block.
        let block = b.rem(outer, row_blocks_v);
        let mut rest = b.div(outer, row_blocks_v);
        let mut batch = vec![zero; gemm.batch().len()];
        for (i, extent) in gemm.batch().iter().enumerate().rev() {
            let extent = env.size(b, extent);
            batch[i] = b.rem(rest, extent);
            rest = b.div(rest, extent);
        }
        let row0 = b.mul(block, block_rows_v);
        let rows = match &blocks {
            Blocks::Even(n) => Rows::Fixed(*n),
            Blocks::Ragged(_) => {
                let left = b.sub(m, row0);
                Rows::Counted(b.min(left, block_rows_v))
            }
        };
        if matches!(cx.left, LeftFrom::Scratch) {
            cx.stage(b, &mut env, &batch, row0, rows);
        }
        for class in &classes {
            let first_group = env.size(b, &class.first_group);
            let first_vector = env.size(b, &class.first_vector);
            let count = env.size(b, &class.groups);
            let end = b.add(first_group, count);
            let (from, to) = (b.max(from, first_group), b.min(to, end));
            b.for_(from, to, 1, &[], |b, g, _| {
                let g = b.sub(g, first_group);
                let v = b.mul_i(g, class.nv as i64);
                let v = b.add(v, first_vector);
                cx.columns(b, &mut env, class, &batch, row0, rows, v);
                vec![]
            });
        }
        vec![]
    });

    let dims = env.dims.clone();
    let kernel = b.finish();
    let tile_vectors = block_rows * Dim::from(classes.first().map_or(1, |c| c.nv));
    let cpu_shape = CpuShape {
        extent,
        grain: Dim::one(),
        // Half a cycle a multiply-add, at 3.5 GHz.
        unit_ps: tile_vectors * steps * Dim::from(150i64),
        scratch: (staged_len + panel_len) * unit,
    };
    let packs = packed.into_iter().map(|(arg, walk)| (arg, Pack::Walk(walk))).collect();
    Ok(Built { kernel, schedule: schedule.clone(), dims, cpu: Some(cpu_shape), grid: None, packs })
}

/// Where packed weights become numbers.
#[derive(Clone, Copy)]
enum Packing<'a> {
    /// They are not packed.
    None,
    /// As they are read.
    Registers(&'a Weights),
    /// Before, in a scratch panel.
    Scratch(&'a Weights),
}

/// One block of the loop nest: rows of a batch and a group of columns.
struct Block<'a> {
    class: &'a Class,
    batch: &'a [Val],
    row0: Val,
    rows: Rows,
    column: Val,
}

/// What the parts of the loop nest share.
struct Cx<'a> {
    gemm: &'a Gemm,
    lanes: usize,
    k: Val,
    n: Val,
    left: LeftFrom,
    right: RightFrom,
    scratch: Option<Buf>,
    row_stride: Dim,
    staged_len: Dim,
    unroll: usize,
    prefetch: bool,
}

impl Cx<'_> {
    /// Element address of an operand at a batch, row, column and k of 0.
    fn origin(&self, b: &mut Builder, env: &mut Env<'_>, at: &Linear, batch: &[Val]) -> Val {
        let mut sum = env.size(b, &at.rest);
        for (i, x) in batch.iter().enumerate() {
            let stride = env.size(b, &at.strides[i]);
            let d = b.mul(*x, stride);
            sum = b.add(sum, d);
        }
        sum
    }

    /// Evaluate the left operand of a row block into scratch rows.
    fn stage(&self, b: &mut Builder, env: &mut Env<'_>, batch: &[Val], row0: Val, rows: Rows) {
        let Some(scratch) = self.scratch else { return };
        let k_axis = self.gemm.k_axis();
        let count = match rows {
            Rows::Fixed(n) => b.index(n as i64),
            Rows::Counted(n) => n,
        };
        let stride = env.size(b, &self.row_stride);
        let (zero, lanes) = (b.index(0), self.lanes as i64);
        let whole = b.div_i(self.k, lanes);
        let whole = b.mul_i(whole, lanes);
        b.for_(zero, count, 1, &[], |b, r, _| {
            let mut axes = batch.to_vec();
            axes.push(b.add(row0, r));
            axes.extend([zero, zero]);
            let to = b.mul(r, stride);
            let vector = |count| VectorAxis { axis: k_axis, lanes: self.lanes, count, aligned: true };
            let mut p = Point::vector(axes, vector(None));
            env.hoist(b, &[self.gemm.lhs], &mut p, 1 << k_axis);
            let mut one = |b: &mut Builder, k: Val, count: Option<Val>| {
                let mut p = p.clone();
                p.axes[k_axis] = k;
                p.vector = Some(vector(count));
                let v = env.expr_lanes(b, self.gemm.lhs, &mut p);
                let v = b.cast(v, self.gemm.math.staged());
                let to = b.add(to, k);
                b.store(scratch, to, v);
            };
            b.for_(zero, whole, lanes, &[], |b, k, _| {
                one(b, k, None);
                vec![]
            });
            let left = b.sub(self.k, whole);
            let some = b.gt(left, zero);
            b.when(some, |b| one(b, whole, Some(left)));
            vec![]
        });
    }

    /// All row tiles of one column group whose first vector is `v`.
    #[expect(clippy::too_many_arguments, reason = "the coordinates of one block of the loop nest")]
    fn columns(&self, b: &mut Builder, env: &mut Env<'_>, class: &Class, batch: &[Val], row0: Val, rows: Rows, v: Val) {
        let (k_axis, lanes, group) = (self.gemm.k_axis(), self.lanes as i64, self.gemm.math.group());
        let column = b.mul_i(v, lanes);
        let one = b.index(1);
        let left = match &self.left {
            LeftFrom::Memory { arg, at } => {
                let base = self.origin(b, env, at, batch);
                let row = env.size(b, &at.strides[k_axis - 2]);
                let first = b.mul(row0, row);
                let base = b.add(base, first);
                Left { buf: env.args[*arg], base, row, step: env.size(b, &at.strides[k_axis]) }
            }
            LeftFrom::Scratch => {
                let Some(scratch) = self.scratch else { return };
                let base = b.index(0);
                let row = self.row_stride.clone().div(&Dim::from(group));
                let row = env.size(b, &row);
                let buf = if group == 1 { scratch } else { b.alias(scratch, DType::I32, 0) };
                Left { buf, base, row, step: one }
            }
        };
        let block = Block { class, batch, row0, rows, column };
        let right = match &self.right {
            RightFrom::Panels { arg, walk, batch: axes } => self.constant_panels(b, env.args[*arg], walk, axes, &block, v),
            RightFrom::Memory { arg, at } => {
                let base = self.origin(b, env, at, batch);
                let base = b.add(base, column);
                let (vector, step) = (b.index(lanes), env.size(b, &at.strides[k_axis]));
                Right { buf: env.args[*arg], base, vector, step, count: None, ahead: None }
            }
            RightFrom::Scratch { along_k } => self.panel(b, env, class, batch, column, along_k.as_ref()),
            RightFrom::Packed { weights, walk, batch: axes } => {
                let right = self.constant_panels(b, env.args[weights.arg], walk, axes, &block, v);
                let few = |b: &mut Builder, env: &mut Env<'_>| self.tiles(b, env, &block, left, right, Packing::Registers(weights));
                let many = |b: &mut Builder, env: &mut Env<'_>| {
                    let right = self.unpacked(b, env, &block, right, weights);
                    self.tiles(b, env, &block, left, right, Packing::Scratch(weights));
                };
                return match rows {
                    Rows::Fixed(n) if n <= weights.few_rows() => few(b, env),
                    Rows::Fixed(_) => many(b, env),
                    Rows::Counted(n) => {
                        let limit = b.index(weights.few_rows() as i64);
                        let is_few = b.le(n, limit);
                        b.when(is_few, |b| few(b, env));
                        let is_many = b.not(is_few);
                        b.when(is_many, |b| many(b, env));
                    }
                };
            }
        };
        self.tiles(b, env, &block, left, right, Packing::None);
    }

    /// The panels of a constant from vector `v` of columns on.
    fn constant_panels(&self, b: &mut Builder, buf: Buf, walk: &Walk, axes: &[usize], block: &Block<'_>, v: Val) -> Right {
        let mut panel = v;
        let mut panels = b.index(walk.panels() as i64);
        for (axis, (extent, _)) in axes.iter().zip(&walk.batch).rev() {
            let d = b.mul(block.batch[*axis], panels);
            panel = b.add(panel, d);
            panels = b.mul_i(panels, *extent as i64);
        }
        let base = b.mul_i(panel, walk.panel() as i64);
        let width = (walk.panel() / walk.steps().max(1)) as i64;
        let (vector, step) = (b.index(walk.panel() as i64), b.index(width));
        // Weights that do not stay in the cache: while a group is worked on, the next one is fetched; of a product
        // of a row or two, what comes soon.
        let batches: usize = walk.batch.iter().map(|(n, _)| n).product();
        let bytes = batches * walk.panels() * walk.panel() * walk.dtype.bits() / 8;
        let few = matches!(block.rows, Rows::Fixed(n) if n <= 2);
        let ahead = if few { 32 * width } else { (block.class.nv * walk.panel()) as i64 };
        let ahead = (self.prefetch && bytes > 256 << 10).then(|| b.index(ahead));
        Right { buf, base, vector, step, count: None, ahead }
    }

    /// Multiply and write all row tiles of a block.
    fn tiles(&self, b: &mut Builder, env: &mut Env<'_>, block: &Block<'_>, left: Left, right: Right, packing: Packing<'_>) {
        let (k_axis, lanes, group) = (self.gemm.k_axis(), self.lanes as i64, self.gemm.math.group());
        let &Block { class, batch, row0, rows, column } = block;
        let steps = b.add_i(self.k, group as i64 - 1);
        let steps = b.div_i(steps, group as i64);
        let partial = self.gemm.n().as_const().is_none_or(|n| n % lanes != 0);
        let masked = (partial && matches!(self.right, RightFrom::Memory { .. })).then(|| {
            let count = b.sub(self.n, column);
            let need = b.index((class.nv * self.lanes) as i64);
            (count, b.ge(count, need))
        });
        let columns = End { at: self.n, aligned: true, partial };
        let packed = if let Packing::Registers(weights) = packing { Some(weights) } else { None };
        let most = packed.map_or(class.mr, |w| class.mr.min(w.few_rows()));
        let unroll = self.unroll.max(1).next_multiple_of(if packed.is_some() { 2 } else { 1 });
        let factor = match packing {
            Packing::Registers(weights) | Packing::Scratch(weights) => weights.factor(),
            Packing::None => None,
        };
        micro::cover(b, rows, most, &mut |b, mr, row| {
            let tile = Tile { mr, nv: class.nv, lanes: self.lanes, math: self.gemm.math, unroll };
            let from = b.mul(row, left.row);
            let left = Left { base: b.add(left.base, from), ..left };
            let mut axes = batch.to_vec();
            axes.extend([b.add(row0, row), column]);
            // A short product is over before memory answers.
            if self.prefetch && self.gemm.k.as_const().is_none_or(|k| k >= 512) {
                micro::ask(b, env, tile, &axes, k_axis - 2);
            }
            let acc = micro::zeros(b, tile);
            let run = |b: &mut Builder, right: Right| micro::accumulate(b, tile, left, right, None, steps, acc.clone());
            let acc = match (packed, masked) {
                (Some(weights), _) => self.blocks_of(b, env, block, weights, &acc, |b, decode, (k0, pairs, len), acc| {
                    let (x, w) = (b.mul(k0, left.step), b.mul(pairs, right.step));
                    let (x, w) = (b.add(left.base, x), b.add(right.base, w));
                    micro::accumulate(b, tile, Left { base: x, ..left }, Right { base: w, ..right }, Some(decode), len, acc)
                }),
                (None, None) => run(b, right),
                (None, Some((count, whole))) => b.if_(whole, |b| run(b, right), |b| run(b, Right { count: Some(count), ..right })),
            };
            let acc = self.scaled(b, env, acc, class.nv, factor, &axes);
            micro::write(b, env, tile, &acc, &axes, k_axis - 2, columns);
        });
    }

    /// Evaluate the right operand's columns from `column` on into a scratch panel `[steps, nv, lanes, group]`.
    fn panel(&self, b: &mut Builder, env: &mut Env<'_>, class: &Class, batch: &[Val], column: Val, along_k: Option<&(usize, Linear)>) -> Right {
        let (lanes, group) = (self.lanes, self.gemm.math.group());
        let panel = Panel { buf: self.scratch.unwrap_or(Buf(0)), base: env.size(b, &self.staged_len), width: class.nv * lanes * group };
        let steps = b.add_i(self.k, group as i64 - 1);
        let steps = b.div_i(steps, group as i64);
        let zero = b.index(0);
        for j in 0..class.nv {
            let first = b.add_i(column, (j * lanes) as i64);
            match along_k {
                None => self.panel_vector(b, env, batch, (panel, j), first, (zero, steps)),
                Some((arg, at)) => {
                    let end = b.add_i(first, lanes as i64);
                    let whole = b.le(end, self.n);
                    let blocks = b.div_i(self.k, lanes as i64);
                    let done = b.mul_i(blocks, lanes as i64);
                    let done = b.select(whole, done, zero);
                    let base = self.origin(b, env, at, batch);
                    let stride = env.size(b, &at.strides[self.gemm.k_axis() - 1]);
                    let d = b.mul(first, stride);
                    let base = b.add(base, d);
                    let buf = env.args[*arg];
                    b.for_(zero, done, lanes as i64, &[], |b, k, _| {
                        let from = b.add(base, k);
                        let rows: Vec<Val> = (0..lanes)
                            .map(|i| {
                                let d = b.mul_i(stride, i as i64);
                                let at = b.add(from, d);
                                b.load(buf, at, lanes)
                            })
                            .collect();
                        let to = b.mul_i(k, panel.width as i64);
                        let to = b.add(panel.base, to);
                        for (i, v) in transpose(b, rows).into_iter().enumerate() {
                            let to = b.add_i(to, (i * panel.width + j * lanes) as i64);
                            b.store(panel.buf, to, v);
                        }
                        vec![]
                    });
                    self.panel_vector(b, env, batch, (panel, j), first, (done, steps));
                }
            }
        }
        let (vector, step) = (b.index((lanes * group) as i64), b.index(panel.width as i64));
        Right { buf: panel.buf, base: panel.base, vector, step, count: None, ahead: None }
    }

    /// Evaluate vector `j` of a panel, the columns from `first` on, for the contraction steps `steps`.
    fn panel_vector(&self, b: &mut Builder, env: &mut Env<'_>, batch: &[Val], (panel, j): (Panel, usize), first: Val, steps: (Val, Val)) {
        let (k_axis, lanes, group) = (self.gemm.k_axis(), self.lanes, self.gemm.math.group());
        let zero = b.index(0);
        let count = b.sub(self.n, first);
        b.for_(steps.0, steps.1, 1, &[], |b, s, _| {
            let mut value = |b: &mut Builder, k: Val| {
                let mut axes = batch.to_vec();
                axes.extend([zero, first, k]);
                let mut p = Point::vector(axes, VectorAxis { axis: k_axis - 1, lanes, count: Some(count), aligned: true });
                let v = env.expr_lanes(b, self.gemm.rhs, &mut p);
                b.cast(v, self.gemm.math.staged())
            };
            let v = if group == 1 {
                value(b, s)
            } else {
                let k = b.mul_i(s, 2);
                let even = value(b, k);
                let next = b.add_i(k, 1);
                let inside = b.lt(next, self.k);
                let none = Ty::of_lanes(DType::I16, lanes);
                let odd = b.if_(inside, |b| vec![value(b, next)], |b| vec![super::expr::zero(b, none)])[0];
                let mask: Vec<u16> = (0..lanes as u16).flat_map(|l| [l, l + lanes as u16]).collect();
                b.shuffle(even, odd, &mask)
            };
            let to = b.mul_i(s, panel.width as i64);
            let to = b.add(to, panel.base);
            let to = b.add_i(to, (j * lanes * group) as i64);
            b.store(panel.buf, to, v);
            vec![]
        });
    }
}

/// A panel in scratch: where it starts and the elements of one step.
#[derive(Clone, Copy)]
struct Panel {
    buf: Buf,
    base: Val,
    width: usize,
}

/// The transpose of a square of vectors, by exchanging blocks of doubling size.
fn transpose(b: &mut Builder, mut rows: Vec<Val>) -> Vec<Val> {
    let n = rows.len();
    let mut d = 1;
    while d < n {
        for i in (0..n).filter(|i| i & d == 0) {
            let (x, y) = (rows[i], rows[i + d]);
            let low: Vec<u16> = (0..n).map(|l| if l & d == 0 { l } else { n + l - d } as u16).collect();
            let high: Vec<u16> = (0..n).map(|l| if l & d == 0 { l + d } else { n + l } as u16).collect();
            rows[i] = b.shuffle(x, y, &low);
            rows[i + d] = b.shuffle(x, y, &high);
        }
        d *= 2;
    }
    rows
}
