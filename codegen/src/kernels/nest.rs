//! Loops over a parallel space: on a CPU slices of one parallel dimension with a vector axis innermost, on a GPU one thread a
//! point. What happens at a point is the family's.
use super::{
    CpuShape, cost,
    expr::{Env, Point, VectorAxis},
};
use crate::tile::{Builder, Device, Val};
use pavage_ir::{Dim, ExprId};

/// What a family does at a point (all lanes of it), or at several vectors side by side.
pub type Body<'a, 'r> = &'a mut dyn FnMut(&mut Builder, &mut Env<'r>, &mut [Point]);

/// How a space is walked on a CPU.
#[derive(Clone, Debug)]
pub struct Nest {
    /// Extents of the axes.
    pub space: Vec<Dim>,
    /// The vector axis, innermost in the loops; none: scalar mode, last axis innermost.
    pub vector: Option<usize>,
    /// Points of a vector.
    pub lanes: usize,
    /// Vectors in the body of the innermost loop.
    pub unroll: usize,
    /// Vectors that the body takes at once.
    pub wide: usize,
    /// Picoseconds of a point.
    pub point_ps: i64,
}

/// How the kernel is launched.
#[derive(Clone, Debug)]
pub struct Walk {
    /// On a CPU, scratch still 0.
    pub cpu: Option<CpuShape>,
    /// On a GPU.
    pub grid: Option<[Dim; 3]>,
}

/// Points that one unit of the parallel dimension should have at least, where extents are known.
const UNIT_POINTS: i64 = 1024;
/// Points of the vector axis in one unit at most.
const BLOCK: i64 = 8192;
/// Threads of a GPU block.
pub const THREADS: i64 = 256;

impl Nest {
    /// Write the loops. `roots` are the expressions the body evaluates, for hoisting. Axes above the space (reduced ones) are
    /// the body's.
    pub fn emit<'r>(&self, b: &mut Builder, env: &mut Env<'r>, roots: &[ExprId], body: Body<'_, 'r>) -> Walk {
        match b.device() {
            Device::Cpu { .. } => Walk { cpu: Some(self.emit_cpu(b, env, roots, body)), grid: None },
            Device::Gpu => Walk { cpu: None, grid: Some(self.emit_gpu(b, env, body)) },
        }
    }

    fn emit_cpu<'r>(&self, b: &mut Builder, env: &mut Env<'r>, roots: &[ExprId], body: Body<'_, 'r>) -> CpuShape {
        let rank = self.space.len();
        let inner = self.vector.unwrap_or(rank - 1);
        let mut order: Vec<usize> = (0..rank).filter(|k| *k != inner).collect();
        // Small inner axes become loops inside a unit.
        let extent = &self.space[inner];
        let blocks = match extent.as_const() {
            Some(n) if n <= BLOCK => Dim::one(),
            _ => extent.ceil_div(&Dim::from(BLOCK)),
        };
        let mut volume = extent.as_const().unwrap_or(64);
        let mut points = extent.smaller(&Dim::from(BLOCK));
        let mut loops = vec![];
        while blocks.is(1) && volume < UNIT_POINTS {
            let Some(k) = order.pop() else { break };
            volume *= self.space[k].as_const().unwrap_or(16);
            points = points * self.space[k].clone();
            loops.insert(0, k);
        }
        let units: Dim = order.iter().map(|k| self.space[*k].clone()).product::<Dim>() * blocks.clone();
        let (lo, hi) = (b.lo(), b.hi());
        let zero = b.index(0);
        b.for_(lo, hi, 1, &[], |b, unit, _| {
            let mut axes = vec![zero; rank.max(64)];
            let mut parts: Vec<Dim> = order.iter().map(|k| self.space[*k].clone()).collect();
            parts.push(blocks.clone());
            let at = split(b, env, unit, &parts);
            for (k, v) in order.iter().zip(&at) {
                axes[*k] = *v;
            }
            let mut p = Point::new(axes);
            let inside = loops.iter().chain([&inner]).fold(0u64, |m, k| m | 1 << k) | above(rank);
            env.hoist(b, roots, &mut p, inside);
            let block = at[order.len()];
            self.loops(b, env, roots, &p, &loops, block, body);
            vec![]
        });
        let unit_ps = points * Dim::from(self.point_ps) + Dim::from(20_000i64);
        CpuShape { extent: units, grain: cost::grain(&unit_ps), unit_ps, scratch: Dim::ZERO }
    }

    #[allow(clippy::too_many_arguments)]
    fn loops<'r>(&self, b: &mut Builder, env: &mut Env<'r>, roots: &[ExprId], p: &Point, loops: &[usize], block: Val, body: Body<'_, 'r>) {
        let rank = self.space.len();
        let Some((&k, rest)) = loops.split_first() else {
            return self.innermost(b, env, p, block, body);
        };
        let (zero, n) = (b.index(0), env.size(b, &self.space[k]));
        b.for_(zero, n, 1, &[], |b, i, _| {
            let mut p = p.clone();
            p.axes[k] = i;
            let inner = self.vector.unwrap_or(rank - 1);
            let inside = rest.iter().chain([&inner]).fold(0u64, |m, k| m | 1 << k) | above(rank);
            env.hoist(b, roots, &mut p, inside);
            self.loops(b, env, roots, &p, rest, block, body);
            vec![]
        });
    }

    fn innermost<'r>(&self, b: &mut Builder, env: &mut Env<'r>, p: &Point, block: Val, body: Body<'_, 'r>) {
        let rank = self.space.len();
        let axis = self.vector.unwrap_or(rank - 1);
        let lanes = if self.vector.is_some() { self.lanes as i64 } else { 1 };
        let n = env.size(b, &self.space[axis]);
        let start = b.mul_i(block, BLOCK);
        let end = if self.space[axis].as_const().is_some_and(|n| n <= BLOCK) {
            n
        } else {
            let end = b.add_i(start, BLOCK);
            b.min(end, n)
        };
        let len = b.sub(end, start);
        let rest = b.rem_i(len, lanes);
        let full = b.sub(end, rest);
        let (unroll, group) = (self.unroll.max(1) as i64, self.wide.max(1) as i64);
        let wide = lanes * unroll * group;
        let rest_wide = b.rem_i(len, wide);
        let full_wide = b.sub(end, rest_wide);
        let mut at = |b: &mut Builder, env: &mut Env<'r>, i: Val, group: i64, count: Option<Val>| {
            let mut points = vec![];
            for j in 0..group {
                let mut p = p.clone();
                p.axes[axis] = b.add_i(i, j * lanes);
                p.vector = (lanes > 1).then_some(VectorAxis { axis, lanes: lanes as usize, count, aligned: true });
                points.push(p);
            }
            body(b, env, &mut points);
        };
        b.for_(start, full_wide, wide, &[], |b, i, _| {
            for u in 0..unroll {
                let i = b.add_i(i, u * lanes * group);
                at(b, env, i, group, None);
            }
            vec![]
        });
        if wide > lanes {
            b.for_(full_wide, full, lanes, &[], |b, i, _| {
                at(b, env, i, 1, None);
                vec![]
            });
        }
        if lanes > 1 {
            let zero = b.index(0);
            let some = b.gt(rest, zero);
            b.when(some, |b| at(b, env, full, 1, Some(rest)));
        }
    }

    fn emit_gpu<'r>(&self, b: &mut Builder, env: &mut Env<'r>, body: Body<'_, 'r>) -> [Dim; 3] {
        let rank = self.space.len();
        b.launch().threads = THREADS as u32;
        let total: Dim = self.space.iter().cloned().product();
        let (block, thread) = (b.block_id(0), b.thread_id());
        let first = b.mul_i(block, THREADS);
        let i = b.add(first, thread);
        let n = env.size(b, &total);
        let inside = b.lt(i, n);
        // The axis that is contiguous in memory is the fastest.
        let inner = self.vector.unwrap_or(rank - 1);
        let mut order: Vec<usize> = (0..rank).filter(|k| *k != inner).collect();
        order.push(inner);
        let parts: Vec<Dim> = order.iter().map(|k| self.space[*k].clone()).collect();
        b.when(inside, |b| {
            let at = split(b, env, i, &parts);
            let zero = b.index(0);
            let mut axes = vec![zero; rank.max(64)];
            for (k, v) in order.iter().zip(at) {
                axes[*k] = v;
            }
            body(b, env, &mut [Point::new(axes)]);
        });
        [total.ceil_div(&Dim::from(THREADS)), Dim::one(), Dim::one()]
    }
}

/// Axes from `rank` on, as bits.
fn above(rank: usize) -> u64 {
    u64::MAX.checked_shl(rank as u32).unwrap_or(0)
}

/// Coordinates of row-major position `at` in a box.
pub fn split(b: &mut Builder, env: &mut Env, at: Val, extents: &[Dim]) -> Vec<Val> {
    let mut out = vec![at; extents.len()];
    let mut left = at;
    for k in (0..extents.len()).rev() {
        if extents[k].is(1) {
            out[k] = b.index(0);
        } else if extents[..k].iter().all(|d| d.is(1)) {
            out[k] = left;
        } else {
            let n = env.size(b, &extents[k]);
            out[k] = b.rem(left, n);
            left = b.div(left, n);
        }
    }
    out
}
