//! Hopper words.
use super::{Emit, Lower, Lowered, Reg, llty, packed};
use crate::tile::hopper::{HopperWord as H, Major, Role, Vary};
use crate::tile::{ReduceFn, Stmt, Val};
use pavage_ir::{DType, ScalarFn};

/// The role whose block is being written.
#[derive(Clone, Copy)]
pub(super) struct RoleScope {
    /// Index of its first warpgroup in the block.
    first: u32,
}

/// A thread's place in its warpgroup.
struct Place {
    /// Warp of the warpgroup.
    warp: Reg,
    /// Lane of the warp.
    lane: Reg,
}

const TMA_MASK: i64 = 0x3FFFF;
/// Descriptor bits 32..: 128-byte swizzle, 1024 bytes from one group of 8 rows to the next.
const DESC_HIGH: i64 = (1 << 62) | (64 << 32);

fn structure(n: usize) -> String {
    format!("!llvm.struct<({})>", vec!["f32"; n].join(", "))
}

impl<'k> Lower<'k> {
    pub(super) fn hopper(&mut self, w: &'k H, s: &'k Stmt) -> Lowered {
        let everywhere = matches!(w, H::Ex2 | H::Rcp | H::AccRows | H::AccCols | H::AccLoad { .. } | H::AccStore { .. });
        if !self.hopper && !everywhere {
            return self.unsupported(s.op.name(), "it needs sm_90a");
        }
        match w {
            H::Roles(roles) => self.roles(roles, s)?,
            H::GroupId => {
                let (w, first) = (self.warpgroup(), self.role.map_or(0, |r| r.first));
                let g = self.e.int2c("add", &w, -i64::from(first));
                self.index_result(s, &g);
            }
            H::GroupThread => {
                let t = self.thread();
                let t = self.e.int2c("and", &t, 127);
                self.index_result(s, &t);
            }
            H::Elect => {
                let w = self.warp();
                let w = self.e.int2c("and", &w, 3);
                let zero = self.e.i32(0);
                let first = self.e.icmp("eq", &w, &zero);
                let r = Reg { name: self.e.fresh(), ty: "i1" };
                self.e.line(format!("{r} = scf.if {first} -> (i1) {{"));
                let p = self.e.op("i1", "nvvm.elect.sync -> i1");
                self.e.line(format!("scf.yield {p} : i1"));
                self.e.line("} else {");
                let no = self.e.int("i1", 0);
                self.e.line(format!("scf.yield {no} : i1"));
                self.e.line("}");
                self.bind(s.results[0], vec![r]);
            }
            H::FenceProxyAsync => self.e.line("nvvm.fence.proxy {kind = #nvvm.proxy_kind<async.shared>, space = #nvvm.shared_space<cta>}"),
            H::MbarInit { count } => {
                let (p, n) = (self.barrier(s, 0, 0), self.e.i32(i64::from(*count)));
                self.e.line(format!("nvvm.mbarrier.init {p}, {n} : !llvm.ptr<3>, i32"));
            }
            H::FenceMbarInit => self.e.line("nvvm.fence.mbarrier.init"),
            H::MbarExpect { bytes } => {
                let (p, n) = (self.barrier(s, 0, 0), self.e.i32(i64::from(*bytes)));
                self.e.line(format!("nvvm.mbarrier.arrive.expect_tx {p}, {n} : !llvm.ptr<3>, i32"));
            }
            H::MbarArrive => {
                let p = self.barrier(s, 0, 0);
                if let Some(rank) = s.args.get(1) {
                    let rank = self.small(*rank);
                    let remote = self.e.op("!llvm.ptr<7>", format!("nvvm.mapa {p}, {rank} : !llvm.ptr<3> -> !llvm.ptr<7>"));
                    self.e.line(format!("nvvm.mbarrier.arrive {remote} : !llvm.ptr<7>"));
                } else {
                    self.e.op("i64", format!("nvvm.mbarrier.arrive {p} : !llvm.ptr<3> -> i64"));
                }
            }
            H::MbarWait => {
                let (p, parity, ticks) = (self.barrier(s, 0, 0), self.small(s.args[1]), self.e.i32(10_000_000));
                self.e.line(format!("nvvm.mbarrier.try_wait.parity {p}, {parity}, {ticks} : !llvm.ptr<3>, i32, i32"));
            }
            H::TmaLoad { map, multicast } => {
                let (dst, _) = self.element(s.bufs[0], s.args[0], 0);
                let dst = self.e.conv("addrspacecast", &dst, "!llvm.ptr<7>");
                let bar = self.barrier(s, 1, 1);
                let coords: Vec<Reg> = s.args[2..].iter().map(|c| self.small(*c)).collect();
                let mask = if *multicast == 0 {
                    String::new()
                } else {
                    let m = self.e.int("i16", i64::from(*multicast as i16));
                    format!(" multicast_mask = {m}")
                };
                self.e.line(format!(
                    "nvvm.cp.async.bulk.tensor.shared.cluster.global {dst}, %map{map}, {bar}, box[{}]{mask} : !llvm.ptr<7>, !llvm.ptr",
                    Emit::list(&coords)
                ));
            }
            H::TmaStore { map } => {
                let (src, _) = self.element(s.bufs[0], s.args[0], 0);
                let coords: Vec<Reg> = s.args[1..].iter().map(|c| self.small(*c)).collect();
                self.e.line(format!("nvvm.cp.async.bulk.tensor.global.shared.cta %map{map}, {src}, box[{}] : !llvm.ptr, !llvm.ptr<3>", Emit::list(&coords)));
            }
            H::BulkCommit => self.e.line("nvvm.cp.async.bulk.commit.group"),
            H::BulkWait { pending, read } => self.e.line(format!("nvvm.cp.async.bulk.wait_group {pending}{}", if *read { " {read}" } else { "" })),
            H::Wgmma { n, k, zero, major, a_panel, b_panel } => self.wgmma(s, usize::from(*n), usize::from(*k), *zero, *major, *a_panel, *b_panel),
            H::WgmmaFence => self.e.line("nvvm.wgmma.fence.aligned"),
            H::WgmmaCommit => self.e.line("nvvm.wgmma.commit.group.sync.aligned"),
            H::WgmmaWait { pending } => self.wgmma_wait(s, *pending),
            H::NamedSync { threads } | H::NamedArrive { threads } => {
                let (id, n) = (self.small(s.args[0]), self.e.i32(i64::from(*threads)));
                let name = if matches!(w, H::NamedSync { .. }) { "barrier" } else { "barrier.arrive" };
                self.e.line(format!("nvvm.{name} id = {id} number_of_threads = {n}"));
            }
            H::ClusterSync => {
                self.e.line("nvvm.cluster.arrive {aligned}");
                self.e.line("nvvm.cluster.wait {aligned}");
            }
            H::ClusterRank => self.special(s.results[0], "cluster.ctarank"),
            H::ClusterId => self.special(s.results[0], "clusterid.x"),
            H::ClusterCount => self.special(s.results[0], "nclusterid.x"),
            H::StMatrix { panel, col } => self.stmatrix(s, *panel, usize::from(*col)),
            H::AccRows | H::AccCols => {
                let place = self.place();
                let n = self.ty(s.results[0]).lanes();
                let first = if matches!(w, H::AccRows) { self.first_row(&place) } else { self.first_col(&place) };
                let regs = (0..n)
                    .map(|i| {
                        let k = if matches!(w, H::AccRows) { 8 * (i / 2 % 2) } else { 8 * (i / 4) + i % 2 };
                        if k == 0 { first.clone() } else { self.e.int2c("add", &first, k as i64) }
                    })
                    .collect();
                self.bind(s.results[0], regs);
            }
            H::RowReduce { with, quad } => self.row_reduce(s, *with, *quad)?,
            H::RowSpread => {
                let n = self.ty(s.results[0]).lanes();
                if packed(self.ty(s.results[0])) {
                    let rows = self.elems(s.args[0]);
                    self.bind_elems(s.results[0], (0..n).map(|i| rows[i / 2 % 2].clone()).collect());
                } else {
                    let rows = self.raw(s.args[0]);
                    self.bind(s.results[0], (0..n).map(|i| rows[i / 2 % 2].clone()).collect());
                }
            }
            H::AccLoad { vary, pairs } => self.acc_load(s, *vary, *pairs)?,
            H::AccStore { pairs } => self.acc_store(s, *pairs)?,
            H::Ex2 | H::Rcp => {
                use super::math::{Arith, Un};
                let op = if matches!(w, H::Ex2) { Un::Ex2 } else { Un::Rcp };
                let regs = self.raw(s.args[0]).iter().map(|r| self.e.un(op, r)).collect();
                self.bind(s.results[0], regs);
            }
            H::PdlWait => self.e.line("nvvm.griddepcontrol wait"),
            H::PdlTrigger => self.e.line("nvvm.griddepcontrol launch_dependents"),
        }
        Ok(())
    }

    // ---- threads ----

    fn thread(&mut self) -> Reg {
        self.e.op("i32", "nvvm.read.ptx.sreg.tid.x : i32")
    }

    /// The warp of the block, in a form ptxas knows to be uniform.
    fn warp(&mut self) -> Reg {
        let t = self.thread();
        let w = self.e.int2c("lshr", &t, 5);
        let (m, z, c) = (self.e.i32(-1), self.e.i32(0), self.e.i32(31));
        self.e.op("i32", format!("nvvm.shfl.sync idx {m}, {w}, {z}, {c} : i32 -> i32"))
    }

    fn warpgroup(&mut self) -> Reg {
        let w = self.warp();
        self.e.int2c("lshr", &w, 2)
    }

    fn place(&mut self) -> Place {
        let t = self.thread();
        let w = self.e.int2c("lshr", &t, 5);
        Place { warp: self.e.int2c("and", &w, 3), lane: self.e.int2c("and", &t, 31) }
    }

    /// The first row a thread holds, in the 64-row tile.
    fn first_row(&mut self, p: &Place) -> Reg {
        let w = self.e.int2c("shl", &p.warp, 4);
        let l = self.e.int2c("lshr", &p.lane, 2);
        self.e.int2("add", &w, &l)
    }

    /// The first column a thread holds.
    fn first_col(&mut self, p: &Place) -> Reg {
        let l = self.e.int2c("and", &p.lane, 3);
        self.e.int2c("shl", &l, 1)
    }

    fn index_result(&mut self, s: &Stmt, r: &Reg) {
        self.bind(s.results[0], vec![r.clone()]);
    }

    /// Pointer to the barrier that operand `arg` picks from buffer `buf`.
    fn barrier(&mut self, s: &Stmt, buf: usize, arg: usize) -> Reg {
        self.element(s.bufs[buf], s.args[arg], 0).0
    }

    fn roles(&mut self, roles: &[Role], s: &'k Stmt) -> Lowered {
        let entry = if self.k.launch.max_regs > 0 { self.k.launch.max_regs } else { (65536 / self.k.launch.threads.max(1)) / 8 * 8 };
        let group = self.warpgroup();
        let mut first = 0u32;
        let outer = self.role;
        for (i, role) in roles.iter().enumerate() {
            let last = i + 1 == roles.len();
            if !last {
                let end = self.e.i32(i64::from(first) + i64::from(role.groups));
                let c = self.e.icmp("ult", &group, &end);
                self.e.line(format!("scf.if {c} {{"));
            }
            if role.regs > 0 {
                let word = if u32::from(role.regs) < entry { "decrease" } else { "increase" };
                self.e.line(format!("nvvm.setmaxregister {word} {}", role.regs));
            }
            self.role = Some(RoleScope { first });
            self.block(&s.blocks[i])?;
            if !last {
                self.e.line("} else {");
            }
            first += u32::from(role.groups);
        }
        for _ in 1..roles.len() {
            self.e.line("}");
        }
        self.role = outer;
        Ok(())
    }

    // ---- matrix products ----

    /// The low word of a shared-memory descriptor of the element at `index`, leading offset in 16-byte units.
    fn descriptor(&mut self, s: &Stmt, buf: usize, index: Val, lead: i64) -> Reg {
        let (p, _) = self.element(s.bufs[buf], index, 0);
        let a = self.e.conv("ptrtoint", &p, "i32");
        let a = self.e.int2c("and", &a, TMA_MASK);
        let a = self.e.int2c("lshr", &a, 4);
        self.e.int2c("or", &a, lead << 16)
    }

    /// The descriptor `bytes` further on.
    fn descriptor_at(&mut self, low: &Reg, bytes: usize) -> Reg {
        let low = if bytes == 0 { low.clone() } else { self.e.int2c("add", low, (bytes / 16) as i64) };
        let d = self.e.conv("zext", &low, "i64");
        self.e.int2c("or", &d, DESC_HIGH)
    }

    #[expect(clippy::too_many_arguments, reason = "the attributes of one word")]
    fn wgmma(&mut self, s: &Stmt, n: usize, k: usize, zero: bool, major: Major, a_panel: u32, b_panel: u32) {
        let from_registers = s.bufs.len() == 1;
        let d = self.buf(s.bufs[0]).dtype;
        let t = llty(d);
        let regs = n / 2;
        let st = structure(regs);
        let (a_panel, b_panel) = (a_panel as usize * 2, b_panel as usize * 2);
        let lead = if major == Major::Mn { (b_panel / 16) as i64 } else { 1 };
        let b = self.descriptor(s, s.bufs.len() - 1, s.args[1], lead);
        let a = if from_registers { None } else { Some(self.descriptor(s, 0, s.args[0], 1)) };
        let a_regs = if from_registers { self.raw(s.args[0]) } else { vec![] };
        let mut acc = if zero { vec![] } else { self.raw(s.args[2]) };
        let mut whole: Option<Reg> = None;
        for step in 0..k / 16 {
            let at = step * 16;
            let b_off = match major {
                Major::K => at / 64 * b_panel + at % 64 * 2,
                Major::Mn => at * 128,
            };
            let db = self.descriptor_at(&b, b_off);
            let fresh = zero && step == 0;
            if let Some(a) = &a {
                let da = self.descriptor_at(a, at / 64 * a_panel + at % 64 * 2);
                let input = match whole.take() {
                    Some(w) => w,
                    None => self.gather_struct(&acc, regs, &st),
                };
                let layout = if major == Major::K { "col" } else { "row" };
                let scale = if fresh { "zero" } else { "one" };
                whole = Some(self.e.op(
                    "struct",
                    format!("nvvm.wgmma.mma_async {da}, {db}, {input}, <m = 64, n = {n}, k = 16>, D [<f32>, <{scale}>], A [<{t}>, <one>, <row>], B [<{t}>, <one>, <{layout}>] : {st} -> {st}"),
                ));
                continue;
            }
            // Registers as the first operand: the dialect has no such form.
            if fresh {
                let z = self.e.float("f32", 0.0);
                acc = vec![z; regs];
            }
            let outs = (0..regs).map(|i| format!("${i}")).collect::<Vec<_>>().join(", ");
            let at_a = 2 * regs;
            let text = format!(
                "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t} {{{outs}}}, {{${}, ${}, ${}, ${}}}, ${}, {}, 1, 1, {};",
                at_a,
                at_a + 1,
                at_a + 2,
                at_a + 3,
                at_a + 4,
                u8::from(!fresh),
                u8::from(major == Major::Mn)
            );
            let mut operands = acc.clone();
            operands.extend_from_slice(&a_regs[4 * step..4 * step + 4]);
            operands.push(db);
            let cons = constraints(regs, &["r", "r", "r", "r", "l"]);
            acc = self.asm(&text, &cons, &operands, regs);
        }
        let out = match whole {
            Some(w) => (0..regs).map(|i| self.e.op("f32", format!("llvm.extractvalue {w}[{i}] : {st}"))).collect(),
            None => acc,
        };
        self.bind(s.results[0], out);
    }

    fn gather_struct(&mut self, regs: &[Reg], n: usize, st: &str) -> Reg {
        let mut v = self.e.op("struct", format!("llvm.mlir.undef : {st}"));
        for (i, r) in regs.iter().enumerate().take(n) {
            v = self.e.op("struct", format!("llvm.insertvalue {r}, {v}[{i}] : {st}"));
        }
        v
    }

    /// Inline assembly with `n` f32 results tied to the first `n` operands.
    fn asm(&mut self, text: &str, cons: &str, operands: &[Reg], n: usize) -> Vec<Reg> {
        let st = if n == 1 { "f32".to_owned() } else { structure(n) };
        let r = self.e.op(
            "struct",
            format!("llvm.inline_asm has_side_effects asm_dialect = att \"{text}\", \"{cons}\" {} : ({}) -> {st}", Emit::list(operands), Emit::types(operands)),
        );
        if n == 1 {
            return vec![Reg { name: r.name, ty: "f32" }];
        }
        (0..n).map(|i| self.e.op("f32", format!("llvm.extractvalue {r}[{i}] : {st}"))).collect()
    }

    /// One assembly statement that all accumulators flow through, so that no use of them can move above the wait.
    fn wgmma_wait(&mut self, s: &Stmt, pending: u8) {
        let regs = self.flat(&s.args);
        if regs.is_empty() {
            self.e.line(format!("nvvm.wgmma.wait.group.sync.aligned {pending}"));
            return;
        }
        let cons = constraints(regs.len(), &["~{memory}"]);
        let out = self.asm(&format!("wgmma.wait_group.sync.aligned {pending};"), &cons, &regs, regs.len());
        let mut at = 0;
        for r in &s.results {
            let n = self.ty(*r).lanes();
            self.bind(*r, out[at..at + n].to_vec());
            at += n;
        }
    }

    // ---- fragments ----

    fn stmatrix(&mut self, s: &Stmt, panel: u32, col: usize) {
        let regs = self.raw(s.args[1]);
        let (base, _) = self.element(s.bufs[0], s.args[0], 0);
        let place = self.place();
        let w = self.e.int2c("shl", &place.warp, 4);
        let l = self.e.int2c("and", &place.lane, 15);
        let row = self.e.int2("add", &w, &l);
        let row7 = self.e.int2c("and", &row, 7);
        let high = self.e.int2c("lshr", &place.lane, 4);
        let bytes = self.e.int2c("shl", &row, 7);
        let base = self.offset_by(&base, &bytes, "i8");
        for (j, group) in regs.chunks(4).enumerate() {
            // Sixteen columns at a time.
            let j = col / 16 + j;
            let chunk = self.e.int2c("add", &high, (j % 4 * 2) as i64);
            let chunk = self.e.int2("xor", &chunk, &row7);
            let chunk = self.e.int2c("shl", &chunk, 4);
            let p = self.offset_const(&base, (j / 4) as i64 * i64::from(panel) * 2, "i8");
            let p = self.offset_by(&p, &chunk, "i8");
            self.e.line(format!(
                "nvvm.stmatrix {p}, {} {{eltType = #nvvm.ld_st_matrix_elt_type<b16>, layout = #nvvm.mma_layout<row>, shape = #nvvm.ld_st_matrix_shape<m = 8, n = 8>}} : !llvm.ptr<3>, {}",
                Emit::list(group),
                Emit::types(group)
            ));
        }
    }

    fn row_reduce(&mut self, s: &Stmt, with: ReduceFn, quad: bool) -> Lowered {
        let regs = self.raw(s.args[0]);
        let f = match with {
            ReduceFn::Add => ScalarFn::Add,
            ReduceFn::Min => ScalarFn::Min,
            _ => ScalarFn::Max,
        };
        // Two chains a row, joined at the end.
        let mut chains: [[Option<Reg>; 2]; 2] = Default::default();
        for (i, r) in regs.iter().enumerate() {
            let slot = &mut chains[i / 2 % 2][i % 2];
            *slot = Some(match slot.take() {
                None => r.clone(),
                Some(a) => self.call(f, DType::F32, &[a, r.clone()])?,
            });
        }
        let mut rows = vec![];
        for [a, b] in chains {
            let (Some(a), Some(b)) = (a, b) else { return self.unsupported("row_reduce", "of fewer than 4 registers") };
            rows.push(self.call(f, DType::F32, &[a, b])?);
        }
        if quad {
            for lanes in [1, 2] {
                let (m, x, c) = (self.e.i32(-1), self.e.i32(lanes), self.e.i32(31));
                let other: Vec<Reg> = rows.iter().map(|r| self.e.op("f32", format!("nvvm.shfl.sync bfly {m}, {r}, {x}, {c} : f32 -> f32"))).collect();
                rows = rows.into_iter().zip(other).map(|(a, b)| self.call(f, DType::F32, &[a, b])).collect::<Result<_, _>>()?;
            }
        }
        self.bind(s.results[0], rows);
        Ok(())
    }

    /// Addresses and conditions of a fragment's elements in memory: by row half `h`, the pointer to its first column;
    /// by row half, whether the row exists; and the first column with its limit.
    fn acc_places(&mut self, s: &Stmt, args: &[Val], vary: Vary) -> AccPlaces {
        let place = self.place();
        let (r0, c0) = (self.first_row(&place), self.first_col(&place));
        let narrow = self.place_fits([0, 1, 2, 3, 4, 5].map(|i| args[i]));
        let ty = if narrow { "i32" } else { "i64" };
        let (r0, c0) = (self.e.conv("zext", &r0, ty), self.e.conv("zext", &c0, ty));
        let [base, row, col, rows, cols, stride] = [0, 1, 2, 3, 4, 5].map(|i| self.kept_as(args[i], ty));
        let col = self.e.int2("add", &col, &c0);
        let (start, _) = self.base(s.bufs[0]);
        let t = llty(self.buf(s.bufs[0]).dtype);
        let mut ptrs = vec![];
        let mut row_ok = vec![];
        for h in 0..2 {
            let r = self.e.int2("add", &row, &r0);
            let r = if h == 1 { self.e.int2c("add", &r, 8) } else { r };
            row_ok.push(self.e.icmp("slt", &r, &rows));
            let at = match vary {
                Vary::Both => {
                    let at = self.e.int2("mul", &r, &stride);
                    let at = self.e.int2("add", &at, &base);
                    self.e.int2("add", &at, &col)
                }
                Vary::Cols => self.e.int2("add", &base, &col),
                Vary::Rows => self.e.int2("add", &base, &r),
            };
            ptrs.push(self.offset_by(&start, &at, t));
        }
        // Columns left from the thread's first one on.
        let left = self.e.int2("sub", &cols, &col);
        let left = if narrow { left } else { self.clamp_i32(&left) };
        AccPlaces { ptrs, row_ok, left }
    }

    fn clamp_i32(&mut self, x: &Reg) -> Reg {
        let cap = self.e.i64(1 << 20);
        let low = self.e.i64(-(1 << 20));
        let x = self.e.op("i64", format!("llvm.intr.smin({x}, {cap}) : (i64, i64) -> i64"));
        let x = self.e.op("i64", format!("llvm.intr.smax({x}, {low}) : (i64, i64) -> i64"));
        self.e.conv("trunc", &x, "i32")
    }

    fn acc_load(&mut self, s: &Stmt, vary: Vary, pairs: bool) -> Lowered {
        let out = s.results[0];
        let (ty, d) = (self.ty(out), self.buf(s.bufs[0]).dtype);
        if !matches!(d, DType::F16 | DType::BF16 | DType::F32 | DType::I32 | DType::U8 | DType::I8) {
            return self.unsupported("acc_load", format!("of {d}"));
        }
        let size = d.bytes(1) as i64;
        let places = self.acc_places(s, &s.args, vary);
        let mut cache: Vec<(usize, Vec<Reg>)> = vec![];
        let mut regs = vec![];
        for i in (0..ty.lanes()).step_by(2) {
            let (h, c) = (i / 2 % 2, 8 * (i / 4));
            // Rows differ between halves, columns between groups of four registers.
            let key = match vary {
                Vary::Both => i,
                Vary::Cols => c,
                Vary::Rows => h,
            };
            if let Some((_, found)) = cache.iter().find(|(k, _)| *k == key) {
                regs.extend(found.clone());
                continue;
            }
            let pair = match vary {
                Vary::Rows => {
                    let x = self.load_guarded(&places.ptrs[h], &places.row_ok[h], d, false);
                    let x = x[0].clone();
                    if size == 2 { vec![self.splat16(&x)] } else { vec![x.clone(), x] }
                }
                _ => {
                    let p = self.offset_const(&places.ptrs[h], c as i64 * size, "i8");
                    let ok = |l: &mut Self, col: usize| {
                        let k = l.e.i32(col as i64);
                        let inside = l.e.icmp("sgt", &places.left, &k);
                        if vary == Vary::Both { l.e.int2("and", &inside, &places.row_ok[h]) } else { inside }
                    };
                    let first = ok(self, c);
                    if pairs {
                        self.load_guarded(&p, &first, d, true)
                    } else {
                        let second = ok(self, c + 1);
                        let a = self.load_guarded(&p, &first, d, false).remove(0);
                        let q = self.offset_const(&p, size, "i8");
                        let b = self.load_guarded(&q, &second, d, false).remove(0);
                        if size == 2 { vec![self.join16(&a, &b)] } else { vec![a, b] }
                    }
                }
            };
            cache.push((key, pair.clone()));
            regs.extend(pair);
        }
        self.bind(out, regs);
        Ok(())
    }

    fn join16(&mut self, a: &Reg, b: &Reg) -> Reg {
        let half = [a, b].map(|x| self.e.conv("bitcast", x, "i16"));
        let [lo, hi] = half.map(|x| self.e.conv("zext", &x, "i32"));
        let hi = self.e.int2c("shl", &hi, 16);
        self.e.int2("or", &lo, &hi)
    }

    /// One or two elements where `ok`, else 0, without a branch. 16-bit pairs come as one register.
    fn load_guarded(&mut self, p: &Reg, ok: &Reg, d: DType, pair: bool) -> Vec<Reg> {
        let ok = self.e.conv("zext", ok, "i32");
        let head = "{ .reg .pred p; setp.ne.b32 p, $";
        let one = |l: &mut Self, bits: u32, con: &str, ty: &'static str| {
            let text = format!("{head}2, 0; mov.b{} $0, 0; @p ld.global.b{bits} $0, [$1]; }}", bits.max(16));
            l.e.op(ty, format!("llvm.inline_asm has_side_effects asm_dialect = att \"{text}\", \"={con},l,r\" {p}, {ok} : ({}, i32) -> {ty}", p.ty))
        };
        // Words in the registers of their kind.
        let (con, word) = if d == DType::I32 { ("r", "i32") } else { ("f", "f32") };
        match (d.bytes(1), pair) {
            (1, true) => {
                let both = one(self, 16, "h", "i16");
                let high = self.e.int2c("lshr", &both, 8);
                [both, high].iter().map(|x| self.e.conv("trunc", x, "i8")).collect()
            }
            (1, false) => {
                let x = one(self, 8, "h", "i16");
                vec![self.e.conv("trunc", &x, "i8")]
            }
            (2, true) => vec![one(self, 32, "r", "i32")],
            (2, false) => {
                let x = one(self, 16, "h", "i16");
                vec![self.e.conv("bitcast", &x, llty(d))]
            }
            (_, false) => vec![one(self, 32, con, word)],
            (_, true) => {
                let text = format!("{head}3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.v2.b32 {{$0, $1}}, [$2]; }}");
                let st = format!("!llvm.struct<({word}, {word})>");
                let r = self.e.op(
                    "struct",
                    format!("llvm.inline_asm has_side_effects asm_dialect = att \"{text}\", \"=&{con},=&{con},l,r\" {p}, {ok} : ({}, i32) -> {st}", p.ty),
                );
                (0..2).map(|i| self.e.op(word, format!("llvm.extractvalue {r}[{i}] : {st}"))).collect()
            }
        }
    }

    fn acc_store(&mut self, s: &Stmt, pairs: bool) -> Lowered {
        let v = s.args[0];
        let (n, d) = (self.ty(v).lanes(), self.buf(s.bufs[0]).dtype);
        if !matches!(d, DType::F16 | DType::BF16 | DType::F32 | DType::I32 | DType::U8 | DType::I8) {
            return self.unsupported("acc_store", format!("of {d}"));
        }
        let size = d.bytes(1) as i64;
        let places = self.acc_places(s, &s.args[1..], Vary::Both);
        let elems = if pairs && size == 2 { self.raw(v) } else { self.elems(v) };
        for i in (0..n).step_by(2) {
            let (h, c) = (i / 2 % 2, 8 * (i / 4));
            let p = self.offset_const(&places.ptrs[h], c as i64 * size, "i8");
            for half in 0..if pairs { 1 } else { 2 } {
                let k = self.e.i32((c + half) as i64);
                let inside = self.e.icmp("sgt", &places.left, &k);
                let ok = self.e.int2("and", &inside, &places.row_ok[h]);
                let ok = self.e.conv("zext", &ok, "i32");
                let p = self.offset_const(&p, half as i64 * size, "i8");
                let head = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p st.global";
                let (text, cons, ops) = match (size, pairs) {
                    (2, true) => (format!("{head}.b32 [$0], $2; }}"), "l,r,r", vec![elems[i / 2].clone()]),
                    (2, false) => {
                        let x = self.e.conv("bitcast", &elems[i + half], "i16");
                        (format!("{head}.b16 [$0], $2; }}"), "l,r,h", vec![x])
                    }
                    (1, true) => {
                        let [low, high] = [i, i + 1].map(|i| self.e.conv("zext", &elems[i], "i16"));
                        let high = self.e.int2c("shl", &high, 8);
                        (format!("{head}.b16 [$0], $2; }}"), "l,r,h", vec![self.e.int2("or", &low, &high)])
                    }
                    (1, false) => {
                        let x = self.e.conv("zext", &elems[i + half], "i16");
                        (format!("{head}.b8 [$0], $2; }}"), "l,r,h", vec![x])
                    }
                    (_, true) => {
                        let cons = if d == DType::I32 { "l,r,r,r" } else { "l,r,f,f" };
                        (format!("{head}.v2.b32 [$0], {{$2, $3}}; }}"), cons, vec![elems[i].clone(), elems[i + 1].clone()])
                    }
                    (_, false) => (format!("{head}.b32 [$0], $2; }}"), if d == DType::I32 { "l,r,r" } else { "l,r,f" }, vec![elems[i + half].clone()]),
                };
                let types: Vec<&str> = [p.ty, "i32"].into_iter().chain(ops.iter().map(|o| o.ty)).collect();
                self.e.line(format!(
                    "llvm.inline_asm has_side_effects asm_dialect = att \"{text}\", \"{cons},~{{memory}}\" {p}, {ok}, {} : ({}) -> ()",
                    Emit::list(&ops),
                    types.join(", ")
                ));
            }
        }
        Ok(())
    }
}

struct AccPlaces {
    ptrs: Vec<Reg>,
    row_ok: Vec<Reg>,
    left: Reg,
}

/// `n` float results tied to the first `n` operands, then these.
fn constraints(n: usize, rest: &[&str]) -> String {
    let outs = vec!["=f".to_owned(); n];
    let ties = (0..n).map(|i| i.to_string());
    outs.into_iter().chain(ties).chain(rest.iter().map(|r| (*r).to_owned())).collect::<Vec<_>>().join(",")
}
