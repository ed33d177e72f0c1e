//! Tile IR to MLIR for CPUs: one-dimensional vectors on bare pointers, structured loops.
//!
//! Constant index parts become constant displacements from one address per (buffer, index value). What LLVM would print
//! as a library call is written out ([`super::float`]), and what it would abort on is gated by the target table.
use super::{LowerError, Mlir, convert, math, memory};
use crate::targets::Cpu;
use crate::tile::{Block, Buf, Device, DotKind, Kernel, Op, Space, Stmt, Ty, Val};
use pavage_ir::{DType, Scalar, ScalarFn};
use std::collections::HashMap;

/// Only a function with a frame pointer can align its stack when registers run out. Without, spilled vectors lie across cache
/// lines in most processes: stacks begin at any multiple of 16 bytes.
const FRAME: &str = "attributes {frame_pointer = #llvm.framePointerKind<all>}";

/// The `llvm.func` of a kernel.
pub fn function(kernel: &Kernel, cpu: &Cpu) -> Result<String, LowerError> {
    let mut l = Lowering {
        e: Mlir::new(),
        kernel,
        cpu,
        names: HashMap::new(),
        consts: HashMap::new(),
        pointers: vec![String::new(); kernel.bufs.len()],
        addresses: vec![HashMap::new()],
    };
    if !matches!(kernel.device, Device::Cpu { .. }) {
        return Err(l.fail("a GPU kernel"));
    }
    l.entry();
    l.block(&kernel.body)?;
    l.e.line("llvm.return");
    Ok(format!("llvm.func @{}(%bufs: !llvm.ptr, %dims: !llvm.ptr, %lo: i64, %hi: i64) {FRAME} {{\n{}}}\n", kernel.name, l.e.text))
}

pub(super) struct Lowering<'k> {
    pub(super) e: Mlir,
    kernel: &'k Kernel,
    cpu: &'k Cpu,
    names: HashMap<Val, String>,
    consts: HashMap<Val, Scalar>,
    pub(super) pointers: Vec<String>,
    /// Address of (buffer, base index), per open block: an address made in a block is good in the blocks inside it.
    addresses: Vec<HashMap<(Buf, Val), String>>,
}

impl Lowering<'_> {
    pub(super) fn fail(&self, what: &str) -> LowerError {
        LowerError { kernel: self.kernel.name.clone(), device: "cpu", what: what.to_owned() }
    }

    fn entry(&mut self) {
        let args: Vec<Buf> = self.kernel.args().collect();
        let load = |e: &mut Mlir, from: &str, i: usize, elem: &str| {
            let p = e.op(&format!("llvm.getelementptr {from}[{i}] : (!llvm.ptr) -> !llvm.ptr, i64"));
            e.op(&format!("llvm.load {p} {{alignment = 8 : i64}} : !llvm.ptr -> {elem}"))
        };
        for (i, b) in args.iter().enumerate() {
            self.pointers[b.0 as usize] = load(&mut self.e, "%bufs", i, "!llvm.ptr");
        }
        if self.kernel.needs_scratch() {
            let scratch = load(&mut self.e, "%bufs", args.len(), "!llvm.ptr");
            for (i, offset) in self.kernel.layout(Space::Local).0.iter().enumerate() {
                if let Some(o) = offset {
                    self.pointers[i] = self.e.op(&format!("llvm.getelementptr {scratch}[{o}] : (!llvm.ptr) -> !llvm.ptr, i8"));
                }
            }
        }
        for (i, b) in self.kernel.bufs.iter().enumerate() {
            if let (Some((owner, bytes)), Space::Global) = (b.alias, b.space) {
                let owner = self.pointers[owner.0 as usize].clone();
                self.pointers[i] = self.e.op(&format!("llvm.getelementptr {owner}[{bytes}] : (!llvm.ptr) -> !llvm.ptr, i8"));
            }
        }
        for (i, d) in self.kernel.dims.iter().enumerate() {
            let v = load(&mut self.e, "%dims", i, "i64");
            self.names.insert(*d, v);
        }
    }

    pub(super) fn name(&self, v: Val) -> &str {
        &self.names[&v]
    }

    pub(super) fn ty(&self, v: Val) -> Ty {
        self.kernel.ty(v)
    }

    fn mlir_types(&self, vals: &[Val]) -> String {
        vals.iter().map(|v| self.e.ty(self.ty(*v))).collect::<Vec<_>>().join(", ")
    }

    fn list(&self, vals: &[Val]) -> String {
        vals.iter().map(|v| self.name(*v).to_owned()).collect::<Vec<_>>().join(", ")
    }

    fn block(&mut self, block: &Block) -> Result<(), LowerError> {
        self.addresses.push(HashMap::new());
        for stmt in &block.stmts {
            self.stmt(stmt)?;
        }
        self.addresses.pop();
        Ok(())
    }

    /// Name the results of a statement that gives `n` values under one name.
    fn bind_many(&mut self, results: &[Val], name: &str) {
        for (i, r) in results.iter().enumerate() {
            let n = if results.len() == 1 { name.to_owned() } else { format!("{name}#{i}") };
            self.names.insert(*r, n);
        }
    }

    fn yields(&mut self, vals: &[Val]) {
        if !vals.is_empty() {
            self.e.line(&format!("scf.yield {} : {}", self.list(vals), self.mlir_types(vals)));
        }
    }

    fn stmt(&mut self, s: &Stmt) -> Result<(), LowerError> {
        let arg = |l: &Self, i: usize| l.name(s.args[i]).to_owned();
        let result_ty = s.results.first().map_or(Ty::BOOL, |r| self.ty(*r));
        let value = match &s.op {
            Op::Const(c) => {
                self.consts.insert(s.results[0], *c);
                self.e.constant(*c, result_ty)
            }
            Op::Map(f) => {
                let ty = self.ty(s.args[s.args.len() - 1]);
                let args: Vec<String> = s.args.iter().map(|a| self.name(*a).to_owned()).collect();
                let consts: Vec<Option<Scalar>> = s.args.iter().map(|a| self.consts.get(a).copied()).collect();
                math::map(&mut self.e, *f, ty, &args, &consts)
            }
            Op::Cast => {
                let v = arg(self, 0);
                let from = self.ty(s.args[0]);
                convert::cast(&mut self.e, &v, from, result_ty.dtype())
            }
            Op::Bitcast => {
                let (from, to) = (self.mlir_types(&s.args), self.e.ty(result_ty));
                let v = arg(self, 0);
                let v = if from == to { v } else { self.e.op(&format!("llvm.bitcast {v} : {from} to {to}")) };
                if result_ty.dtype().is_packed() { convert::wrap_packed(&mut self.e, &v, result_ty) } else { v }
            }
            Op::Splat => {
                if let Some(c) = self.consts.get(&s.args[0]).copied() {
                    self.consts.insert(s.results[0], c);
                    self.e.constant(c, result_ty)
                } else {
                    let (from, to) = (self.mlir_types(&s.args), self.e.ty(result_ty));
                    let v = arg(self, 0);
                    self.e.op(&format!("vector.broadcast {v} : {from} to {to}"))
                }
            }
            Op::Extract(i) => {
                let (v, t, elem) = (arg(self, 0), self.mlir_types(&s.args), self.e.ty(result_ty));
                self.e.op(&format!("vector.extract {v}[{i}] : {elem} from {t}"))
            }
            Op::Insert(i) => {
                let (v, x, t, elem) = (arg(self, 0), arg(self, 1), self.e.ty(result_ty), self.mlir_types(&s.args[1..]));
                self.e.op(&format!("vector.insert {x}, {v}[{i}] : {elem} into {t}"))
            }
            Op::Pack => {
                let (vs, t) = (self.list(&s.args), self.e.ty(result_ty));
                self.e.op(&format!("vector.from_elements {vs} : {t}"))
            }
            Op::Iota => {
                let t = self.e.ty(result_ty);
                let items: Vec<String> = (0..result_ty.lanes()).map(|i| i.to_string()).collect();
                if result_ty.is_scalar() {
                    self.e.constant(Scalar::I(0), result_ty)
                } else {
                    self.e.op(&format!("arith.constant dense<[{}]> : {t}", items.join(", ")))
                }
            }
            Op::Shuffle(mask) => self.shuffle(&arg(self, 0), &arg(self, 1), self.ty(s.args[0]), mask),
            Op::Reduce(r) => {
                let v = arg(self, 0);
                self.reduce(r.scalar(), &v, self.ty(s.args[0]))
            }
            Op::LaneMask => {
                let count = arg(self, 0);
                self.lane_mask(&count, result_ty)
            }
            Op::Load { offset } => self.load(s, *offset, result_ty)?,
            Op::Store { offset } => return self.store(s, *offset),
            Op::Gather { offset } => self.gather(s, *offset, result_ty)?,
            Op::Scatter { offset } => return self.scatter(s, *offset),
            Op::AtomicAdd { offset } => {
                let (p, ty) = (self.address(s.bufs[0], s.args[0], *offset), self.ty(s.args[1]));
                let (t, v) = (self.e.ty(ty), arg(self, 1));
                let adds = match ty.dtype() {
                    DType::F32 | DType::F64 => true,
                    d => d.is_int() && d.bits() >= 8,
                };
                if !adds {
                    return Err(self.fail(&format!("atomic_add of {ty}")));
                }
                let kind = if ty.dtype().is_float() { "fadd" } else { "add" };
                self.e.op(&format!("llvm.atomicrmw {kind} {p}, {v} monotonic : !llvm.ptr, {t}"));
                return Ok(());
            }
            Op::Prefetch { offset, near } => {
                let p = self.address(s.bufs[0], s.args[0], *offset);
                let hint = if *near { 3 } else { 2 };
                self.e.line(&format!("\"llvm.intr.prefetch\"({p}) <{{cache = 1 : i32, hint = {hint} : i32, rw = 0 : i32}}> : (!llvm.ptr) -> ()"));
                return Ok(());
            }
            Op::Dot(kind) => self.dot(*kind, s)?,
            Op::Lo => "%lo".to_owned(),
            Op::Hi => "%hi".to_owned(),
            Op::For => return self.for_loop(s),
            Op::If => return self.branch(s),
            Op::While => return self.while_loop(s),
            Op::BlockId(_) | Op::GridDim(_) | Op::ThreadId | Op::LaneId | Op::Barrier | Op::Shfl(_) | Op::Vote(_) | Op::Mma(_) | Op::Hopper(_) => {
                return Err(self.fail(s.op.name()));
            }
        };
        self.names.insert(s.results[0], value);
        Ok(())
    }

    // ---- control ----

    fn for_loop(&mut self, s: &Stmt) -> Result<(), LowerError> {
        let body = &s.blocks[0];
        let i = self.e.fresh();
        self.names.insert(body.params[0], i.clone());
        let bounds: Vec<String> = s.args[..3].iter().map(|a| self.name(*a).to_owned()).collect();
        let head = format!("scf.for {i} = {} to {} step {}", bounds[0], bounds[1], bounds[2]);
        let carried = &body.params[1..];
        if carried.is_empty() {
            self.e.open(&format!("{head} : i64 {{"));
        } else {
            let mut inits = vec![];
            for (p, init) in carried.iter().zip(&s.args[3..]) {
                let n = self.e.fresh();
                inits.push(format!("{n} = {}", self.name(*init)));
                self.names.insert(*p, n);
            }
            let types = self.mlir_types(carried);
            let r = self.e.fresh();
            let many = if carried.len() == 1 { String::new() } else { format!(":{}", carried.len()) };
            self.e.open(&format!("{r}{many} = {head} iter_args({}) -> ({types}) : i64 {{", inits.join(", ")));
            self.bind_many(&s.results, &r);
        }
        self.block(body)?;
        self.yields(&body.yields);
        self.e.close("}");
        Ok(())
    }

    fn branch(&mut self, s: &Stmt) -> Result<(), LowerError> {
        let cond = self.name(s.args[0]).to_owned();
        if s.results.is_empty() {
            self.e.open(&format!("scf.if {cond} {{"));
        } else {
            let r = self.e.fresh();
            let many = if s.results.len() == 1 { String::new() } else { format!(":{}", s.results.len()) };
            self.e.open(&format!("{r}{many} = scf.if {cond} -> ({}) {{", self.mlir_types(&s.results)));
            self.bind_many(&s.results, &r);
        }
        self.block(&s.blocks[0])?;
        self.yields(&s.blocks[0].yields);
        if !s.results.is_empty() || !s.blocks[1].stmts.is_empty() {
            self.e.close("} else {");
            self.e.reopen();
            self.block(&s.blocks[1])?;
            self.yields(&s.blocks[1].yields);
        }
        self.e.close("}");
        Ok(())
    }

    fn while_loop(&mut self, s: &Stmt) -> Result<(), LowerError> {
        let (before, body) = (&s.blocks[0], &s.blocks[1]);
        let mut inits = vec![];
        for (p, init) in before.params.iter().zip(&s.args) {
            let n = self.e.fresh();
            inits.push(format!("{n} = {}", self.name(*init)));
            self.names.insert(*p, n);
        }
        let (from, to) = (self.mlir_types(&before.params), self.mlir_types(&s.results));
        let many = if s.results.len() == 1 { String::new() } else { format!(":{}", s.results.len()) };
        let head = format!("scf.while ({}) : ({from}) -> ({to}) {{", inits.join(", "));
        if s.results.is_empty() {
            self.e.open(&head);
        } else {
            let r = self.e.fresh();
            self.e.open(&format!("{r}{many} = {head}"));
            self.bind_many(&s.results, &r);
        }
        self.block(before)?;
        let (cond, values) = (before.yields[0], &before.yields[1..]);
        let forwarded = if values.is_empty() { String::new() } else { format!(" {} : {}", self.list(values), self.mlir_types(values)) };
        self.e.line(&format!("scf.condition({}){forwarded}", self.name(cond)));
        self.e.close("} do {");
        self.e.reopen();
        let mut params = vec![];
        for p in &body.params {
            let n = self.e.fresh();
            params.push(format!("{n}: {}", self.e.ty(self.ty(*p))));
            self.names.insert(*p, n);
        }
        if !params.is_empty() {
            self.e.line(&format!("^bb0({}):", params.join(", ")));
        }
        self.block(body)?;
        if body.yields.is_empty() {
            self.e.line("scf.yield");
        }
        self.yields(&body.yields);
        self.e.close("}");
        Ok(())
    }

    // ---- lanes ----

    pub(super) fn shuffle(&mut self, a: &str, b: &str, ty: Ty, mask: &[u16]) -> String {
        let t = self.e.ty(ty);
        let mask: Vec<String> = mask.iter().map(u16::to_string).collect();
        if mask.len() == 1 {
            let i: usize = mask[0].parse().unwrap_or(0);
            let (v, i) = if i < ty.lanes() { (a, i) } else { (b, i - ty.lanes()) };
            let elem = self.e.ty(Ty::Scalar(ty.dtype()));
            return self.e.op(&format!("vector.extract {v}[{i}] : {elem} from {t}"));
        }
        self.e.op(&format!("vector.shuffle {a}, {b} [{}] : {t}, {t}", mask.join(", ")))
    }

    /// Lanes `from..from + n` of a vector.
    fn slice(&mut self, v: &str, ty: Ty, from: usize, n: usize) -> String {
        if from == 0 && n == ty.lanes() {
            return v.to_owned();
        }
        let mask: Vec<u16> = (from..from + n).map(|i| i as u16).collect();
        self.shuffle(v, v, ty, &mask)
    }

    fn reduce(&mut self, f: ScalarFn, v: &str, ty: Ty) -> String {
        match f {
            ScalarFn::Max | ScalarFn::Min if ty.dtype() == DType::F32 && ty.lanes() > 2 => self.extreme(f, v, ty.lanes()),
            _ => self.halves(f, v, ty),
        }
    }

    /// The largest or least of floats, as integers of the same order: zeros have their signs in it, and one test finds a NaN. Each
    /// half by itself would have to look for both.
    fn extreme(&mut self, f: ScalarFn, v: &str, lanes: usize) -> String {
        let (floats, ints) = (Ty::of_lanes(DType::F32, lanes), Ty::of_lanes(DType::I32, lanes));
        let (ft, it) = (self.e.ty(floats), self.e.ty(ints));
        let bits = self.e.op(&format!("arith.bitcast {v} : {ft} to {it}"));
        let keys = self.ordered(&bits, ints);
        let key = self.halves(f, &keys, ints);
        let bits = self.ordered(&key, Ty::Scalar(DType::I32));
        let found = self.e.op(&format!("arith.bitcast {bits} : i32 to f32"));
        let nans = self.e.op(&format!("arith.cmpf uno, {v}, {v} : {ft}"));
        let some = self.e.op(&format!("vector.reduction <or>, {nans} : vector<{lanes}xi1> into i1"));
        let nan = self.e.constant(Scalar::F(f64::NAN), Ty::Scalar(DType::F32));
        self.e.op(&format!("arith.select {some}, {nan}, {found} : f32"))
    }

    /// Bits of floats as integers that compare as they do, and back.
    fn ordered(&mut self, bits: &str, ty: Ty) -> String {
        let t = self.e.ty(ty);
        let (top, one) = (self.e.constant(Scalar::I(31), ty), self.e.constant(Scalar::I(1), ty));
        let sign = self.e.op(&format!("arith.shrsi {bits}, {top} : {t}"));
        let flip = self.e.op(&format!("arith.shrui {sign}, {one} : {t}"));
        self.e.op(&format!("arith.xori {bits}, {flip} : {t}"))
    }

    fn halves(&mut self, f: ScalarFn, v: &str, ty: Ty) -> String {
        let mut v = v.to_owned();
        let mut n = ty.lanes();
        while n > 1 {
            let whole = Ty::of_lanes(ty.dtype(), n);
            let half = Ty::of_lanes(ty.dtype(), n / 2);
            let (low, high) = (self.slice(&v, whole, 0, n / 2), self.slice(&v, whole, n / 2, n / 2));
            v = math::map(&mut self.e, f, half, &[low, high], &[None, None]);
            n /= 2;
        }
        v
    }

    fn lane_mask(&mut self, count: &str, ty: Ty) -> String {
        let lanes = ty.lanes();
        let (zero, top) = (self.e.index(0), self.e.index(lanes as i64));
        let below = self.e.op(&format!("arith.minsi {count}, {top} : i64"));
        let held = self.e.op(&format!("arith.maxsi {below}, {zero} : i64"));
        if ty.is_scalar() {
            return self.e.op(&format!("arith.cmpi sgt, {held}, {zero} : i64"));
        }
        let narrow = self.e.op(&format!("arith.trunci {held} : i64 to i32"));
        let items: Vec<String> = (0..lanes).map(|i| i.to_string()).collect();
        let t = format!("vector<{lanes}xi32>");
        let all = self.e.op(&format!("vector.broadcast {narrow} : i32 to {t}"));
        let iota = self.e.op(&format!("arith.constant dense<[{}]> : {t}", items.join(", ")));
        self.e.op(&format!("arith.cmpi sgt, {all}, {iota} : {t}"))
    }

    // ---- memory ----

    pub(super) fn address(&mut self, buf: Buf, index: Val, offset: i64) -> String {
        let dtype = self.kernel.buf(buf).dtype;
        let (elem, per_byte) = if dtype.is_packed() { ("i8", 8 / dtype.bits() as i64) } else { (memory(dtype), 1) };
        let base = match self.addresses.iter().rev().find_map(|m| m.get(&(buf, index))) {
            Some(p) => p.clone(),
            None => {
                let pointer = self.pointers[buf.0 as usize].clone();
                let known = self.consts.get(&index).map(|c| c.i());
                let p = if known == Some(0) {
                    pointer
                } else {
                    let mut i = self.name(index).to_owned();
                    if per_byte > 1 {
                        let shift = self.e.index(per_byte.ilog2().into());
                        i = self.e.op(&format!("arith.shrsi {i}, {shift} : i64"));
                    }
                    self.e.op(&format!("llvm.getelementptr {pointer}[{i}] : (!llvm.ptr, i64) -> !llvm.ptr, {elem}"))
                };
                if let Some(open) = self.addresses.last_mut() {
                    open.insert((buf, index), p.clone());
                }
                p
            }
        };
        if offset == 0 {
            return base;
        }
        let offset = offset.div_euclid(per_byte);
        // The displacement of a getelementptr has 32 bits in this form.
        if i32::try_from(offset).is_ok() {
            return self.e.op(&format!("llvm.getelementptr {base}[{offset}] : (!llvm.ptr) -> !llvm.ptr, {elem}"));
        }
        let k = self.e.index(offset);
        self.e.op(&format!("llvm.getelementptr {base}[{k}] : (!llvm.ptr, i64) -> !llvm.ptr, {elem}"))
    }

    /// Type of `ty` in memory, and the alignment of one element.
    fn memory_ty(&self, ty: Ty) -> (String, usize) {
        let elem = memory(ty.dtype());
        let t = if ty.is_scalar() { elem.to_owned() } else { format!("vector<{}x{elem}>", ty.lanes()) };
        (t, ty.dtype().bits().max(8) / 8)
    }

    /// A loaded value in register form: bool bytes become bits.
    fn after_load(&mut self, v: String, ty: Ty) -> String {
        if ty.dtype() != DType::Bool {
            return v;
        }
        let zero = self.e.constant(Scalar::I(0), ty.with(DType::I8));
        let t = self.e.ty(ty.with(DType::I8));
        self.e.op(&format!("arith.cmpi ne, {v}, {zero} : {t}"))
    }

    fn before_store(&mut self, v: String, ty: Ty) -> String {
        if ty.dtype() != DType::Bool {
            return v;
        }
        let (from, to) = (self.e.ty(ty), self.e.ty(ty.with(DType::I8)));
        self.e.op(&format!("arith.extui {v} : {from} to {to}"))
    }

    fn load(&mut self, s: &Stmt, offset: i64, ty: Ty) -> Result<String, LowerError> {
        let (t, align) = self.memory_ty(ty);
        if ty.dtype().is_packed() {
            return self.load_packed(s, offset, ty, false);
        }
        let mask = s.args.get(1).map(|m| self.name(*m).to_owned());
        let Some(mask) = mask else {
            let p = self.address(s.bufs[0], s.args[0], offset);
            let v = self.e.op(&format!("llvm.load {p} {{alignment = {align} : i64}} : !llvm.ptr -> {t}"));
            return Ok(self.after_load(v, ty));
        };
        let p = self.address(s.bufs[0], s.args[0], offset);
        let v = if ty.is_scalar() {
            self.load_if(&mask, &p, ty)
        } else {
            let zero = self.zero(ty);
            let m = self.e.ty(ty.with(DType::Bool));
            self.e.op(&format!("llvm.intr.masked.load {p}, {mask}, {zero} {{alignment = {align} : i32}} : (!llvm.ptr, {m}, {t}) -> {t}"))
        };
        Ok(self.after_load(v, ty))
    }

    /// A scalar where `mask` holds, else zero, without touching memory.
    fn load_if(&mut self, mask: &str, p: &str, ty: Ty) -> String {
        let (t, align) = self.memory_ty(ty);
        let r = self.e.fresh();
        self.e.open(&format!("{r} = scf.if {mask} -> ({t}) {{"));
        let v = self.e.op(&format!("llvm.load {p} {{alignment = {align} : i64}} : !llvm.ptr -> {t}"));
        self.e.line(&format!("scf.yield {v} : {t}"));
        self.e.close("} else {");
        self.e.reopen();
        let zero = self.zero(ty);
        self.e.line(&format!("scf.yield {zero} : {t}"));
        self.e.close("}");
        r
    }

    /// Zero in memory form.
    fn zero(&mut self, ty: Ty) -> String {
        let ty = if ty.dtype() == DType::Bool { ty.with(DType::I8) } else { ty };
        let zero = if ty.dtype().is_float() { Scalar::F(0.0) } else { Scalar::I(0) };
        self.e.constant(zero, ty)
    }

    fn store(&mut self, s: &Stmt, offset: i64) -> Result<(), LowerError> {
        let ty = self.ty(s.args[1]);
        let (t, align) = self.memory_ty(ty);
        if ty.dtype().is_packed() {
            return self.store_packed(s, offset, ty);
        }
        let v = self.name(s.args[1]).to_owned();
        let v = self.before_store(v, ty);
        let p = self.address(s.bufs[0], s.args[0], offset);
        let Some(mask) = s.args.get(2).map(|m| self.name(*m).to_owned()) else {
            self.e.line(&format!("llvm.store {v}, {p} {{alignment = {align} : i64}} : {t}, !llvm.ptr"));
            return Ok(());
        };
        if ty.is_scalar() {
            self.e.open(&format!("scf.if {mask} {{"));
            self.e.line(&format!("llvm.store {v}, {p} {{alignment = {align} : i64}} : {t}, !llvm.ptr"));
            self.e.close("}");
        } else {
            let m = self.e.ty(ty.with(DType::Bool));
            self.e.line(&format!("llvm.intr.masked.store {v}, {p}, {mask} {{alignment = {align} : i32}} : {t}, {m} into !llvm.ptr"));
        }
        Ok(())
    }

    /// Pointers to the elements at a vector of indices, and their type.
    fn pointers_at(&mut self, s: &Stmt, offset: i64) -> Result<(String, Ty), LowerError> {
        let buf = s.bufs[0];
        let dtype = self.kernel.buf(buf).dtype;
        if dtype.is_packed() {
            return Err(self.fail("scatter of elements that share bytes"));
        }
        let ty = self.ty(s.args[0]);
        let mut i = self.name(s.args[0]).to_owned();
        // i32 indices are signed and extended; x86 gathers take either width.
        if ty.dtype() == DType::I32 && ty.is_scalar() {
            i = self.e.op(&format!("arith.extsi {i} : i32 to i64"));
        }
        let elem = memory(dtype);
        let mut base = self.pointers[buf.0 as usize].clone();
        if offset != 0 {
            let k = self.e.index(offset);
            base = self.e.op(&format!("llvm.getelementptr {base}[{k}] : (!llvm.ptr, i64) -> !llvm.ptr, {elem}"));
        }
        let p = if ty.is_scalar() {
            self.e.op(&format!("llvm.getelementptr {base}[{i}] : (!llvm.ptr, i64) -> !llvm.ptr, {elem}"))
        } else {
            let t = self.e.ty(ty);
            self.e.op(&format!("llvm.getelementptr {base}[{i}] : (!llvm.ptr, {t}) -> vector<{}x!llvm.ptr>, {elem}", ty.lanes()))
        };
        Ok((p, ty))
    }

    fn gather(&mut self, s: &Stmt, offset: i64, ty: Ty) -> Result<String, LowerError> {
        if ty.dtype().is_packed() {
            return self.load_packed(s, offset, ty, true);
        }
        let (p, _) = self.pointers_at(s, offset)?;
        let (t, align) = self.memory_ty(ty);
        let v = if ty.is_scalar() {
            let mask = s.args.get(1).map(|m| self.name(*m).to_owned());
            let mask = mask.unwrap_or_else(|| self.e.constant(Scalar::B(true), Ty::BOOL));
            self.load_if(&mask, &p, ty)
        } else {
            let bools = ty.with(DType::Bool);
            let mask = s.args.get(1).map(|m| self.name(*m).to_owned());
            let mask = mask.unwrap_or_else(|| self.e.constant(Scalar::B(true), bools));
            let (zero, m) = (self.zero(ty), self.e.ty(bools));
            self.e
                .op(&format!("llvm.intr.masked.gather {p}, {mask}, {zero} {{alignment = {align} : i32}} : (vector<{}x!llvm.ptr>, {m}, {t}) -> {t}", ty.lanes()))
        };
        Ok(self.after_load(v, ty))
    }

    fn scatter(&mut self, s: &Stmt, offset: i64) -> Result<(), LowerError> {
        let (p, _) = self.pointers_at(s, offset)?;
        let ty = self.ty(s.args[1]);
        let (t, align) = self.memory_ty(ty);
        let v = self.name(s.args[1]).to_owned();
        let v = self.before_store(v, ty);
        let mask = s.args.get(2).map(|m| self.name(*m).to_owned());
        if ty.is_scalar() {
            if let Some(m) = &mask {
                self.e.open(&format!("scf.if {m} {{"));
            }
            self.e.line(&format!("llvm.store {v}, {p} {{alignment = {align} : i64}} : {t}, !llvm.ptr"));
            if mask.is_some() {
                self.e.close("}");
            }
            return Ok(());
        }
        let bools = ty.with(DType::Bool);
        let mask = mask.unwrap_or_else(|| self.e.constant(Scalar::B(true), bools));
        let m = self.e.ty(bools);
        self.e.line(&format!("llvm.intr.masked.scatter {v}, {p}, {mask} {{alignment = {align} : i32}} : {t}, {m} into vector<{}x!llvm.ptr>", ty.lanes()));
        Ok(())
    }

    // ---- integer dot products ----

    fn dot(&mut self, kind: DotKind, s: &Stmt) -> Result<String, LowerError> {
        let args: Vec<(String, Ty)> = s.args.iter().map(|a| (self.name(*a).to_owned(), self.ty(*a))).collect();
        let out = self.ty(s.results[0]);
        // Registers of results at a time; every operand is cut in the same number of pieces.
        let native_bytes = usize::from(self.cpu.lanes) * 4;
        let out_bytes = out.dtype().bytes(out.lanes());
        if !out_bytes.is_power_of_two() || out_bytes < 16 {
            return Err(self.fail(&format!("dot to {out}")));
        }
        let piece_bytes = out_bytes.min(native_bytes);
        let pieces = out_bytes / piece_bytes;
        let mut parts: Vec<(String, usize)> = vec![];
        for p in 0..pieces {
            let ops: Vec<(String, Ty)> = args
                .iter()
                .map(|(v, t)| {
                    let n = t.lanes() / pieces;
                    (self.slice(v, *t, p * n, n), Ty::of_lanes(t.dtype(), n))
                })
                .collect();
            let lanes = out.lanes() / pieces;
            parts.push((self.dot_piece(kind, &ops, Ty::of_lanes(out.dtype(), lanes), piece_bytes), lanes));
        }
        while parts.len() > 1 {
            let joined: Vec<(String, usize)> = parts
                .chunks(2)
                .map(|c| {
                    let n = c[0].1;
                    let mask: Vec<u16> = (0..2 * n as u16).collect();
                    (self.shuffle(&c[0].0, &c[1].0, Ty::of_lanes(out.dtype(), n), &mask), 2 * n)
                })
                .collect();
            parts = joined;
        }
        Ok(parts.swap_remove(0).0)
    }

    fn dot_piece(&mut self, kind: DotKind, ops: &[(String, Ty)], out: Ty, bytes: usize) -> String {
        let names = ops.iter().map(|(v, _)| v.clone()).collect::<Vec<_>>().join(", ");
        let types = ops.iter().map(|(_, t)| self.e.ty(*t)).collect::<Vec<_>>().join(", ");
        let to = self.e.ty(out);
        let call = |e: &mut Mlir, intrinsic: &str, names: &str, types: &str, to: &str| {
            e.op(&format!("llvm.call_intrinsic \"{intrinsic}\"({names}) : ({types}) -> {to}"))
        };
        match kind {
            DotKind::I16Pairs => {
                let intrinsic = match bytes {
                    16 => "llvm.x86.sse2.pmadd.wd",
                    32 => "llvm.x86.avx2.pmadd.wd",
                    _ => "llvm.x86.avx512.pmaddw.d.512",
                };
                call(&mut self.e, intrinsic, &names, &types, &to)
            }
            DotKind::U8I8PairsSat => {
                let intrinsic = match bytes {
                    16 => "llvm.x86.ssse3.pmadd.ub.sw.128",
                    32 => "llvm.x86.avx2.pmadd.ub.sw",
                    _ => "llvm.x86.avx512.pmaddubs.w.512",
                };
                call(&mut self.e, intrinsic, &names, &types, &to)
            }
            DotKind::U8I8Quads if self.cpu.vnni => {
                let intrinsic = format!("llvm.x86.avx512.vpdpbusd.{}", bytes * 8);
                call(&mut self.e, &intrinsic, &names, &types, &to)
            }
            DotKind::U8I8Quads => {
                // Even and odd bytes as i16 pairs: two exact pair products make the four.
                let words = Ty::of_lanes(DType::I16, bytes / 2);
                let t = self.e.ty(words);
                let as_words: Vec<String> = ops[1..].iter().map(|(v, ty)| format!("llvm.bitcast {v} : {} to {t}", self.e.ty(*ty))).collect();
                let a = self.e.op(&as_words[0]);
                let b = self.e.op(&as_words[1]);
                let (eight, low) = (self.e.constant(Scalar::I(8), words), self.e.constant(Scalar::I(255), words));
                let a_even = self.e.op(&format!("arith.andi {a}, {low} : {t}"));
                let a_odd = self.e.op(&format!("arith.shrui {a}, {eight} : {t}"));
                let b_up = self.e.op(&format!("arith.shli {b}, {eight} : {t}"));
                let b_even = self.e.op(&format!("arith.shrsi {b_up}, {eight} : {t}"));
                let b_odd = self.e.op(&format!("arith.shrsi {b}, {eight} : {t}"));
                let even = self.dot_piece(DotKind::I16Pairs, &[(a_even, words), (b_even, words)], out, bytes);
                let odd = self.dot_piece(DotKind::I16Pairs, &[(a_odd, words), (b_odd, words)], out, bytes);
                let sum = self.e.op(&format!("arith.addi {even}, {odd} : {to}"));
                self.e.op(&format!("arith.addi {}, {sum} : {to}", ops[0].0))
            }
        }
    }
}
