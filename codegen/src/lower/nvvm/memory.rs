//! Loads and stores: wide where the alignment is known, lane by lane under masks.
use super::{Lower, Lowered, Reg, Space, llty, packed};
use crate::tile::{Access, Buf, Stmt, Val};
use pavage_ir::DType;

/// The type an element has in memory.
const fn memory_ty(d: DType) -> &'static str {
    match d {
        DType::Bool => "i8",
        _ => llty(d),
    }
}

impl Lower<'_> {
    /// The first byte of a buffer, and the alignment of its first element in bytes.
    pub(super) fn base(&mut self, b: Buf) -> (Reg, u64) {
        let info = self.buf(b);
        let owner = info.alias.map_or(b, |(o, _)| o);
        let align = match info.align {
            0 if info.space == Space::Global => info.dtype.bytes(1) as u64,
            0 => 64,
            a => u64::from(a),
        };
        match info.space {
            Space::Global => {
                let r = self.args[&owner.0].clone();
                match info.alias {
                    Some((_, bytes)) if bytes > 0 => (self.offset_const(&r, bytes as i64, "i8"), align),
                    _ => (r, align),
                }
            }
            Space::Shared => {
                let at = self.shared[b.0 as usize].unwrap_or(0);
                let r = self.smem.clone().unwrap_or_else(|| Reg { name: "%none".into(), ty: "!llvm.ptr<3>" });
                let align = if at == 0 { align } else { align.min(1 << at.trailing_zeros()) };
                (self.offset_const(&r, at as i64, "i8"), align)
            }
            Space::Local => {
                let at = self.local[b.0 as usize].unwrap_or(0);
                let r = self.stack.clone().unwrap_or_else(|| Reg { name: "%none".into(), ty: "!llvm.ptr" });
                (self.offset_const(&r, at as i64, "i8"), 64)
            }
        }
    }

    /// `p + n` elements.
    pub(super) fn offset_const(&mut self, p: &Reg, n: i64, elem: &str) -> Reg {
        if n == 0 {
            return p.clone();
        }
        self.e.op(p.ty, format!("llvm.getelementptr {p}[{n}] : ({}) -> {}, {elem}", p.ty, p.ty))
    }

    /// `p + i` elements, `i` in a register.
    pub(super) fn offset_by(&mut self, p: &Reg, i: &Reg, elem: &str) -> Reg {
        self.e.op(p.ty, format!("llvm.getelementptr {p}[{i}] : ({}, {}) -> {}, {elem}", p.ty, i.ty, p.ty))
    }

    /// The element at `index + offset`, and its alignment in bytes.
    pub(super) fn element(&mut self, b: Buf, index: Val, offset: i64) -> (Reg, u64) {
        let (base, align) = self.base(b);
        let d = self.buf(b).dtype;
        let size = d.bytes(1) as u64;
        let shared = self.buf(b).space == Space::Shared;
        let i = if shared { self.small(index) } else { self.kept(index) };
        let p = self.offset_by(&base, &i, memory_ty(d));
        let p = self.offset_const_gep32(&p, offset, memory_ty(d));
        let twos = self.two(index).min(if offset == 0 { 62 } else { offset.trailing_zeros() }).min(16);
        (p, align.min(size << twos))
    }

    fn offset_const_gep32(&mut self, p: &Reg, n: i64, elem: &str) -> Reg {
        if i32::try_from(n).is_ok() {
            return self.offset_const(p, n, elem);
        }
        let i = self.e.i64(n);
        self.offset_by(p, &i, elem)
    }

    fn sub_byte(&self, d: DType) -> bool {
        d.bits() < 8 || d == DType::Str
    }

    /// Whether loads may go through the read-only cache.
    fn constant_memory(&self, b: Buf) -> bool {
        self.buf(b).space == Space::Global && self.buf(b).access == Access::Read
    }

    pub(super) fn load(&mut self, s: &Stmt, offset: i64) -> Lowered {
        let (b, out) = (s.bufs[0], s.results[0]);
        let d = self.buf(b).dtype;
        if d.is_packed() {
            return self.load_packed(s, offset);
        }
        if self.sub_byte(d) {
            return self.unsupported("load", format!("of {d}"));
        }
        let n = self.ty(out).lanes();
        let (p, align) = self.element(b, s.args[0], offset);
        let invariant = if self.constant_memory(b) { " invariant" } else { "" };
        if let Some(mask) = s.args.get(1) {
            let masks = self.raw(*mask);
            let lanes = (0..n).map(|i| self.load_if(&p, i, d, invariant, &masks[i])).collect();
            self.bind_elems(out, lanes);
            return Ok(());
        }
        let size = d.bytes(1);
        let chunk = (align.min(16) as usize).min((n * size).next_power_of_two());
        let words = chunk / 4;
        if words == 0 || !(n * size).is_multiple_of(chunk) || chunk < 2 * size && size < 4 || n == 1 {
            let lanes = (0..n).map(|i| self.load_one(&p, i, d, invariant)).collect();
            self.bind_elems(out, lanes);
            return Ok(());
        }
        let mut regs = vec![];
        for c in 0..n * size / chunk {
            let q = self.offset_const(&p, (c * chunk) as i64, "i8");
            regs.extend(self.load_words(&q, words, size == 8, invariant, chunk));
        }
        self.bind_words(out, d, regs);
        Ok(())
    }

    /// Elements that share bytes: from an index on, or at each index.
    fn load_packed(&mut self, s: &Stmt, offset: i64) -> Lowered {
        let (b, n) = (s.bufs[0], self.ty(s.results[0]).lanes());
        let ty = self.sum_ty(s.args[0], offset, n);
        let indices = if ty == "i32" { vec![self.kept(s.args[0])] } else { self.raw(s.args[0]) };
        let masks = s.args.get(1).map(|m| self.raw(*m));
        let mut lanes = vec![];
        for l in 0..n {
            let index = self.e.int_to(&indices[if indices.len() == 1 { 0 } else { l }], ty);
            let at = self.e.int2c("add", &index, offset + if indices.len() == 1 { l as i64 } else { 0 });
            let Some(masks) = &masks else {
                lanes.push(self.packed_element(b, &at));
                continue;
            };
            let r = Reg { name: self.e.fresh(), ty: "i8" };
            self.e.line(format!("{r} = scf.if {} -> (i8) {{", masks[if masks.len() == 1 { 0 } else { l }]));
            let x = self.packed_element(b, &at);
            self.e.line(format!("scf.yield {x} : i8"));
            self.e.line("} else {");
            let zero = self.zero("i8");
            self.e.line(format!("scf.yield {zero} : i8"));
            self.e.line("}");
            lanes.push(r);
        }
        self.bind_elems(s.results[0], lanes);
        Ok(())
    }

    /// `words` 32-bit (or half as many 64-bit) words in one instruction.
    fn load_words(&mut self, p: &Reg, words: usize, wide: bool, invariant: &str, align: usize) -> Vec<Reg> {
        let (t, n) = if wide { ("i64", words / 2) } else { ("i32", words) };
        if n == 1 {
            return vec![self.e.op(t, format!("llvm.load {p}{invariant} {{alignment = {align} : i64}} : {} -> {t}", p.ty))];
        }
        let v = self.e.op("", format!("llvm.load {p}{invariant} {{alignment = {align} : i64}} : {} -> vector<{n}x{t}>", p.ty));
        (0..n)
            .map(|i| {
                let at = self.e.i32(i as i64);
                self.e.op(t, format!("llvm.extractelement {v}[{at} : i32] : vector<{n}x{t}>"))
            })
            .collect()
    }

    /// Bind a value to memory words in order.
    fn bind_words(&mut self, out: Val, d: DType, words: Vec<Reg>) {
        let t = llty(d);
        if packed(self.ty(out)) {
            return self.bind(out, words);
        }
        let mut elems = vec![];
        for w in &words {
            let per = super::emit::width(w.ty) as usize / 8 / d.bytes(1);
            if per == 1 {
                elems.push(self.e.conv("bitcast", w, t));
                continue;
            }
            let part = if d.bytes(1) == 1 { "i8" } else { "i16" };
            for i in 0..per {
                let x = if i == 0 { w.clone() } else { self.e.int2c("lshr", w, (i * d.bytes(1) * 8) as i64) };
                let x = self.e.conv("trunc", &x, part);
                elems.push(self.loaded(&x, d));
            }
        }
        self.bind(out, elems);
    }

    fn loaded(&mut self, x: &Reg, d: DType) -> Reg {
        if d == DType::Bool {
            let zero = self.e.int("i8", 0);
            return self.e.icmp("ne", x, &zero);
        }
        self.e.conv("bitcast", x, llty(d))
    }

    fn storable(&mut self, x: &Reg, d: DType) -> Reg {
        if d == DType::Bool { self.e.conv("zext", x, "i8") } else { x.clone() }
    }

    fn load_one(&mut self, p: &Reg, i: usize, d: DType, invariant: &str) -> Reg {
        let t = memory_ty(d);
        let q = self.offset_const(p, i as i64, t);
        let x = self.e.op(t, format!("llvm.load {q}{invariant} {{alignment = {} : i64}} : {} -> {t}", d.bytes(1), p.ty));
        self.loaded(&x, d)
    }

    fn load_if(&mut self, p: &Reg, i: usize, d: DType, invariant: &str, mask: &Reg) -> Reg {
        let t = llty(d);
        let r = Reg { name: self.e.fresh(), ty: t };
        self.e.line(format!("{r} = scf.if {mask} -> ({t}) {{"));
        let x = self.load_one(p, i, d, invariant);
        self.e.line(format!("scf.yield {x} : {t}"));
        self.e.line("} else {");
        let zero = self.zero(t);
        self.e.line(format!("scf.yield {zero} : {t}"));
        self.e.line("}");
        r
    }

    /// Zero of a register type.
    pub(super) fn zero(&mut self, t: &'static str) -> Reg {
        if t.starts_with('i') { self.e.int(t, 0) } else { self.e.float(t, 0.0) }
    }

    fn store_one(&mut self, p: &Reg, i: usize, d: DType, x: &Reg) {
        let t = memory_ty(d);
        let q = self.offset_const(p, i as i64, t);
        let x = self.storable(x, d);
        self.e.line(format!("llvm.store {x}, {q} {{alignment = {} : i64}} : {t}, {}", d.bytes(1), p.ty));
    }

    fn store_if(&mut self, p: &Reg, i: usize, d: DType, x: &Reg, mask: &Reg) {
        self.e.line(format!("scf.if {mask} {{"));
        self.store_one(p, i, d, x);
        self.e.line("}");
    }

    pub(super) fn store(&mut self, s: &Stmt, offset: i64) -> Lowered {
        let (b, v) = (s.bufs[0], s.args[1]);
        let d = self.buf(b).dtype;
        if self.sub_byte(d) {
            return self.unsupported("store", format!("of {d}"));
        }
        let n = self.ty(v).lanes();
        let (p, align) = self.element(b, s.args[0], offset);
        if let Some(mask) = s.args.get(2) {
            let (masks, elems) = (self.raw(*mask), self.elems(v));
            for i in 0..n {
                self.store_if(&p, i, d, &elems[i], &masks[i]);
            }
            return Ok(());
        }
        let size = d.bytes(1);
        let chunk = (align.min(16) as usize).min((n * size).next_power_of_two());
        let words = chunk / 4;
        if words == 0 || !(n * size).is_multiple_of(chunk) || chunk < 2 * size && size < 4 || n == 1 {
            let elems = self.elems(v);
            for (i, x) in elems.iter().enumerate() {
                self.store_one(&p, i, d, x);
            }
            return Ok(());
        }
        let regs = self.words(v, d);
        let per = if size == 8 { words / 2 } else { words };
        for (c, group) in regs.chunks(per).enumerate() {
            let q = self.offset_const(&p, (c * chunk) as i64, "i8");
            let t = group[0].ty;
            if per == 1 {
                self.e.line(format!("llvm.store {}, {q} {{alignment = {chunk} : i64}} : {t}, {}", group[0], q.ty));
                continue;
            }
            let mut vec = self.e.op("", format!("llvm.mlir.undef : vector<{per}x{t}>"));
            for (i, w) in group.iter().enumerate() {
                let at = self.e.i32(i as i64);
                vec = self.e.op("", format!("llvm.insertelement {w}, {vec}[{at} : i32] : vector<{per}x{t}>"));
            }
            self.e.line(format!("llvm.store {vec}, {q} {{alignment = {chunk} : i64}} : vector<{per}x{t}>, {}", q.ty));
        }
        Ok(())
    }

    /// A value as memory words: 64-bit ones for 8-byte elements, else 32-bit.
    fn words(&mut self, v: Val, d: DType) -> Vec<Reg> {
        if packed(self.ty(v)) {
            return self.raw(v);
        }
        let elems = self.elems(v);
        let size = d.bytes(1);
        if size >= 4 {
            let t = if size == 8 { "i64" } else { "i32" };
            return elems.iter().map(|x| self.e.conv("bitcast", x, t)).collect();
        }
        let (part, per) = if size == 1 { ("i8", 4) } else { ("i16", 2) };
        elems
            .chunks(per)
            .map(|group| {
                let mut word: Option<Reg> = None;
                for (i, x) in group.iter().enumerate() {
                    let x = self.storable(x, d);
                    let x = self.e.conv("bitcast", &x, part);
                    let x = self.e.conv("zext", &x, "i32");
                    let x = if i == 0 { x } else { self.e.int2c("shl", &x, (i * size * 8) as i64) };
                    word = Some(match word {
                        None => x,
                        Some(w) => self.e.int2("or", &w, &x),
                    });
                }
                word.expect("a group is not empty")
            })
            .collect()
    }

    /// Pointers to elements at a vector of indices.
    fn pointers(&mut self, b: Buf, indices: Val, offset: i64) -> Vec<Reg> {
        let (base, _) = self.base(b);
        let t = memory_ty(self.buf(b).dtype);
        let shared = self.buf(b).space == Space::Shared;
        let indices = if self.is_narrow(indices) { vec![self.kept(indices)] } else { self.raw(indices) };
        indices
            .iter()
            .map(|i| {
                let i = if shared { self.e.int_to(i, "i32") } else { i.clone() };
                let p = self.offset_by(&base, &i, t);
                self.offset_const_gep32(&p, offset, t)
            })
            .collect()
    }

    pub(super) fn gather(&mut self, s: &Stmt, offset: i64) -> Lowered {
        let (b, d) = (s.bufs[0], self.buf(s.bufs[0]).dtype);
        if d.is_packed() {
            return self.load_packed(s, offset);
        }
        if self.sub_byte(d) {
            return self.unsupported("gather", format!("of {d}"));
        }
        let ptrs = self.pointers(b, s.args[0], offset);
        let invariant = if self.constant_memory(b) { " invariant" } else { "" };
        let masks = s.args.get(1).map(|m| self.raw(*m));
        let elems = ptrs
            .iter()
            .enumerate()
            .map(|(i, p)| match &masks {
                Some(m) => self.load_if(p, 0, d, invariant, &m[if m.len() == 1 { 0 } else { i }]),
                None => self.load_one(p, 0, d, invariant),
            })
            .collect();
        self.bind_elems(s.results[0], elems);
        Ok(())
    }

    pub(super) fn scatter(&mut self, s: &Stmt, offset: i64) -> Lowered {
        let (b, d) = (s.bufs[0], self.buf(s.bufs[0]).dtype);
        if self.sub_byte(d) {
            return self.unsupported("scatter", format!("of {d}"));
        }
        let ptrs = self.pointers(b, s.args[0], offset);
        let elems = self.elems(s.args[1]);
        let masks = s.args.get(2).map(|m| self.raw(*m));
        for (i, (p, x)) in ptrs.iter().zip(&elems).enumerate() {
            match &masks {
                Some(m) => self.store_if(p, 0, d, x, &m[if m.len() == 1 { 0 } else { i }]),
                None => self.store_one(p, 0, d, x),
            }
        }
        Ok(())
    }

    pub(super) fn atomic_add(&mut self, s: &Stmt, offset: i64) -> Lowered {
        let d = self.buf(s.bufs[0]).dtype;
        let (p, _) = self.element(s.bufs[0], s.args[0], offset);
        let x = self.scalar(s.args[1]);
        let op = match d {
            _ if d.is_float() && d.bytes(1) >= 2 => "fadd",
            DType::I32 | DType::U32 | DType::I64 | DType::U64 => "add",
            _ => return self.unsupported("atomic_add", format!("on {d}")),
        };
        self.e.op(x.ty, format!("llvm.atomicrmw {op} {p}, {x} monotonic : {}, {}", p.ty, x.ty));
        Ok(())
    }
}
