//! The core operations: control, values, warps.
use super::{Emit, Lower, Lowered, Reg, Ty, llty, packed};
use crate::tile::{Op, ReduceFn, ShflKind, Stmt, Val, VoteKind};
use pavage_ir::{DType, Scalar, ScalarFn};

impl<'k> Lower<'k> {
    pub(super) fn core(&mut self, s: &'k Stmt) -> Lowered {
        match &s.op {
            Op::Const(c) => {
                let (v, d) = (s.results[0], self.ty(s.results[0]).dtype());
                let r = if self.is_narrow(v) { self.e.i32(c.i() as i64) } else { self.constant(*c, d) };
                if let Scalar::I(i) = c.cast(d) {
                    self.consts.insert(v, i);
                    self.twos.insert(v, if i == 0 { 62 } else { i.trailing_zeros() });
                }
                let n = self.reg_types(v).len();
                let r = if packed(self.ty(v)) { self.splat16(&r) } else { r };
                self.bind(v, vec![r; n]);
            }
            Op::Map(f) => self.map(*f, s)?,
            Op::Cast => self.cast(s)?,
            Op::Bitcast => {
                let (from, to) = (self.ty(s.args[0]), self.ty(s.results[0]));
                let regs = self.raw(s.args[0]);
                if packed(from) == packed(to) && from.lanes() == to.lanes() {
                    let t = if packed(to) { "i32" } else { llty(to.dtype()) };
                    let mut regs: Vec<Reg> = regs.iter().map(|r| self.e.conv("bitcast", r, t)).collect();
                    if to.dtype().is_packed() {
                        regs = regs.iter().map(|r| self.wrap(r, to.dtype())).collect();
                    }
                    self.bind(s.results[0], regs);
                } else {
                    return self.unsupported("bitcast", format!("{from} to {to}"));
                }
            }
            Op::Splat => {
                let ty = self.ty(s.results[0]);
                let mut r = self.scalar(s.args[0]);
                if packed(ty) {
                    r = self.splat16(&r);
                }
                let n = self.reg_types(s.results[0]).len();
                self.bind(s.results[0], vec![r; n]);
            }
            Op::Extract(i) => {
                let ty = self.ty(s.args[0]);
                let regs = self.raw(s.args[0]);
                let i = usize::from(*i);
                let r = if packed(ty) { self.half(&regs[i / 2], i % 2, llty(ty.dtype())) } else { regs[i].clone() };
                self.bind(s.results[0], vec![r]);
            }
            Op::Insert(i) => {
                let ty = self.ty(s.args[0]);
                let (mut regs, x) = (self.raw(s.args[0]), self.scalar(s.args[1]));
                let i = usize::from(*i);
                if packed(ty) {
                    let h = self.e.op("", format!("llvm.bitcast {} : i32 to vector<2x{}>", regs[i / 2], llty(ty.dtype())));
                    let at = self.e.i32((i % 2) as i64);
                    let h = self.e.op("", format!("llvm.insertelement {x}, {h}[{at} : i32] : vector<2x{}>", llty(ty.dtype())));
                    regs[i / 2] = self.e.op("i32", format!("llvm.bitcast {h} : vector<2x{}> to i32", llty(ty.dtype())));
                } else {
                    regs[i] = x;
                }
                self.bind(s.results[0], regs);
            }
            Op::Pack => {
                let elems: Vec<Reg> = s.args.iter().map(|a| self.scalar(*a)).collect();
                self.bind_elems(s.results[0], elems);
            }
            Op::Iota => {
                let ty = self.ty(s.results[0]);
                let regs = (0..ty.lanes()).map(|i| self.e.int(llty(ty.dtype()), i as i64)).collect();
                self.bind(s.results[0], regs);
            }
            Op::Shuffle(mask) => {
                let mut elems = self.elems(s.args[0]);
                elems.extend(self.elems(s.args[1]));
                let picked = mask.iter().map(|m| elems[usize::from(*m)].clone()).collect();
                self.bind_elems(s.results[0], picked);
            }
            Op::Reduce(r) => self.reduce(*r, s)?,
            Op::LaneMask => {
                let count = self.kept(s.args[0]);
                let n = self.ty(s.results[0]).lanes();
                let regs = (0..n)
                    .map(|i| {
                        let i = self.e.int(count.ty, i as i64);
                        self.e.icmp("slt", &i, &count)
                    })
                    .collect();
                self.bind(s.results[0], regs);
            }
            Op::Load { offset } => self.load(s, *offset)?,
            Op::Store { offset } => self.store(s, *offset)?,
            Op::Gather { offset } => self.gather(s, *offset)?,
            Op::Scatter { offset } => self.scatter(s, *offset)?,
            Op::AtomicAdd { offset } => self.atomic_add(s, *offset)?,
            Op::Prefetch { .. } => {}
            Op::For => self.for_(s)?,
            Op::If => self.if_(s)?,
            Op::While => self.while_(s)?,
            Op::BlockId(a) => self.special(s.results[0], &format!("ctaid.{}", axis(*a))),
            Op::GridDim(a) => self.special(s.results[0], &format!("nctaid.{}", axis(*a))),
            Op::ThreadId => self.special(s.results[0], "tid.x"),
            Op::LaneId => self.special(s.results[0], "laneid"),
            Op::Barrier => self.e.line("nvvm.barrier0"),
            Op::Shfl(kind) => self.shfl(*kind, s)?,
            Op::Vote(kind) => {
                let (m, p) = (self.e.i32(-1), self.scalar(s.args[0]));
                let (name, ty) = match kind {
                    VoteKind::Any => ("any", "i1"),
                    VoteKind::All => ("all", "i1"),
                    VoteKind::Ballot => ("ballot", "i32"),
                };
                let r = self.e.op(ty, format!("nvvm.vote.sync {name} {m}, {p} -> {ty}"));
                self.bind(s.results[0], vec![r]);
            }
            Op::Dot(_) | Op::Lo | Op::Hi => return self.unsupported(s.op.name(), "it belongs to CPU kernels"),
            Op::Mma(_) | Op::Hopper(_) => unreachable!("dispatched by `stmt`"),
        }
        Ok(())
    }

    /// A scalar constant of a dtype.
    pub(super) fn constant(&mut self, c: Scalar, d: DType) -> Reg {
        let t = llty(d);
        match c.cast(d) {
            Scalar::F(v) => self.e.float(t, v),
            Scalar::I(v) => self.e.int(t, v as i64),
            Scalar::B(v) => self.e.int("i1", i64::from(v)),
        }
    }

    /// A read-only register, non-negative, as an index below `2^31`.
    pub(super) fn special(&mut self, v: Val, name: &str) {
        let range = self.ranges.get(v);
        let r = self.e.op("i32", format!("nvvm.read.ptx.sreg.{name} range <i32, {}, {}> : i32", range.lo, (range.hi + 1) as i32));
        self.bind(v, vec![r]);
    }

    /// Both halves of a register the same 16-bit float.
    pub(super) fn splat16(&mut self, x: &Reg) -> Reg {
        let bits = self.e.conv("bitcast", x, "i16");
        let lo = self.e.conv("zext", &bits, "i32");
        let hi = self.e.int2c("shl", &lo, 16);
        self.e.int2("or", &lo, &hi)
    }

    /// One half of a register of two 16-bit floats.
    fn half(&mut self, r: &Reg, i: usize, ty: &'static str) -> Reg {
        let r = if i == 1 { self.e.int2c("lshr", r, 16) } else { r.clone() };
        let h = self.e.conv("trunc", &r, "i16");
        self.e.conv("bitcast", &h, ty)
    }

    /// One register a lane, in the element's own type.
    pub(super) fn elems(&mut self, v: Val) -> Vec<Reg> {
        let (ty, regs) = (self.ty(v), self.raw(v));
        if !packed(ty) {
            return regs;
        }
        regs.iter().flat_map(|r| [0, 1].map(|i| self.half(r, i, llty(ty.dtype())))).collect()
    }

    /// Bind a value to lanes in the element's own type.
    pub(super) fn bind_elems(&mut self, v: Val, elems: Vec<Reg>) {
        let ty = self.ty(v);
        let regs = if packed(ty) {
            elems
                .chunks(2)
                .map(|p| {
                    let half = p.iter().map(|x| self.e.conv("bitcast", x, "i16")).collect::<Vec<_>>();
                    let (lo, hi) = (self.e.conv("zext", &half[0], "i32"), self.e.conv("zext", &half[1], "i32"));
                    let hi = self.e.int2c("shl", &hi, 16);
                    self.e.int2("or", &lo, &hi)
                })
                .collect()
        } else {
            elems
        };
        self.bind(v, regs);
    }

    fn reduce(&mut self, r: ReduceFn, s: &Stmt) -> Lowered {
        let d = self.ty(s.args[0]).dtype();
        let mut lanes = self.lanes(s.args[0]);
        while lanes.len() > 1 {
            let half = lanes.len() / 2;
            let odd = (lanes.len() % 2 == 1).then(|| lanes[lanes.len() - 1].clone());
            lanes = (0..half).map(|i| self.call(r.scalar(), d, &[lanes[i].clone(), lanes[i + half].clone()])).collect::<Result<_, _>>()?;
            // An odd lane joins after the others have met.
            if let Some(odd) = odd {
                let last = lanes.len() - 1;
                lanes[last] = self.call(r.scalar(), d, &[lanes[last].clone(), odd])?;
            }
        }
        self.bind_lanes(s.results[0], lanes);
        Ok(())
    }

    fn shfl(&mut self, kind: ShflKind, s: &Stmt) -> Lowered {
        let (lane, d) = (self.small(s.args[1]), self.ty(s.args[0]).dtype());
        let regs = if self.is_narrow(s.args[0]) { vec![self.kept(s.args[0])] } else { self.raw(s.args[0]) };
        let (mode, clamp) = match kind {
            ShflKind::Xor => ("bfly", 31),
            ShflKind::Up => ("up", 0),
            ShflKind::Down => ("down", 31),
            ShflKind::Idx => ("idx", 31),
        };
        let (mask, clamp) = (self.e.i32(-1), self.e.i32(clamp));
        let word = |e: &mut Emit, r: &Reg| e.op(r.ty, format!("nvvm.shfl.sync {mode} {mask}, {r}, {lane}, {clamp} : {0} -> {0}", r.ty));
        let mut out = vec![];
        for r in &regs {
            let e = &mut self.e;
            out.push(match r.ty {
                "f32" | "i32" => word(e, r),
                "f64" | "i64" => {
                    let b = e.conv("bitcast", r, "i64");
                    let lo = e.conv("trunc", &b, "i32");
                    let hi = e.int2c("lshr", &b, 32);
                    let hi = e.conv("trunc", &hi, "i32");
                    let (lo, hi) = (word(e, &lo), word(e, &hi));
                    let (lo, hi) = (e.conv("zext", &lo, "i64"), e.conv("zext", &hi, "i64"));
                    let hi = e.int2c("shl", &hi, 32);
                    let b = e.int2("or", &lo, &hi);
                    e.conv("bitcast", &b, r.ty)
                }
                small => {
                    let bits = match small {
                        "f16" | "bf16" => "i16",
                        other => other,
                    };
                    let b = e.conv("bitcast", r, bits);
                    let b = e.conv("zext", &b, "i32");
                    let b = word(e, &b);
                    let b = e.conv("trunc", &b, bits);
                    e.conv("bitcast", &b, small)
                }
            });
        }
        if d == DType::Str {
            return self.unsupported("shfl", "strings");
        }
        self.bind(s.results[0], out);
        Ok(())
    }

    // ---- control ----

    fn yield_(&mut self, vals: &[Val], become_: &[Val]) {
        let regs = self.flat_as(vals, become_);
        if !regs.is_empty() {
            self.e.line(format!("scf.yield {} : {}", Emit::list(&regs), Emit::types(&regs)));
        }
    }

    /// Bind results as `%x#i`; the text to put before the operation.
    fn results(&mut self, vals: &[Val]) -> (String, Vec<Reg>) {
        let base = self.e.fresh();
        let count: usize = vals.iter().map(|v| self.reg_types(*v).len()).sum();
        let regs = self.spread(vals, |_, i| if count == 1 { base.clone() } else { format!("{base}#{i}") });
        let head = match count {
            0 => String::new(),
            1 => format!("{base} = "),
            n => format!("{base}:{n} = "),
        };
        (head, regs)
    }

    fn for_(&mut self, s: &'k Stmt) -> Lowered {
        let body = &s.blocks[0];
        let ty = self.counter_ty(s);
        let [lo, hi, step] = [0, 1, 2].map(|i| self.kept_as(s.args[i], ty));
        let init = self.flat_as(&s.args[3..], &body.params[1..]);
        let i = Reg { name: self.e.fresh(), ty };
        self.twos.insert(body.params[0], self.two(s.args[0]).min(self.two(s.args[2])));
        let carried = self.spread(&body.params[1..], |e, _| e.fresh());
        // Results must not shadow: they are bound after the body is written.
        let base = self.e.fresh();
        let n = carried.len();
        let head = match n {
            0 => String::new(),
            1 => format!("{base} = "),
            n => format!("{base}:{n} = "),
        };
        let iter = if n == 0 {
            String::new()
        } else {
            let pairs: Vec<String> = carried.iter().zip(&init).map(|(c, i)| format!("{c} = {i}")).collect();
            format!(" iter_args({}) -> ({})", pairs.join(", "), Emit::types(&carried))
        };
        self.e.line(format!("{head}scf.for {i} = {lo} to {hi} step {step}{iter} : {ty} {{"));
        self.bind(body.params[0], vec![i]);
        self.block(body)?;
        self.yield_(&body.yields, &body.params[1..]);
        self.e.line("}");
        self.spread(&s.results, |_, i| if n == 1 { base.clone() } else { format!("{base}#{i}") });
        Ok(())
    }

    fn if_(&mut self, s: &'k Stmt) -> Lowered {
        let c = self.scalar(s.args[0]);
        let (head, regs) = self.results(&s.results);
        let types = if regs.is_empty() { String::new() } else { format!(" -> ({})", Emit::types(&regs)) };
        self.e.line(format!("{head}scf.if {c}{types} {{"));
        self.block(&s.blocks[0])?;
        self.yield_(&s.blocks[0].yields, &s.results);
        if !s.blocks[1].stmts.is_empty() || !regs.is_empty() {
            self.e.line("} else {");
            self.block(&s.blocks[1])?;
            self.yield_(&s.blocks[1].yields, &s.results);
        }
        self.e.line("}");
        Ok(())
    }

    fn while_(&mut self, s: &'k Stmt) -> Lowered {
        let (before, body) = (&s.blocks[0], &s.blocks[1]);
        let init = self.flat_as(&s.args, &before.params);
        let params = self.spread(&before.params, |e, _| e.fresh());
        let (head, regs) = self.results(&s.results);
        let pairs: Vec<String> = params.iter().zip(&init).map(|(c, i)| format!("{c} = {i}")).collect();
        let args = if pairs.is_empty() { String::new() } else { format!(" ({})", pairs.join(", ")) };
        self.e.line(format!("{head}scf.while{args} : ({}) -> ({}) {{", Emit::types(&init), Emit::types(&regs)));
        self.block(before)?;
        let go = self.scalar(before.yields[0]);
        let out = self.flat_as(&before.yields[1..], &s.results);
        let types = if out.is_empty() { String::new() } else { format!(" {} : {}", Emit::list(&out), Emit::types(&out)) };
        self.e.line(format!("scf.condition({go}){types}"));
        self.e.line("} do {");
        let bound = self.spread(&body.params, |e, _| e.fresh());
        let list: Vec<String> = bound.iter().map(|r| format!("{r}: {}", r.ty)).collect();
        self.e.line(format!("^bb0({}):", list.join(", ")));
        self.block(body)?;
        let regs = self.flat_as(&body.yields, &before.params);
        self.e.line(if regs.is_empty() { "scf.yield".to_owned() } else { format!("scf.yield {} : {}", Emit::list(&regs), Emit::types(&regs)) });
        self.e.line("}");
        Ok(())
    }

    // ---- what is known of integers ----

    /// Exponent of a power of two that divides the value.
    pub(super) fn two(&self, v: Val) -> u32 {
        self.twos.get(&v).copied().unwrap_or(0)
    }

    /// What a map tells about the powers of two in its result.
    pub(super) fn learn(&mut self, f: ScalarFn, s: &Stmt) {
        if s.args.len() != 2 || self.ty(s.results[0]) != Ty::INDEX {
            return;
        }
        let (a, b) = (self.two(s.args[0]), self.two(s.args[1]));
        let k = match f {
            ScalarFn::Add | ScalarFn::Sub | ScalarFn::Min | ScalarFn::Max | ScalarFn::Mod | ScalarFn::Rem => a.min(b),
            ScalarFn::Mul => a + b,
            ScalarFn::And => a.max(b),
            _ => 0,
        };
        self.twos.insert(s.results[0], k.min(62));
    }
}

const fn axis(a: u8) -> char {
    match a {
        0 => 'x',
        1 => 'y',
        _ => 'z',
    }
}
