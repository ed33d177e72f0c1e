//! Index arithmetic: `i64` scalars whose values all fit are held in 32-bit registers, as [`crate::tile::range`] proves.
//!
//! A GPU has no 64-bit adder: an `i64` sum is two instructions, a product some four, a quotient a routine. So such values are
//! made, compared and carried in 32 bits, and extended where something needs 64; addresses extend by themselves.
use super::{Lower, Lowered, Reg, Ty, Val};
use crate::tile::Stmt;
use crate::tile::range::{self, Interval};
use pavage_ir::{DType, ScalarFn};

impl Lower<'_> {
    /// Whether a value is an `i64` scalar held in 32 bits.
    pub(super) fn is_narrow(&self, v: Val) -> bool {
        self.ty(v) == Ty::INDEX && self.ranges.get(v).fits_i32()
    }

    /// The register of a scalar as it is kept: 32 bits for a narrow index.
    pub(super) fn kept(&self, v: Val) -> Reg {
        self.regs[&v][0].clone()
    }

    /// An integer scalar in a type at least as wide as its values.
    pub(super) fn kept_as(&mut self, v: Val, ty: &'static str) -> Reg {
        let r = self.kept(v);
        if ty == "i64" && r.ty == "i32" && self.is_narrow(v) { self.wide(v) } else { self.e.int_to(&r, ty) }
    }

    /// An index or other integer scalar as `i32`.
    pub(super) fn small(&mut self, v: Val) -> Reg {
        self.kept_as(v, "i32")
    }

    /// A narrow index in 64 bits.
    pub(super) fn wide(&mut self, v: Val) -> Reg {
        let r = self.kept(v);
        if let Some(c) = self.ranges.get(v).single() {
            return self.e.i64(c);
        }
        self.e.conv("sext", &r, "i64")
    }

    /// The type a loop counts in: it is stepped once past its end.
    pub(super) fn counter_ty(&self, s: &Stmt) -> &'static str {
        let [lo, hi, step] = [0, 1, 2].map(|i| self.ranges.get(s.args[i]));
        let past = Interval::new(i128::from(lo.lo), i128::from(hi.hi.max(lo.hi)) + i128::from(step.hi));
        if [lo, hi, step, past].iter().all(|i| i.fits_i32()) { "i32" } else { "i64" }
    }

    /// The type for the sums of an index and `n` numbers from `offset` on.
    pub(super) fn sum_ty(&self, index: Val, offset: i64, n: usize) -> &'static str {
        let last = i128::from(offset) + n as i128;
        let sums = range::apply(ScalarFn::Add, &[self.ranges.get(index), Interval::new(offset.into(), last)]);
        if self.is_narrow(index) && sums.fits_i32() { "i32" } else { "i64" }
    }

    /// Whether the places of an accumulator's elements fit 32 bits: base, row, column, rows, columns, stride.
    pub(super) fn place_fits(&self, args: [Val; 6]) -> bool {
        let [base, row, col, rows, cols, stride] = args.map(|a| self.ranges.get(a));
        // A thread's first row and column in the tile and the second row half.
        let (row, col) = (range::apply(ScalarFn::Add, &[row, Interval { lo: 0, hi: 72 }]), range::apply(ScalarFn::Add, &[col, Interval { lo: 0, hi: 8 }]));
        let flat = row.mul_add(stride, Interval::of(0));
        let at = range::apply(ScalarFn::Add, &[flat, base]);
        let whole = range::apply(ScalarFn::Add, &[at, col]);
        let (along, down) = (range::apply(ScalarFn::Add, &[base, col]), range::apply(ScalarFn::Add, &[base, row]));
        let left = range::apply(ScalarFn::Sub, &[cols, col]);
        [base, rows, stride, row, col, flat, at, whole, along, down, left].iter().all(|i| i.fits_i32())
    }

    /// A scalar function of indices: folded where the ranges say so, in 32 bits where they fit.
    pub(super) fn index_map(&mut self, f: ScalarFn, s: &Stmt) -> Lowered {
        use ScalarFn::{Add, And, Div, Max, Min, Mod, Mul, Neg, Not, Or, Rem, Select, Sub, Xor};
        let out = s.results[0];
        let args = if f == Select { &s.args[1..] } else { &s.args[..] };
        let ranges: Vec<Interval> = args.iter().map(|a| self.ranges.get(*a)).collect();
        let (first, second) = (ranges[0], ranges.get(1).copied().unwrap_or(Interval::of(0)));
        if let Some(c) = range::decided(f, first, second) {
            let r = self.e.int("i1", i64::from(c));
            self.bind(out, vec![r]);
            return Ok(());
        }
        let index = self.ty(out) == Ty::INDEX;
        if index && let Some(c) = self.ranges.get(out).single() {
            let r = self.e.int(if self.is_narrow(out) { "i32" } else { "i64" }, c);
            self.bind(out, vec![r]);
            return Ok(());
        }
        let same = match f {
            Min if first.hi <= second.lo => Some(args[0]),
            Min if second.hi <= first.lo => Some(args[1]),
            Max if first.lo >= second.hi => Some(args[0]),
            Max if second.lo >= first.hi => Some(args[1]),
            Rem | Mod if first.is_natural() && first.hi < second.lo => Some(args[0]),
            _ => None,
        };
        if let Some(v) = same {
            let r = self.kept(v);
            self.bind(out, vec![r]);
            return Ok(());
        }
        let fits = ranges.iter().all(|r| r.fits_i32());
        // The low half of a result needs the low halves of the operands only.
        let low = matches!(f, Add | Sub | Mul | And | Or | Xor | Neg | Not | Select) && self.is_narrow(out);
        let ty = if low || fits && (!index || self.is_narrow(out)) { "i32" } else { "i64" };
        let mut regs: Vec<Reg> = args.iter().map(|a| self.kept_as(*a, ty)).collect();
        let natural = ranges.iter().all(|r| r.is_natural());
        let d = match (ty, natural) {
            ("i32", true) => DType::U32,
            ("i32", false) => DType::I32,
            (_, true) => DType::U64,
            (_, false) => DType::I64,
        };
        let r = match f {
            Select => {
                regs.insert(0, self.scalar(s.args[0]));
                self.call(f, d, &regs)?
            }
            // Exact, so nothing wraps.
            Add | Sub | Mul if ty == "i32" && fits => {
                let unsigned = natural && (f != Sub || first.lo >= second.hi);
                self.e.exact(f.name(), &regs[0], &regs[1], unsigned)
            }
            // No guard against 0, nor -1, which has no unsigned form.
            Div | Rem | Mod if !second.contains(0) && !second.contains(-1) => self.divide(f, d, &regs[0], &regs[1]),
            _ => self.call(f, d, &regs)?,
        };
        self.bind(out, vec![r]);
        Ok(())
    }
}
