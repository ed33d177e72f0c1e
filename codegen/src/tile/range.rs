//! What values integers can take: an interval for every `i64` scalar of a kernel, and narrower ones, whatever the data.
//!
//! Known are constants, threads, lanes and the blocks of a grid that the kernel fixes ([`super::Launch::grid`]); what is loaded,
//! and sizes that are open, can be anything of their dtype. Loops are followed until nothing grows.
//! The lowering to GPUs holds in 32 bits what fits there; the interpreter reports a value outside its interval.
use super::{Block, Kernel, Op, Stmt, Ty, Val, hopper::HopperWord};
use pavage_ir::{DType, ScalarFn, dtype::Class};
use std::collections::BTreeMap;

/// The whole numbers from `lo` to `hi`, both inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// Least.
    pub lo: i64,
    /// Largest, at least `lo`.
    pub hi: i64,
}

impl Interval {
    /// Every `i64`.
    pub const ALL: Interval = Interval { lo: i64::MIN, hi: i64::MAX };

    /// From `lo` to `hi`; everything, if an `i64` would wrap.
    pub fn new(lo: i128, hi: i128) -> Interval {
        match (i64::try_from(lo), i64::try_from(hi)) {
            (Ok(lo), Ok(hi)) => Interval { lo, hi },
            _ => Interval::ALL,
        }
    }

    /// One value.
    pub const fn of(v: i64) -> Interval {
        Interval { lo: v, hi: v }
    }

    /// Whether `v` is inside.
    pub const fn contains(self, v: i64) -> bool {
        self.lo <= v && v <= self.hi
    }

    /// Whether every value is an `i32`.
    pub const fn fits_i32(self) -> bool {
        self.lo >= i32::MIN as i64 && self.hi <= i32::MAX as i64
    }

    /// Whether no value is below 0.
    pub const fn is_natural(self) -> bool {
        self.lo >= 0
    }

    /// The value, if there is but one.
    pub fn single(self) -> Option<i64> {
        (self.lo == self.hi).then_some(self.lo)
    }

    /// The least interval around both.
    pub fn join(self, o: Interval) -> Interval {
        Interval { lo: self.lo.min(o.lo), hi: self.hi.max(o.hi) }
    }

    fn wide(self) -> (i128, i128) {
        (i128::from(self.lo), i128::from(self.hi))
    }

    /// What a function that is monotone in each operand can give, from the corners.
    fn corners(self, o: Interval, f: impl Fn(i128, i128) -> i128) -> (i128, i128) {
        let ((a, b), (c, d)) = (self.wide(), o.wide());
        let at = [f(a, c), f(a, d), f(b, c), f(b, d)];
        (at.iter().copied().min().unwrap_or(0), at.iter().copied().max().unwrap_or(0))
    }

    /// `self * o + p`, as an index is made.
    pub fn mul_add(self, o: Interval, p: Interval) -> Interval {
        let (lo, hi) = self.corners(o, |x, y| x * y);
        let (plo, phi) = p.wide();
        Interval::new(lo + plo, hi + phi)
    }
}

/// What `f` of `i64` operands in these intervals can give.
pub fn apply(f: ScalarFn, args: &[Interval]) -> Interval {
    use ScalarFn::*;
    let (a, b) = match args {
        [a] => (*a, Interval::of(0)),
        [a, b, ..] => (*a, *b),
        [] => return Interval::ALL,
    };
    let ((alo, ahi), (blo, bhi)) = (a.wide(), b.wide());
    match f {
        Add => Interval::new(alo + blo, ahi + bhi),
        Sub => Interval::new(alo - bhi, ahi - blo),
        Mul => a.mul_add(b, Interval::of(0)),
        Neg => Interval::new(-ahi, -alo),
        Not => Interval::new(-1 - ahi, -1 - alo),
        Min => Interval { lo: a.lo.min(b.lo), hi: a.hi.min(b.hi) },
        Max => Interval { lo: a.lo.max(b.lo), hi: a.hi.max(b.hi) },
        Abs => {
            let least = if a.contains(0) { 0 } else { alo.abs().min(ahi.abs()) };
            Interval::new(least, alo.abs().max(ahi.abs()))
        }
        Sign => Interval { lo: a.lo.signum(), hi: a.hi.signum() },
        Div => divided(a, b),
        Rem | Mod if a.is_natural() && a.hi < b.lo => a,
        Rem => {
            // The sign of the dividend, below the divisor; 0 by 0.
            let most = (blo.abs().max(bhi.abs()) - 1).max(0);
            Interval::new(if alo < 0 { alo.max(-most) } else { 0 }, if ahi > 0 { ahi.min(most) } else { 0 })
        }
        Mod => {
            // The sign of the divisor; 0 by 0.
            let hi = if bhi > 0 { bhi - 1 } else { 0 };
            let lo = if blo < 0 { blo + 1 } else { 0 };
            Interval::new(lo, if a.is_natural() && blo >= 0 { hi.min(ahi) } else { hi })
        }
        And => match (a.is_natural(), b.is_natural()) {
            (true, true) => Interval { lo: 0, hi: a.hi.min(b.hi) },
            (true, false) => Interval { lo: 0, hi: a.hi },
            (false, true) => Interval { lo: 0, hi: b.hi },
            (false, false) => Interval::ALL,
        },
        Or | Xor if a.is_natural() && b.is_natural() => {
            let bits = 64 - a.hi.max(b.hi).leading_zeros();
            Interval::new(if f == Or { alo.max(blo) } else { 0 }, (1i128 << bits) - 1)
        }
        Shl if b.lo >= 0 && b.hi < 63 => {
            let (lo, hi) = a.corners(b, |x, by| x << by);
            Interval::new(lo, hi)
        }
        Shr => {
            // Outside 0..64 only the sign is left, as by 63.
            let by = if b.lo >= 0 { Interval { lo: b.lo.min(63), hi: b.hi.min(63) } } else { Interval { lo: 0, hi: 63 } };
            let (lo, hi) = a.corners(by, |x, by| x >> by);
            Interval::new(lo, hi)
        }
        _ => Interval::ALL,
    }
}

/// Toward zero; 0 by 0.
fn divided(a: Interval, b: Interval) -> Interval {
    let mut parts = vec![];
    if b.hi > 0 {
        parts.push(a.corners(Interval { lo: b.lo.max(1), hi: b.hi }, |x, y| x / y));
    }
    if b.lo < 0 {
        parts.push(a.corners(Interval { lo: b.lo, hi: b.hi.min(-1) }, |x, y| x / y));
    }
    if b.contains(0) {
        parts.push((0, 0));
    }
    let lo = parts.iter().map(|p| p.0).min().unwrap_or(0);
    Interval::new(lo, parts.iter().map(|p| p.1).max().unwrap_or(0))
}

/// What a comparison of `i64` operands in these intervals always says.
pub fn decided(f: ScalarFn, a: Interval, b: Interval) -> Option<bool> {
    let less = |a: Interval, b: Interval| if a.hi < b.lo { Some(true) } else { (a.lo >= b.hi).then_some(false) };
    let equal = match (a.single(), b.single()) {
        (Some(x), Some(y)) if x == y => Some(true),
        _ => (a.hi < b.lo || b.hi < a.lo).then_some(false),
    };
    match f {
        ScalarFn::Lt => less(a, b),
        ScalarFn::Gt => less(b, a),
        ScalarFn::Le => less(b, a).map(|x| !x),
        ScalarFn::Ge => less(a, b).map(|x| !x),
        ScalarFn::Eq => equal,
        ScalarFn::Ne => equal.map(|x| !x),
        _ => None,
    }
}

/// What is left of `a` where `a f b` holds; all of it where that cannot be told, or never holds.
pub fn limited(f: ScalarFn, a: Interval, b: Interval) -> Interval {
    let (below, above) = (b.hi.saturating_sub(1), b.lo.saturating_add(1));
    let (lo, hi) = match f {
        ScalarFn::Lt => (a.lo, a.hi.min(below)),
        ScalarFn::Le => (a.lo, a.hi.min(b.hi)),
        ScalarFn::Gt => (a.lo.max(above), a.hi),
        ScalarFn::Ge => (a.lo.max(b.lo), a.hi),
        ScalarFn::Eq => (a.lo.max(b.lo), a.hi.min(b.hi)),
        ScalarFn::Ne if b.single() == Some(a.hi) => (a.lo, below),
        ScalarFn::Ne if b.single() == Some(a.lo) => (above, a.hi),
        _ => (a.lo, a.hi),
    };
    if lo <= hi { Interval { lo, hi } } else { a }
}

/// The comparison that holds where another does not, and the one that holds of its operands the other way round.
fn turned(f: ScalarFn) -> Option<(ScalarFn, ScalarFn)> {
    use ScalarFn::{Eq, Ge, Gt, Le, Lt, Ne};
    Some(match f {
        Lt => (Ge, Gt),
        Le => (Gt, Ge),
        Gt => (Le, Lt),
        Ge => (Lt, Le),
        Eq => (Ne, Eq),
        Ne => (Eq, Ne),
        _ => return None,
    })
}

/// The interval of every value of a kernel; [`Interval::ALL`] for those that are no integer scalars, and for `u64`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges {
    values: Vec<Interval>,
    /// Comparisons of such scalars, by their result.
    tests: BTreeMap<Val, (ScalarFn, Val, Val)>,
}

/// Whether values of a type have intervals: integer scalars whose values are all `i64`s.
fn is_followed(ty: Ty) -> bool {
    let d = ty.dtype();
    ty.is_scalar() && d != DType::U64 && matches!(d.class(), Class::Signed | Class::Unsigned)
}

/// All a type holds.
fn whole(ty: Ty) -> Interval {
    if !is_followed(ty) {
        return Interval::ALL;
    }
    let (lo, hi) = ty.dtype().int_range();
    Interval::new(lo, hi)
}

/// Rounds over a loop before what still grows counts as anything: the stages of a ring are found one a round.
const PATIENCE: usize = 8;

impl Ranges {
    /// Analyse a kernel.
    pub fn of(kernel: &Kernel) -> Ranges {
        let mut r = Ranges { values: kernel.types.iter().map(|t| whole(*t)).collect(), tests: BTreeMap::new() };
        kernel.walk(&mut |s| {
            if let (Op::Map(f), [x, y]) = (&s.op, &s.args[..])
                && turned(*f).is_some()
                && is_followed(kernel.ty(*x))
            {
                r.tests.insert(s.results[0], (*f, *x, *y));
            }
        });
        r.block(kernel, &kernel.body);
        r
    }

    /// The interval of a value.
    pub fn get(&self, v: Val) -> Interval {
        self.values.get(v.0 as usize).copied().unwrap_or(Interval::ALL)
    }

    #[cfg(test)]
    pub(crate) fn plant(&mut self, v: Val, i: Interval) {
        self.values[v.0 as usize] = i;
    }

    fn put(&mut self, kernel: &Kernel, v: Val, i: Interval) {
        if is_followed(kernel.ty(v)) {
            // What leaves the dtype has wrapped.
            let whole = whole(kernel.ty(v));
            self.values[v.0 as usize] = if whole.contains(i.lo) && whole.contains(i.hi) { i } else { whole };
        }
    }

    fn block(&mut self, kernel: &Kernel, block: &Block) {
        for s in &block.stmts {
            self.stmt(kernel, s);
        }
    }

    fn stmt(&mut self, kernel: &Kernel, s: &Stmt) {
        match &s.op {
            Op::For => return self.for_(kernel, s),
            Op::While => return self.while_(kernel, s),
            _ => s.blocks.iter().for_each(|b| self.block(kernel, b)),
        }
        if s.op == Op::If {
            for (r, (x, y)) in s.results.iter().zip(s.blocks[0].yields.iter().zip(&s.blocks[1].yields)) {
                self.put(kernel, *r, self.get(*x).join(self.get(*y)));
            }
        } else if let [out] = s.results[..]
            && is_followed(kernel.ty(out))
        {
            let range = self.value(kernel, s);
            self.put(kernel, out, range);
        }
    }

    /// A value where a condition is true or false.
    fn where_(&self, v: Val, condition: Val, holds: bool) -> Interval {
        let range = self.get(v);
        let Some((f, x, y)) = self.tests.get(&condition) else { return range };
        let f = if holds { Some(*f) } else { turned(*f).map(|t| t.0) };
        match f {
            Some(f) if v == *x => limited(f, range, self.get(*y)),
            Some(f) if v == *y => turned(f).map_or(range, |t| limited(t.1, range, self.get(*x))),
            _ => range,
        }
    }

    /// The one integer that a statement gives, before it wraps.
    fn value(&self, kernel: &Kernel, s: &Stmt) -> Interval {
        let launch = &kernel.launch;
        let below = |n: u32| Interval { lo: 0, hi: i64::from(n.max(1)) - 1 };
        // CUDA programming guide, "Technical Specifications per Compute Capability".
        let most = |axis: u8| if axis == 0 { i32::MAX as u32 } else { 65535 };
        let grid = |axis: u8| match launch.grid.get(usize::from(axis)) {
            Some(n) if *n > 0 => *n,
            _ => most(axis),
        };
        match &s.op {
            Op::Const(c) => Interval::new(c.i(), c.i()),
            Op::Map(ScalarFn::Select) => self.where_(s.args[1], s.args[0], true).join(self.where_(s.args[2], s.args[0], false)),
            Op::Map(f) => apply(*f, &s.args.iter().map(|a| self.get(*a)).collect::<Vec<_>>()),
            Op::Cast => match kernel.ty(s.args[0]).dtype() {
                DType::Bool => Interval { lo: 0, hi: 1 },
                d if is_followed(Ty::Scalar(d)) => self.get(s.args[0]),
                _ => Interval::ALL,
            },
            // A lane's value is one that some lane had.
            Op::Shfl(_) => self.get(s.args[0]),
            Op::BlockId(axis) => below(grid(*axis)),
            Op::GridDim(axis) => Interval { lo: 1, hi: i64::from(grid(*axis)) },
            Op::ThreadId => below(launch.threads),
            Op::LaneId => below(32),
            Op::Hopper(HopperWord::GroupId) => below(launch.threads.div_ceil(128)),
            Op::Hopper(HopperWord::GroupThread) => below(128),
            Op::Hopper(HopperWord::ClusterRank) => below(launch.cluster.iter().product()),
            Op::Hopper(HopperWord::ClusterId) => below(grid(0)),
            Op::Hopper(HopperWord::ClusterCount) => Interval { lo: 0, hi: i64::from(grid(0)) },
            _ => Interval::ALL,
        }
    }

    fn for_(&mut self, kernel: &Kernel, s: &Stmt) {
        let body = &s.blocks[0];
        let (lo, hi, step) = (self.get(s.args[0]), self.get(s.args[1]), self.get(s.args[2]));
        // The last one, where the bounds are known, else the one before the end.
        let last = match (lo.single(), step.single()) {
            (Some(l), Some(by)) if by > 0 && l < hi.hi => {
                let (l, by, end) = (i128::from(l), i128::from(by), i128::from(hi.hi));
                (l + (end - 1 - l) / by * by) as i64
            }
            _ => hi.hi.saturating_sub(1),
        };
        self.put(kernel, body.params[0], Interval { lo: lo.lo, hi: last.max(lo.lo) });
        let (carried, init) = (&body.params[1..], &s.args[3..]);
        self.carry(kernel, carried, init, &body.yields, |r| r.block(kernel, body));
        for (r, p) in s.results.iter().zip(carried) {
            self.put(kernel, *r, self.get(*p));
        }
    }

    fn while_(&mut self, kernel: &Kernel, s: &Stmt) {
        let (before, body) = (&s.blocks[0], &s.blocks[1]);
        self.carry(kernel, &before.params, &s.args, &body.yields, |r| {
            r.block(kernel, before);
            for (i, v) in before.yields[1..].iter().enumerate() {
                let x = r.get(*v);
                r.put(kernel, body.params[i], x);
                r.put(kernel, s.results[i], x);
            }
            r.block(kernel, body);
        });
    }

    /// Follow a loop until what its carried values can be holds what comes in and what each round hands on.
    fn carry(&mut self, kernel: &Kernel, params: &[Val], init: &[Val], next: &[Val], mut round: impl FnMut(&mut Self)) {
        for (p, i) in params.iter().zip(init) {
            self.put(kernel, *p, self.get(*i));
        }
        for rounds in 0.. {
            round(self);
            let mut grew = false;
            for (p, n) in params.iter().zip(next) {
                let (old, new) = (self.get(*p), self.get(*p).join(self.get(*n)));
                if old == new {
                    continue;
                }
                grew = true;
                let lo = if new.lo < old.lo && rounds >= PATIENCE { i64::MIN } else { new.lo };
                let hi = if new.hi > old.hi && rounds >= PATIENCE { i64::MAX } else { new.hi };
                self.put(kernel, *p, Interval { lo, hi });
            }
            if !grew {
                return;
            }
        }
    }
}

#[cfg(test)]
#[path = "range_test.rs"]
mod tests;
