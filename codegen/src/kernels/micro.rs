//! The register tile that matrix products and convolutions share: `mr` rows times `nv` vectors of columns held in
//! registers over the whole contraction, then handed to the region's output expressions.
use super::{
    expr::{Env, Lanes, Point, VectorAxis},
    pack::Cells,
    weights::Decode,
};
use crate::{
    targets::Cpu,
    tile::{Buf, Builder, DotKind, Ty, Val},
};
use pavage_ir::{DType, Expr, ExprId, Scalar, dim::Atom};

/// How one step of the contraction is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Math {
    /// `f32` multiply-add; the right operand may be stored narrower.
    F32,
    /// Pairs of `i16` into `i32`, exact: a step takes two elements of k.
    I16Pairs,
    /// Four `u8` of the left by four `i8` of the right operand into `i32`, exact: a step takes four elements of k.
    Quads,
}

impl Math {
    /// Elements of k in one step.
    pub(super) fn group(self) -> usize {
        match self {
            Math::F32 => 1,
            Math::I16Pairs => 2,
            Math::Quads => 4,
        }
    }

    /// Dtype of the accumulators.
    pub(super) fn acc(self) -> DType {
        match self {
            Math::F32 => DType::F32,
            Math::I16Pairs | Math::Quads => DType::I32,
        }
    }

    /// Dtype of the left operand where it is staged in scratch.
    pub(super) fn staged(self) -> DType {
        match self {
            Math::F32 => DType::F32,
            Math::I16Pairs => DType::I16,
            Math::Quads => DType::U8,
        }
    }

    /// Dtype of a right operand packed at compile time, of which `own` is its own.
    pub(super) fn packed(self, own: DType) -> DType {
        match self {
            Math::F32 => own,
            Math::I16Pairs => DType::I16,
            Math::Quads => DType::I8,
        }
    }
}

/// Rows and vectors of columns that stay in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// Rows.
    pub(super) mr: usize,
    /// Vectors of columns.
    pub(super) nv: usize,
    /// Columns in a vector.
    pub(super) lanes: usize,
    /// How a step is computed.
    pub(super) math: Math,
    /// Steps written out in a loop body, at least 1: fewer where a step has many multiply-adds.
    pub(super) unroll: usize,
}

/// So many multiply-adds hide a loop's own instructions. Of longer bodies LLVM's scheduler moves the loads of later steps up front:
/// the registers they take are those of accumulators, which then go through memory.
const BODY: usize = 32;

/// Where the left operand is: row `i`, step `k` at `base + i * row + k * step`, in units of one step's elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    /// Memory: `f32`, or `i32` standing for a pair of `i16` or four `u8`.
    pub(super) buf: Buf,
    /// First element.
    pub(super) base: Val,
    /// Elements between rows.
    pub(super) row: Val,
    /// Elements between steps.
    pub(super) step: Val,
}

/// Where the right operand is: vector `j`, step `k` at `base + j * vector + k * step`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Right {
    /// Memory.
    pub(super) buf: Buf,
    /// First element.
    pub(super) base: Val,
    /// Elements between vectors of columns.
    pub(super) vector: Val,
    /// Elements between steps.
    pub(super) step: Val,
    /// Columns that exist from the first vector on; none: all.
    pub(super) count: Option<Val>,
    /// Ask for the cache lines this many elements ahead.
    pub(super) ahead: Option<Val>,
}

/// Largest `mr` whose tile leaves room in the registers for the operands.
pub(super) fn max_rows(cpu: &Cpu, nv: usize) -> usize {
    let regs = cpu.vector_regs as usize;
    let spare = if regs >= 32 { 2 } else { 0 };
    (regs.saturating_sub(nv + 1 + spare) / nv).clamp(1, 24)
}

/// Cycles of one contraction step of a tile, in halves: two multiply-adds and two loads a cycle, latency 4.
pub(super) fn step_cost(mr: usize, nv: usize) -> usize {
    (mr * nv).max(mr + nv).max(8)
}

/// Zeroed accumulators.
pub(super) fn zeros(b: &mut Builder, tile: Tile) -> Vec<Val> {
    let zero = b.constant_of(Scalar::I(0).cast(tile.math.acc()), Ty::of_lanes(tile.math.acc(), tile.lanes));
    vec![zero; tile.mr * tile.nv]
}

/// Add `steps` contraction steps to the accumulators (`acc[i * nv + j]`), see [`Tile`]. Packed weights say how to `decode` them; of
/// nibbles the number of steps is known, and the right operand's steps are pairs.
pub(super) fn accumulate(b: &mut Builder, tile: Tile, left: Left, right: Right, decode: Option<&Decode>, steps: Val, acc: Vec<Val>) -> Vec<Val> {
    let nibbles = decode.is_some_and(|d| d.cells == Cells::Nibbles);
    let math = tile.math;
    let mut unroll = tile.unroll;
    while !nibbles && unroll > 1 && unroll * tile.mr * tile.nv > BODY {
        unroll /= 2;
    }
    // Few accumulators cannot hide the latency of the multiply-add: keep several sets and add them at the end.
    let sets = if tile.mr * tile.nv >= 8 { 1 } else { (8usize.div_ceil(tile.mr * tile.nv)).min(unroll) };
    let mut all = acc;
    for _ in 1..sets {
        all.extend(zeros(b, tile));
    }
    let rows: Vec<Val> = (0..tile.mr).map(|i| at(b, left.base, left.row, i)).collect();
    let columns: Vec<Val> = (0..tile.nv).map(|j| at(b, right.base, right.vector, j)).collect();
    let masks: Option<Vec<Val>> = right.count.map(|n| {
        (0..tile.nv)
            .map(|j| {
                let n = b.add_i(n, -((j * tile.lanes) as i64));
                b.lane_mask(n, tile.lanes)
            })
            .collect()
    });
    // One hint a cache line of 64 bytes.
    let step_bytes = tile.lanes * math.group() * b.dtype(right.buf).bits() / 8;
    let line = |u: usize| u.is_multiple_of((64 / step_bytes.max(1)).max(1));
    let body = |b: &mut Builder, k: Val, carried: &[Val], unroll: usize| -> Vec<Val> {
        let mut acc = carried.to_vec();
        let left_k = b.mul(k, left.step);
        let right_k = if nibbles { b.div_i(k, 2) } else { k };
        let right_k = b.mul(right_k, right.step);
        let mut loaded: Vec<Val> = vec![];
        for u in 0..unroll {
            if !(nibbles && u % 2 == 1) {
                loaded = (0..tile.nv)
                    .map(|j| {
                        let x = b.add(columns[j], right_k);
                        let x = at(b, x, right.step, if nibbles { u / 2 } else { u });
                        if let Some(ahead) = right.ahead.filter(|_| line(u)) {
                            let x = b.add(x, ahead);
                            b.prefetch(right.buf, x, false);
                        }
                        match (&masks, math) {
                            (Some(m), _) => b.load_masked(right.buf, x, m[j]),
                            (None, _) => b.load(right.buf, x, tile.lanes * math.group()),
                        }
                    })
                    .collect();
            }
            let number = |b: &mut Builder, (j, v): (usize, &Val)| match decode {
                Some(d) => d.value(b, *v, u, j),
                None if math == Math::F32 => b.cast(*v, DType::F32),
                None => *v,
            };
            let vectors: Vec<Val> = loaded.iter().enumerate().map(|v| number(b, v)).collect();
            let set = u % sets * tile.mr * tile.nv;
            for (i, row) in rows.iter().enumerate() {
                let x = b.add(*row, left_k);
                let x = at(b, x, left.step, u);
                let x = b.load(left.buf, x, 1);
                let x = b.splat(x, tile.lanes);
                for (j, v) in vectors.iter().enumerate() {
                    let a = &mut acc[set + i * tile.nv + j];
                    *a = match math {
                        Math::F32 => b.fma(x, *v, *a),
                        Math::I16Pairs => {
                            let pairs = b.bitcast(x, Ty::of_lanes(DType::I16, 2 * tile.lanes));
                            let dot = b.dot(DotKind::I16Pairs, &[pairs, *v]);
                            b.add(*a, dot)
                        }
                        Math::Quads => {
                            let quads = b.bitcast(x, Ty::of_lanes(DType::U8, 4 * tile.lanes));
                            b.dot(DotKind::U8I8Quads, &[*a, quads, *v])
                        }
                    };
                }
            }
        }
        acc
    };
    let zero = b.index(0);
    let whole = b.div_i(steps, unroll as i64);
    let whole = b.mul_i(whole, unroll as i64);
    let all = b.for_(zero, whole, unroll as i64, &all, |b, k, acc| body(b, k, acc, unroll));
    let mut all = match (b.as_index(whole), b.as_index(steps)) {
        (Some(from), Some(to)) if to > from => {
            let k = b.index(from);
            body(b, k, &all, (to - from) as usize)
        }
        (Some(_), Some(_)) => all,
        _ if unroll == 1 => all,
        _ => b.for_(whole, steps, 1, &all, |b, k, acc| body(b, k, acc, 1)),
    };
    let size = tile.mr * tile.nv;
    for s in 1..sets {
        for i in 0..size {
            all[i] = b.add(all[i], all[s * size + i]);
        }
    }
    all.truncate(size);
    all
}

/// `base + i * stride`.
fn at(b: &mut Builder, base: Val, stride: Val, i: usize) -> Val {
    let d = b.mul_i(stride, i as i64);
    b.add(base, d)
}

/// Where columns end.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    /// The first column that does not exist.
    pub(super) at: Val,
    /// Whether tiles start at multiples of their vectors' lanes.
    pub(super) aligned: bool,
    /// Whether a tile may reach beyond the end.
    pub(super) partial: bool,
}

/// Arguments of more bytes than this do not stay in the nearest cache from one tile to the next.
const FAR: i64 = 256 << 10;

/// Ask for what [`write()`] will read of a tile, so that it comes while the tile is multiplied: rows of a tile lie apart, and nothing else sees
/// early that they are wanted. Parameters are those of [`write()`].
pub(super) fn ask(b: &mut Builder, env: &mut Env<'_>, tile: Tile, axes: &[Val], row_axis: usize) {
    let column_axis = axes.len() - 1;
    for id in far_reads(env, row_axis) {
        let Some((arg, at)) = env.address(id) else { continue };
        let line = 512 / env.region.args[arg].dtype.bits();
        let mut p = Point::vector(axes.to_vec(), VectorAxis { axis: column_axis, lanes: tile.lanes, count: None, aligned: true });
        if env.lanes(&at, &p) != Lanes::Step(1) {
            continue;
        }
        for i in 0..tile.mr {
            p.axes[row_axis] = b.add_i(axes[row_axis], i as i64);
            for column in (0..tile.nv * tile.lanes).step_by(line) {
                p.axes[column_axis] = b.add_i(axes[column_axis], column as i64);
                let at = env.index(b, &at, &mut p);
                b.prefetch(env.args[arg], at, true);
            }
        }
    }
}

/// Loads that the outputs make for each row, whose addresses are known beforehand, of arguments that are not near.
fn far_reads(env: &Env<'_>, row_axis: usize) -> Vec<ExprId> {
    let mut seen = vec![false; env.region.exprs.len()];
    let mut stack: Vec<ExprId> = env.region.outputs.iter().map(|o| o.expr).collect();
    let mut found = vec![];
    while let Some(id) = stack.pop() {
        if std::mem::replace(&mut seen[id.0 as usize], true) {
            continue;
        }
        match env.region.expr(id) {
            Expr::Call(_, xs) => stack.extend(xs),
            Expr::Cast(x) | Expr::Bits(x) => stack.push(*x),
            Expr::Load { arg, index, guard: None } => {
                let ty = &env.region.args[*arg as usize];
                let bytes = ty.shape.iter().try_fold(ty.dtype.bits() as i64 / 8, |bytes, d| bytes.checked_mul(d.as_const()?));
                let by_data = index.iter().any(|d| d.any_atom(&|a| matches!(a, Atom::Value(_))));
                if !by_data && env.axes_of(id) >> row_axis & 1 == 1 && bytes.is_none_or(|n| n > FAR) {
                    found.push(id);
                }
            }
            Expr::Load { .. } | Expr::Index(_) | Expr::Float(_) | Expr::Int(_) | Expr::Acc(_) => {}
        }
    }
    found
}

/// Evaluate and write the region's outputs for a tile. `axes` are the parallel axes' values, axis `row_axis` at the tile's
/// first row and the last one at its first column.
pub(super) fn write(b: &mut Builder, env: &mut Env<'_>, tile: Tile, acc: &[Val], axes: &[Val], row_axis: usize, columns: End) {
    let column_axis = axes.len() - 1;
    let first = axes[column_axis];
    let mut all = |b: &mut Builder, tail: bool| {
        let roots: Vec<ExprId> = env.region.outputs.iter().map(|o| o.expr).collect();
        let vector = |count| VectorAxis { axis: column_axis, lanes: tile.lanes, count, aligned: columns.aligned };
        // Once: what depends on neither rows nor columns; what depends on columns alone; what depends on rows alone.
        let mut corner = Point::vector(axes.to_vec(), vector(None));
        env.hoist(b, &roots, &mut corner, 1 << row_axis | 1 << column_axis);
        let points: Vec<Point> = (0..tile.nv)
            .map(|j| {
                let mut p = corner.clone();
                p.axes[column_axis] = b.add_i(first, (j * tile.lanes) as i64);
                if let Some(v) = &mut p.vector {
                    v.count = tail.then(|| b.sub(columns.at, p.axes[column_axis]));
                }
                env.hoist(b, &roots, &mut p, 1 << row_axis);
                p
            })
            .collect();
        for i in 0..tile.mr {
            let mut row = corner.clone();
            row.axes[row_axis] = b.add_i(axes[row_axis], i as i64);
            env.hoist(b, &roots, &mut row, 1 << column_axis);
            for (j, p) in points.iter().enumerate() {
                let mut p = p.clone();
                p.axes[row_axis] = row.axes[row_axis];
                p.learn(&row);
                p.accs = vec![acc[i * tile.nv + j]];
                for o in 0..env.region.outputs.len() {
                    env.store(b, o, &mut p);
                }
            }
        }
    };
    if !columns.partial {
        return all(b, false);
    }
    let end = b.add_i(first, (tile.nv * tile.lanes) as i64);
    let whole = b.le(end, columns.at);
    b.when(whole, |b| all(b, false));
    let part = b.not(whole);
    b.when(part, |b| all(b, true));
}

/// Rows that tiles must cover.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rows {
    /// A number known now: tiles of two sizes that differ by one, no remainder.
    Fixed(usize),
    /// A number known at run time: whole tiles, then ones of halved sizes.
    Counted(Val),
}

/// Cover `rows` with tiles of at most `mr`, calling `tile(b, rows of the tile, its first row)`.
pub(super) fn cover(b: &mut Builder, rows: Rows, mr: usize, tile: &mut dyn FnMut(&mut Builder, usize, Val)) {
    match rows {
        Rows::Fixed(0) => {}
        Rows::Fixed(n) => {
            let tiles = n.div_ceil(mr);
            let (small, more) = (n / tiles, n % tiles);
            let mut from = 0;
            for (size, count) in [(small + 1, more), (small, tiles - more)] {
                let (lo, hi) = (b.index(0), b.index(count as i64));
                b.for_(lo, hi, 1, &[], |b, t, _| {
                    let row = b.mul_i(t, size as i64);
                    let row = b.add_i(row, from as i64);
                    tile(b, size, row);
                    vec![]
                });
                from += size * count;
            }
        }
        Rows::Counted(n) => {
            let whole = b.div_i(n, mr as i64);
            let whole = b.mul_i(whole, mr as i64);
            let zero = b.index(0);
            b.for_(zero, whole, mr as i64, &[], |b, row, _| {
                tile(b, mr, row);
                vec![]
            });
            let mut row = whole;
            let mut size = mr.next_power_of_two() / 2;
            while size > 0 {
                let end = b.add_i(row, size as i64);
                let fits = b.le(end, n);
                row = b.if_(
                    fits,
                    |b| {
                        tile(b, size, row);
                        vec![end]
                    },
                    |_| vec![row],
                )[0];
                size /= 2;
            }
        }
    }
}

/// Vectors of columns cut into groups: `groups[i]` is the vectors of one group and how many such groups follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    /// `(nv, mr, groups)`.
    pub(super) classes: Vec<(usize, usize, usize)>,
}

/// The cheapest cut of `vectors` for `rows` rows. `nv` and `mr` fix the main class where they are not 0.
pub(super) fn cut(cpu: &Cpu, vectors: usize, rows: usize, nv: usize, mr: usize) -> Columns {
    let rows_of = |nv: usize| if mr > 0 { mr.min(max_rows(cpu, nv)) } else { max_rows(cpu, nv) };
    let cost_of = |nv: usize| {
        let tiles = rows.div_ceil(rows_of(nv));
        let (small, more) = (rows / tiles, rows % tiles);
        more * step_cost(small + 1, nv) + (tiles - more) * step_cost(small, nv)
    };
    let widest = if rows == 1 { 8 } else { 4 };
    let mut best: Option<(usize, Columns)> = None;
    for main in 1..=widest.min(vectors.max(1)) {
        if nv > 0 && main != nv.min(vectors.max(1)) {
            continue;
        }
        for rest in 0..=widest.min(vectors) {
            if vectors < rest || !(vectors - rest).is_multiple_of(main) || rest == main {
                continue;
            }
            let count = (vectors - rest) / main;
            let mut cost = count * cost_of(main);
            let mut classes = vec![];
            if count > 0 {
                classes.push((main, rows_of(main), count));
            }
            if rest > 0 {
                cost += cost_of(rest);
                classes.push((rest, rows_of(rest), 1));
            }
            // More code for the same speed is a loss.
            let cost = cost * 64 + classes.len();
            if best.as_ref().is_none_or(|(c, _)| cost < *c) {
                best = Some((cost, Columns { classes }));
            }
        }
    }
    best.map_or(Columns { classes: vec![] }, |(_, c)| c)
}
