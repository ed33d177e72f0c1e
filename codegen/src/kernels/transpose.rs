//! Tiles of a map whose loads run along one axis and whose stores along another: square blocks are loaded along the first and
//! turned in registers.
use super::{
    CpuShape, cost,
    expr::{Env, Lanes, Point, VectorAxis},
    nest::split,
};
use crate::tile::{Builder, Val};
use pavage_ir::{Dim, Expr, ExprId};

/// A map in square tiles.
pub struct Tiled {
    /// Extents of the axes.
    pub space: Vec<Dim>,
    /// The axis that stores run along, in vectors of `lanes`.
    pub axis: usize,
    /// The axis that the turned loads run along.
    pub across: usize,
    /// Points of a vector, a power of two.
    pub lanes: usize,
    /// Picoseconds of a point.
    pub point_ps: i64,
}

/// The axis along which a load that is scattered along `axis` is contiguous, where turning tiles pays.
pub fn turned_axis(env: &Env, axis: usize, lanes: usize) -> Option<usize> {
    let space = &env.region.space;
    let large = |k: usize| space[k].as_const().is_none_or(|n| n >= lanes as i64);
    if lanes < 4 || !large(axis) {
        return None;
    }
    (0..space.len()).find(|k| *k != axis && large(*k) && !turned_loads(env, axis, *k).is_empty())
}

/// Loads to be turned: contiguous along `across`, scattered along `axis`, not guarded.
fn turned_loads(env: &Env, axis: usize, across: usize) -> Vec<ExprId> {
    let turned = |expr: &Expr| match expr {
        Expr::Load { index, guard: None, .. } => {
            let along = env.lanes_along(&index[0], axis, None);
            along != Lanes::Step(0) && along != Lanes::Step(1) && env.lanes_along(&index[0], across, None) == Lanes::Step(1)
        }
        _ => false,
    };
    let exprs = env.region.exprs.iter().enumerate();
    exprs.filter(|(_, (e, _))| turned(e)).map(|(i, _)| ExprId(i as u32)).collect()
}

impl Tiled {
    /// Write the loops; `body` is what happens at a point (all lanes of it).
    pub fn emit<'r>(&self, b: &mut Builder, env: &mut Env<'r>, body: &mut dyn FnMut(&mut Builder, &mut Env<'r>, &mut Point)) -> CpuShape {
        let lanes = self.lanes as i64;
        // Two tiles side by side read whole cache lines.
        let side = 2 * lanes;
        let loads = turned_loads(env, self.axis, self.across);
        let outer: Vec<usize> = (0..self.space.len()).filter(|k| *k != self.axis && *k != self.across).collect();
        let blocks = self.space[self.across].ceil_div(&Dim::from(side));
        let (lo, hi) = (b.lo(), b.hi());
        b.for_(lo, hi, 1, &[], |b, unit, _| {
            let parts: Vec<Dim> = outer.iter().map(|k| self.space[*k].clone()).chain([blocks.clone()]).collect();
            let at = split(b, env, unit, &parts);
            let zero = b.index(0);
            let mut axes = vec![zero; self.space.len().max(64)];
            for (k, v) in outer.iter().zip(&at) {
                axes[*k] = *v;
            }
            let first = b.mul_i(at[outer.len()], side);
            let (n, m) = (env.size(b, &self.space[self.across]), env.size(b, &self.space[self.axis]));
            let end = b.add_i(first, side);
            let end = b.min(end, n);
            let len = b.sub(end, first);
            let whole = b.index(side);
            let full = b.ge(len, whole);
            let rest = b.rem_i(m, lanes);
            let stop = b.sub(m, rest);
            // Full tiles, then what is left along either axis in the plain way.
            let tiled_to = b.select(full, stop, zero);
            b.for_(zero, tiled_to, lanes, &[], |b, i, _| {
                for half in 0..2 {
                    let t = b.add_i(first, half * lanes);
                    self.tile(b, env, &axes, &loads, (i, t), body);
                }
                vec![]
            });
            b.for_(first, end, 1, &[], |b, t, _| {
                axes[self.across] = t;
                let at = |i: Val, count: Option<Val>| {
                    let mut axes = axes.clone();
                    axes[self.axis] = i;
                    Point::vector(axes, VectorAxis { axis: self.axis, lanes: self.lanes, count, aligned: true })
                };
                b.for_(tiled_to, stop, lanes, &[], |b, i, _| {
                    body(b, env, &mut at(i, None));
                    vec![]
                });
                let some = b.gt(rest, zero);
                b.when(some, |b| body(b, env, &mut at(stop, Some(rest))));
                vec![]
            });
            vec![]
        });
        let unit_ps = self.space[self.axis].clone() * Dim::from(side * self.point_ps) + Dim::from(20_000i64);
        let extent = outer.iter().map(|k| self.space[*k].clone()).product::<Dim>() * blocks;
        CpuShape { extent, grain: cost::grain(&unit_ps), unit_ps, scratch: Dim::ZERO }
    }

    /// `lanes` by `lanes` points from `i` along the store axis and `t` along the load axis.
    fn tile<'r>(
        &self,
        b: &mut Builder,
        env: &mut Env<'r>,
        axes: &[Val],
        loads: &[ExprId],
        (i, t): (Val, Val),
        body: &mut dyn FnMut(&mut Builder, &mut Env<'r>, &mut Point),
    ) {
        let point = |axis: usize, i: Val, t: Val| {
            let mut axes = axes.to_vec();
            axes[self.axis] = i;
            axes[self.across] = t;
            Point::vector(axes, VectorAxis { axis, lanes: self.lanes, count: None, aligned: true })
        };
        let mut turned = vec![];
        for load in loads {
            let rows: Vec<Val> = (0..self.lanes as i64)
                .map(|k| {
                    let i = b.add_i(i, k);
                    env.expr(b, *load, &mut point(self.across, i, t))
                })
                .collect();
            turned.push(turn(b, rows));
        }
        for k in 0..self.lanes {
            let t = b.add_i(t, k as i64);
            let mut p = point(self.axis, i, t);
            for (load, columns) in loads.iter().zip(&turned) {
                p.know(*load, columns[k]);
            }
            body(b, env, &mut p);
        }
    }
}

/// The transpose of a square of vectors.
fn turn(b: &mut Builder, mut rows: Vec<Val>) -> Vec<Val> {
    let n = rows.len();
    if n == 8 {
        return turn_8(b, &rows);
    }
    // Interleaving the two halves of the list, as often as the length halves, turns it.
    let low: Vec<u16> = (0..n as u16).map(|i| i / 2 + (i % 2) * n as u16).collect();
    let high: Vec<u16> = low.iter().map(|i| i + n as u16 / 2).collect();
    for _ in 0..n.trailing_zeros() {
        let mut next = vec![];
        for i in 0..n / 2 {
            next.push(b.shuffle(rows[i], rows[i + n / 2], &low));
            next.push(b.shuffle(rows[i], rows[i + n / 2], &high));
        }
        rows = next;
    }
    rows
}

/// 8 by 8 with one instruction a shuffle on AVX: within halves first, then across.
fn turn_8(b: &mut Builder, r: &[Val]) -> Vec<Val> {
    const PAIRS: [[u16; 8]; 2] = [[0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]];
    const FOURS: [[u16; 8]; 2] = [[0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]];
    const HALVES: [[u16; 8]; 2] = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]];
    let mut pairs = vec![];
    for i in [0, 2, 4, 6] {
        pairs.extend(PAIRS.map(|m| b.shuffle(r[i], r[i + 1], &m)));
    }
    let mut fours = vec![];
    for i in [0, 1, 4, 5] {
        fours.extend(FOURS.map(|m| b.shuffle(pairs[i], pairs[i + 2], &m)));
    }
    let mut out = vec![];
    for m in HALVES {
        for i in 0..4 {
            out.push(b.shuffle(fours[i], fours[i + 4], &m));
        }
    }
    out
}
