//! Region expressions as kernel code: what every family uses to read, compute and write at a point.
//!
//! A [`Point`] gives each axis of an index space a value. In vector mode one axis stands for `lanes` consecutive
//! coordinates; whatever does not depend on it stays a scalar, and the builder splats it where the two meet. The
//! flat address of a load is analysed along the vector axis: step 0 is a scalar load, step 1 a contiguous one,
//! anything else a gather; guards and tails become masks.
//!
//! Narrow floats and integers of less than a byte are held in registers as `f32` and `i8` ([`reg`]) and rounded to their own dtype after
//! each function that can leave it, as the reference does.
use crate::tile::{Access, Buf, Builder, ReduceFn, Ty, Val};
use pavage_ir::{DType, Dim, Expr, ExprId, Heart, Region, Scalar, ScalarFn, Sym, dim::Atom};
use std::collections::{BTreeMap, HashMap};

/// The dtype in which a register holds a value of `dtype`.
pub fn reg(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        d if d.is_mini() => DType::F32,
        DType::I4 | DType::I2 => DType::I8,
        DType::U4 | DType::U2 => DType::U8,
        other => other,
    }
}

/// Round a register value to `dtype`, staying in the register dtype.
pub fn round(b: &mut Builder, v: Val, dtype: DType) -> Val {
    if reg(dtype) == dtype {
        return v;
    }
    let narrow = b.cast(v, dtype);
    b.cast(narrow, reg(dtype))
}

/// How a value varies over the lanes of the vector axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// Lane `l` is the value of lane 0 plus `l` times this; 0 is the same in every lane.
    Step(i64),
    /// Anything.
    Varying,
}

/// The axis that stands for several points.
#[derive(Clone, Copy, Debug)]
pub struct VectorAxis {
    /// Which axis.
    pub axis: usize,
    /// How many consecutive points.
    pub lanes: usize,
    /// How many of them exist (`i64`); none: all.
    pub count: Option<Val>,
    /// Whether the axis value is a multiple of `lanes`: then quotients and remainders of it are often regular.
    pub aligned: bool,
}

type Memo = HashMap<(ExprId, Option<Val>), Val>;

/// Where expressions are evaluated. Values computed at a point are kept with it: a clone made inside a loop body
/// inherits what was computed outside, see [`Env::hoist`].
#[derive(Clone, Debug, Default)]
pub struct Point {
    /// Value of each axis, `i64`; of the vector axis, that of lane 0.
    pub axes: Vec<Val>,
    /// The vector axis.
    pub vector: Option<VectorAxis>,
    /// Values of the heart's accumulators, in register dtypes.
    pub accs: Vec<Val>,
    memo: Memo,
}

impl Point {
    /// A point in scalar mode.
    pub fn new(axes: Vec<Val>) -> Point {
        Point { axes, ..Point::default() }
    }

    /// The same axes with `axis` made the vector axis; computed values are kept where they do not depend on it.
    pub fn vector(axes: Vec<Val>, vector: VectorAxis) -> Point {
        Point { axes, vector: (vector.lanes > 1).then_some(vector), ..Point::default() }
    }

    /// Take `v` for the value of an expression here.
    pub fn know(&mut self, id: ExprId, v: Val) {
        self.memo.insert((id, None), v);
    }

    /// Take over what is known at `other`, the same row: accumulators, and values that were computed there.
    pub fn learn(&mut self, other: &Point) {
        self.accs.clone_from(&other.accs);
        self.memo.extend(&other.memo);
    }

    /// The same point with this vector axis.
    pub fn along(mut self, vector: Option<VectorAxis>) -> Point {
        self.vector = vector;
        self
    }

    /// Lanes of the vector axis, 1 in scalar mode.
    pub fn lanes(&self) -> usize {
        self.vector.map_or(1, |v| v.lanes)
    }
}

/// What a region's expressions mean in one kernel: buffers of its arguments and outputs, values of its symbols.
pub struct Env<'r> {
    /// The region.
    pub region: &'r Region,
    /// Buffer of each argument.
    pub args: Vec<Buf>,
    /// Buffer of each output.
    pub outs: Vec<Buf>,
    /// The size that each dim parameter of the kernel stands for, in parameter order.
    pub dims: Vec<Dim>,
    syms: BTreeMap<Sym, Val>,
    /// Axes that each expression depends on, as bits.
    axes: Vec<u64>,
    /// Accumulators that each expression depends on, as bits.
    accs: Vec<u64>,
}

impl<'r> Env<'r> {
    /// Declare the region's arguments and outputs as the kernel's buffers.
    pub fn new(b: &mut Builder, region: &'r Region) -> Env<'r> {
        let args = region.args.iter().map(|t| b.arg(t.dtype, Access::Read)).collect();
        let outs = region.outputs.iter().map(|o| b.arg(o.ty.dtype, Access::Write)).collect();
        Env::with_bufs(region, args, outs)
    }

    /// As [`Env::new`], over buffers that the family declared itself.
    pub fn with_bufs(region: &'r Region, args: Vec<Buf>, outs: Vec<Buf>) -> Env<'r> {
        let mut env = Env { region, args, outs, dims: vec![], syms: BTreeMap::new(), axes: vec![], accs: vec![] };
        for (expr, _) in &region.exprs {
            let (mut axes, mut accs) = (0, 0);
            let mut visit = |id: ExprId, env: &Env| {
                axes |= env.axes[id.0 as usize];
                accs |= env.accs[id.0 as usize];
            };
            let mut own = 0;
            match expr {
                Expr::Float(_) | Expr::Int(_) => {}
                Expr::Index(d) => own |= env.dim_axes(d, &mut |v| visit(v, &env)),
                Expr::Load { index, guard, .. } => {
                    for d in index {
                        own |= env.dim_axes(d, &mut |v| visit(v, &env));
                    }
                    if let Some(g) = guard {
                        visit(*g, &env);
                    }
                }
                Expr::Acc(i) => accs |= 1 << i,
                Expr::Call(_, xs) => xs.iter().for_each(|x| visit(*x, &env)),
                Expr::Cast(x) | Expr::Bits(x) => visit(*x, &env),
            }
            env.axes.push(axes | own);
            env.accs.push(accs);
        }
        env
    }

    /// As [`Env::with_bufs`] for another region of the same kernel, sizes being those of `self`: ask for every symbol before.
    pub fn beside<'s>(&self, region: &'s Region, outs: Vec<Buf>) -> Env<'s> {
        Env { dims: self.dims.clone(), syms: self.syms.clone(), ..Env::with_bufs(region, self.args.clone(), outs) }
    }

    /// The axes named in `d`, as bits; `value` is called for every value of the pool in it.
    fn dim_axes(&self, d: &Dim, value: &mut dyn FnMut(ExprId)) -> u64 {
        let mut found = 0;
        leaves(d, &mut |atom| match atom {
            Atom::Axis(k) => found |= 1u64 << (k & 63),
            Atom::Value(v) => value(ExprId(*v)),
            _ => {}
        });
        found
    }

    /// Axes that an expression depends on, as bits.
    pub fn axes_of(&self, id: ExprId) -> u64 {
        self.axes[id.0 as usize]
    }

    /// Accumulators that an expression depends on, as bits.
    pub fn accs_of(&self, id: ExprId) -> u64 {
        self.accs[id.0 as usize]
    }

    /// Axes that an index depends on, as bits, through values of the pool too.
    pub fn axes_of_dim(&self, d: &Dim) -> u64 {
        let mut through = 0;
        let own = self.dim_axes(d, &mut |v| through |= self.axes_of(v));
        own | through
    }

    /// Row-major element index of `index` in a tensor of this shape.
    pub fn flat(shape: &[Dim], index: &[Dim]) -> Dim {
        index.iter().zip(shape).fold(Dim::ZERO, |at, (i, n)| at * n.clone() + i.clone()).recombine()
    }

    /// Element index that load `id` reads, when it is a load.
    pub fn address(&self, id: ExprId) -> Option<(usize, Dim)> {
        match self.region.expr(id) {
            Expr::Load { arg, index, .. } => Some((*arg as usize, Self::flat(&self.region.args[*arg as usize].shape, index))),
            _ => None,
        }
    }

    /// Element index that output `i` writes.
    pub fn out_address(&self, i: usize) -> Dim {
        let out = &self.region.outputs[i];
        Self::flat(&out.ty.shape, &out.index)
    }

    // ---- sizes and indices ----

    /// The value of a symbol: a dim parameter of the kernel.
    pub fn sym(&mut self, b: &mut Builder, sym: &Sym) -> Val {
        if let Some(v) = self.syms.get(sym) {
            return *v;
        }
        let v = b.dim();
        self.dims.push(Dim::from(Atom::Sym(sym.clone())));
        self.syms.insert(sym.clone(), v);
        v
    }

    /// The value of a size free of axes.
    pub fn size(&mut self, b: &mut Builder, d: &Dim) -> Val {
        self.index(b, d, &mut Point::default())
    }

    /// The value of `d` at a point, `i64`: that of lane 0 in vector mode (see [`Env::lanes`] for the others).
    pub fn index(&mut self, b: &mut Builder, d: &Dim, p: &mut Point) -> Val {
        let vector = p.vector.take();
        let v = self.dim(b, d, p, None);
        p.vector = vector;
        v
    }

    /// How `d` varies over the lanes.
    pub fn lanes(&self, d: &Dim, p: &Point) -> Lanes {
        let Some(v) = p.vector else { return Lanes::Step(0) };
        self.lanes_along(d, v.axis, v.aligned.then_some(v.lanes as i64))
    }

    /// How `d` varies along `axis`; `tile`: over this many points from a multiple of it on.
    pub fn lanes_along(&self, d: &Dim, axis: usize, tile: Option<i64>) -> Lanes {
        let mut step = 0i64;
        for (atoms, c) in d.terms() {
            let mut term = 0;
            for atom in atoms {
                match self.atom_lanes(atom, axis, tile) {
                    Lanes::Step(0) => {}
                    Lanes::Step(s) if atoms.len() == 1 => term = s,
                    _ => return Lanes::Varying,
                }
            }
            step += c * term;
        }
        Lanes::Step(step)
    }

    fn atom_lanes(&self, atom: &Atom, axis: usize, tile: Option<i64>) -> Lanes {
        let uniform = |d: &Dim| self.lanes_along(d, axis, tile) == Lanes::Step(0);
        match atom {
            Atom::Sym(_) => Lanes::Step(0),
            Atom::Axis(k) => Lanes::Step(i64::from(*k as usize == axis)),
            Atom::Value(v) => {
                if self.axes_of(ExprId(*v)) >> axis & 1 == 0 {
                    Lanes::Step(0)
                } else {
                    Lanes::Varying
                }
            }
            Atom::Div(x, by) | Atom::Mod(x, by) => {
                if uniform(x) && uniform(by) {
                    return Lanes::Step(0);
                }
                // A tile of points that starts at a multiple of its size stays within one period of the divisor.
                let (Lanes::Step(s), Some(by), Some(tile)) = (self.lanes_along(x, axis, tile), by.as_const(), tile) else { return Lanes::Varying };
                let span = s * tile;
                let starts_even = x.terms().iter().all(|(atoms, c)| {
                    let whole = matches!(atoms.as_slice(), [Atom::Axis(k)] if *k as usize == axis);
                    (if whole { c.wrapping_mul(tile) } else { *c }) % span == 0
                });
                if s <= 0 || by % span != 0 || !starts_even {
                    return Lanes::Varying;
                }
                if matches!(atom, Atom::Div(..)) { Lanes::Step(0) } else { Lanes::Step(s) }
            }
            Atom::Max(x, y) | Atom::Min(x, y) => {
                if uniform(x) && uniform(y) {
                    Lanes::Step(0)
                } else {
                    Lanes::Varying
                }
            }
        }
    }

    /// The value of `d` in every lane: a scalar where it is the same in all, else a vector of `i64`.
    pub fn index_lanes(&mut self, b: &mut Builder, d: &Dim, p: &mut Point, mask: Option<Val>) -> Val {
        let lanes = p.lanes();
        match self.lanes(d, p) {
            Lanes::Step(0) => self.index(b, d, p),
            Lanes::Step(s) => {
                let base = self.index(b, d, p);
                let iota = b.iota(DType::I64, lanes);
                let k = b.index(s);
                let step = if s == 1 { iota } else { b.map(ScalarFn::Mul, &[iota, k]) };
                b.map(ScalarFn::Add, &[step, base])
            }
            Lanes::Varying => self.dim(b, d, p, mask),
        }
    }

    /// Term by term, each atom in lanes where it varies. Terms of outer axes come first, so that the builder can
    /// place their sum outside the inner loops.
    fn dim(&mut self, b: &mut Builder, d: &Dim, p: &mut Point, mask: Option<Val>) -> Val {
        let mut terms: Vec<(u64, &(Vec<Atom>, i64))> = d
            .terms()
            .iter()
            .map(|t| {
                let mut axes = 0;
                for atom in &t.0 {
                    axes |= self.axes_of_dim(&Dim::from(atom.clone()));
                }
                (axes, t)
            })
            .collect();
        terms.sort_by_key(|(axes, _)| 64 - axes.leading_zeros());
        let mut sum: Option<Val> = None;
        let mut offset = 0i64;
        for (_, (atoms, c)) in terms {
            if atoms.is_empty() {
                offset = offset.wrapping_add(*c);
                continue;
            }
            let mut product: Option<Val> = None;
            for atom in atoms {
                let v = self.atom(b, atom, p, mask);
                product = Some(product.map_or(v, |x| b.mul(x, v)));
            }
            let k = b.index(*c);
            let term = product.map_or(k, |x| if *c == 1 { x } else { b.mul(x, k) });
            sum = Some(sum.map_or(term, |s| b.add(s, term)));
        }
        let k = b.index(offset);
        match sum {
            Some(s) if offset == 0 => s,
            Some(s) => b.add(s, k),
            None => k,
        }
    }

    fn atom(&mut self, b: &mut Builder, atom: &Atom, p: &mut Point, mask: Option<Val>) -> Val {
        match atom {
            Atom::Sym(s) => self.sym(b, s),
            Atom::Axis(k) => {
                let base = p.axes[*k as usize];
                match p.vector {
                    Some(v) if v.axis == *k as usize => {
                        let iota = b.iota(DType::I64, v.lanes);
                        b.map(ScalarFn::Add, &[iota, base])
                    }
                    _ => base,
                }
            }
            Atom::Value(v) => {
                let v = self.masked(b, ExprId(*v), p, mask);
                b.cast(v, DType::I64)
            }
            Atom::Div(x, by) => {
                let plain = x.is_nonneg() && by.is_nonneg();
                let (x, by) = (self.part(b, x, p, mask), self.part(b, by, p, mask));
                if plain {
                    return b.div(x, by);
                }
                let rest = b.map(ScalarFn::Mod, &[x, by]);
                let whole = b.sub(x, rest);
                b.div(whole, by)
            }
            Atom::Mod(x, by) => {
                let f = if x.is_nonneg() && by.is_nonneg() { ScalarFn::Rem } else { ScalarFn::Mod };
                let (x, by) = (self.part(b, x, p, mask), self.part(b, by, p, mask));
                b.map(f, &[x, by])
            }
            Atom::Max(x, y) => {
                let (x, y) = (self.part(b, x, p, mask), self.part(b, y, p, mask));
                b.max(x, y)
            }
            Atom::Min(x, y) => {
                let (x, y) = (self.part(b, x, p, mask), self.part(b, y, p, mask));
                b.min(x, y)
            }
        }
    }

    fn part(&mut self, b: &mut Builder, d: &Dim, p: &mut Point, mask: Option<Val>) -> Val {
        if p.vector.is_some() { self.index_lanes(b, d, p, mask) } else { self.dim(b, d, p, mask) }
    }

    // ---- expressions ----

    /// The value of an expression at a point, in its register dtype: a scalar where all lanes agree.
    pub fn expr(&mut self, b: &mut Builder, id: ExprId, p: &mut Point) -> Val {
        self.masked(b, id, p, None)
    }

    /// As [`Env::expr`], a vector always (in vector mode).
    pub fn expr_lanes(&mut self, b: &mut Builder, id: ExprId, p: &mut Point) -> Val {
        let v = self.masked(b, id, p, None);
        b.splat(v, p.lanes())
    }

    /// `mask`: a bool in whose false lanes the value is not wanted and memory must not be touched.
    fn masked(&mut self, b: &mut Builder, id: ExprId, p: &mut Point, mask: Option<Val>) -> Val {
        // What does not depend on data is the same under any mask.
        let found = p.memo.get(&(id, mask)).or_else(|| p.memo.get(&(id, None)));
        if let Some(v) = found {
            return *v;
        }
        let dtype = self.region.dtype(id);
        let v = match self.region.expr(id).clone() {
            Expr::Float(v) => b.float(v.get(), reg(dtype)),
            Expr::Int(v) => b.constant(if dtype == DType::Bool { Scalar::B(v != 0) } else { Scalar::I(i128::from(v)) }, reg(dtype)),
            Expr::Index(d) => self.part(b, &d, p, mask),
            Expr::Load { arg, index, guard } => self.load(b, arg as usize, &index, guard, p, mask),
            Expr::Acc(i) => p.accs[i as usize],
            Expr::Call(f, operands) if let Some(mask) = self.lane_bound(b, f, &operands, p) => mask,
            Expr::Call(f, operands) => {
                let of: Vec<DType> = operands.iter().map(|o| self.region.dtype(*o)).collect();
                let args: Vec<Val> = operands.iter().map(|o| self.masked(b, *o, p, mask)).collect();
                call(b, f, of.last().copied().unwrap_or(dtype), &args)
            }
            Expr::Cast(x) => {
                let v = self.masked(b, x, p, mask);
                convert(b, v, dtype)
            }
            Expr::Bits(x) => {
                let from = self.region.dtype(x);
                // Out of memory as they are: a register of another dtype would quiet a NaN.
                let v = match self.region.expr(x).clone() {
                    Expr::Load { arg, index, guard } => self.load_raw(b, arg as usize, &index, guard, p, mask),
                    _ => {
                        let v = self.masked(b, x, p, mask);
                        b.cast(v, from)
                    }
                };
                let v = b.bitcast(v, b.ty(v).with(dtype));
                b.cast(v, reg(dtype))
            }
        };
        p.memo.insert((id, mask), v);
        v
    }

    /// A comparison of a regular index with a bound, as a mask of the first lanes: no vector of indices is made.
    fn lane_bound(&mut self, b: &mut Builder, f: ScalarFn, operands: &[ExprId], p: &mut Point) -> Option<Val> {
        let v = p.vector.filter(|_| matches!(f, ScalarFn::Lt | ScalarFn::Ge))?;
        let (Expr::Index(at), Expr::Index(_) | Expr::Int(_)) = (self.region.expr(operands[0]).clone(), self.region.expr(operands[1])) else { return None };
        let Lanes::Step(step) = self.lanes(&at, p) else { return None };
        if step <= 0 || self.axes_of(operands[1]) >> v.axis & 1 == 1 || self.region.dtype(operands[1]) != DType::I64 {
            return None;
        }
        // Lane l is below the bound where l < ceil((bound - base) / step).
        let base = self.index(b, &at, p);
        let bound = self.expr(b, operands[1], p);
        let room = b.sub(bound, base);
        let room = b.add_i(room, step - 1);
        let below = b.div_i(room, step);
        let mask = b.lane_mask(below, v.lanes);
        Some(if f == ScalarFn::Lt { mask } else { b.not(mask) })
    }

    fn load(&mut self, b: &mut Builder, arg: usize, index: &[Dim], guard: Option<ExprId>, p: &mut Point, mask: Option<Val>) -> Val {
        let v = self.load_raw(b, arg, index, guard, p, mask);
        b.cast(v, reg(self.region.args[arg].dtype))
    }

    /// As [`Env::load`], in the dtype of memory.
    fn load_raw(&mut self, b: &mut Builder, arg: usize, index: &[Dim], guard: Option<ExprId>, p: &mut Point, mask: Option<Val>) -> Val {
        let buf = self.args[arg];
        let dtype = self.region.args[arg].dtype;
        let guard = guard.map(|g| self.masked(b, g, p, mask));
        let mask = match (mask, guard) {
            (Some(m), Some(g)) => Some(b.and(m, g)),
            (m, g) => m.or(g),
        };
        let at = Self::flat(&self.region.args[arg].shape, index);
        let lanes = self.lanes(&at, p);
        match (p.vector, lanes) {
            (None, _) | (_, Lanes::Step(0)) if mask.is_none_or(|m| b.ty(m).is_scalar()) => {
                let at = self.part(b, &at, p, mask);
                when_scalar(b, mask, Ty::Scalar(dtype), |b| b.load(buf, at, 1))
            }
            (Some(v), Lanes::Step(1)) if mask.is_none_or(|m| b.ty(m).is_scalar()) => {
                let at = self.index(b, &at, p);
                when_scalar(b, mask, Ty::of_lanes(dtype, v.lanes), |b| match v.count {
                    Some(n) => b.load_upto(buf, at, v.lanes, n),
                    None => b.load(buf, at, v.lanes),
                })
            }
            (Some(v), Lanes::Step(2)) if v.count.is_none() && v.lanes >= 4 => {
                let first = self.index(b, &at, p);
                match mask {
                    None => every_other(b, buf, first, v.lanes),
                    Some(m) => {
                        let m = b.splat(m, v.lanes);
                        let all = b.reduce(ReduceFn::And, m);
                        let at = self.index_lanes(b, &at, p, mask);
                        b.if_(all, |b| vec![every_other(b, buf, first, v.lanes)], |b| vec![b.gather(buf, at, Some(m))])[0]
                    }
                }
            }
            (Some(v), lanes) => {
                let tail = v.count.map(|n| b.lane_mask(n, v.lanes));
                let mask = match (tail, mask) {
                    (Some(t), Some(m)) => Some(b.and(t, m)),
                    (t, m) => t.or(m),
                };
                if let (Lanes::Step(1), Some(mask)) = (lanes, mask) {
                    let at = self.index(b, &at, p);
                    b.load_masked(buf, at, mask)
                } else {
                    let at = self.index_lanes(b, &at, p, mask);
                    let at = b.splat(at, v.lanes);
                    let mask = mask.map(|m| b.splat(m, v.lanes));
                    b.gather(buf, at, mask)
                }
            }
            (None, _) => unreachable!("a mask is a scalar in scalar mode"),
        }
    }

    /// Write output `i` at a point.
    pub fn store(&mut self, b: &mut Builder, i: usize, p: &mut Point) {
        let value = self.expr(b, self.region.outputs[i].expr, p);
        self.store_value(b, i, value, p);
    }

    /// Write `value` (register dtype of the output's expression) as output `i` at a point.
    pub fn store_value(&mut self, b: &mut Builder, i: usize, value: Val, p: &mut Point) {
        let (buf, dtype) = (self.outs[i], self.region.outputs[i].ty.dtype);
        let value = b.cast(value, dtype);
        let at = self.out_address(i);
        let Some(v) = p.vector else {
            let at = self.index(b, &at, p);
            return b.store(buf, at, value);
        };
        let value = b.splat(value, v.lanes);
        match (self.lanes(&at, p), v.count) {
            (Lanes::Step(1), None) => {
                let at = self.index(b, &at, p);
                b.store(buf, at, value);
            }
            (Lanes::Step(1), Some(n)) => {
                let at = self.index(b, &at, p);
                b.store_upto(buf, at, value, n);
            }
            (_, count) => {
                let at = self.index_lanes(b, &at, p, None);
                let at = b.splat(at, v.lanes);
                let mask = count.map(|n| b.lane_mask(n, v.lanes));
                b.scatter(buf, at, value, mask);
            }
        }
    }

    /// Compute now what `roots` need and none of `inner` (axes, as bits) or of the accumulators not yet known
    /// changes. Clones of `p` made afterwards find it.
    pub fn hoist(&mut self, b: &mut Builder, roots: &[ExprId], p: &mut Point, inner: u64) {
        for &id in roots {
            let known = self.accs_of(id) >> p.accs.len().min(63) == 0;
            if known && self.axes_of(id) & inner == 0 {
                self.expr(b, id, p);
                continue;
            }
            let operands: Vec<ExprId> = match self.region.expr(id) {
                Expr::Call(_, xs) => xs.clone(),
                Expr::Cast(x) | Expr::Bits(x) => vec![*x],
                // Values inside the index of a guarded load may be asked for only where the guard holds.
                Expr::Load { guard: Some(g), .. } => vec![*g],
                Expr::Load { index, guard: None, .. } => values(index),
                Expr::Index(d) => values(std::slice::from_ref(d)),
                Expr::Float(_) | Expr::Int(_) | Expr::Acc(_) => vec![],
            };
            self.hoist(b, &operands, p, inner);
        }
    }

    /// Every expression that the region's outputs and heart start from.
    pub fn roots(&self) -> Vec<ExprId> {
        let mut roots: Vec<ExprId> = self.region.outputs.iter().map(|o| o.expr).collect();
        match &self.region.heart {
            Heart::Map | Heart::Op(_) => {}
            Heart::Reduce { stages, .. } => roots.extend(stages.iter().map(|s| s.expr)),
            Heart::Contract { lhs, rhs, .. } => roots.extend([*lhs, *rhs]),
            Heart::Conv { x, w, .. } => roots.extend([*x, *w]),
            Heart::Separable { x, w, mid, point, .. } => roots.extend([*x, *w, *mid, *point]),
            Heart::Pool { x, .. } | Heart::WinogradOutput { x, .. } => roots.push(*x),
            Heart::Attention { q, k, v, mask, .. } => roots.extend([*q, *k, *v].into_iter().chain(*mask)),
        }
        roots
    }
}

/// Elements `at`, `at + 2`, ...: two overlapping loads that touch nothing beyond the last.
fn every_other(b: &mut Builder, buf: Buf, at: Val, lanes: usize) -> Val {
    let low = b.load(buf, at, lanes);
    let next = b.add_i(at, lanes as i64 - 1);
    let high = b.load(buf, next, lanes);
    let n = lanes as u16;
    let mask: Vec<u16> = (0..n / 2).map(|i| 2 * i).chain((0..n / 2).map(|i| n + 2 * i + 1)).collect();
    b.shuffle(low, high, &mask)
}

/// `load` where the scalar `mask` allows it, else zero.
fn when_scalar(b: &mut Builder, mask: Option<Val>, ty: Ty, load: impl FnOnce(&mut Builder) -> Val) -> Val {
    match mask {
        None => load(b),
        Some(m) => b.if_(m, |b| vec![load(b)], |b| vec![zero(b, ty)])[0],
    }
}

/// Zero of a type.
pub fn zero(b: &mut Builder, ty: Ty) -> Val {
    b.constant_of(Scalar::I(0).cast(ty.dtype()), ty)
}

/// Apply a scalar function to register values of operands of `dtype` (of the last operand), as the reference does.
pub fn call(b: &mut Builder, f: ScalarFn, dtype: DType, args: &[Val]) -> Val {
    let v = b.map(f, args);
    let exact = matches!(
        f,
        ScalarFn::Max
            | ScalarFn::Min
            | ScalarFn::Abs
            | ScalarFn::Select
            | ScalarFn::Floor
            | ScalarFn::Ceil
            | ScalarFn::Round
            | ScalarFn::Trunc
            | ScalarFn::Sign
    ) || (f == ScalarFn::Neg && dtype.is_float())
        || b.ty(v).dtype() == DType::Bool;
    if exact { v } else { round(b, v, dtype) }
}

/// Convert a register value to the register value of `dtype`, rounding to `dtype`.
pub fn convert(b: &mut Builder, v: Val, dtype: DType) -> Val {
    let v = b.cast(v, dtype);
    b.cast(v, reg(dtype))
}

/// Visit every leaf atom.
pub fn leaves(d: &Dim, visit: &mut dyn FnMut(&Atom)) {
    for atom in d.terms().iter().flat_map(|(atoms, _)| atoms) {
        match atom {
            Atom::Div(x, y) | Atom::Mod(x, y) | Atom::Max(x, y) | Atom::Min(x, y) => {
                leaves(x, visit);
                leaves(y, visit);
            }
            leaf => visit(leaf),
        }
    }
}

/// Contiguous elements from `at` on (of lane 0), as many as the point has lanes, in the register dtype.
pub fn read(b: &mut Builder, buf: Buf, at: Val, p: &Point) -> Val {
    let dtype = b.dtype(buf);
    let v = match p.vector {
        Some(VectorAxis { lanes, count: Some(n), .. }) => b.load_upto(buf, at, lanes, n),
        _ => b.load(buf, at, p.lanes()),
    };
    b.cast(v, reg(dtype))
}

/// Write what [`read`] reads.
pub fn write(b: &mut Builder, buf: Buf, at: Val, v: Val, p: &Point) {
    let v = b.cast(v, b.dtype(buf));
    let v = b.splat(v, p.lanes());
    match p.vector {
        Some(VectorAxis { count: Some(n), .. }) => b.store_upto(buf, at, v, n),
        _ => b.store(buf, at, v),
    }
}

fn values(index: &[Dim]) -> Vec<ExprId> {
    let mut found = vec![];
    for d in index {
        leaves(d, &mut |atom| {
            if let Atom::Value(v) = atom {
                found.push(ExprId(*v));
            }
        });
    }
    found
}

/// The factor of axis `k` in `d` (free of it, perhaps symbolic) and what is left; `None` where `d` is not affine in it.
pub fn affine(d: &Dim, k: usize) -> Option<(Dim, Dim)> {
    let axis = Atom::Axis(k as u32);
    let (mut factor, mut rest) = (Dim::ZERO, Dim::ZERO);
    for (atoms, c) in d.terms() {
        let at = atoms.iter().position(|a| *a == axis);
        let mut product = Dim::from(*c);
        for (i, atom) in atoms.iter().enumerate() {
            let atom = Dim::from(atom.clone());
            if Some(i) == at {
                continue;
            }
            if atom.any_atom(&|a| *a == axis) {
                return None;
            }
            product = product * atom;
        }
        if at.is_some() {
            factor = factor + product;
        } else {
            rest = rest + product;
        }
    }
    Some((factor, rest))
}
