//! Tile IR to the llvm, nvvm and scf dialects, one module for many kernels; [`crate::mlir`] and
//! [`crate::llvm`] take the text on to PTX.
//!
//! Every tile value becomes a list of scalar registers: one for a scalar, one a lane for vectors and
//! fragments, and one for two lanes where the element is a 16-bit float. An `i64` scalar whose values all fit is held in 32 bits
//! ([`index`]). So `Map` needs no case for
//! fragments, and what a matrix instruction returns is used by the same code as what a load returns.
mod core;
mod emit;
mod hopper;
mod index;
pub(crate) mod math;
mod memory;
mod mma;
mod narrow;
mod scalar;

use super::LowerError;
use crate::targets::Gpu;
use crate::tile::{self, Block, Buf, BufInfo, Kernel, Space, Ty, Val, range::Ranges};
use emit::{Emit, Reg};
use pavage_ir::DType;
use std::collections::HashMap;
/// One MLIR module with every kernel.
pub fn module(kernels: &[Kernel], gpu: &Gpu) -> Result<String, LowerError> {
    let mut e = Emit::default();
    e.line("module {");
    if kernels.iter().any(|k| k.bufs.iter().any(|b| b.space == Space::Shared)) {
        e.line("llvm.mlir.global external @smem() {addr_space = 3 : i32, alignment = 1024 : i64} : !llvm.array<0 x i8>");
    }
    for kernel in kernels {
        e = Lower::kernel(kernel, gpu.hopper, e)?;
    }
    e.line("}");
    Ok(e.finish())
}

/// The LLVM type of one element in a register.
const fn llty(d: DType) -> &'static str {
    match d {
        DType::F64 => "f64",
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::I64 | DType::U64 => "i64",
        DType::I32 | DType::U32 => "i32",
        DType::I16 | DType::U16 => "i16",
        DType::Bool => "i1",
        _ => "i8",
    }
}

/// Whether two lanes share a register.
fn packed(ty: Ty) -> bool {
    !ty.is_scalar() && matches!(ty.dtype(), DType::F16 | DType::BF16) && ty.lanes().is_multiple_of(2)
}

/// One kernel being lowered.
struct Lower<'k> {
    k: &'k Kernel,
    hopper: bool,
    e: Emit,
    /// Registers of every value defined so far.
    regs: HashMap<Val, Vec<Reg>>,
    /// What index values can be.
    ranges: Ranges,
    /// Powers of two known to divide index values, as exponents.
    twos: HashMap<Val, u32>,
    /// Integer constants.
    consts: HashMap<Val, i128>,
    /// Base pointer of every argument, by buffer index.
    args: HashMap<u32, Reg>,
    shared: Vec<Option<u64>>,
    local: Vec<Option<u64>>,
    smem: Option<Reg>,
    stack: Option<Reg>,
    /// Threads and first thread of the role being written.
    role: Option<hopper::RoleScope>,
}

type Lowered<T = ()> = Result<T, LowerError>;

impl<'k> Lower<'k> {
    fn kernel(k: &'k Kernel, hopper: bool, e: Emit) -> Lowered<Emit> {
        let (shared, _) = k.layout(Space::Shared);
        let (local, local_bytes) = k.layout(Space::Local);
        let mut l = Lower {
            k,
            hopper,
            e,
            regs: HashMap::new(),
            ranges: Ranges::of(k),
            twos: HashMap::new(),
            consts: HashMap::new(),
            args: HashMap::new(),
            shared,
            local,
            smem: None,
            stack: None,
            role: None,
        };
        let mut params = vec![];
        for (i, b) in k.args().enumerate() {
            let name = format!("%arg{i}");
            params.push(format!("{name}: !llvm.ptr<1>"));
            l.args.insert(b.0, Reg { name, ty: "!llvm.ptr<1>" });
        }
        for (i, d) in k.dims.iter().enumerate() {
            let name = format!("%dim{i}");
            params.push(format!("{name}: i64"));
            l.regs.insert(*d, vec![Reg { name, ty: "i64" }]);
        }
        for i in 0..k.maps.len() {
            params.push(format!("%map{i}: !llvm.ptr {{llvm.align = 64 : i32, llvm.byval = !llvm.array<128 x i8>, nvvm.grid_constant}}"));
        }
        let mut attrs = vec!["nvvm.kernel".to_owned(), format!("nvvm.reqntid = array<i32: {}, 1, 1>", k.launch.threads)];
        if k.launch.min_ctas > 0 {
            attrs.push(format!("nvvm.minctasm = {} : i32", k.launch.min_ctas));
        }
        if k.launch.max_regs > 0 {
            attrs.push(format!("nvvm.maxnreg = {} : i32", k.launch.max_regs));
        }
        if k.launch.cluster != [1, 1, 1] {
            let [x, y, z] = k.launch.cluster;
            attrs.push(format!("nvvm.cluster_dim = array<i32: {x}, {y}, {z}>"));
        }
        l.e.line(format!("llvm.func @{}({}) attributes {{{}}} {{", k.name, params.join(", "), attrs.join(", ")));
        if k.bufs.iter().any(|b| b.space == Space::Shared) {
            l.smem = Some(l.e.op("!llvm.ptr<3>", "llvm.mlir.addressof @smem : !llvm.ptr<3>"));
        }
        if local_bytes > 0 {
            let n = l.e.i32(local_bytes as i64);
            l.stack = Some(l.e.op("!llvm.ptr", format!("llvm.alloca {n} x i8 {{alignment = 64 : i64}} : (i32) -> !llvm.ptr")));
        }
        l.block(&k.body)?;
        l.e.line("llvm.return");
        l.e.line("}");
        Ok(l.e)
    }

    fn unsupported<T>(&self, op: &str, why: impl Into<String>) -> Lowered<T> {
        Err(LowerError { kernel: self.k.name.clone(), device: "gpu", what: format!("{op}: {}", why.into()) })
    }

    fn ty(&self, v: Val) -> Ty {
        self.k.ty(v)
    }

    fn buf(&self, b: Buf) -> &'k BufInfo {
        self.k.buf(b)
    }

    /// The registers of a value.
    fn raw(&mut self, v: Val) -> Vec<Reg> {
        if self.is_narrow(v) { vec![self.wide(v)] } else { self.regs[&v].clone() }
    }

    /// The register of a scalar.
    fn scalar(&mut self, v: Val) -> Reg {
        self.raw(v)[0].clone()
    }

    /// One register a lane; 16-bit floats come as `f32`.
    fn lanes(&mut self, v: Val) -> Vec<Reg> {
        let ty = self.ty(v);
        let raw = self.raw(v);
        match ty.dtype() {
            DType::F16 | DType::BF16 if packed(ty) => raw.iter().flat_map(|r| self.e.unpack16(r, llty(ty.dtype()))).collect(),
            DType::F16 | DType::BF16 => raw.iter().map(|r| self.e.conv("fpext", r, "f32")).collect(),
            _ => raw,
        }
    }

    /// Bind a value to its lanes, 16-bit floats given as `f32`.
    fn bind_lanes(&mut self, v: Val, lanes: Vec<Reg>) {
        let ty = self.ty(v);
        let t = llty(ty.dtype());
        let regs = match ty.dtype() {
            DType::F16 | DType::BF16 if packed(ty) => lanes.chunks(2).map(|p| self.e.pack16(&p[0], &p[1], t)).collect(),
            DType::F16 | DType::BF16 => lanes.iter().map(|r| self.e.conv("fptrunc", r, t)).collect(),
            _ => lanes,
        };
        self.bind(v, regs);
    }

    fn bind(&mut self, v: Val, mut regs: Vec<Reg>) {
        if self.ty(v) == Ty::INDEX {
            regs = regs.iter().map(|r| self.e.int_to(r, if self.is_narrow(v) { "i32" } else { "i64" })).collect();
        }
        self.regs.insert(v, regs);
    }

    /// The types of the registers a value is kept in.
    fn reg_types(&self, v: Val) -> Vec<&'static str> {
        let ty = self.ty(v);
        match ty {
            _ if packed(ty) => vec!["i32"; ty.lanes() / 2],
            _ if self.is_narrow(v) => vec!["i32"],
            _ => vec![llty(ty.dtype()); ty.lanes()],
        }
    }

    fn block(&mut self, b: &'k Block) -> Lowered {
        for s in &b.stmts {
            self.stmt(s)?;
        }
        Ok(())
    }

    /// The registers of several values, flat.
    fn flat(&mut self, vals: &[Val]) -> Vec<Reg> {
        vals.iter().flat_map(|v| self.raw(*v)).collect()
    }

    /// The registers of several values, flat, as others that they become keep theirs.
    fn flat_as(&mut self, vals: &[Val], become_: &[Val]) -> Vec<Reg> {
        let mut regs = vec![];
        for (v, to) in vals.iter().zip(become_) {
            if self.is_narrow(*to) {
                regs.push(self.kept_as(*v, "i32"));
            } else {
                regs.extend(self.raw(*v));
            }
        }
        regs
    }

    /// Names for values coming out of (or into) a structured operation: `base#0, base#1, ...` or fresh names.
    fn spread(&mut self, vals: &[Val], mut name: impl FnMut(&mut Emit, usize) -> String) -> Vec<Reg> {
        let mut all = vec![];
        for v in vals {
            let regs: Vec<Reg> = self
                .reg_types(*v)
                .into_iter()
                .map(|ty| {
                    let r = Reg { name: name(&mut self.e, all.len()), ty };
                    all.push(r.clone());
                    r
                })
                .collect();
            self.bind(*v, regs);
        }
        all
    }

    fn stmt(&mut self, s: &'k tile::Stmt) -> Lowered {
        match &s.op {
            tile::Op::Mma(w) => self.mma(w, s),
            tile::Op::Hopper(w) => self.hopper(w, s),
            _ => self.core(s),
        }
    }
}

#[cfg(test)]
pub(crate) mod assembler;
#[cfg(test)]
mod tests;
