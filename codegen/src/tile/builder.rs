//! Writing kernels: the builder that kernel families call.
//!
//! Index arithmetic is folded as it is written: constants are evaluated, `i64` values are kept as
//! `base + constant` so that loads and stores get constant displacements, equal index computations become one
//! value, and each is placed in the outermost block where its operands exist, so a loop body holds only what
//! changes in it. On GPUs, what of a dividend is a multiple of the divisor is divided as it is written. Conditions on constants decide at build time which branch is written.
//!
//! Mixing types wrongly is an error in the family that builds, and panics with the types in the message;
//! `tile::check` says the same of parsed text without panicking.
use super::range::{self, Interval};
use super::{Access, Block, Buf, BufInfo, Device, DotKind, Kernel, Launch, Op, ReduceFn, ShflKind, Space, Stmt, Ty, Val, VoteKind, hopper};
use pavage_ir::{DType, Scalar, ScalarFn};
use std::collections::HashMap;

/// What makes two pure statements equal: operation in text, operands, result type.
type Key = (String, Vec<Val>, Ty);

#[derive(Default)]
struct Frame {
    id: u32,
    block: Block,
    known: HashMap<Key, Val>,
}

/// Builds one [`Kernel`]. Closures passed to `for_`, `if_` and `while_` write the nested blocks.
pub struct Builder {
    kernel: Kernel,
    frames: Vec<Frame>,
    next_frame: u32,
    /// Frame each value was defined in.
    home: Vec<u32>,
    /// `i64` values as base and constant part; a missing base is 0.
    affine: HashMap<Val, (Option<Val>, i64)>,
    bool_consts: HashMap<Val, bool>,
    /// What `i64` values can be, as far as it is known while the kernel is written.
    ranges: HashMap<Val, Interval>,
    /// `i64` values that are another times a constant.
    scaled: HashMap<Val, (Val, i64)>,
}

impl Builder {
    /// A kernel named `name` (a C identifier) for `device`.
    pub fn new(name: &str, device: Device) -> Builder {
        let kernel = Kernel {
            name: name.to_owned(),
            device,
            launch: Launch::default(),
            bufs: vec![],
            dims: vec![],
            maps: vec![],
            types: vec![],
            body: Block::default(),
        };
        Builder {
            kernel,
            frames: vec![Frame::default()],
            next_frame: 1,
            home: vec![],
            affine: HashMap::new(),
            bool_consts: HashMap::new(),
            ranges: HashMap::new(),
            scaled: HashMap::new(),
        }
    }

    // ---- parameters and memory ----

    /// The next buffer argument.
    pub fn arg(&mut self, dtype: DType, access: Access) -> Buf {
        self.add_buf(BufInfo { space: Space::Global, dtype, len: None, align: 0, access, alias: None })
    }

    /// The next run-time size, an `i64`.
    pub fn dim(&mut self) -> Val {
        let v = self.fresh_in(Ty::INDEX, 0);
        self.kernel.dims.push(v);
        v
    }

    /// The next tensor map parameter; its number.
    pub fn tensor_map(&mut self, map: hopper::TensorMap) -> usize {
        self.kernel.maps.push(map);
        self.kernel.maps.len() - 1
    }

    /// `len` elements of `space` (`Shared` or `Local`), 64-byte aligned, not cleared.
    pub fn alloc(&mut self, space: Space, dtype: DType, len: u64) -> Buf {
        self.alloc_aligned(space, dtype, len, 64)
    }

    /// `len` elements aligned to `align` bytes.
    pub fn alloc_aligned(&mut self, space: Space, dtype: DType, len: u64, align: u32) -> Buf {
        self.add_buf(BufInfo { space, dtype, len: Some(len), align, access: Access::ReadWrite, alias: None })
    }

    /// `len` elements of shared memory.
    pub fn shared(&mut self, dtype: DType, len: u64) -> Buf {
        self.alloc(Space::Shared, dtype, len)
    }

    /// The open-ended tail of the per-thread scratch (CPU): the launcher adds its bytes to `Kernel::scratch_bytes`.
    pub fn scratch(&mut self, dtype: DType) -> Buf {
        self.add_buf(BufInfo { space: Space::Local, dtype, len: None, align: 64, access: Access::ReadWrite, alias: None })
    }

    /// The memory of `of` from `byte_offset` on, as elements of `dtype`.
    pub fn alias(&mut self, of: Buf, dtype: DType, byte_offset: u64) -> Buf {
        let mut info = self.kernel.buf(of).clone();
        let (owner, base) = info.alias.unwrap_or((of, 0));
        let bytes = info.len.map(|n| info.dtype.bytes(n as usize) as u64);
        info.len = bytes.map(|b| b.saturating_sub(byte_offset) * 8 / dtype.bits() as u64);
        info.dtype = dtype;
        info.alias = Some((owner, base + byte_offset));
        self.add_buf(info)
    }

    fn add_buf(&mut self, info: BufInfo) -> Buf {
        self.kernel.bufs.push(info);
        Buf(self.kernel.bufs.len() as u32 - 1)
    }

    /// Launch facts of a GPU kernel, to be set.
    pub fn launch(&mut self) -> &mut Launch {
        &mut self.kernel.launch
    }

    /// Element type of a buffer.
    pub fn dtype(&self, buf: Buf) -> DType {
        self.kernel.buf(buf).dtype
    }

    /// Type of a value.
    pub fn ty(&self, v: Val) -> Ty {
        self.kernel.ty(v)
    }

    /// What the kernel runs on.
    pub fn device(&self) -> Device {
        self.kernel.device
    }

    // ---- constants ----

    /// An `i64` constant.
    pub fn index(&mut self, v: i64) -> Val {
        let c = self.constant(Scalar::I(i128::from(v)), DType::I64);
        self.affine.insert(c, (None, v));
        c
    }

    /// A scalar constant, rounded to `dtype`.
    pub fn constant(&mut self, value: Scalar, dtype: DType) -> Val {
        let value = value.cast(dtype);
        let v = self.one(Op::Const(value), &[], &[], Ty::Scalar(dtype));
        if let Scalar::B(b) = value {
            self.bool_consts.insert(v, b);
        }
        if let (Scalar::I(i), DType::I64) = (value, dtype) {
            self.affine.insert(v, (None, i as i64));
        }
        v
    }

    /// A float constant, rounded to `dtype`.
    pub fn float(&mut self, value: f64, dtype: DType) -> Val {
        self.constant(Scalar::F(value), dtype)
    }

    /// A constant in every lane of `ty`.
    pub fn constant_of(&mut self, value: Scalar, ty: Ty) -> Val {
        let c = self.constant(value, ty.dtype());
        self.splat_to(c, ty)
    }

    /// The value of an `i64` constant.
    pub fn as_index(&self, v: Val) -> Option<i64> {
        match self.affine.get(&v) {
            Some((None, c)) => Some(*c),
            _ => None,
        }
    }

    // ---- arithmetic ----

    /// Apply a scalar function lane by lane. Scalars beside vectors or fragments are splatted.
    pub fn map(&mut self, f: ScalarFn, args: &[Val]) -> Val {
        let shape = args.iter().map(|a| self.ty(*a)).find(|t| !t.is_scalar());
        let args: Vec<Val> = match shape {
            None => args.to_vec(),
            Some(t) => args.iter().map(|a| if self.ty(*a).is_scalar() { self.splat_to(*a, t.with(self.ty(*a).dtype())) } else { *a }).collect(),
        };
        let types: Vec<Ty> = args.iter().map(|a| self.ty(*a)).collect();
        let dtypes: Vec<DType> = types.iter().map(|t| t.dtype()).collect();
        let dtype = f.infer(&dtypes).unwrap_or_else(|e| panic!("{f} of {}: {e}", list(&types)));
        assert!(types.iter().all(|t| t.with(dtype) == types[0].with(dtype)), "{f}: shapes differ: {}", list(&types));
        if types.iter().all(|t| *t == Ty::INDEX)
            && let Some(v) = self.fold_index(f, &args)
        {
            return v;
        }
        if f == ScalarFn::Select && args.len() == 3 {
            match self.bool_consts.get(&args[0]) {
                Some(true) => return args[1],
                Some(false) => return args[2],
                None => {}
            }
        }
        if types.iter().all(|t| *t == Ty::BOOL) {
            let known: Option<Vec<Scalar>> = args.iter().map(|a| self.bool_consts.get(a).map(|b| Scalar::B(*b))).collect();
            if let Some(known) = known {
                return self.constant(f.eval(DType::Bool, &known), DType::Bool);
            }
        }
        self.one(Op::Map(f), &args, &[], types[0].with(dtype))
    }

    fn affine_of(&self, v: Val) -> (Option<Val>, i64) {
        self.affine.get(&v).copied().unwrap_or((Some(v), 0))
    }

    fn of_affine(&mut self, base: Option<Val>, c: i64) -> Val {
        let Some(base) = base else {
            return self.index(c);
        };
        if c == 0 {
            return base;
        }
        let k = self.index(c);
        let v = self.one(Op::Map(ScalarFn::Add), &[base, k], &[], Ty::INDEX);
        self.affine.insert(v, (Some(base), c));
        v
    }

    fn fold_index(&mut self, f: ScalarFn, args: &[Val]) -> Option<Val> {
        let consts: Option<Vec<Scalar>> = args.iter().map(|a| self.as_index(*a).map(|c| Scalar::I(i128::from(c)))).collect();
        if let Some(consts) = consts {
            let value = f.eval(DType::I64, &consts);
            return Some(match value {
                Scalar::B(_) => self.constant(value, DType::Bool),
                _ => self.index(value.i() as i64),
            });
        }
        let ((a, ac), (b, bc)) = match args {
            [x, y] => (self.affine_of(*x), self.affine_of(*y)),
            _ => return None,
        };
        match f {
            ScalarFn::Add => {
                let base = match (a, b) {
                    (None, base) | (base, None) => base,
                    (Some(a), Some(b)) => Some(self.one(Op::Map(f), &[a, b], &[], Ty::INDEX)),
                };
                Some(self.of_affine(base, ac.wrapping_add(bc)))
            }
            ScalarFn::Sub if b.is_none() || a == b => Some(self.of_affine(if b.is_none() { a } else { None }, ac.wrapping_sub(bc))),
            ScalarFn::Mul => {
                let (base, c, k) = match (a, b) {
                    (Some(base), None) => (base, ac, bc),
                    (None, Some(base)) => (base, bc, ac),
                    _ => return None,
                };
                let scaled = match k {
                    0 => return Some(self.index(0)),
                    1 => base,
                    _ => {
                        let times = self.index(k);
                        let v = self.one(Op::Map(f), &[base, times], &[], Ty::INDEX);
                        self.scaled.insert(v, (base, k));
                        v
                    }
                };
                Some(self.of_affine(Some(scaled), c.wrapping_mul(k)))
            }
            ScalarFn::Div if b.is_none() && bc == 1 => Some(args[0]),
            ScalarFn::Rem | ScalarFn::Mod if b.is_none() && bc == 1 => Some(self.index(0)),
            ScalarFn::Div | ScalarFn::Rem | ScalarFn::Mod if b.is_none() && self.device() == Device::Gpu => self.fold_quotient(f, args[0], bc),
            ScalarFn::Min | ScalarFn::Max if args[0] == args[1] => Some(args[0]),
            _ => None,
        }
    }

    /// What an `i64` value can be.
    fn range(&self, v: Val) -> Interval {
        match self.as_index(v) {
            Some(c) => Interval::of(c),
            None => self.ranges.get(&v).copied().unwrap_or(Interval::ALL),
        }
    }

    /// `x / k` or `x % k` of an `x` that is not negative: what of `x` is a multiple of `k`, or `k` of it, needs no division.
    /// So the threads' parts of a tile, which are a constant apart, have indices a constant apart.
    fn fold_quotient(&mut self, f: ScalarFn, x: Val, k: i64) -> Option<Val> {
        let ((Some(base), c), whole, quotient) = (self.affine_of(x), self.range(x), f == ScalarFn::Div) else { return None };
        if k < 1 || !whole.is_natural() || !self.range(base).is_natural() {
            return None;
        }
        if whole.hi < k {
            return Some(if quotient { self.index(0) } else { x });
        }
        // x = base + over * k + rest.
        let (over, rest) = (c.div_euclid(k), c.rem_euclid(k));
        let (value, plus) = match self.scaled.get(&base).copied() {
            Some((_, m)) if m % k == 0 && !quotient => return Some(self.index(rest)),
            Some((y, m)) if m % k == 0 => (self.mul_i(y, m / k), over),
            Some((y, m)) if m > 0 && k % m == 0 && rest < m && self.range(y).is_natural() => {
                let part = k / m;
                if quotient {
                    (self.div_i(y, part), over)
                } else {
                    let v = self.rem_i(y, part);
                    (self.mul_i(v, m), rest)
                }
            }
            _ if over == 0 || rest != 0 => return None,
            _ if quotient => (self.div_i(base, k), over),
            _ => (self.rem_i(base, k), 0),
        };
        Some(self.add_i(value, plus))
    }

    /// What a statement's one `i64` can be.
    fn range_of(&self, op: &Op, args: &[Val]) -> Interval {
        match op {
            Op::Map(ScalarFn::Select) => self.range(args[1]).join(self.range(args[2])),
            Op::Map(f) => range::apply(*f, &args.iter().map(|a| self.range(*a)).collect::<Vec<_>>()),
            Op::ThreadId => Interval { lo: 0, hi: 1023 },
            Op::LaneId => Interval { lo: 0, hi: 31 },
            Op::BlockId(_) => Interval { lo: 0, hi: i64::from(i32::MAX) },
            Op::Hopper(hopper::HopperWord::GroupThread) => Interval { lo: 0, hi: 127 },
            _ => Interval::ALL,
        }
    }

    /// Convert to `dtype` (floats round to nearest even; float to integer truncates and saturates).
    pub fn cast(&mut self, v: Val, dtype: DType) -> Val {
        let ty = self.ty(v);
        if ty.dtype() == dtype { v } else { self.one(Op::Cast, &[v], &[], ty.with(dtype)) }
    }

    /// The same bits as another type of the same total width.
    pub fn bitcast(&mut self, v: Val, ty: Ty) -> Val {
        let from = self.ty(v);
        assert_eq!(from.dtype().bits() * from.lanes(), ty.dtype().bits() * ty.lanes(), "bitcast of {from} to {ty}: widths differ");
        if from == ty { v } else { self.one(Op::Bitcast, &[v], &[], ty) }
    }

    /// A vector with `v` in each of `lanes` lanes; `v` itself for one lane.
    pub fn splat(&mut self, v: Val, lanes: usize) -> Val {
        let ty = Ty::of_lanes(self.ty(v).dtype(), lanes);
        self.splat_to(v, ty)
    }

    /// `v` in every lane of `ty`.
    pub fn splat_to(&mut self, v: Val, ty: Ty) -> Val {
        if self.ty(v) == ty { v } else { self.one(Op::Splat, &[v], &[], ty) }
    }

    /// Lane `lane`.
    pub fn extract(&mut self, v: Val, lane: usize) -> Val {
        let ty = self.ty(v);
        assert!(lane < ty.lanes(), "lane {lane} of {ty}");
        if ty.is_scalar() { v } else { self.one(Op::Extract(lane as u16), &[v], &[], Ty::Scalar(ty.dtype())) }
    }

    /// `v` with lane `lane` replaced by the scalar `x`.
    pub fn insert(&mut self, v: Val, lane: usize, x: Val) -> Val {
        let ty = self.ty(v);
        self.one(Op::Insert(lane as u16), &[v, x], &[], ty)
    }

    /// A vector or fragment of these scalars.
    pub fn pack(&mut self, elems: &[Val], ty: Ty) -> Val {
        assert_eq!(elems.len(), ty.lanes(), "pack of {ty}");
        self.one(Op::Pack, elems, &[], ty)
    }

    /// 0, 1, 2, ... in `lanes` lanes of an integer dtype.
    pub fn iota(&mut self, dtype: DType, lanes: usize) -> Val {
        self.one(Op::Iota, &[], &[], Ty::of_lanes(dtype, lanes))
    }

    /// Lanes picked from `a` (0..n) and `b` (n..2n).
    pub fn shuffle(&mut self, a: Val, b: Val, mask: &[u16]) -> Val {
        let ty = Ty::of_lanes(self.ty(a).dtype(), mask.len());
        self.one(Op::Shuffle(mask.to_vec()), &[a, b], &[], ty)
    }

    /// All lanes folded into a scalar, halving; a scalar is itself.
    pub fn reduce(&mut self, with: ReduceFn, v: Val) -> Val {
        let ty = self.ty(v);
        if ty.is_scalar() { v } else { self.one(Op::Reduce(with), &[v], &[], Ty::Scalar(ty.dtype())) }
    }

    /// Lane `i` is `i < count`, for an `i64` count that may be negative or beyond the lanes.
    pub fn lane_mask(&mut self, count: Val, lanes: usize) -> Val {
        self.one(Op::LaneMask, &[count], &[], Ty::of_lanes(DType::Bool, lanes))
    }

    /// Integer dot products, see [`DotKind`].
    pub fn dot(&mut self, kind: DotKind, args: &[Val]) -> Val {
        let ty = match (kind, self.ty(args[0])) {
            (DotKind::I16Pairs, Ty::Vec(_, n)) => Ty::Vec(DType::I32, n / 2),
            (DotKind::U8I8PairsSat, Ty::Vec(_, n)) => Ty::Vec(DType::I16, n / 2),
            (DotKind::U8I8Quads, ty) => ty,
            (_, ty) => panic!("dot of {ty}"),
        };
        self.one(Op::Dot(kind), args, &[], ty)
    }

    // ---- memory ----

    /// `lanes` contiguous elements at element index `index`: a scalar for 1, else a vector.
    pub fn load(&mut self, buf: Buf, index: Val, lanes: usize) -> Val {
        let ty = Ty::of_lanes(self.dtype(buf), lanes);
        let (index, offset) = self.split(index);
        self.one(Op::Load { offset }, &[index], &[buf], ty)
    }

    /// As [`Builder::load`], only where `mask` (bool vector) is true; other lanes are 0 and not touched.
    pub fn load_masked(&mut self, buf: Buf, index: Val, mask: Val) -> Val {
        let ty = self.ty(mask).with(self.dtype(buf));
        let (index, offset) = self.split(index);
        self.one(Op::Load { offset }, &[index, mask], &[buf], ty)
    }

    /// The first `count` (`i64`) of `lanes` elements; the others are 0 and not touched.
    pub fn load_upto(&mut self, buf: Buf, index: Val, lanes: usize, count: Val) -> Val {
        let mask = self.lane_mask(count, lanes);
        self.load_masked(buf, index, mask)
    }

    /// Elements at a vector (or scalar) of `i32`/`i64` indices; where `mask` is false: 0, not touched.
    pub fn gather(&mut self, buf: Buf, indices: Val, mask: Option<Val>) -> Val {
        let ty = self.ty(indices).with(self.dtype(buf));
        if ty.is_scalar() && mask.is_none() {
            return self.load(buf, indices, 1);
        }
        let mut args = vec![indices];
        args.extend(mask);
        self.one(Op::Gather { offset: 0 }, &args, &[buf], ty)
    }

    /// Store a scalar or vector contiguously at `index`.
    pub fn store(&mut self, buf: Buf, index: Val, v: Val) {
        self.expect_elem(buf, v);
        let (index, offset) = self.split(index);
        self.push(Op::Store { offset }, &[index, v], &[buf], vec![], &[]);
    }

    /// Store the lanes where `mask` is true.
    pub fn store_masked(&mut self, buf: Buf, index: Val, v: Val, mask: Val) {
        self.expect_elem(buf, v);
        let (index, offset) = self.split(index);
        self.push(Op::Store { offset }, &[index, v, mask], &[buf], vec![], &[]);
    }

    /// Store the first `count` (`i64`) lanes.
    pub fn store_upto(&mut self, buf: Buf, index: Val, v: Val, count: Val) {
        let mask = self.lane_mask(count, self.ty(v).lanes());
        self.store_masked(buf, index, v, mask);
    }

    /// Store each lane at its own index; of equal indices the highest lane wins.
    pub fn scatter(&mut self, buf: Buf, indices: Val, v: Val, mask: Option<Val>) {
        self.expect_elem(buf, v);
        let mut args = vec![indices, v];
        args.extend(mask);
        self.push(Op::Scatter { offset: 0 }, &args, &[buf], vec![], &[]);
    }

    /// `buf[index] += v`, atomically.
    pub fn atomic_add(&mut self, buf: Buf, index: Val, v: Val) {
        self.expect_elem(buf, v);
        let (index, offset) = self.split(index);
        self.push(Op::AtomicAdd { offset }, &[index, v], &[buf], vec![], &[]);
    }

    /// Ask for the cache line of an element ahead of its use, into the `near`est cache or the next one; the element need not exist.
    pub fn prefetch(&mut self, buf: Buf, index: Val, near: bool) {
        let (index, offset) = self.split(index);
        self.push(Op::Prefetch { offset, near }, &[index], &[buf], vec![], &[]);
    }

    fn expect_elem(&self, buf: Buf, v: Val) {
        assert_eq!(self.dtype(buf), self.ty(v).dtype(), "store into @{}", buf.0);
    }

    fn split(&mut self, index: Val) -> (Val, i64) {
        assert_eq!(self.ty(index), Ty::INDEX, "an index is an i64 scalar");
        let (base, offset) = self.affine_of(index);
        let base = base.unwrap_or_else(|| self.index(0));
        (base, offset)
    }

    // ---- control ----

    /// `for i in (lo..hi).step_by(step)`, step above 0, with carried values; the body returns their next values.
    pub fn for_(&mut self, lo: Val, hi: Val, step: i64, init: &[Val], body: impl FnOnce(&mut Builder, Val, &[Val]) -> Vec<Val>) -> Vec<Val> {
        let step = self.index(step);
        self.for_step(lo, hi, step, init, body)
    }

    /// As [`Builder::for_`], with a step known at run time. A loop known to run once is written without a loop, one known not
    /// to run at all is not written.
    pub fn for_step(&mut self, lo: Val, hi: Val, step: Val, init: &[Val], body: impl FnOnce(&mut Builder, Val, &[Val]) -> Vec<Val>) -> Vec<Val> {
        if let (Some(l), Some(h)) = (self.as_index(lo), self.as_index(hi)) {
            if l >= h {
                return init.to_vec();
            }
            if self.as_index(step).is_some_and(|s| s >= h - l) {
                return body(self, lo, init);
            }
        }
        let types: Vec<Ty> = init.iter().map(|v| self.ty(*v)).collect();
        self.open();
        let i = self.param(Ty::INDEX);
        let (least, end) = (self.range(lo).lo, self.range(hi).hi);
        self.ranges.insert(i, Interval { lo: least, hi: end.saturating_sub(1).max(least) });
        let carried: Vec<Val> = types.iter().map(|t| self.param(*t)).collect();
        let next = body(self, i, &carried);
        let block = self.close(next, Some(&types), "for");
        let mut args = vec![lo, hi, step];
        args.extend(init);
        self.push(Op::For, &args, &[], vec![block], &types)
    }

    /// `if cond { then } else { otherwise }`; both return the same number of values of the same types.
    pub fn if_(&mut self, cond: Val, then: impl FnOnce(&mut Builder) -> Vec<Val>, otherwise: impl FnOnce(&mut Builder) -> Vec<Val>) -> Vec<Val> {
        match self.bool_consts.get(&cond) {
            Some(true) => return then(self),
            Some(false) => return otherwise(self),
            None => {}
        }
        assert_eq!(self.ty(cond), Ty::BOOL, "if needs a bool scalar");
        self.open();
        let yes = then(self);
        let types: Vec<Ty> = yes.iter().map(|v| self.ty(*v)).collect();
        let yes = self.close(yes, None, "if");
        self.open();
        let no = otherwise(self);
        let no = self.close(no, Some(&types), "if");
        self.push(Op::If, &[cond], &[], vec![yes, no], &types)
    }

    /// `if cond { then }`, without values.
    pub fn when(&mut self, cond: Val, then: impl FnOnce(&mut Builder)) {
        self.if_(
            cond,
            |b| {
                then(b);
                vec![]
            },
            |_| vec![],
        );
    }

    /// `loop`: `before` returns whether to go on and the values; `body` gets them and returns the next carried values.
    /// The results are the values of the last `before`.
    pub fn while_(
        &mut self,
        init: &[Val],
        before: impl FnOnce(&mut Builder, &[Val]) -> (Val, Vec<Val>),
        body: impl FnOnce(&mut Builder, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let carried: Vec<Ty> = init.iter().map(|v| self.ty(*v)).collect();
        self.open();
        let params: Vec<Val> = carried.iter().map(|t| self.param(*t)).collect();
        let (go, values) = before(self, &params);
        let types: Vec<Ty> = values.iter().map(|v| self.ty(*v)).collect();
        let mut yields = vec![go];
        yields.extend(values);
        let first = self.close(yields, None, "while");
        self.open();
        let params: Vec<Val> = types.iter().map(|t| self.param(*t)).collect();
        let next = body(self, &params);
        let second = self.close(next, Some(&carried), "while");
        self.push(Op::While, init, &[], vec![first, second], &types)
    }

    /// First index of this call's slice (CPU).
    pub fn lo(&mut self) -> Val {
        self.one(Op::Lo, &[], &[], Ty::INDEX)
    }

    /// End of this call's slice (CPU).
    pub fn hi(&mut self) -> Val {
        self.one(Op::Hi, &[], &[], Ty::INDEX)
    }

    /// Index of this block on grid axis 0, 1 or 2 (GPU).
    pub fn block_id(&mut self, axis: u8) -> Val {
        self.one(Op::BlockId(axis), &[], &[], Ty::INDEX)
    }

    /// Blocks of the grid on an axis (GPU).
    pub fn grid_dim(&mut self, axis: u8) -> Val {
        self.one(Op::GridDim(axis), &[], &[], Ty::INDEX)
    }

    /// Index of this thread in its block (GPU).
    pub fn thread_id(&mut self) -> Val {
        self.one(Op::ThreadId, &[], &[], Ty::INDEX)
    }

    /// Index of this thread in its warp (GPU).
    pub fn lane_id(&mut self) -> Val {
        self.one(Op::LaneId, &[], &[], Ty::INDEX)
    }

    /// All threads of the block meet (GPU).
    pub fn barrier(&mut self) {
        self.push(Op::Barrier, &[], &[], vec![], &[]);
    }

    /// The value of another lane of the warp (GPU).
    pub fn shfl(&mut self, kind: ShflKind, v: Val, lane: Val) -> Val {
        let ty = self.ty(v);
        self.one(Op::Shfl(kind), &[v, lane], &[], ty)
    }

    /// Ask the warp (GPU): bool, or `u32` for a ballot.
    pub fn vote(&mut self, kind: VoteKind, v: Val) -> Val {
        let dtype = if kind == VoteKind::Ballot { DType::U32 } else { DType::Bool };
        self.one(Op::Vote(kind), &[v], &[], Ty::Scalar(dtype))
    }

    /// A statement given in full: how device words (`tile::hopper`, `tile::mma`) are written. Nested blocks come from
    /// [`Builder::block`].
    pub fn word(&mut self, op: Op, args: &[Val], bufs: &[Buf], blocks: Vec<Block>, results: &[Ty]) -> Vec<Val> {
        self.push(op, args, bufs, blocks, results)
    }

    /// A nested block with parameters of these types, for [`Builder::word`].
    pub fn block(&mut self, params: &[Ty], body: impl FnOnce(&mut Builder, &[Val]) -> Vec<Val>) -> Block {
        self.open();
        let params: Vec<Val> = params.iter().map(|t| self.param(*t)).collect();
        let yields = body(self, &params);
        self.close(yields, None, "block")
    }

    // ---- statements and blocks ----

    fn open(&mut self) {
        self.frames.push(Frame { id: self.next_frame, ..Frame::default() });
        self.next_frame += 1;
    }

    fn param(&mut self, ty: Ty) -> Val {
        let depth = self.frames.len() - 1;
        let v = self.fresh_in(ty, depth);
        self.frames[depth].block.params.push(v);
        v
    }

    fn close(&mut self, yields: Vec<Val>, expect: Option<&[Ty]>, what: &str) -> Block {
        let types: Vec<Ty> = yields.iter().map(|v| self.ty(*v)).collect();
        if let Some(expect) = expect {
            assert_eq!(types, expect, "{what}: types of the values handed out");
        }
        for v in &yields {
            self.depth_of(*v);
        }
        let mut frame = self.frames.pop().expect("an open block");
        frame.block.yields = yields;
        frame.block
    }

    fn fresh_in(&mut self, ty: Ty, depth: usize) -> Val {
        self.kernel.types.push(ty);
        self.home.push(self.frames[depth].id);
        Val(self.kernel.types.len() as u32 - 1)
    }

    fn depth_of(&self, v: Val) -> usize {
        let home = self.home[v.0 as usize];
        self.frames.iter().rposition(|f| f.id == home).unwrap_or_else(|| panic!("%{} is used outside the block that defines it", v.0))
    }

    fn one(&mut self, op: Op, args: &[Val], bufs: &[Buf], ty: Ty) -> Val {
        self.push(op, args, bufs, vec![], &[ty])[0]
    }

    fn push(&mut self, op: Op, args: &[Val], bufs: &[Buf], blocks: Vec<Block>, results: &[Ty]) -> Vec<Val> {
        let lowest = args.iter().map(|a| self.depth_of(*a)).max().unwrap_or(0);
        let here = self.frames.len() - 1;
        // Scalar integers are cheap to keep and dear to recompute in a loop; vectors are the other way round.
        let shared = op.is_pure()
            && blocks.is_empty()
            && bufs.is_empty()
            && results.len() == 1
            && results[0].is_scalar()
            && matches!(op, Op::Const(_) | Op::Map(_) | Op::Cast | Op::Lo | Op::Hi | Op::BlockId(_) | Op::GridDim(_) | Op::ThreadId | Op::LaneId);
        let hoist = shared && (results[0] == Ty::INDEX || matches!(op, Op::Const(_)));
        let key = shared.then(|| (format!("{op:?}"), args.to_vec(), results[0]));
        if let Some(key) = &key
            && let Some(v) = self.frames.iter().rev().find_map(|f| f.known.get(key))
        {
            return vec![*v];
        }
        let depth = if hoist { lowest } else { here };
        let range = (results == [Ty::INDEX]).then(|| self.range_of(&op, args));
        let results: Vec<Val> = results.iter().map(|t| self.fresh_in(*t, depth)).collect();
        if let Some(range) = range {
            self.ranges.insert(results[0], range);
        }
        let frame = &mut self.frames[depth];
        if let Some(key) = key {
            frame.known.insert(key, results[0]);
        }
        frame.block.stmts.push(Stmt { op, args: args.to_vec(), bufs: bufs.to_vec(), blocks, results: results.clone() });
        results
    }

    /// The kernel: unused statements dropped, values numbered in text order.
    pub fn finish(mut self) -> Kernel {
        assert_eq!(self.frames.len(), 1, "finish inside a nested block");
        self.kernel.body = self.frames.remove(0).block;
        super::tidy::tidy(&mut self.kernel);
        self.kernel
    }
}

fn list(types: &[Ty]) -> String {
    types.iter().map(Ty::to_string).collect::<Vec<_>>().join(", ")
}

macro_rules! sugar {
    ($( $(#[doc = $doc:literal])* $name:ident($($arg:ident),*) = $f:ident; )*) => {
        impl Builder {
            $( $(#[doc = $doc])* pub fn $name(&mut self, $($arg: Val),*) -> Val { self.map(ScalarFn::$f, &[$($arg),*]) } )*
        }
    };
}

sugar! {
    /// `x + y`.
    add(x, y) = Add;
    /// `x - y`.
    sub(x, y) = Sub;
    /// `x * y`.
    mul(x, y) = Mul;
    /// `x / y`; integers toward zero.
    div(x, y) = Div;
    /// C remainder.
    rem(x, y) = Rem;
    /// Smaller.
    min(x, y) = Min;
    /// Larger.
    max(x, y) = Max;
    /// `-x`.
    neg(x) = Neg;
    /// `x * y + z`, rounded once.
    fma(x, y, z) = Fma;
    /// Bitwise or logical and.
    and(x, y) = And;
    /// Bitwise or logical or.
    or(x, y) = Or;
    /// Bitwise or logical exclusive or.
    xor(x, y) = Xor;
    /// Complement.
    not(x) = Not;
    /// Shift left.
    shl(x, y) = Shl;
    /// Shift right, arithmetic for signed.
    shr(x, y) = Shr;
    /// `x == y`.
    eq(x, y) = Eq;
    /// `x != y`.
    ne(x, y) = Ne;
    /// `x < y`.
    lt(x, y) = Lt;
    /// `x <= y`.
    le(x, y) = Le;
    /// `x > y`.
    gt(x, y) = Gt;
    /// `x >= y`.
    ge(x, y) = Ge;
    /// `c ? x : y`.
    select(c, x, y) = Select;
}

impl Builder {
    /// `x + k` for an `i64` value.
    pub fn add_i(&mut self, x: Val, k: i64) -> Val {
        let k = self.index(k);
        self.add(x, k)
    }

    /// `x * k` for an `i64` value.
    pub fn mul_i(&mut self, x: Val, k: i64) -> Val {
        let k = self.index(k);
        self.mul(x, k)
    }

    /// `x / k` for an `i64` value, toward zero.
    pub fn div_i(&mut self, x: Val, k: i64) -> Val {
        let k = self.index(k);
        self.div(x, k)
    }

    /// `x % k` for an `i64` value, with the sign of `x`.
    pub fn rem_i(&mut self, x: Val, k: i64) -> Val {
        let k = self.index(k);
        self.rem(x, k)
    }
}
