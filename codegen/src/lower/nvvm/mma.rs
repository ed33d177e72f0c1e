//! Ampere words.
use super::{Emit, Lower, Lowered, llty};
use crate::tile::Stmt;
use crate::tile::mma::MmaWord as M;
use pavage_ir::DType;

impl Lower<'_> {
    pub(super) fn mma(&mut self, w: &M, s: &Stmt) -> Lowered {
        match w {
            M::CpAsyncCommit => self.e.line("nvvm.cp.async.commit.group"),
            M::CpAsyncWait { pending } => self.e.line(format!("nvvm.cp.async.wait.group {pending}")),
            M::CpAsync { n, offset } => {
                let bytes = self.buf(s.bufs[0]).dtype.bytes(usize::from(*n));
                let (to, _) = self.element(s.bufs[0], s.args[0], *offset);
                let (from, _) = self.element(s.bufs[1], s.args[1], 0);
                let inside = self.scalar(s.args[2]);
                let (all, none) = (self.e.i32(bytes as i64), self.e.i32(0));
                let size = self.e.select(&inside, &all, &none);
                // Only whole 16-byte copies can pass the first-level cache by.
                let cache = if bytes == 16 { "cg" } else { "ca" };
                self.e.line(format!("nvvm.cp.async.shared.global {to}, {from}, {bytes}, cache = {cache}, {size} : {}, {}, i32", to.ty, from.ty));
            }
            M::LdMatrix { trans, offset } => {
                let (p, _) = self.element(s.bufs[0], s.args[0], *offset);
                let layout = if *trans { "col" } else { "row" };
                let st = "!llvm.struct<(i32, i32, i32, i32)>";
                let r = self.e.op(
                    "struct",
                    format!(
                        "nvvm.ldmatrix {p} {{eltType = #nvvm.ld_st_matrix_elt_type<b16>, layout = #nvvm.mma_layout<{layout}>, num = 4 : i32, shape = #nvvm.ld_st_matrix_shape<m = 8, n = 8>}} : (!llvm.ptr<3>) -> {st}"
                    ),
                );
                let regs = (0..4).map(|i| self.e.op("i32", format!("llvm.extractvalue {r}[{i}] : {st}"))).collect();
                self.bind(s.results[0], regs);
            }
            M::Mma => {
                let d = self.ty(s.args[1]).dtype();
                // The dialect takes f16 as vectors and bf16 as words.
                let (operand, types) = match d {
                    DType::F16 => ("vector<2xf16>", ""),
                    _ => ("i32", "multiplicandAPtxType = #nvvm.mma_type<bf16>, multiplicandBPtxType = #nvvm.mma_type<bf16>, "),
                };
                debug_assert!(matches!(llty(d), "f16" | "bf16"));
                let mut acc = self.raw(s.args[0]);
                let a: Vec<_> = self.raw(s.args[1]).iter().map(|r| self.e.conv("bitcast", r, operand)).collect();
                let b: Vec<_> = self.flat(&s.args[2..]).iter().map(|r| self.e.conv("bitcast", r, operand)).collect();
                let st = "!llvm.struct<(f32, f32, f32, f32)>";
                for (c, b) in acc.chunks_mut(4).zip(b.chunks(2)) {
                    let r = self.e.op(
                        "struct",
                        format!(
                            "nvvm.mma.sync A[{}] B[{}] C[{}] {{layoutA = #nvvm.mma_layout<row>, layoutB = #nvvm.mma_layout<col>, {types}shape = #nvvm.shape<m = 16, n = 8, k = 16>}} : ({operand}, {operand}, f32) -> {st}",
                            Emit::list(&a),
                            Emit::list(b),
                            Emit::list(c)
                        ),
                    );
                    for (i, c) in c.iter_mut().enumerate() {
                        *c = self.e.op("f32", format!("llvm.extractvalue {r}[{i}] : {st}"));
                    }
                }
                self.bind(s.results[0], acc);
            }
            M::MmaBytes { a, b } => {
                let [lhs, rhs] = [a, b].map(|d| if *d == DType::I8 { "s8" } else { "u8" });
                let mut acc = self.raw(s.args[0]);
                let (a, b) = (self.raw(s.args[1]), self.flat(&s.args[2..]));
                let st = "!llvm.struct<(i32, i32, i32, i32)>";
                for (c, b) in acc.chunks_mut(4).zip(b.chunks(2)) {
                    let r = self.e.op(
                        "struct",
                        format!(
                            "nvvm.mma.sync A[{}] B[{}] C[{}] {{layoutA = #nvvm.mma_layout<row>, layoutB = #nvvm.mma_layout<col>, intOverflowBehavior = #nvvm.mma_int_overflow<wrapped>, multiplicandAPtxType = #nvvm.mma_type<{lhs}>, multiplicandBPtxType = #nvvm.mma_type<{rhs}>, shape = #nvvm.shape<m = 16, n = 8, k = 32>}} : (i32, i32, i32) -> {st}",
                            Emit::list(&a),
                            Emit::list(b),
                            Emit::list(c)
                        ),
                    );
                    for (i, c) in c.iter_mut().enumerate() {
                        *c = self.e.op("i32", format!("llvm.extractvalue {r}[{i}] : {st}"));
                    }
                }
                self.bind(s.results[0], acc);
            }
        }
        Ok(())
    }
}
