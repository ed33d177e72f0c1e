//! Tile IR to MLIR text, per device. [`Mlir`] is the text under construction; [`math`] writes scalar functions.
pub mod convert;
pub mod cpu;
mod elementary;
pub mod float;
pub mod math;
pub mod nvvm;
mod packed;

use crate::tile::Ty;
use pavage_ir::{DType, Scalar};
use std::fmt::Write as _;

/// A kernel uses something that the device's lowering has no form for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}: {what} has no lowering on {device}")]
pub struct LowerError {
    /// Kernel name.
    pub kernel: String,
    /// `cpu` or `gpu`.
    pub device: &'static str,
    /// The operation and its types.
    pub what: String,
}

/// MLIR text under construction: one statement a line, temporaries numbered in order, so equal kernels give equal text.
pub struct Mlir {
    /// The text so far.
    pub text: String,
    next: u32,
    depth: usize,
}

impl Default for Mlir {
    fn default() -> Self {
        Mlir::new()
    }
}

impl Mlir {
    /// Empty text.
    pub fn new() -> Mlir {
        Mlir { text: String::new(), next: 0, depth: 1 }
    }

    /// A fresh value name.
    pub fn fresh(&mut self) -> String {
        self.next += 1;
        format!("%v{}", self.next)
    }

    /// Append a statement without results.
    pub fn line(&mut self, text: &str) {
        let _ = writeln!(self.text, "{:1$}{text}", "", 2 * self.depth);
    }

    /// Append `%fresh = text`; the name.
    pub fn op(&mut self, text: &str) -> String {
        let v = self.fresh();
        self.line(&format!("{v} = {text}"));
        v
    }

    /// Append a line that opens a region.
    pub fn open(&mut self, text: &str) {
        self.line(text);
        self.depth += 1;
    }

    /// Close the innermost region with `text` (`}` or `} else {` after which [`Mlir::reopen`] follows).
    pub fn close(&mut self, text: &str) {
        self.depth -= 1;
        self.line(text);
    }

    /// Go one level in without a line.
    pub fn reopen(&mut self) {
        self.depth += 1;
    }

    /// An `arith.constant` of `value` in every lane.
    pub fn constant(&mut self, value: Scalar, ty: Ty) -> String {
        let mlir = self.ty(ty);
        let literal = literal(value, ty.dtype());
        if ty.is_scalar() {
            // A boolean literal carries its type.
            if ty.dtype() == DType::Bool { self.op(&format!("arith.constant {literal}")) } else { self.op(&format!("arith.constant {literal} : {mlir}")) }
        } else {
            self.op(&format!("arith.constant dense<{literal}> : {mlir}"))
        }
    }

    /// An `i64` constant.
    pub fn index(&mut self, v: i64) -> String {
        self.op(&format!("arith.constant {v} : i64"))
    }

    /// The MLIR type of a scalar or vector in registers. Fragments are lowered register by register.
    pub fn ty(&self, ty: Ty) -> String {
        let elem = register(ty.dtype());
        match ty {
            Ty::Scalar(_) => elem.to_owned(),
            Ty::Vec(_, n) | Ty::Frag(_, n) => format!("vector<{n}x{elem}>"),
        }
    }
}

/// The MLIR element type of a dtype in registers.
pub fn register(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "f64",
        DType::F32 => "f32",
        DType::F16 => "f16",
        // As its bits: x86 backends round it slowly, or flush denormals.
        DType::BF16 => "i16",
        DType::I64 | DType::U64 => "i64",
        DType::I32 | DType::U32 => "i32",
        DType::I16 | DType::U16 => "i16",
        DType::Bool => "i1",
        DType::F8E4M3 | DType::F8E5M2 | DType::F8E4M3Fnuz | DType::F8E5M2Fnuz | DType::F8E8M0 | DType::F4E2M1 => "i8",
        DType::I8 | DType::U8 | DType::I4 | DType::U4 | DType::I2 | DType::U2 | DType::Str => "i8",
    }
}

/// The MLIR element type of a dtype in memory.
pub fn memory(dtype: DType) -> &'static str {
    if dtype == DType::Bool { "i8" } else { register(dtype) }
}

/// The bits of a float constant, or an integer, as an MLIR literal.
fn literal(value: Scalar, dtype: DType) -> String {
    let v = value.cast(dtype);
    match dtype {
        DType::F64 => format!("0x{:016X}", v.f().to_bits()),
        DType::F32 => format!("0x{:08X}", (v.f() as f32).to_bits()),
        DType::F16 => format!("0x{:04X}", half::f16::from_f64(v.f()).to_bits()),
        DType::BF16 => (half::bf16::from_f64(v.f()).to_bits() as i16).to_string(),
        _ if dtype.is_mini() => (pavage_ir::minifloat::encode(v.f(), dtype) as i8).to_string(),
        DType::Bool => v.b().to_string(),
        // Unsigned values beyond the signed range are written as their two's complement.
        DType::U64 => (v.i() as u64 as i64).to_string(),
        DType::U32 => (v.i() as u32 as i32).to_string(),
        DType::U16 => (v.i() as u16 as i16).to_string(),
        DType::U8 => (v.i() as u8 as i8).to_string(),
        _ => v.i().to_string(),
    }
}

/// Wrap function texts into a module.
pub fn module(functions: &[String]) -> String {
    let mut out = String::from("module {\n");
    for f in functions {
        out.push_str(f);
    }
    out.push_str("}\n");
    out
}
