//! Accumulators of reductions: their start, their step, and how several become one. Shared by rows, pools and scans.
use super::expr::{reg, round};
use crate::tile::{self, Builder, Ty, Val};
use pavage_ir::{DType, Scalar, ScalarFn, attr::ReduceFn, region::StageFn, region_eval::neutral};

/// The accumulator of one stage: one value for a fold, the best value and its position for an arg.
#[derive(Clone, Copy, Debug)]
pub struct Fold {
    /// How it combines.
    pub f: StageFn,
    /// Dtype of what it combines.
    pub dtype: DType,
    /// Dtype of positions: `i32` where they fit, for they stand beside narrower values in vectors.
    pub position: DType,
}

impl Fold {
    /// Values that the accumulator takes.
    pub fn width(&self) -> usize {
        match self.f {
            StageFn::Fold(_) => 1,
            StageFn::Arg { .. } => 2,
        }
    }

    /// The function that combines two values.
    fn with(&self) -> (ScalarFn, tile::ReduceFn) {
        let (StageFn::Fold(f) | StageFn::Arg { f, .. }) = self.f;
        match (f, self.dtype == DType::Bool) {
            (ReduceFn::Sum | ReduceFn::Max, true) => (ScalarFn::Or, tile::ReduceFn::Or),
            (ReduceFn::Prod | ReduceFn::Min, true) => (ScalarFn::And, tile::ReduceFn::And),
            (ReduceFn::Sum, _) => (ScalarFn::Add, tile::ReduceFn::Add),
            (ReduceFn::Prod, _) => (ScalarFn::Mul, tile::ReduceFn::Mul),
            (ReduceFn::Max, _) => (ScalarFn::Max, tile::ReduceFn::Max),
            (ReduceFn::Min, _) => (ScalarFn::Min, tile::ReduceFn::Min),
        }
    }

    /// Empty accumulators of this many lanes.
    pub fn start(&self, b: &mut Builder, lanes: usize) -> Vec<Val> {
        let (StageFn::Fold(f) | StageFn::Arg { f, .. }) = self.f;
        let first = b.constant_of(neutral(f, self.dtype), Ty::of_lanes(reg(self.dtype), lanes));
        match self.f {
            StageFn::Fold(_) => vec![first],
            StageFn::Arg { .. } => vec![first, b.constant_of(Scalar::I(0), Ty::of_lanes(self.position, lanes))],
        }
    }

    /// Take in `v` (a scalar or as many lanes as the accumulator); lanes where `mask` is false are left as they are. `at` is the
    /// position of `v`, of the position dtype.
    pub fn step(&self, b: &mut Builder, acc: &[Val], v: Val, at: Option<Val>, mask: Option<Val>) -> Vec<Val> {
        let ty = b.ty(acc[0]);
        let v = b.splat_to(v, ty);
        match (self.f, at) {
            (StageFn::Arg { last, .. }, Some(at)) => {
                let better = self.better(b, v, acc[0], last);
                let better = mask.map_or(better, |m| b.and(better, m));
                let position = b.splat_to(at, ty.with(self.position));
                vec![b.select(better, v, acc[0]), b.select(better, position, acc[1])]
            }
            _ => {
                let next = b.map(self.with().0, &[acc[0], v]);
                vec![mask.map_or(next, |m| b.select(m, next, acc[0]))]
            }
        }
    }

    /// Whether `v` replaces `best`: it is beyond it, or NaN and `best` is not; or, for the last, equal.
    fn better(&self, b: &mut Builder, v: Val, best: Val, last: bool) -> Val {
        let (StageFn::Fold(f) | StageFn::Arg { f, .. }) = self.f;
        if self.dtype == DType::Bool {
            // true is above false.
            let (high, low) = if f == ReduceFn::Max { (v, best) } else { (best, v) };
            let not_low = b.not(low);
            return if last { b.or(high, not_low) } else { b.and(high, not_low) };
        }
        let beyond = match (f == ReduceFn::Max, last) {
            (true, false) => b.gt(v, best),
            (true, true) => b.ge(v, best),
            (false, false) => b.lt(v, best),
            (false, true) => b.le(v, best),
        };
        if !self.dtype.is_float() {
            return beyond;
        }
        let v_nan = b.map(ScalarFn::IsNan, &[v]);
        let best_nan = b.map(ScalarFn::IsNan, &[best]);
        let known = b.not(best_nan);
        let wins = if last { v_nan } else { b.and(v_nan, known) };
        b.or(beyond, wins)
    }

    /// Whether `v` is strictly beyond `best` in the order of the fold.
    pub fn beyond(&self, b: &mut Builder, v: Val, best: Val) -> Val {
        self.better(b, v, best, false)
    }

    /// Two accumulators of the same lanes as one.
    pub fn join(&self, b: &mut Builder, x: &[Val], y: &[Val]) -> Vec<Val> {
        match self.f {
            StageFn::Fold(_) => vec![b.map(self.with().0, &[x[0], y[0]])],
            StageFn::Arg { last, .. } => {
                let over = self.better(b, y[0], x[0], false);
                let under = self.better(b, x[0], y[0], false);
                // Equals: the earlier position, or the later.
                let nearer = if last { b.gt(y[1], x[1]) } else { b.lt(y[1], x[1]) };
                let not_under = b.not(under);
                let tie = b.and(not_under, nearer);
                let take = b.or(over, tie);
                vec![b.select(take, y[0], x[0]), b.select(take, y[1], x[1])]
            }
        }
    }

    /// All lanes as one.
    pub fn lanes(&self, b: &mut Builder, acc: &[Val]) -> Vec<Val> {
        let n = b.ty(acc[0]).lanes();
        if n == 1 {
            return acc.to_vec();
        }
        match self.f {
            StageFn::Fold(_) => vec![b.reduce(self.with().1, acc[0])],
            StageFn::Arg { .. } => {
                // Halves joined, as long as there are any.
                let mut best = acc.to_vec();
                let mut n = n as u16;
                while n > 2 && n.is_multiple_of(2) {
                    n /= 2;
                    let half = |b: &mut Builder, from: u16| -> Vec<Val> {
                        let lanes: Vec<u16> = (from..from + n).collect();
                        best.iter().map(|v| b.shuffle(*v, *v, &lanes)).collect()
                    };
                    let (low, high) = (half(b, 0), half(b, n));
                    best = self.join(b, &low, &high);
                }
                let lane = |b: &mut Builder, l: usize| -> Vec<Val> { best.iter().map(|v| b.extract(*v, l)).collect() };
                let mut one = lane(b, 0);
                for l in 1..usize::from(n) {
                    let next = lane(b, l);
                    one = self.join(b, &one, &next);
                }
                one
            }
        }
    }

    /// The stage's result in its register dtype.
    pub fn finish(&self, b: &mut Builder, acc: &[Val]) -> Val {
        match self.f {
            StageFn::Fold(_) => round(b, acc[0], self.dtype),
            StageFn::Arg { .. } => b.cast(acc[1], DType::I64),
        }
    }
}
